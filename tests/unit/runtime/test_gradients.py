"""Accumulation of gradients in fp32."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lowmem_ft.runtime.gradients import GradientAccumulator


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear, GradientAccumulator]:
    torch.manual_seed(0)
    used, unused = nn.Linear(5, 7, dtype=dtype), nn.Linear(3, 3, dtype=dtype)
    return used, unused, GradientAccumulator([*used.parameters(), *unused.parameters()])


def test_gradients_are_moved_and_freed() -> None:
    used, unused, accumulator = make()
    used(torch.ones(2, 5)).sum().backward()
    used(torch.ones(1, 5)).sum().backward()
    assert used.weight.grad is None
    assert used.bias.grad is None
    gradient = accumulator.gradient(used.weight)
    assert gradient is not None
    assert torch.equal(gradient, torch.full((7, 5), 3.0))
    assert torch.equal(accumulator.gradient(used.bias), torch.full((7,), 3.0))
    assert accumulator.gradient(unused.weight) is None, "no micro-batch reached it"


def test_bf16_gradients_add_up_in_fp32() -> None:
    used, _, accumulator = make(torch.bfloat16)
    used(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()
    for _ in range(64):  # each is below half the last digit of 1 in bf16, which is 2^-8
        (used(torch.ones(1, 5, dtype=torch.bfloat16)).sum() * 2**-10).backward()
    gradient = accumulator.gradient(used.weight)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((7, 5), 1 + 64 * 2**-10))


@pytest.mark.parametrize("max_norm", [0.5, 1e4, None])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_clip_equals_torch(max_norm: float | None, scale: float) -> None:
    used, _, accumulator = make()
    x = torch.randn(4, 5)
    (used(x).square().sum() * scale).backward()
    norm = accumulator.clip(max_norm, scale=scale)
    accumulator.remove()
    used(x).square().sum().backward()
    theirs = nn.utils.clip_grad_norm_(used.parameters(), max_norm if max_norm is not None else float("inf"))
    torch.testing.assert_close(norm, theirs, rtol=1e-6, atol=0)
    for parameter in used.parameters():
        torch.testing.assert_close(accumulator.gradient(parameter), parameter.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_norm_shows_what_is_not_finite(bad: float) -> None:
    used, _, accumulator = make()
    (used(torch.ones(1, 5)).sum() * bad).backward()
    assert not torch.isfinite(accumulator.clip(1.0))
    accumulator.reset()
    used(torch.ones(1, 5)).sum().backward()
    assert torch.isfinite(accumulator.clip(1.0)), "reset forgets it"


def test_reset_forgets_and_remove_detaches() -> None:
    used, _, accumulator = make()
    used(torch.ones(1, 5)).sum().backward()
    accumulator.reset()
    assert accumulator.gradient(used.weight) is None
    assert not accumulator.buffer(used.weight).any()
    accumulator.remove()
    used(torch.ones(1, 5)).sum().backward()
    assert used.weight.grad is not None
    assert not accumulator.buffer(used.weight).any()


def test_nothing_holds_it_and_its_parameters() -> None:
    """PyTorch keeps a parameter's hooks where no collector of garbage looks: what a run trained would stay for good."""
    parameter = nn.Parameter(torch.ones(3))
    accumulator = GradientAccumulator([parameter])
    parameter.sum().backward()
    seen = [weakref.ref(it) for it in (parameter, accumulator)]
    del parameter, accumulator
    gc.collect()
    assert [it() for it in seen] == [None, None]
