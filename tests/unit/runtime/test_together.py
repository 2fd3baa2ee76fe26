"""Parameters that lie together keep their values, and train as they did apart, in fewer calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_ft.runtime import optim, together
from lowmem_ft.runtime.gradients import GradientAccumulator
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.runtime.together import follows, joined, lay_together

# whole blocks of 8-bit state, too small for it, a last block cut short twice, whole again
SHAPES = [(96, 64), (3, 5), (70, 61), (41, 101), (4096,)]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    return [nn.Parameter(value) for value in values]


def gradients(owned: list[nn.Parameter], step: int, leave_out: int | None = None) -> Callable[[nn.Parameter], Any]:
    """As a run has them, all in one buffer; one may be missing."""
    generator = torch.Generator().manual_seed(100 + step)
    accumulator = GradientAccumulator(owned)
    for at, (parameter, shape) in enumerate(zip(owned, SHAPES, strict=True)):
        values = torch.randn(shape, generator=generator)
        if at != leave_out:
            accumulator.buffer(parameter).copy_(values)
    return accumulator.gradient


def same(a: AdamW, b: AdamW) -> bool:
    """Parameters, state and step counts."""
    pairs = zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True)
    own, other = a.state_tensors(), b.state_tensors()
    values = all(torch.equal(x, y) for x, y in pairs)
    return values and a.state_meta() == b.state_meta() and all(torch.equal(own[name], other[name]) for name in other)


def calls_of(optimizer: AdamW, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each update from now on."""
    calls: list[int] = []
    update = optimizer._adam

    def counting(value: Tensor, *args: Any) -> None:
        calls.append(value.numel())
        update(value, *args)

    monkeypatch.setattr(optimizer, "_adam", counting)
    return calls


def test_values_stay_and_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    owned = parameters()
    before, views = [it.detach().clone() for it in owned], [it.view(-1) for it in owned]
    lay_together(owned)
    assert all(torch.equal(a, b) for a, b in zip(owned, before, strict=True))
    assert {it.storage_offset() % together.ALIGNMENT for it in owned} == {0}
    assert all(follows(a, b) for a, b in itertools.pairwise(owned))
    assert not follows(owned[0], owned[2])
    assert not follows(views[0], owned[1])
    whole = joined(owned)
    assert torch.equal(whole[:6144], before[0].view(-1))
    assert torch.equal(whole[-4096:], before[4])
    whole.zero_()
    assert not any(it.any() for it in owned), "it is a view"

    monkeypatch.setattr(together, "RUN", 10_000)
    owned = [*parameters(), *parameters(torch.float32)]
    lay_together(owned)
    storages = [it.untyped_storage()._cdata for it in owned]
    # the first is too large, the last of the first dtype finds no room, and dtypes do not mix
    assert [storages.count(it) for it in storages] == [1, 3, 3, 3, 1, 1, 3, 3, 3, 1]


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_updates_are_those_of_each_parameter(
    dtype: torch.dtype, bits: Any, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, also where gradients are missing and step counts differ from then on."""
    apart, near = parameters(dtype), parameters(dtype)
    lay_together(near)
    plain = AdamW(apart, bits=bits, on_host=on_host, **SETTINGS)
    joint = AdamW(near, bits=bits, on_host=on_host, **SETTINGS)
    calls = calls_of(joint, monkeypatch)
    for step, (leave_out, expected) in enumerate(
        [(None, 1 if bits == 32 else 3), (None, 1 if bits == 32 else 3), (3, 2 if bits == 32 else 4), (None, None)]
    ):
        calls.clear()
        plain.step(gradient=gradients(apart, step, leave_out))
        joint.step(gradient=gradients(near, step, leave_out))
        assert same(joint, plain)
        assert expected is None or len(calls) == expected
    assert len(calls) == (3 if bits == 32 else 5), "one of them has made a step less"
    assert sum(it.nbytes for it in joint.held()) >= sum(it.nbytes for it in plain.held())


def test_gradients_that_lie_elsewhere_are_taken_one_by_one() -> None:
    apart, near = parameters(), parameters()
    lay_together(near)
    plain, joint = AdamW(apart, **SETTINGS), AdamW(near, **SETTINGS)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        turned = [it.t().contiguous().t() if it.ndim == 2 else it for it in values]  # not contiguous
        plain.step(gradient=dict(zip(apart, values, strict=True)).__getitem__)
        joint.step(gradient=dict(zip(near, turned, strict=True)).__getitem__)
    assert same(joint, plain)


def test_a_parameter_that_has_moved_is_updated_where_it_lies() -> None:
    apart, near = parameters(), parameters()
    lay_together(near)
    plain, joint = AdamW(apart, bits=8, **SETTINGS), AdamW(near, bits=8, **SETTINGS)
    near[2].data = near[2].detach().clone()
    plain.step(gradient=gradients(apart, 0))
    joint.step(gradient=gradients(near, 0))
    assert same(joint, plain)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_that_failed_goes_on(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any call, as often as it takes, and from within what is updated together."""
    monkeypatch.setattr(optim, "SLICE", 4096)
    apart, near = parameters(), parameters()
    lay_together(near)
    plain, joint = AdamW(apart, bits=bits, **SETTINGS), AdamW(near, bits=bits, **SETTINGS)
    update, numbers = joint._adam, iter(range(1000))
    failing = {1, 2, 5, 6, 7, 9}

    def fail(*args: Any) -> None:
        update(*args)
        if next(numbers) in failing:
            raise torch.OutOfMemoryError("after the kernel")

    monkeypatch.setattr(joint, "_adam", fail)
    failed = 0
    for step in range(3):
        # the second step has no gradient for one, so that the third begins with step counts that differ
        leave_out = 1 if step == 1 else None
        plain.step(gradient=gradients(apart, step, leave_out))
        gradient, go = gradients(near, step, leave_out), joint.step
        while True:
            try:
                go(gradient=gradient)
            except torch.OutOfMemoryError:
                failed += 1
                go = joint.resume
            else:
                break
        assert same(joint, plain)
    assert failed == len(failing)


def test_state_goes_between_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """So checkpoints from before go on."""
    apart, near = parameters(), parameters()
    plain = AdamW(apart, bits=8, **SETTINGS)
    plain.step(gradient=gradients(apart, 0))
    for own, other in zip(near, apart, strict=True):
        own.data.copy_(other.data)
    lay_together(near)
    joint = AdamW(near, bits=8, lr=1.0)
    joint.load_state(plain.state_tensors(), plain.state_meta())
    plain.step(gradient=gradients(apart, 1))
    joint.step(gradient=gradients(near, 1))
    assert same(joint, plain)


def test_paged_moments_are_pages_of_their_own() -> None:
    owned = [nn.Parameter(torch.empty(400, 300, dtype=torch.bfloat16, device="meta")) for _ in range(2)]
    lay_together(owned)
    optimizer = AdamW(owned, lr=1e-3, bits=8, paged=True, on_card=True)
    assert [len(run) for run in optimizer.runs] == [1, 1]
    assert [len(run) for run in AdamW(owned, lr=1e-3, bits=8, on_card=True).runs] == [2]
    assert optimizer.slice_elements == optim.SLICE_ON_CARD
    assert not optimizer.guarded
