"""Attention as one operator whose memory is known: the same one in training and in planning.

Which kernel PyTorch picks inside `scaled_dot_product_attention` depends on device, dtype, mask and strides, and on fake
tensors it is another one than in the run that is planned. So the kernel is called by name here. On a CPU it works on
a few heads of one row at a time: with grouped queries keys and values are repeated for those only, and where they are
widened to fp32 only those exist in it. Forward does that where the processor does not multiply 16-bit floats
(`quant.products`). Backward always does: oneDNN's small products of 16-bit floats take scratch for
every thread in every thread (measured: 0.23 MB with one, with two 0.46 MB in each), and no plan knows how many ask for
it at once.

Packed documents need no mask: they are told by where they begin (`data.isolation.documents`), and each attends within
itself alone: by FlashAttention's kernel for sequences of any lengths, or one by one, on a CPU and where FlashAttention
does not serve (fp32, cards before Ampere).

Registered with transformers as the attention implementation `ATTENTION`, for training and evaluation; whatever else a
model asks for (a key-value cache, dropout, sinks) goes to transformers' own SDPA function.

Letters in shapes: B rows, H query heads, G key-value heads, T positions, E head size, N documents.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask, sliding_window_causal_mask_function

from lowmem_ft.data.isolation import ATTENTION, visible
from lowmem_ft.quant.products import multiplies

_TILE_BYTES = 8 << 20  # of queries at a time, on a CPU
_PLAIN = frozenset({"sliding_window", "position_ids", "output_attentions", "use_cache", "cache_position"})


def use_attention(model: PreTrainedModel) -> None:
    """Let `model` attend through `attention`, if it goes by transformers' attention interface with SDPA."""
    if model.config._attn_implementation == "sdpa" and type(model)._supports_attention_backend:
        AttentionInterface.register(ATTENTION, _transformers_attention)
        AttentionMaskInterface.register(ATTENTION, _transformers_mask)
        model.config._attn_implementation = ATTENTION


@dataclass(slots=True)
class Attended:
    """What the attention of a block gave in its first run, so that the second one need not attend again.

    It lies as `attended` on the modules of a block (`runtime.activations`).
    """

    kept: list[Tensor] | None = None  # outputs and log-sum-exps in turn; None: nothing is kept
    again: list[Tensor] | None = None  # what the run that is on takes of them

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        if self.again is not None:
            return self.again.pop(0), self.again.pop(0)
        out, lse = torch.ops.lowmem_ft.attention.default(q, k, v, mask, scale)
        if self.kept is not None:
            self.kept += out, lse
        return out, lse


def attention(
    q_BHTE: Tensor,
    k_BGTE: Tensor,
    v_BGTE: Tensor,
    mask: Tensor | None,
    scale: float,
    attended: Attended | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v for each head, causal where there is no mask; (B, T, H, E) in the dtype of q.

    Args:
        mask: boolean (B or 1, 1 or H, T, T), true where a position (third axis) sees another (last axis); or
            `data.isolation.documents`, (1, 1, W, N+1) int32 on the host.
        attended: keeps the result, or has it.

    H is a multiple of G: query heads that follow each other share a key-value head.
    """
    attended = attended or Attended()
    result: Tensor = _Attention.apply(q_BHTE, k_BGTE, v_BGTE, mask, scale, attended)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and one number per query; backward recomputes the scores (arXiv:2205.14135)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, attended: Attended
    ) -> Tensor:
        out, lse = attended.attend(q, k, v, mask, scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        gradients = torch.ops.lowmem_ft.attention_backward.default(dout, q, k, v, mask, out, lse, ctx.scale)
        return *gradients, None, None, None


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (B, H, T, E), (B, G, T, E) -> (B, T, H, E)."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    shapes = query.shape[-2:] == key.shape[-2:] == value.shape[-2:] and query.shape[2] > 1
    packed = _tells_documents(attention_mask)
    masked = packed or (attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.ndim == 4)
    asked = any(value is not None and value is not False for name, value in kwargs.items() if name not in _PLAIN)
    if not shapes or dropout > 0 or asked or not (masked or (attention_mask is None and causal)):
        if attention_mask is not None and packed:
            attention_mask = visible(attention_mask, query.shape[0], query.shape[2], query.device)
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, attention_mask, scale, getattr(module, "attended", None)), None


def _transformers_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' SDPA mask: none where plain causal attention is meant, and one for all rows where a window is.

    To see which, transformers looks at the values of position ids, which a simulated run does not have: there it would
    make a mask for each row. Packed rows never come here, since their masks are made by us.
    """
    window = kwargs.get("local_size")
    simulated = torch.device(kwargs.get("device", "cpu")).type == "meta"
    if simulated and kwargs.get("attention_mask") is None:
        if window is None or kwargs["kv_length"] < window:
            return None
        kwargs["mask_function"] = sliding_window_causal_mask_function(window)
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


torch.library.define(
    "lowmem_ft::attention", "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> (Tensor, Tensor)"
)
torch.library.define(
    "lowmem_ft::attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("lowmem_ft::attention")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("lowmem_ft::attention_backward")  # type: ignore[untyped-decorator]
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _tells_documents(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32


def _bounds(documents: Tensor, tokens: int) -> list[int]:
    bounds: list[int] = documents[0, 0, 0].tolist()
    assert bounds[-1] == tokens, "the model has cut what tells where documents begin"
    return bounds


def _output(q_BHTE: Tensor) -> Tensor:
    """Heads behind positions, as the output projection reads them."""
    batch, heads, length, size = q_BHTE.shape
    return q_BHTE.new_empty(batch, length, heads, size)


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _output(q), q.new_empty(q.shape[:3], dtype=torch.float32)
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
    return dq, dk, dv


def _widened(q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The heads of one row for the CPU kernel, keys and values for each query head."""
    share = q_HTE.shape[0] // k_GTE.shape[0]
    repeated = [t if share == 1 else t.repeat_interleave(share, 0) for t in (k_GTE.to(dtype), v_GTE.to(dtype))]
    return [t.unsqueeze(0) for t in (q_HTE.to(dtype), *repeated)]


def traced_rows(q_BHTE: Tensor) -> int:
    """Without data three rows stand for all, of which each takes the same."""
    return min(3, q_BHTE.shape[0]) if q_BHTE.is_meta else q_BHTE.shape[0]


def _tiles(
    q: Tensor, k: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[int, slice, slice, slice, Tensor | None]]:
    """(row, positions, query heads, key-value heads, additive mask or None) of each piece that is computed at once."""
    share = q.shape[1] // k.shape[1]
    at_once = max(1, _TILE_BYTES // (4 * share * q.shape[2] * q.shape[3]))
    of: Tensor | None = None
    bias: Tensor | None = None
    for row, at, seen in _pieces(q, mask, traced_rows(q)):
        if seen is not of:
            of, bias = seen, None  # freed before the next one is made
            if seen is not None:
                bias = torch.zeros(seen.shape, dtype=dtype, device=q.device).masked_fill_(~seen, torch.finfo(dtype).min)
        for first in range(0, k.shape[1], at_once):
            groups = slice(first, min(first + at_once, k.shape[1]))
            heads = slice(groups.start * share, groups.stop * share)
            yield row, at, heads, groups, bias if bias is None or bias.shape[1] == 1 else bias[:, heads]


def _pieces(q: Tensor, mask: Tensor | None, rows: int) -> Iterator[tuple[int, slice, Tensor | None]]:
    """(row, positions, what each of them sees, None for all up to itself) of what attends apart from the rest."""
    length = q.shape[2]
    if mask is None or not _tells_documents(mask):
        for row in range(rows):
            yield row, slice(length), mask if mask is None or mask.shape[0] == 1 else mask[row : row + 1]
        return
    window = mask.shape[2]
    for first, last in itertools.pairwise(_bounds(mask, q.shape[0] * length)):
        (row, start), own = divmod(first, length), last - first
        if row < rows:
            alone = torch.tensor([0, own], dtype=torch.int32).expand(1, 1, window, -1)
            yield row, slice(start, start + own), visible(alone, 1, own, q.device) if window < own else None


torch.library.impl("lowmem_ft::attention", "CPU", attention_cpu)
torch.library.impl("lowmem_ft::attention_backward", "CPU", attention_backward_cpu)


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
    flash = _flash(q, capability)
    if mask is not None and _tells_documents(mask):
        out_BTHE, lse = (_documents_cuda if flash else _one_by_one)(q, k, v, mask, scale)
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
    flash = _flash(q, capability)
    gradients: Sequence[Tensor]
    if mask is not None and _tells_documents(mask):
        apart = _documents_backward_cuda if flash else _one_by_one_backward
        gradients = apart(dout, q, k, v, mask, out, lse, scale, none)
    elif flash and mask is None:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
        given = dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse
        gradients = kernel(*given, None, None, length, length, 0.0, True, none, none[0], scale=scale)
    else:
        gradients = _efficient_backward(dout, q, k, v, mask, out, lse, scale, none)
    dq, dk, dv = (gradient[..., :size] for gradient in gradients)
    return dq, dk, dv


torch.library.impl("lowmem_ft::attention", "CUDA", attention_cuda)
torch.library.impl("lowmem_ft::attention_backward", "CUDA", attention_backward_cuda)


def padded(heads: Tensor) -> Tensor:
    """Heads (last axis) of a size that the kernels load, a multiple of 8, zeros behind; the same where it is one."""
    missing = -heads.shape[-1] % 8
    return nn.functional.pad(heads, (0, missing)) if missing else heads


def _flash(q: Tensor, capability: tuple[int, int] | None) -> bool:
    """Whether FlashAttention takes it: 16-bit floats, Ampere or newer, heads that are not too large."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
    return fits and (capability or torch.cuda.get_device_capability(q.device)) >= (8, 0)


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
    out, lse = _output(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def attend(row: slice, at: slice, seen: Tensor | None) -> None:
        heads, sums = _efficient(q[row, :, at], k[row, :, at], v[row, :, at], seen, scale)
        out[row, at] = heads.transpose(1, 2)
        lse[row, :, at] = sums[..., : at.stop - at.start]

    for row, at, seen in _pieces(q, documents, q.shape[0]):
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

    for row, at, seen in _pieces(q, documents, q.shape[0]):
        differentiate(slice(row, row + 1), at, seen)
    return wholes


def _documents_cuda(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B, T, H, E) and (B, H, T), each document for itself."""
    rows, _, length, _ = q.shape
    bounds, window = _bounds(documents, rows * length), documents.shape[2]
    kernel = torch.ops.aten._flash_attention_forward.default
    told, back = _told(bounds, window, documents_at_once(rows * length), q.device)
    result = kernel(_flat(q), _flat(k), _flat(v), *told, 0.0, True, False, scale=scale, **back)
    return result[0].unflatten(0, (rows, length)), result[1].unflatten(1, (rows, length)).transpose(0, 1)


def _documents_backward_cuda(
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
    bounds, window = _bounds(documents, rows * length), documents.shape[2]
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
    lines.masked_fill_(~mask, torch.finfo(q.dtype).min)
    return lines.expand(q.shape[0], q.shape[1], q.shape[2], keys)
