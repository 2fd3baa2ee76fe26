"""Kernels that training needs, run once and small on a device, against plain PyTorch on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem_ft.core.checks import Check
from lowmem_ft.core.errors import LowMemError
from lowmem_ft.data.packing import as_bounds
from lowmem_ft.quant.ops import FourBitType, QuantSpec, dequantize, quantize, reference_4bit, reference_int8
from lowmem_ft.quant.products import mm, multiplies
from lowmem_ft.runtime.attention import attention
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.runtime.tiers import DiskTier, HostTier, device_memory

SHAPE = (96, 80)  # rows a multiple of 16 and not of 64, where a kernel of bitsandbytes has been wrong
PAGE = 1 << 20  # of a streamed block
# Largest relative errors (root of mean squares) that are right: about half as much again as was measured on a CPU
# (2026-11-26, x86 with bf16 units, these seeds). Rounding of bf16 is 0.17% a number.
LOST = {"nf4": 0.14, "fp4": 0.18, "int8": 0.01}
ROUNDED = 0.01
LR = 1e-3

BROKEN = "`python -m bitsandbytes` says what is wrong with bitsandbytes; install a build for this device"


def check_kernels(where: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Run each kernel on device `where`, computing in `dtype`, and hold what it gives against a plain reference."""
    probes: list[tuple[str, Callable[[], str], str]] = [
        ("kernel: matrix product", partial(product, where, dtype), "install a PyTorch build for this device"),
        *((f"kernel: {kind}", partial(four_bit, kind, where, dtype), BROKEN) for kind in FOUR_BITS),
        ("kernel: int8", partial(int8, where, dtype), BROKEN),
        ("kernel: 8-bit optimizer", partial(optimizer, where, dtype), BROKEN),
        ("kernel: attention", partial(attends, where, dtype), "install a PyTorch build for this device"),
    ]
    if where.type == "cuda":
        pinned = "lower what other processes pin, or stream from the disk (`policy.stream_from: disk`)"
        probes.append(("pinned memory", partial(pins, where), pinned))
    for name, probe, fix in probes:
        yield _probed(name, probe, fix)


FOUR_BITS: tuple[FourBitType, ...] = ("nf4", "fp4")


def check_streaming(folder: Path) -> Check:
    """Whether weights can be streamed from a file in `folder`, and past the page cache."""
    name = "streaming from disk"
    try:
        tier = DiskTier(folder, [PAGE])
        sent, got = torch.arange(PAGE, dtype=torch.int64).to(torch.uint8), device_memory(PAGE, torch.device("cpu"))
        tier.write(0, 0, sent)
        tier.wait(tier.start(0, got))
    except LowMemError as error:
        return Check(name=name, status="warning", found=f"{error.what} {error.given}", fix=str(error.fix))
    if not torch.equal(sent, got):
        return Check(
            name=name,
            status="warning",
            found=f"{folder}: what was read is not what was written",
            fix="let `output` name a folder on a local disk",
        )
    if tier.direct:
        return Check(name=name, status="ok", found="read past the page cache (O_DIRECT)")
    return Check(
        name=name,
        status="warning",
        found="through the page cache: this file system has no O_DIRECT, so streamed weights take RAM for a while",
        fix="let `output` (or `cache`) name a folder on a local disk",
    )


def _probed(name: str, probe: Callable[[], str], fix: str) -> Check:
    try:
        return Check(name=name, status="ok", found=probe())
    except Exception as error:  # of a driver, a compiler or a library that does not load: anything
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name=name, status="problem", found=first, fix=fix)


def product(where: torch.device, dtype: torch.dtype) -> str:
    """The matrix product that linear layers use."""
    a, b = _random(64, 128, seed=1).to(dtype), _random(128, 96, seed=2).to(dtype)
    error = _error(mm(a.to(where), b.to(where)), a.double() @ b.double())
    _require(error, ROUNDED)
    how = "" if where.type == "cuda" or multiplies(dtype) else ", in fp32 tiles, as this CPU multiplies no bf16"
    return f"{_name(dtype)}, off by {error:.2%}{how}"


def four_bit(kind: FourBitType, where: torch.device, dtype: torch.dtype) -> str:
    """Quantize and dequantize, with double quantization and without."""
    weight = _random(*SHAPE, seed=3)
    lost = 0.0
    for double in (False, True):
        storage = quantize(weight.to(where, dtype), QuantSpec(type=kind, double_quant=double))
        held = {name: tensor.cpu() for name, tensor in storage.items()}
        scales = held["absmax"]
        if double:
            units = held["nested_absmax"].repeat_interleave(256)[: scales.numel()]
            scales = held["nested_code"][scales.long()] * units + held["nested_offset"]
        plain = reference_4bit(held["qweight"], scales, kind, SHAPE, torch.float32)
        values = dequantize(storage, kind=kind, shape=SHAPE, dtype=torch.float32)
        _require(_error(values, plain), 1e-6)
        _require(_error(dequantize(storage, kind=kind, shape=SHAPE, dtype=dtype), plain), ROUNDED)
        lost = max(lost, _error(values, weight))
    _require(lost, LOST[kind])
    return f"as the plain reference; quantizing loses {lost:.1%} of a normal weight"


def int8(where: torch.device, dtype: torch.dtype) -> str:
    """Quantize and dequantize by rows."""
    weight = _random(*SHAPE, seed=4)
    storage = quantize(weight.to(where, dtype), QuantSpec(bits=8))
    plain = reference_int8(storage["qweight"].cpu(), storage["scale"].cpu(), torch.float32)
    _require(_error(dequantize(storage, kind="int8", shape=SHAPE, dtype=dtype), plain), ROUNDED)
    lost = _error(plain, weight)
    _require(lost, LOST["int8"])
    return f"as the plain reference; quantizing loses {lost:.1%} of a normal weight"


def optimizer(where: torch.device, dtype: torch.dtype) -> str:
    """Two updates of AdamW in 8 bits against those in 32."""
    moved = []
    for bits in (8, 32):
        parameter = torch.nn.Parameter(torch.zeros(8192, device=where, dtype=torch.float32))
        update = AdamW([parameter], lr=LR, bits=8 if bits == 8 else 32)
        for seed in (5, 6):
            gradient = _random(8192, seed=seed).to(where)
            update.step(gradient=lambda _, gradient=gradient: gradient)  # type: ignore[misc]
        moved.append(parameter.detach().cpu())
    error = _error(moved[0], moved[1])
    _require(error, 0.05)
    return f"off by {error:.1%} from 32 bits after two updates"


def attends(where: torch.device, dtype: torch.dtype) -> str:
    """Attention forward and backward, causal, with a mask and of packed documents, against fp64."""
    worst = 0.0
    causal = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    apart = causal & (torch.arange(64) // 32 == torch.arange(64)[:, None] // 32)  # two examples in a row
    documents = as_bounds([0, 32, 64]).expand(1, 1, 64, -1)
    for told, mask in ((None, causal), (apart.to(where), apart), (documents, apart)):
        given = [_random(1, 2, 64, 64, seed=seed).to(dtype) for seed in (7, 8, 9)]
        found = _with_gradients(partial(_ours, told), [tensor.to(where) for tensor in given])
        plain = _with_gradients(partial(_plain, mask), [it.double() for it in given])
        worst = max(worst, *(_error(a, b) for a, b in zip(found, plain, strict=True)))
    _require(worst, 2 * ROUNDED)
    return f"{_name(dtype)}, forward and backward off by {worst:.2%} at most"


def _ours(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, mask, 0.125).transpose(1, 2)


def _plain(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * 0.125).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def _with_gradients(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of half its sum of squares."""
    leaves = [tensor.requires_grad_() for tensor in given]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, out.detach())
    return [out.detach(), *gradients]


def pins(where: torch.device) -> str:
    """A round trip through pinned memory."""
    tier = HostTier([PAGE], where)
    sent, got = torch.arange(PAGE, dtype=torch.int64).to(torch.uint8), device_memory(PAGE, where)
    tier.write(0, 0, sent)
    tier.wait(tier.start(0, got))
    if not torch.equal(sent, got.cpu()):
        raise ValueError("what came back from pinned memory is not what was sent")
    return "copied to the device by itself"


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(found: Tensor, truth: Tensor) -> float:
    """Root of the mean squared difference, as a share of that of the truth; infinite where it is not finite."""
    off = found.detach().cpu().double() - truth.double()
    share = (off.square().mean() / truth.double().square().mean()).sqrt().item()
    return share if share == share else float("inf")


def _require(error: float, allowed: float) -> None:
    if error > allowed:
        raise ValueError(f"wrong numbers: off by {error:.2%}, where at most {allowed:.2%} is right")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
