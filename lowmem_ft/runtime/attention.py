"""Attention as one operator whose memory is known: the same one in training and in planning.

Which kernel PyTorch picks inside `scaled_dot_product_attention` depends on device, dtype, mask and strides, and on fake
tensors it is another one than in the run that is planned. So the kernel is called by name: `runtime.attention_cpu`,
`runtime.attention_cuda`. None of them caps scores, which `runtime.attention_capped` does. Packed documents need no
mask: they are told by where they begin (`data.isolation.documents`), and each attends within itself alone.

`runtime.attend` says which models use it, and how.

Letters in shapes: B rows, H query heads, G key-value heads, T positions, E head size, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_ft.runtime.attention_capped import capped_attention, capped_attention_backward
from lowmem_ft.runtime.attention_cpu import attention_backward_cpu, attention_cpu
from lowmem_ft.runtime.attention_cuda import attention_backward_cuda, attention_cuda
from lowmem_ft.runtime.documents import output_like


@dataclass(slots=True)
class Attended:
    """What the attention of a block gave in its first run, so that the second one need not attend again.

    It lies as `attended` on the modules of a block (`runtime.activations`).
    """

    kept: list[Tensor] | None = None  # outputs and log-sum-exps in turn; None: nothing is kept
    again: list[Tensor] | None = None  # what the run that is on takes of them

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        sinks_H: Tensor | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        if self.again is not None:
            return self.again.pop(0), self.again.pop(0)
        if softcap is None:
            out, lse = torch.ops.lowmem_ft.attention.default(q, k, v, mask, scale)
        else:
            out, lse = torch.ops.lowmem_ft.capped_attention.default(q, k, v, mask, scale, softcap)
        if sinks_H is not None:
            sinks_H1 = sinks_H.detach().float().unsqueeze(1)
            rest_BHT = lse[..., : q.shape[2]].sub(sinks_H1).sigmoid_()  # what the sink leaves
            out.mul_(rest_BHT.to(out.dtype).transpose(1, 2).unsqueeze(-1))
            lse = torch.logaddexp(lse, sinks_H1)
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
    sinks_H: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v for each head, causal where there is no mask; (B, T, H, E) in the dtype of q.

    Args:
        mask: boolean (B or 1, 1 or H, T, T), true where a position (third axis) sees another (last axis); or
            `data.isolation.documents`, (1, 1, W, N+1) int32 on the host.
        attended: keeps the result, or has it.
        sinks_H: of each head a score that belongs to no position, and takes its share of the sum of the softmax
            (gpt-oss; arXiv:2309.17453).
        softcap: scores are softcap * tanh(scores / softcap) (Gemma 2; arXiv:2408.00118).

    H is a multiple of G: query heads that follow each other share a key-value head.
    """
    attended = attended or Attended()
    result: Tensor = _Attention.apply(q_BHTE, k_BGTE, v_BGTE, sinks_H, mask, scale, softcap, attended)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and one number per query; backward recomputes the scores (arXiv:2205.14135).

    A sink is a position whose value is 0. With it in the output and in the log-sum-exp, the gradients of all others are
    what they are without: probabilities times what differs from the sum over d out * out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Tensor | None,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        attended: Attended,
    ) -> Tensor:
        out, lse = attended.attend(q, k, v, mask, scale, sinks_H, softcap)
        ctx.scale, ctx.softcap = scale, softcap
        trained = sinks_H if ctx.needs_input_grad[3] else None  # others may lie in a slot, which has other weights then
        ctx.save_for_backward(q, k, v, trained, mask, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, mask, out, lse = ctx.saved_tensors
        dsinks_H = None
        if sinks_H is not None:
            taken_BHT = (sinks_H.float().unsqueeze(1) - lse[..., : q.shape[2]]).exp_()
            dtaken_BHT = (dout * out).sum(-1, dtype=torch.float32).transpose(1, 2).neg_()
            dsinks_H = (taken_BHT * dtaken_BHT).sum((0, 2)).to(sinks_H.dtype)
        given = dout, q, k, v, mask, out, lse, ctx.scale
        if ctx.softcap is None:
            gradients = torch.ops.lowmem_ft.attention_backward.default(*given)
        else:
            gradients = torch.ops.lowmem_ft.capped_attention_backward.default(*given, ctx.softcap)
        return *gradients, dsinks_H, None, None, None, None


_GIVEN, _GIVEN_BACK = "Tensor q, Tensor k, Tensor v, Tensor? mask", "Tensor out, Tensor lse, float scale"
torch.library.define("lowmem_ft::attention", f"({_GIVEN}, float scale) -> (Tensor, Tensor)")
torch.library.define("lowmem_ft::capped_attention", f"({_GIVEN}, float scale, float softcap) -> (Tensor, Tensor)")
torch.library.define(
    "lowmem_ft::attention_backward", f"(Tensor dout, {_GIVEN}, {_GIVEN_BACK}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "lowmem_ft::capped_attention_backward",
    f"(Tensor dout, {_GIVEN}, {_GIVEN_BACK}, float softcap) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("lowmem_ft::attention")  # type: ignore[untyped-decorator]
@torch.library.register_fake("lowmem_ft::capped_attention")  # type: ignore[untyped-decorator]
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return output_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("lowmem_ft::attention_backward")  # type: ignore[untyped-decorator]
@torch.library.register_fake("lowmem_ft::capped_attention_backward")  # type: ignore[untyped-decorator]
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


torch.library.impl("lowmem_ft::attention", "CPU", attention_cpu)
torch.library.impl("lowmem_ft::attention_backward", "CPU", attention_backward_cpu)
torch.library.impl("lowmem_ft::attention", "CUDA", attention_cuda)
torch.library.impl("lowmem_ft::attention_backward", "CUDA", attention_backward_cuda)
torch.library.impl("lowmem_ft::capped_attention", ("CPU", "CUDA"), capped_attention)
torch.library.impl("lowmem_ft::capped_attention_backward", ("CPU", "CUDA"), capped_attention_backward)
