"""Attention on a card: FlashAttention, or the memory-efficient kernel where that does not serve (masks, fp32, large
heads, cards before Ampere).

Packed documents are computed by FlashAttention's kernel for sequences of any lengths, or one by one. Dropout is not
served: what backward is told of random numbers is not read.

Letters in shapes: B rows, H query heads, G key-value heads, T positions, E head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowmem_ft.runtime.documents import apart, bounds_of, output_like, tells_documents


def attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    capability: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """On a card of this compute capability; by default that which holds the tensors."""
    size = q.shape[3]
    q, k, v = padded(q), padded(k), padded(v)
    flash = takes_flash(q, capability)
    if mask is not None and tells_documents(mask):
        out_BTHE, lse = (_documents if flash else _one_by_one)(q, k, v, mask, scale)
        return out_BTHE[..., :size].contiguous(), lse
    if flash and mask is None:
        result = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True, False, scale=scale)
    else:
        result = _efficient(q, k, v, mask, scale)
    return result[0][..., :size].transpose(1, 2).contiguous(), result[1]


def attention_backward_cuda(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    capability: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    size = q.shape[3]
    q, k, v = padded(q), padded(k), padded(v)
    dout, out = padded(dout), padded(out)
    length, none = q.shape[2], torch.zeros(2, dtype=torch.int64, device=q.device)  # no dropout: nothing was drawn
    flash = takes_flash(q, capability)
    gradients: Sequence[Tensor]
    if mask is not None and tells_documents(mask):
        differentiate = _documents_backward if flash else _one_by_one_backward
        gradients = differentiate(dout, q, k, v, mask, out, lse, scale, none)
    elif flash and mask is None:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
        given = dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse
        gradients = kernel(*given, None, None, length, length, 0.0, True, none, none[0], scale=scale)
    else:
        gradients = _efficient_backward(dout, q, k, v, mask, out, lse, scale, none)
    dq, dk, dv = (gradient[..., :size] for gradient in gradients)
    return dq, dk, dv


def padded(heads: Tensor) -> Tensor:
    """Heads (last axis) of a size that the kernels load, a multiple of 8, zeros behind; the same where it is one."""
    missing = -heads.shape[-1] % 8
    return nn.functional.pad(heads, (0, missing)) if missing else heads


def takes_flash(q: Tensor, capability: tuple[int, int] | None, *, drops: bool = False) -> bool:
    """Whether FlashAttention does it: 16-bit floats, Ampere or newer, heads that are not too large.

    Some of the largest heads have no backward on cards that are not for data centers, which nobody says when the kernel
    is called by name (PyTorch's aten/native/transformers/cuda/sdp_utils.cpp).

    Args:
        drops: there is dropout.
    """
    capability, size = capability or torch.cuda.get_device_capability(q.device), q.shape[-1]
    roomy = capability == (8, 0) or capability[0] in (9, 10)
    fits = size <= 256 if roomy else size <= 192 or (224 < size <= 256 and not drops)
    return fits and q.dtype in (torch.bfloat16, torch.float16) and capability >= (8, 0)


def _efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(B, H, T, E) and (B, H, T rounded up to 32), by the memory-efficient kernel."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention.default
    heads = q, repeated(q, k), repeated(q, v)
    out, lse, *_ = kernel(*heads, additive(q, mask), True, 0.0, mask is None, scale=scale)
    return out, lse


def _efficient_backward(
    dout_BTHE: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out_BTHE: Tensor,
    lse: Tensor,
    scale: float,
    none: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    dq, dk, dv, _ = kernel(
        *(dout_BTHE.transpose(1, 2), q, repeated(q, k), repeated(q, v), additive(q, mask), out_BTHE.transpose(1, 2)),
        *(lse, none[0], none[1], 0.0, [True, True, True, False], mask is None),
        scale=scale,
    )
    groups = k.shape[1]
    dk, dv = (t if t.shape[1] == groups else t.unflatten(1, (groups, -1)).sum(2) for t in (dk, dv))
    return dq, dk, dv


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B, T, H, E) and (B, H, T), each document by a call of the memory-efficient kernel."""
    out, lse = output_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def attend(row: slice, at: slice, seen: Tensor | None) -> None:
        heads, sums = _efficient(q[row, :, at], k[row, :, at], v[row, :, at], seen, scale)
        out[row, at] = heads.transpose(1, 2)
        lse[row, :, at] = sums[..., : at.stop - at.start]

    for row, at, seen in apart(q, documents, q.shape[0]):
        attend(slice(row, row + 1), at, seen)  # a call, so that nothing of a document is held for the next one
    return out, lse


def _one_by_one_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    none: Tensor,
) -> tuple[Tensor, ...]:
    wholes = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def differentiate(row: slice, at: slice, seen: Tensor | None) -> None:
        # as the kernel's forward leaves it: to multiples of 32, and nothing is seen of what is too much
        sums = nn.functional.pad(lse[row, :, at], (0, (at.start - at.stop) % 32), value=torch.inf)
        heads = q[row, :, at], k[row, :, at], v[row, :, at]
        parts = _efficient_backward(dout[row, at], *heads, seen, out[row, at], sums, scale, none)
        for whole, part in zip(wholes, parts, strict=True):
            whole[row, :, at] = part

    for row, at, seen in apart(q, documents, q.shape[0]):
        differentiate(slice(row, row + 1), at, seen)
    return wholes


def _documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B, T, H, E) and (B, H, T), each document for itself."""
    rows, _, length, _ = q.shape
    bounds, window = bounds_of(documents, rows * length), documents.shape[2]
    kernel = torch.ops.aten._flash_attention_forward.default
    told, back = _told(bounds, window, documents_at_once(rows * length), q.device)
    result = kernel(_flat(q), _flat(k), _flat(v), *told, 0.0, True, False, scale=scale, **back)
    return result[0].unflatten(0, (rows, length)), result[1].unflatten(1, (rows, length)).transpose(0, 1)


def _documents_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    none: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, in their shapes.

    The kernel sums 128 positions more for each document, so that a call takes a few documents only. The call with most
    positions gives tensors for all of them, into which what the others give is copied.
    """
    rows, _, length, _ = q.shape
    bounds, window = bounds_of(documents, rows * length), documents.shape[2]
    most = documents_at_once(rows * length)
    dout, out, lse = dout.flatten(0, 1), out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    q, k, v = _flat(q), _flat(k), _flat(v)
    kernel = functools.partial(torch.ops.aten._flash_attention_backward.default, scale=scale)
    largest, *others = _calls(bounds, most)
    told, back = _told(largest, window, most, q.device)
    whole = kernel(dout, q, k, v, out, lse, *told, 0.0, True, none, none[0], **back)
    for call in others:
        at = slice(call[0], call[-1])
        told, back = _told([bound - at.start for bound in call], window, 0, q.device)
        held = dout[at], q[at], k[at], v[at], out[at], lse[:, at].contiguous()
        for gradient, part in zip(whole, kernel(*held, *told, 0.0, True, none, none[0], **back), strict=True):
            gradient[at] = part
    return tuple(gradient.unflatten(0, (rows, length)).transpose(1, 2) for gradient in whole)


def documents_at_once(tokens: int) -> int:
    """How many documents a call of the backward kernel takes at most. Its sums are a quarter larger for them."""
    return tokens // 512 + 2


def _calls(bounds: list[int], most: int) -> list[list[int]]:
    """Bounds of the documents of each call, that with most positions first.

    The others have less than half of the positions in one document, or a third in several. So beside what the first one
    gave none of them takes more than that did, which leaves out no position and is told of `most` documents.
    """
    if len(bounds) - 1 <= most:
        return [bounds]
    calls = [[0]]
    for bound in bounds[1:]:
        call = calls[-1]
        if len(call) > most or (len(call) > 1 and bound - call[0] > bounds[-1] // 3):
            calls.append([call[-1]])
        calls[-1].append(bound)
    return sorted(calls, key=lambda call: call[0] - call[-1])


def _told(
    bounds: Sequence[int], window: int, least: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor, int, int], dict[str, int]]:
    """How kernels for sequences of any lengths are told of documents; of `least` at least, empty ones behind, so that
    what a call takes does not depend on how many there are."""
    longest = max(last - first for first, last in itertools.pairwise(bounds))
    empty = [bounds[-1]] * (least + 1 - len(bounds))
    begins = torch.tensor([*bounds, *empty], dtype=torch.int32).to(device, non_blocking=True)
    back = {"window_size_left": window - 1, "window_size_right": 0} if window < longest else {}
    longest = max(2, longest)  # for single queries the forward kernel has ways of its own
    return (begins, begins, longest, longest), back


def _flat(heads: Tensor) -> Tensor:
    """(B, H, T, E) -> (B * T, H, E)."""
    return heads.transpose(1, 2).flatten(0, 1)


def repeated(q: Tensor, k: Tensor) -> Tensor:
    """Keys or values, one for each query head."""
    share = q.shape[1] // k.shape[1]
    return k if share == 1 else k.repeat_interleave(share, 1)


def additive(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as the memory-efficient kernel wants it: additive, lines aligned to 16 elements, one for each head."""
    if mask is None:
        return None
    keys = mask.shape[3]
    lines = q.new_zeros(*mask.shape[:3], -(-keys // 16) * 16)[..., :keys]
    if mask.dtype == torch.bool:
        lines.masked_fill_(~mask, torch.finfo(q.dtype).min)
    else:
        lines.copy_(mask)
    return lines.expand(q.shape[0], q.shape[1], q.shape[2], keys)
