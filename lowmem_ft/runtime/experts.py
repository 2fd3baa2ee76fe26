"""A mixture-of-experts layer whose memory does not depend on where tokens are routed.

transformers' eager forward asks the device for each expert which tokens are its own, and what it allocates follows from
the answer. Here the (token, expert) pairs are sorted once, the device is waited for once, and each expert's rows are
worked on in tiles of limited height. So a plan made without data holds for every routing.

Registered with transformers as the experts implementation `EXPERTS`. The products are those of the weights themselves
(`stack[e]`), whether dense, quantized or adapted.

Letters in shapes: T tokens, K experts per token, E experts, P = T * K pairs, D hidden size, R a tile's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
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
    times = traced_tiles(rows) if hidden_TD.is_meta else [1] * len(tiles)
    x_PD = hidden_TD.index_select(0, token_P)  # one gather, whose backward is one scatter
    balanced = min(experts.num_experts, pairs) / max(len(tiles), 1)  # tiles of a balanced routing for each of these
    if hidden_TD.is_meta:
        x_PD = _Said.apply(x_PD, EACH_IS, balanced, 1.0)  # type: ignore[no-untyped-call]
    parts = (
        _split(x_PD, rows, times),
        _split(top_k_weights_TK.reshape(-1).index_select(0, order_P), rows, times),
        _split(token_P, rows, times),
    )
    taken = ((tile, count) for tile, count in zip(tiles, times, strict=True) if count)
    out_TD = torch.zeros_like(hidden_TD)
    # What is kept for backward depends on the number of pairs alone. What a tile takes beside that grows with its rows,
    # and comes on top of everything kept if the tile is the last in forward, the first in backward. In every routing
    # some expert has as many rows as a balanced one gives to each: with the highest tile last, all take about the same.
    ordered = sorted(zip(taken, *parts, strict=True), key=_height)
    for at, (((expert, _), count), x_RD, weights_R, token_R) in enumerate(ordered):
        if hidden_TD.is_meta and at == len(ordered) - 1:
            EACH_IS(x_RD, 0.0)  # which takes memory, but no time
            _begin_lowest(experts, expert, x_RD, pairs // experts.num_experts)
            EACH_IS(x_RD, balanced)
        if count > 1:
            out_TD = _Said.apply(out_TD, STANDS_FOR, count, 1)  # type: ignore[no-untyped-call]
        # within a tile each token is there once, so that the sum does not depend on the order of CUDA's threads
        out_TD = out_TD.index_add_(0, token_R, _weighted(experts, expert, x_RD, weights_R, hidden_TD.dtype))
        if count > 1:
            out_TD = _Said.apply(out_TD, STANDS_FOR, 1, count)  # type: ignore[no-untyped-call]
    if hidden_TD.is_meta:
        out_TD = _Said.apply(out_TD, EACH_IS, 1.0, balanced)  # type: ignore[no-untyped-call]
        out_TD = _touch_factors(experts, out_TD, times)
    return out_TD


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


def traced_tiles(rows: Sequence[int]) -> list[int]:
    """Without data: for how many each tile stands; 0 where another stands for it.

    The first and the last of equally high ones are next to other work; all between them take and give back the same.
    """
    equal = rows.count(rows[0])
    return [1, equal - 2, *[0] * (equal - 3), 1, *[1] * (len(rows) - equal)] if equal > 3 else [1] * len(rows)


def _split(whole: Tensor, rows: list[int], times: list[int]) -> tuple[Tensor, ...]:
    """The rows of each tile that is worked on."""
    if all(count == 1 for count in times):
        return torch.split(whole, rows)
    parts: tuple[Tensor, ...] = _Taken.apply(whole, rows, times)  # type: ignore[no-untyped-call]
    return parts


class _Taken(torch.autograd.Function):
    """Without data: `torch.split`, of which only some parts are taken, for others too."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, rows: list[int], times: list[int]) -> tuple[Tensor, ...]:
        ctx.times = [count for count in times if count]
        return tuple(part for part, count in zip(torch.split(whole, rows), times, strict=True) if count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        every = [part for part, count in zip(gradients, ctx.times, strict=True) for _ in range(count)]
        return torch.cat(every), None, None


class _Said(torch.autograd.Function):
    """Its first input. From here on `say` holds with `forward`, and in backward, from here on, with `backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, say: Any, forward: float, backward: float) -> Tensor:
        ctx.say, ctx.backward = say, backward
        ctx.mark_dirty(x)  # not a view, which could not be added to in place
        say(x, forward)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        ctx.say(dx, ctx.backward)
        return dx, None, None, None


# What they say to whoever traces tensors without data: for how many of its like each following operation stands; that
# where it does so and the first of these is given back, it is one of them for each; and for how many each following
# tile stands in time alone, as their rows are the same in all
torch.library.define("lowmem_ft::stands_for", "(Tensor x, int times) -> ()")
torch.library.define("lowmem_ft::go_alike", "(Tensor[] likes) -> ()")
torch.library.define("lowmem_ft::each_is", "(Tensor x, float tiles) -> ()")
STANDS_FOR, GO_ALIKE = torch.ops.lowmem_ft.stands_for.default, torch.ops.lowmem_ft.go_alike.default
EACH_IS = torch.ops.lowmem_ft.each_is.default


@torch.library.register_fake("lowmem_ft::stands_for")  # type: ignore[untyped-decorator]
def _(x: Tensor, times: int) -> None:
    return None


@torch.library.register_fake("lowmem_ft::each_is")  # type: ignore[untyped-decorator]
def _(x: Tensor, tiles: float) -> None:
    return None


@torch.library.register_fake("lowmem_ft::go_alike")  # type: ignore[untyped-decorator]
def _(likes: list[Tensor]) -> None:
    return None


def _height(tile: tuple[tuple[tuple[int, int], int], Tensor, Tensor, Tensor]) -> int:
    return tile[0][0][1]


def _weighted(experts: Any, e: int, x_RD: Tensor, weights_R: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the rows' tokens. A function, so that nothing of a tile is held while the next is worked on."""
    return (_expert(experts, e, x_RD) * weights_R.unsqueeze(1)).to(dtype)


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


def _touch_factors(experts: Any, out_TD: Tensor, times: Sequence[int]) -> Tensor:
    """Without data: let all experts' adapters have their gradients before any tile's backward.

    With data they get them one by one, and may have them so early: with a few rows for each expert but the first.

    Args:
        times: for how many experts that of each tile stands.
    """
    adapters: list[Any] = [module for module in experts.modules() if hasattr(module, "factors")]  # as LoraStack has
    splits = [split for adapter in adapters for split in adapter.factors()]
    firsts = range(0, len(splits) * experts.num_experts, experts.num_experts)
    # the second expert stands for others, and those that no tile is traced for are alike too
    every = [range(1, 1 + max(times)), range(len(times), experts.num_experts)] if max(times) > 1 else []
    alike = [range(first + it.start, first + it.stop) for first in firsts for it in every if len(it) > 1]
    factors = [factor for split in splits for factor in split]
    kinds = [(split[0].shape, split[0].dtype) for split in splits]  # each factor's own would take long to ask for
    shapes = [kind for kind, split in zip(kinds, splits, strict=True) for _ in split]
    touched: Tensor = _Touched.apply(out_TD, alike, shapes, *factors)  # type: ignore[no-untyped-call]
    return touched


class _Touched(torch.autograd.Function):
    """Its first input; the others get gradients that are never filled.

    In each range of `alike` the first one's stands for those of all; the others share one, which is not added to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alike: list[range], shapes: list[Any], *others: Tensor) -> Tensor:
        ctx.shapes, ctx.alike = shapes, alike
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = gradients
        touched: list[Tensor] = []
        rests = {one_for_all[1]: one_for_all[1:] for one_for_all in ctx.alike}
        while len(touched) < len(ctx.shapes):
            shape, dtype = ctx.shapes[len(touched)]
            rest = rests.get(len(touched))
            if rest is None:
                touched.append(dx.new_empty(shape, dtype=dtype))
                continue
            STANDS_FOR(dx, len(rest))
            one = dx.new_empty(shape, dtype=dtype)
            STANDS_FOR(dx, 1)
            GO_ALIKE([touched[-1], one])
            touched += [one] * len(rest)
        return dx, None, None, *touched
