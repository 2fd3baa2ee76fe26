"""AdamW's update of parameters whose moments are stored in 8 bits, on a CPU.

Block by block of 256 the moments are divided by the largest of them and get the nearest of 256 codes (Dettmers et al.
2022, arXiv:2110.02861). bitsandbytes' kernel for CPUs looks codes up in a table of 65536 even steps instead, so that of
the smallest values 30 to 39% get another code than the nearest.

The nearest code of a second moment below 1.6e-7 of its block's largest is 0, and the first moment, which is not, is
then divided by next to nothing. So second moments get the smallest code above 0 at least. How far 200 updates are from
those with moments in fp32, where gradients in a block differ by up to 2, 3 and 4 orders of magnitude: 6%, 17% and 30%;
with the nearest codes (as on a card) 6%, 96% and 2600%; by bitsandbytes on a CPU 14%, 28% and 51%.

The codes nearest to all numbers with the same upper 16 bits are one or two: a table tells the first, and the middle
between it and the next tells which of them it is. That takes a quarter of the time of bitsandbytes' kernel.

Letters in shapes: N elements, M = N / 256 blocks, rounded up.
"""

from __future__ import annotations

import functools
import math

import bitsandbytes.functional as bnb
import numpy as np
import torch
from torch import Tensor

BLOCK = 256  # elements that share one scale

torch.library.define(
    "lowmem_ft::adam_8bit",
    "(Tensor(a!) value, Tensor gradient, Tensor(b!) moment1, Tensor(c!) moment2, Tensor(d!) absmax1,"
    " Tensor(e!) absmax2, Tensor code1, Tensor code2, float beta1, float beta2, float eps, float decay, float lr,"
    " int step) -> ()",
)


@torch.library.impl("lowmem_ft::adam_8bit", "CPU")
def _adam_8bit(
    value_N: Tensor,
    gradient_N: Tensor,
    moment1_N: Tensor,
    moment2_N: Tensor,
    absmax1_M: Tensor,
    absmax2_M: Tensor,
    code1: Tensor,
    code2: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    lr: float,
    step: int,
) -> None:
    """One step of `value_N` (fp32) and its moments (uint8), with the gradient in fp32."""
    mean_N, square_N = _decoded(moment1_N, absmax1_M, code1), _decoded(moment2_N, absmax2_M, code2)
    mean_N.mul_(beta1).add_(gradient_N, alpha=1.0 - beta1)
    square_N.mul_(beta2).addcmul_(gradient_N, gradient_N, value=1.0 - beta2)
    denominator_N = square_N.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
    if decay:
        value_N.mul_(1.0 - lr * decay)
    value_N.addcdiv_(mean_N, denominator_N, value=-lr / (1.0 - beta1**step))
    del denominator_N
    encode(mean_N, moment1_N, absmax1_M, signed=True)
    encode(square_N, moment2_N, absmax2_M, signed=False)


@torch.library.register_fake("lowmem_ft::adam_8bit")  # type: ignore[untyped-decorator]
def _(value_N: Tensor, *_: object) -> None:
    return None


def code(*, signed: bool) -> Tensor:
    """bitsandbytes' dynamic 8-bit code: 256 ascending fp32 values on the host, from -1 or 0 to 1."""
    with torch.device("cpu"):
        values: Tensor = bnb.create_dynamic_map(signed=signed)
    return values


def encode(values_N: Tensor, moment_N: Tensor, absmax_M: Tensor, *, signed: bool) -> None:
    """Write the nearest codes of fp32 values to `moment_N` (uint8), and their scales to `absmax_M`. Uses them up.

    Args:
        signed: which code; of the other one, for second moments, 0 is left out.
    """
    first, middles = _tables(signed)
    whole = values_N.numel() // BLOCK
    for part_MB, scale_M in (
        (values_N[: whole * BLOCK].view(-1, BLOCK), absmax_M[:whole]),
        (values_N[whole * BLOCK :].view(1, -1), absmax_M[whole:]),
    ):
        if part_MB.numel():
            torch.linalg.vector_norm(part_MB, math.inf, dim=1, out=scale_M)
            part_MB.div_(scale_M.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1))
    codes_N = first.index_select(0, values_N.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF))
    codes_N.add_(values_N > middles.index_select(0, codes_N.int()))
    moment_N.copy_(codes_N if signed else codes_N.clamp_(min=1))


@functools.cache
def _tables(signed: bool) -> tuple[Tensor, Tensor]:
    """By the upper 16 bits of an fp32 number the first code that may be the nearest; the middles between the codes."""
    codes = code(signed=signed)
    middles = (codes[1:] + codes[:-1]) / 2
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.stack([upper, upper | 0xFFFF]).view(np.float32)
    numbers = np.isfinite(ends).all(0)
    first, last = np.searchsorted(middles.numpy(), np.sort(np.where(numbers, ends, 0.0), axis=0))
    assert (last - first).max() == 1, "no two middles among numbers with the same upper bits"
    # of numpy's memory, as they are kept, and no step of a run takes them
    kept = np.append(middles.numpy(), np.float32(np.inf))
    return torch.from_numpy(first.astype(np.uint8)), torch.from_numpy(kept)


def _decoded(moment_N: Tensor, absmax_M: Tensor, codes: Tensor) -> Tensor:
    decoded: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(moment_N, absmax_M, codes, BLOCK, torch.float32)
    return decoded
