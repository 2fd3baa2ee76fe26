"""Attention on a CPU: a few heads of one row at a time, in PyTorch's FlashAttention.

With grouped queries keys and values are repeated for those heads only, and where they are widened to fp32 only those
exist in it. Forward does that where the processor does not multiply 16-bit floats (`quant.products`). Backward always
does: oneDNN's small products of 16-bit floats take scratch for every thread in every thread (measured: 0.23 MB with
one, with two 0.46 MB in each), and no plan knows how many ask for it at once.

Letters in shapes: B rows, H query heads, G key-value heads, T positions, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem_ft.quant.products import multiplies
from lowmem_ft.runtime.documents import apart, output_like

_TILE_BYTES = 8 << 20  # of queries at a time


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = output_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    dtype = q.dtype if multiplies(q.dtype) else torch.float32

    def attend(row: int, at: slice, heads: slice, groups: slice, bias: Tensor | None) -> None:
        tile = _widened(q[row, heads, at], k[row, groups, at], v[row, groups, at], dtype)
        out_tile, lse_tile = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            *tile, 0.0, bias is None, attn_mask=bias, scale=scale
        )
        out[row, at, heads] = out_tile[0].transpose(0, 1)
        lse[row, heads, at] = lse_tile[0]

    for piece in _tiles(q, k, mask, dtype):
        attend(*piece)  # a call, so that nothing of a tile is held while the next one is made
        del piece
    return out, lse


def attention_backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def differentiate(row: int, at: slice, heads: slice, groups: slice, bias: Tensor | None) -> None:
        tile = _widened(q[row, heads, at], k[row, groups, at], v[row, groups, at], torch.float32)
        dout_tile, out_tile = (t[row : row + 1, at, heads].transpose(1, 2).float() for t in (dout, out))
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            *(dout_tile, *tile, out_tile, lse[row : row + 1, heads, at], 0.0, bias is None),
            attn_mask=bias,
            scale=scale,
        )
        dq[row, heads, at] = gradients[0][0]
        for whole, repeated in ((dk, gradients[1]), (dv, gradients[2])):
            if q.shape[1] == k.shape[1]:
                whole[row, groups, at] = repeated[0]
            else:  # summed in the kernel's dtype over the query heads that share a key-value head
                whole[row, groups, at] = repeated[0].unflatten(0, (groups.stop - groups.start, -1)).sum(1)

    for piece in _tiles(q, k, mask, torch.float32):
        differentiate(*piece)
        del piece
    return dq, dk, dv


def _widened(q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The heads of one row for the CPU kernel, keys and values for each query head."""
    share = q_HTE.shape[0] // k_GTE.shape[0]
    repeated = [t if share == 1 else t.repeat_interleave(share, 0) for t in (k_GTE.to(dtype), v_GTE.to(dtype))]
    return [t.unsqueeze(0) for t in (q_HTE.to(dtype), *repeated)]


def traced_rows(q_BHTE: Tensor) -> int:
    """Without data one row stands for all, of which each takes the same."""
    return 1 if q_BHTE.is_meta else q_BHTE.shape[0]


def _tiles(
    q: Tensor, k: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[int, slice, slice, slice, Tensor | None]]:
    """(row, positions, query heads, key-value heads, additive mask or None) of each piece that is computed at once."""
    share = q.shape[1] // k.shape[1]
    at_once = max(1, _TILE_BYTES // (4 * share * q.shape[2] * q.shape[3]))
    of: Tensor | None = None
    bias: Tensor | None = None
    for row, at, seen in apart(q, mask, traced_rows(q)):
        if seen is not of:
            of, bias = seen, None  # freed before the next one is made
            if seen is not None:
                bias = torch.zeros(seen.shape, dtype=dtype, device=q.device).masked_fill_(~seen, torch.finfo(dtype).min)
        for first in range(0, k.shape[1], at_once):
            groups = slice(first, min(first + at_once, k.shape[1]))
            heads = slice(groups.start * share, groups.stop * share)
            yield row, at, heads, groups, bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
