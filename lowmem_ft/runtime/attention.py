"""Attention as one operator whose memory is known: the same one in training and in planning.

Which kernel PyTorch picks inside `scaled_dot_product_attention` depends on device, dtype, mask and strides, and on fake
tensors it is another one than in the run that is planned. So the kernel is called by name: `runtime.attention_cpu`,
`runtime.attention_cuda`. Packed documents need no mask: they are told by where they begin (`data.isolation.documents`),
and each attends within itself alone.

Registered with transformers as the attention implementation `ATTENTION`, for training and evaluation; whatever else a
model asks for (a key-value cache, dropout, sinks) goes to transformers' own SDPA function.

Letters in shapes: B rows, H query heads, G key-value heads, T positions, E head size, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask, sliding_window_causal_mask_function

from lowmem_ft.data.isolation import ATTENTION, visible
from lowmem_ft.runtime.attention_cpu import attention_backward_cpu, attention_cpu
from lowmem_ft.runtime.attention_cuda import attention_backward_cuda, attention_cuda
from lowmem_ft.runtime.documents import output_like, tells_documents

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
    packed = tells_documents(attention_mask)
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
    return output_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("lowmem_ft::attention_backward")  # type: ignore[untyped-decorator]
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


torch.library.impl("lowmem_ft::attention", "CPU", attention_cpu)
torch.library.impl("lowmem_ft::attention_backward", "CPU", attention_backward_cpu)
torch.library.impl("lowmem_ft::attention", "CUDA", attention_cuda)
torch.library.impl("lowmem_ft::attention_backward", "CUDA", attention_backward_cuda)
