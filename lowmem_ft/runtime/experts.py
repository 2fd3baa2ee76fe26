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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

EXPERTS = "lowmem_ft"
_ROWS = 64  # of a tile a multiple of it: on a CPU dequantizing a slice takes as long as multiplying so many rows


def use_experts(model: PreTrainedModel) -> None:
    """Let `model` run its experts through `experts_forward`, if they go by transformers' experts interface."""
    if type(model)._can_set_experts_implementation():
        ExpertsInterface.register(EXPERTS, experts_forward)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config._experts_implementation = EXPERTS


def experts_forward(experts: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's experts, (T, D). An index of E or more belongs to no expert."""
    pairs, top_k = top_k_index_TK.numel(), top_k_index_TK.shape[-1]
    expert_P, order_P = top_k_index_TK.reshape(-1).sort(stable=True)
    # a token goes to each expert once at most, so that no expert has more rows than there are tokens
    most = min(hidden_TD.shape[0], tile_rows(pairs, experts.num_experts, hidden_TD.shape[1]))
    counts = _counts(expert_P, experts.num_experts, most)
    del expert_P
    tiles = list(_tiles(counts, most))
    rows = [rows for _, rows in tiles]
    order_P = order_P[: sum(rows)]
    token_P = order_P.div(top_k, rounding_mode="floor")
    parts = (
        torch.split(hidden_TD.index_select(0, token_P), rows),  # one gather, whose backward is one scatter
        torch.split(top_k_weights_TK.reshape(-1).index_select(0, order_P), rows),
        torch.split(token_P, rows),
    )
    out_TD = torch.zeros_like(hidden_TD)
    # What is kept for backward depends on the number of pairs alone. What a tile takes beside that grows with its rows,
    # and comes on top of everything kept if the tile is the last in forward, the first in backward. In every routing
    # some expert has as many rows as a balanced one gives to each: with the highest tile last, all take about the same.
    ordered = sorted(zip(tiles, *parts, strict=True), key=_height)
    for at, ((expert, _), x_RD, weights_R, token_R) in enumerate(ordered):
        if hidden_TD.is_meta and at == len(tiles) - 1:
            _begin_lowest(experts, expert, x_RD, pairs // experts.num_experts)
        # within a tile each token is there once, so that the sum does not depend on the order of CUDA's threads
        done_RD = _expert(experts, expert, x_RD) * weights_R.unsqueeze(1)
        out_TD = out_TD.index_add_(0, token_R, done_RD.to(hidden_TD.dtype))
    return _touch_factors(experts, out_TD) if hidden_TD.is_meta else out_TD


def _begin_lowest(experts: Any, e: int, x_RD: Tensor, rows: int) -> None:
    """Without data: take what the last tile takes when it begins, if it is as low as a balanced routing makes it.

    Then more rows are kept already. With large weights and few rows that is the most that the layer takes.
    """
    if torch.is_grad_enabled() and 0 < rows < x_RD.shape[0]:
        kept = _expert(experts, e, x_RD[rows:].detach())
        _product(experts, "gate_up_proj" if experts.has_gate else "up_proj", e, x_RD[:rows])
        del kept


def tile_rows(pairs: int, experts: int, hidden: int) -> int:
    """The most rows that are worked on at once.

    About as many as each expert has when all have the same, and 1/128 of all pairs, so that the few rows more that most
    routings give to some experts need no second tile, and still a tile's height changes the layer's memory by less than
    1%. At least D / 4, with which a tile takes about the memory of the slice that is dequantized for it: in training
    (D + 5 I) numbers a row and 2 * D * I of the slice, for I of 0.3 to 3.5 D as published models have.
    """
    return _ROWS * -(-max(-(-pairs // experts) + pairs // 128, hidden // 4) // _ROWS)


def _counts(expert_P: Tensor, experts: int, most: int) -> list[int]:
    """Pairs of each expert, from the pairs' experts in order; the one time that the device is waited for.

    Without data the routing is unknown, and one with tiles as high as they get is assumed.
    """
    if not expert_P.is_meta:
        starts = torch.searchsorted(expert_P, torch.arange(experts + 1, device=expert_P.device)).tolist()
        return [end - start for start, end in pairwise(starts)]
    full, rest = divmod(expert_P.numel(), most)
    return [most] * full + ([rest] if rest else [])


def _tiles(counts: list[int], most: int) -> Iterator[tuple[int, int]]:
    """(expert, rows) of each tile."""
    for expert, count in enumerate(counts):
        for start in range(0, count, most):
            yield expert, min(most, count - start)


def _height(tile: tuple[tuple[int, int], Tensor, Tensor, Tensor]) -> int:
    return tile[0][1]


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


def _touch_factors(experts: nn.Module, out_TD: Tensor) -> Tensor:
    """Without data: let all experts' adapters have their gradients before any tile's backward.

    With data they get them one by one, and may have them so early: with a few rows for each expert but the first.
    """
    adapters: list[Any] = [module for module in experts.modules() if hasattr(module, "factors")]  # as LoraStack has
    factors = [factor for adapter in adapters for split in adapter.factors() for factor in split]
    touched: Tensor = _Touched.apply(out_TD, *factors)  # type: ignore[no-untyped-call]
    return touched


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
