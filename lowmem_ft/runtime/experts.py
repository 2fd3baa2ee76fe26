"""A mixture-of-experts layer whose memory does not depend on where tokens are routed.

transformers' eager forward asks the device for each expert which tokens are its own, and what it allocates follows from
the answer. Here the (token, expert) pairs are sorted once, the device is waited for once, and each expert's rows are
worked on in tiles of limited height. So a plan made without data holds for every routing.

Registered with transformers as the experts implementation `EXPERTS`. The products are those of the weights themselves
(`stack[e]`), whether dense, quantized or adapted.

Letters in shapes: T tokens, K experts per token, E experts, P = T * K pairs, D hidden size, R a tile's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

EXPERTS = "lowmem_ft"
_LEAST_ROWS = 256  # of a tile: dequantizing a slice takes about as long as multiplying 64 rows with it


def use_experts(model: PreTrainedModel) -> None:
    """Let `model` run its experts through `experts_forward`, if they go by transformers' experts interface."""
    if type(model)._can_set_experts_implementation():
        ExpertsInterface.register(EXPERTS, experts_forward)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config._experts_implementation = EXPERTS


def experts_forward(experts: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's experts, (T, D). An index of E or more belongs to no expert."""
    pairs, top_k = top_k_index_TK.numel(), top_k_index_TK.shape[-1]
    order_P = top_k_index_TK.reshape(-1).argsort(stable=True)
    tiles = list(_tiles(_counts(top_k_index_TK, experts.num_experts), tile_rows(pairs, experts.num_experts)))
    rows = [rows for _, rows in tiles]
    order_P = order_P[: sum(rows)]
    token_P = order_P.div(top_k, rounding_mode="floor")
    x_PD = hidden_TD.index_select(0, token_P)
    weights_P = top_k_weights_TK.reshape(-1).index_select(0, order_P)
    if hidden_TD.is_meta:
        x_PD = _touch_the_rest(experts, x_PD, {expert for expert, _ in tiles})
    done = [
        (_expert(experts, expert, x_RD) * weights_R.unsqueeze(1)).to(hidden_TD.dtype)
        for (expert, _), x_RD, weights_R in zip(
            tiles, torch.split(x_PD, rows), torch.split(weights_P, rows), strict=True
        )
    ]
    return torch.zeros_like(hidden_TD).index_add_(0, token_P, torch.cat(done))


def tile_rows(pairs: int, experts: int) -> int:
    """The most rows that are worked on at once: about as many as each expert has when all have the same."""
    balanced: int = -(-pairs // experts)
    return max(_LEAST_ROWS, 1 << (balanced - 1).bit_length())


def _counts(top_k_index_TK: Tensor, experts: int) -> list[int]:
    """Pairs of each expert.

    Without data the routing is unknown, and one is assumed that takes the most memory: tiles as high as they get. A
    token goes to each expert once at most, so no expert has more rows than there are tokens.
    """
    if not top_k_index_TK.is_meta:
        return top_k_index_TK.reshape(-1).bincount(minlength=experts)[:experts].tolist()
    tokens, pairs = top_k_index_TK.shape[0], top_k_index_TK.numel()
    most = min(tokens, tile_rows(pairs, experts))
    return [min(most, max(0, pairs - expert * most)) for expert in range(experts)]


def _tiles(counts: list[int], most: int) -> Iterator[tuple[int, int]]:
    """(expert, rows) of each tile."""
    for expert, count in enumerate(counts):
        for start in range(0, count, most):
            yield expert, min(most, count - start)


def _expert(experts: Any, e: int, x_RD: Tensor) -> Tensor:
    """What expert `e` makes of its rows, (R, D)."""
    if experts.has_gate:
        inner = experts._apply_gate(_product(experts, "gate_up_proj", e, x_RD))
    else:
        inner = experts.act_fn(_product(experts, "up_proj", e, x_RD))
    out_RD = _product(experts, "down_proj", e, inner)
    return experts.post_expert_norm(out_RD) if getattr(experts, "has_post_expert_norm", False) else out_RD


def _product(experts: Any, name: str, e: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[e]
    out: Tensor = x @ weight if experts.is_transposed else F.linear(x, weight)
    return out + getattr(experts, f"{name}_bias")[e] if experts.has_bias else out


def _touch_the_rest(experts: nn.Module, x_PD: Tensor, used: set[int]) -> Tensor:
    """Without data: let the factors of experts that have no tile get gradients, as with data all experts' do."""
    factors: list[Tensor] = []
    for module in experts.modules():
        split = getattr(module, "factors", None)  # of the adapter of a stack
        if split is not None:
            pairs = enumerate(zip(*split(), strict=True))
            factors += [factor for e, pair in pairs if e not in used for factor in pair]
    result: Tensor = _Touched.apply(x_PD, *factors) if factors else x_PD  # type: ignore[no-untyped-call]
    return result


class _Touched(torch.autograd.Function):
    """Its first input; the others get gradients that are never filled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(other.shape, other.dtype) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (dx,) = gradients
        return dx, *(dx.new_empty(shape, dtype=dtype) for shape, dtype in ctx.shapes)
