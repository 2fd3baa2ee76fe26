"""AdamW against torch's and bitsandbytes' own, bf16 parameters against fp32 ones, and exact resume."""

import json
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowmem_ft.core.errors import CheckpointError, ConfigError
from lowmem_ft.planner.verify import allocator_events
from lowmem_ft.runtime import optim
from lowmem_ft.runtime.gradients import GradientAccumulator
from lowmem_ft.runtime.optim import AdamW, join_bf16, split_bf16

SHAPES = [(96, 64), (3, 5), (70, 61), (4096,)]  # 8-bit, too small for it, 8-bit with a last block cut short, 8-bit
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The same values in every dtype: numbers that bf16 and fp16 can hold."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).clamp(-2, 2) for shape in SHAPES]
    return [nn.Parameter(value.mul(64).round().div(64).to(dtype)) for value in values]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 2) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, owned: list[nn.Parameter], steps: range) -> None:
    """Steps with the same fp32 gradients for every kind of optimizer."""
    for step in steps:
        grads = dict(zip(owned, gradients(step), strict=True))
        if isinstance(optimizer, AdamW):
            optimizer.step(gradient=grads.__getitem__)
        else:
            for parameter in owned:
                parameter.grad = grads[parameter]
            optimizer.step()


def test_32_bit_equals_torch() -> None:
    ours, theirs = parameters(), parameters()
    run(AdamW(ours, **SETTINGS), ours, range(30))
    run(torch.optim.AdamW(theirs, **SETTINGS), theirs, range(30))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_8_bit_equals_bitsandbytes_but_for_what_it_stores() -> None:
    """A first step is the same bit by bit; then bitsandbytes' moments on a CPU are not the nearest codes."""
    ours, theirs, exact = parameters(), parameters(), parameters()
    kinds = AdamW(ours, bits=8, **SETTINGS), bitsandbytes.optim.AdamW8bit(theirs, **SETTINGS)
    for optimizer, owned in zip((*kinds, torch.optim.AdamW(exact, **SETTINGS)), (ours, theirs, exact), strict=True):
        run(optimizer, owned, range(1))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for optimizer, owned in zip(kinds, (ours, theirs), strict=True):
        run(optimizer, owned, range(1, 30))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / b.norm() < 0.01


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_trained_as_fp32_ones(bits: Any, dtype: torch.dtype) -> None:
    low, full = parameters(dtype), parameters()
    optimizer = AdamW(low, bits=bits, **SETTINGS)
    run(optimizer, low, range(30))
    run(AdamW(full, bits=bits, **SETTINGS), full, range(30))
    for a, b in zip(low, full, strict=True):
        assert a.dtype == dtype
        state = optimizer.state[a]
        whole = join_bf16(a.detach().view(-1), state["remainder"]) if "remainder" in state else state["master"]
        assert torch.equal(whole.view(b.shape), b), "the whole value is the fp32 one, bit by bit"
        rounded = b.detach().to(dtype)  # by torch: other only where two numbers of `dtype` are as near
        assert torch.equal((a.float() - b).abs(), (rounded.float() - b).abs()), "and the parameter is that one rounded"


@pytest.mark.parametrize("bits", [32, 8])
def test_steps_below_the_last_digit_of_bf16_are_not_lost(bits: Any) -> None:
    ours, plain = nn.Parameter(torch.ones(64, 64).bfloat16()), nn.Parameter(torch.ones(64, 64).bfloat16())
    optimizer, theirs = AdamW([ours], lr=1e-4, bits=bits), bitsandbytes.optim.AdamW([plain], lr=1e-4, weight_decay=0)
    for _ in range(200):
        optimizer.step(gradient=lambda parameter: torch.ones(64, 64))
        plain.grad = torch.ones_like(plain)
        theirs.step()
    assert torch.equal(plain, torch.ones_like(plain)), "a plain bf16 update never moves"
    # 200 steps of 1e-4 (a constant gradient makes Adam's step exactly the rate), to half a digit of bf16 below 1
    assert ours.float().sub(0.98).abs().max() <= 2**-9


def test_split_is_the_inverse_of_join() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    ties = (torch.arange(-300, 300, dtype=torch.int32) << 16) + (1 << 15)
    whole = torch.cat([bits, ties, torch.tensor([0, 1, -(2**31), 0x7F7FFFFF, 0x00007FFF])]).to(torch.int32)
    whole = whole[whole.view(torch.float32).isfinite()].view(torch.float32)
    whole = whole[whole.abs() < 3.38e38]  # beyond, bf16 rounds to infinity
    value, remainder = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty_like(whole, dtype=torch.int16)
    split_bf16(whole.clone(), value, remainder)
    assert torch.equal(join_bf16(value, remainder).view(torch.int32), whole.view(torch.int32))
    off = value.double() - whole.double()
    best = whole.bfloat16().double() - whole.double()  # torch's own rounding: other only where both are as near
    assert torch.equal(off.abs(), best.abs())


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slices_do_not_change_the_result(bits: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sliced = parameters(dtype), parameters(dtype)
    run(AdamW(whole, bits=bits, **SETTINGS), whole, range(5))
    monkeypatch.setattr(optim, "SLICE", 512)
    run(AdamW(sliced, bits=bits, **SETTINGS), sliced, range(5))
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_resume_is_exact(bits: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    first = parameters(dtype)
    optimizer = AdamW(first, bits=bits, **SETTINGS)
    run(optimizer, first, range(7))
    save_file(optimizer.state_tensors(), tmp_path / "state.safetensors")
    meta = json.loads(json.dumps(optimizer.state_meta()))

    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = AdamW(second, bits=bits, lr=1.0)
    resumed.load_state(load_file(tmp_path / "state.safetensors"), meta)
    for step in range(7, 12):
        run(optimizer, first, range(step, step + 1))
        run(resumed, second, range(step, step + 1))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert resumed.state_meta() == optimizer.state_meta()
    own, other = resumed.state_tensors(), optimizer.state_tensors()
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_state_dict_goes_through_torch_save(tmp_path: Path) -> None:
    first = parameters(torch.bfloat16)
    optimizer = AdamW(first, bits=8, **SETTINGS)
    run(optimizer, first, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = AdamW(second, bits=8, **SETTINGS)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    run(optimizer, first, range(3, 5))
    run(resumed, second, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    owned = parameters()
    optimizer = AdamW(owned, bits=8, **SETTINGS)
    run(optimizer, owned, range(2))
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    for other in (AdamW(parameters(), **SETTINGS), AdamW(parameters()[:2], bits=8, **SETTINGS)):
        with pytest.raises(CheckpointError, match="belongs to other parameters"):
            optimizer.load_state(other.state_tensors(), other.state_meta())
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_tensors().items())


def test_groups_keep_their_ratio_of_learning_rates() -> None:
    a, b = parameters()[:2]
    optimizer = AdamW([{"params": [a]}, {"params": [b], "lr": 16e-3, "weight_decay": 0.5}], lr=1e-3)
    optimizer.set_lr(2e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 32e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]


def test_gradients_come_from_grad_or_an_accumulator_and_may_be_missing() -> None:
    torch.manual_seed(0)
    used, unused = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = AdamW([*used.parameters(), *unused.parameters()], lr=0.1, weight_decay=0.5)
    before = unused.weight.clone()
    used(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    from_grad = used.weight.clone()
    assert torch.equal(unused.weight, before), "no gradient: no decay either"
    optimizer.zero_grad()

    torch.manual_seed(0)
    again = nn.Linear(4, 4)
    accumulator = GradientAccumulator(again.parameters())
    again(torch.ones(1, 4)).sum().backward()
    AdamW(again.parameters(), lr=0.1, weight_decay=0.5).step(gradient=accumulator.gradient)
    assert torch.equal(again.weight, from_grad)


def test_torch_schedulers_and_closures_accept_it() -> None:
    owned = parameters()
    optimizer = AdamW(owned, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in owned)
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(float(optimizer.step(closure)))
        schedule.step()
    assert losses[2] < losses[0]
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_state_is_there_from_the_start_and_counts_up_in_the_plan() -> None:
    elements, blocks = 96 * 64 + 4096, 24 + 16
    big = [SHAPES[0], SHAPES[3]]
    for dtype, bits, each in (
        (torch.float32, 32, 8), (torch.bfloat16, 32, 10), (torch.float16, 32, 12),
        (torch.float32, 8, 2), (torch.bfloat16, 8, 4), (torch.float16, 8, 6),
    ):  # fmt: skip
        for device in ("cpu", "meta"):
            owned = [nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) for shape in big]
            state = AdamW(owned, lr=1e-3, bits=bits).state_tensors()
            expected = elements * each + (blocks * 2 * 4 if bits == 8 else 0)
            assert sum(tensor.nbytes for tensor in state.values()) == expected
            assert {tensor.device.type for tensor in state.values()} == {device}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("paged", [False, True])
def test_same_way_without_data(bits: Any, paged: bool) -> None:
    owned = [nn.Parameter(torch.empty(400, 300, dtype=torch.bfloat16, device="meta"))]
    optimizer = AdamW(owned, lr=1e-3, bits=bits, paged=paged)
    optimizer.step(gradient=lambda parameter: torch.empty(400, 300, device="meta"))
    state = optimizer.state[owned[0]]
    assert state["step"] == 1
    assert state["state1"].device.type == ("cpu" if paged else "meta"), "paged moments count as host memory"


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_host_results_are_the_same(bits: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, and so is going on from the state of an optimizer on the device. Values are copied down and up where
    the device is a CPU, too."""
    monkeypatch.setattr(optim, "SLICE", 512)
    here, below = parameters(dtype), parameters(dtype)
    resident, offloaded = AdamW(here, bits=bits, **SETTINGS), AdamW(below, bits=bits, on_host=True, **SETTINGS)
    run(resident, here, range(5))
    run(offloaded, below, range(5))
    assert all(torch.equal(a, b) for a, b in zip(here, below, strict=True))
    again = [nn.Parameter(p.detach().clone()) for p in here]
    resumed = AdamW(again, bits=bits, on_host=True, lr=1.0)
    resumed.load_state({name: it.clone() for name, it in resident.state_tensors().items()}, resident.state_meta())
    run(resident, here, range(5, 8))
    run(resumed, again, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(here, again, strict=True))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_host_nothing_is_on_the_device(bits: Any, dtype: torch.dtype) -> None:
    owned = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in SHAPES]
    optimizer = AdamW(owned, lr=1e-3, bits=bits, on_host=True)
    assert {it.device.type for it in optimizer.held()} == {"cpu"}
    optimizer.step(gradient=lambda parameter: torch.empty(parameter.shape, device="meta"))
    resident = AdamW(parameters(dtype), lr=1e-3, bits=bits)
    sizes = [sorted(it.nbytes for it in one.held()) for one in (optimizer, resident)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_update_on_the_host_takes_little_beside_its_state(bits: Any, dtype: torch.dtype) -> None:
    owned, gradient = [nn.Parameter(torch.ones(2 << 20, dtype=dtype))], torch.ones(2 << 20)
    optimizer = AdamW(owned, lr=1e-3, bits=bits, on_host=True)
    taken = max(accumulate(allocator_events(lambda: optimizer.step(gradient=lambda _: gradient))))
    gradients = 4 * optim.SLICE  # which come from elsewhere, where the device is none of the host's memory
    assert taken + gradients <= optim.HOST_WORK_BYTES


def test_paging_on_the_cpu_is_a_warning() -> None:
    paged, plain = parameters(), parameters()
    with pytest.warns(UserWarning, match="Paging does not exist on the CPU") as caught:
        optimizer = AdamW(paged, bits=8, paged=True, **SETTINGS)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, paged, range(3))
    run(AdamW(plain, bits=8, **SETTINGS), plain, range(3))
    assert all(torch.equal(a, b) for a, b in zip(paged, plain, strict=True))


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}])
def test_impossible_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="AdamW cannot"):
        AdamW(parameters(), **{"lr": 1e-3, **bad})


def test_a_parameter_with_holes_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be trained"):
        AdamW([nn.Parameter(torch.ones(4, 6).t())], lr=1e-3)
