"""A mixture-of-experts layer whose memory does not depend on where tokens are routed.

transformers' eager forward asks the device for each expert which tokens are its own, and keeps for backward several
times as much as its input. Here the (token, expert) pairs are sorted once, the device is waited for once, and each
expert's rows are worked on in tiles of limited height, of which nothing but the outputs of the first product survives.
In the second run of a block that recomputes, not even those: backward then runs a tile's first product once more and
differentiates that tile at once. So a plan made without data holds for every routing.

Registered with transformers as the experts implementation `EXPERTS`. The products are those of the weights themselves
(`stack[e]`), whether dense, quantized or adapted.

Letters in shapes: T tokens, K experts per token, E experts, P = T * K pairs, D hidden size, I inner size, H outputs of
the first product (2 * I with a gate), R a tile's rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, compress, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from lowmem_ft.quant.experts import frozen_product
from lowmem_ft.quant.products import ROWS
from lowmem_ft.runtime.rerun import active_autocast, as_before, random_states, runs_again

EXPERTS = "lowmem_ft"


def use_experts(model: PreTrainedModel) -> None:
    """Let `model` run its experts through `experts_forward`, if they go by transformers' experts interface."""
    if type(model)._can_set_experts_implementation():
        ExpertsInterface.register(EXPERTS, experts_forward)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config._experts_implementation = EXPERTS
        for module in model.modules():
            if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
                module.unread = False  # set while nobody reads the values of the output, see runtime.activations


def experts_forward(experts: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's experts, (T, D). An index of E or more belongs to no expert."""
    factors = _factors(_adapters(experts))
    trained = {id(it) for it in experts.parameters() if it.requires_grad} - {id(it) for it in factors}
    differs = any(it.requires_grad for it in (hidden_TD, top_k_weights_TK, *factors))
    if trained or not (differs and torch.is_grad_enabled()):
        return _run(experts, hidden_TD, top_k_weights_TK, _route(experts, hidden_TD, top_k_index_TK))
    result: Tensor = _Experts.apply(experts, top_k_index_TK, hidden_TD, top_k_weights_TK, *factors)  # type: ignore[no-untyped-call]
    return result


class _Experts(torch.autograd.Function):
    """See above. Arguments: the experts, (T, K) indices, (T, D), (T, K) weights, and A and B of each adapter."""

    @staticmethod
    def forward(
        ctx: Any, experts: Any, index_TK: Tensor, hidden_TD: Tensor, weights_TK: Tensor, *factors: Tensor
    ) -> Tensor:
        ctx.owner, ctx.autocast = experts, active_autocast(hidden_TD.device)
        ctx.set_materialize_grads(False)
        draws = any(adapter.draws() for adapter in _adapters(experts).values())
        states = random_states(hidden_TD.device) if draws else []
        kept_PH = order_P = ctx.tiles = None
        if getattr(experts, "unread", False) and not draws:  # what draws is run all the same: others draw after it
            out_TD = torch.empty_like(hidden_TD)
        else:
            order_P, tiles = routing = _route(experts, hidden_TD, index_TK)
            if runs_again() or ctx.autocast:  # under which products have other dtypes
                order_P = None
            else:
                kept_PH, ctx.tiles = hidden_TD.new_empty(len(order_P), _width(experts)), tiles
            out_TD = _run(experts, hidden_TD, weights_TK, routing, kept_PH)
        ctx.save_for_backward(index_TK, hidden_TD, weights_TK, order_P, kept_PH, *states)
        return out_TD

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if dout_TD is None:
            return None, None, *[None] * len(wanted)
        index_TK, hidden_TD, weights_TK, order_P, kept_PH, *states = ctx.saved_tensors
        with as_before(hidden_TD.device, states, ctx.autocast):
            known = None if order_P is None else _Routing(order_P, ctx.tiles)
            routing = known or _route(ctx.owner, hidden_TD, index_TK)
            return None, None, *_differentiate(ctx.owner, hidden_TD, weights_TK, dout_TD, routing, kept_PH, wanted)


class _Routing(NamedTuple):
    """Which expert works on which pairs.

    Attributes:
        order_P: the pairs, by their experts; without those of no expert.
        tiles: (expert, rows) of each tile.
    """

    order_P: Tensor
    tiles: list[tuple[int, int]]


def _route(experts: Any, hidden_TD: Tensor, index_TK: Tensor) -> _Routing:
    expert_P, order_P = index_TK.reshape(-1).sort(stable=True)
    # a token goes to each expert once at most, so that no expert has more rows than there are tokens
    most = min(hidden_TD.shape[0], tile_rows(index_TK.numel(), experts.num_experts, hidden_TD.shape[1]))
    tiles = list(_tiles(_counts(expert_P, experts.num_experts, most), most))
    return _Routing(order_P[: sum(rows for _, rows in tiles)], tiles)


def _run(
    experts: Any, hidden_TD: Tensor, weights_TK: Tensor, routing: _Routing, kept_PH: Tensor | None = None
) -> Tensor:
    """The layer's output; the outputs of the first product to `kept_PH`."""
    token_P, weights_P = _of_pairs(routing, weights_TK)
    out_TD = torch.zeros_like(hidden_TD)

    def work(e: int, rows: slice) -> None:  # a function, so that nothing of a tile is held while the next is worked on
        kept_RH = None if kept_PH is None else kept_PH[rows]
        first_RH = _product(experts, _first(experts), e, hidden_TD.index_select(0, token_P[rows]), out=kept_RH)
        out_RD = _normed(experts, _product(experts, "down_proj", e, _inner(experts, first_RH)))
        # within a tile each token is there once, so that the sum does not depend on the order of CUDA's threads
        out_TD.index_add_(0, token_P[rows], (out_RD * weights_P[rows].unsqueeze(1)).to(out_TD.dtype))

    for e, rows in _worked_on(experts, hidden_TD, routing):
        work(e, rows)
    return out_TD


def _differentiate(
    experts: Any,
    hidden_TD: Tensor,
    weights_TK: Tensor,
    dout_TD: Tensor,
    routing: _Routing,
    kept_PH: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the input, of the weights and of the adapters' factors, where they are wanted."""
    token_P, weights_P = _of_pairs(routing, weights_TK)
    first, adapters = _first(experts), _adapters(experts)
    like = [hidden_TD, weights_TK, *_factors(adapters)]
    found = [it.new_zeros(it.shape) if want else None for it, want in zip(like, wanted, strict=True)]
    dhidden_TD, dweights_TK = found[:2]
    splits = {}  # by the name of the stack: the adapter's factors, by expert, and their gradients
    for at, (name, adapter) in enumerate(adapters.items()):
        dA, dB = found[2 + 2 * at : 4 + 2 * at]
        if dA is not None and dB is not None:
            splits[name] = adapter.split(adapter.lora_A, adapter.lora_B), adapter.split(dA, dB)

    def work(e: int, rows: slice) -> None:
        leaves = {name: [of[e].detach().requires_grad_() for of in split] for name, (split, _) in splits.items()}
        x_RD = hidden_TD.index_select(0, token_P[rows]).requires_grad_(wanted[0])
        known = {} if kept_PH is None else {"unread": True, "out": kept_PH[rows]}
        with torch.enable_grad():
            first_RH = _product(experts, first, e, x_RD, **_with(leaves.get(first)), **known)
            inner_RI = _inner(experts, first_RH)
        del first_RH
        dout_RD = dout_TD.index_select(0, token_P[rows])
        dinner_RI, dweights_R, *dfactors = _back_to_inner(
            experts, e, inner_RI.detach(), weights_P[rows], dout_RD, leaves.get("down_proj", [])
        )
        del dout_RD
        if dweights_TK is not None:
            dweights_TK.view(-1).index_copy_(0, routing.order_P[rows], dweights_R.to(dweights_TK.dtype))
        into = [x_RD] * wanted[0] + leaves.get(first, [])
        dinto = list(torch.autograd.grad(inner_RI, into, dinner_RI)) if into else []
        if dhidden_TD is not None:
            dhidden_TD.index_add_(0, token_P[rows], dinto.pop(0))
        for name, more in ((first, dinto), ("down_proj", dfactors)):
            for of, gradient in zip(splits[name][1] if more else (), more, strict=True):
                of[e].add_(gradient)

    for e, rows in _worked_on(experts, hidden_TD, routing):
        work(e, rows)
    return found


def _back_to_inner(
    experts: Any, e: int, inner_RI: Tensor, weights_R: Tensor, dout_RD: Tensor, factors: list[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of the inner values, of the weights (R,), and of the factors."""
    if getattr(experts, "has_post_expert_norm", False):
        inner_RI, weights_R = inner_RI.requires_grad_(), weights_R.detach().requires_grad_()
        with torch.enable_grad():
            out_RD = _normed(experts, _product(experts, "down_proj", e, inner_RI, **_with(factors)))
            weighted_RD = (out_RD * weights_R.unsqueeze(1)).to(dout_RD.dtype)
        return torch.autograd.grad(weighted_RD, [inner_RI, weights_R, *factors], dout_RD)
    # without a norm w * (h W) is (w * h) W, whose gradients need no values of the product
    weighted_RI = (inner_RI * weights_R.unsqueeze(1)).to(inner_RI.dtype).requires_grad_()
    with torch.enable_grad():
        out_RD = _product(experts, "down_proj", e, weighted_RI, unread=True, **_with(factors))
        edge = get_gradient_edge(out_RD)
    del out_RD
    dweighted_RI, *dfactors = torch.autograd.grad([edge], [weighted_RI, *factors], [dout_RD])
    dweights_R = (inner_RI * dweighted_RI).sum(1, dtype=torch.float32)
    if experts.has_bias:
        dweights_R += dout_RD @ experts.down_proj_bias[e].to(dout_RD.dtype)
    return (dweighted_RI * weights_R.unsqueeze(1)).to(inner_RI.dtype), dweights_R, *dfactors


def _of_pairs(routing: _Routing, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each pair, and its weight."""
    token_P = routing.order_P.div(weights_TK.shape[1], rounding_mode="floor")
    return token_P, weights_TK.reshape(-1).index_select(0, routing.order_P)


def _worked_on(experts: Any, hidden_TD: Tensor, routing: _Routing) -> Iterator[tuple[int, slice]]:
    """(expert, its rows of the pairs) of each tile; without data some tiles stand for others like them."""
    heights = [rows for _, rows in routing.tiles]
    slices = [slice(end - rows, end) for rows, end in zip(heights, accumulate(heights), strict=True)]
    tiles = [(e, rows) for (e, _), rows in zip(routing.tiles, slices, strict=True)]
    if not hidden_TD.is_meta or torch.is_grad_enabled():  # a graph of few tiles would not be differentiated as of all
        yield from tiles
        return
    times = traced_tiles(heights)
    EACH_IS(hidden_TD, min(experts.num_experts, sum(heights)) / len(tiles))  # tiles of a balanced routing
    for tile, each in compress(zip(tiles, times, strict=True), times):
        if each > 1:
            STANDS_FOR(hidden_TD, each)
        yield tile
        if each > 1:
            STANDS_FOR(hidden_TD, 1)
    EACH_IS(hidden_TD, 1.0)


def tile_rows(pairs: int, experts: int, hidden: int) -> int:
    """The most rows that are worked on at once.

    About as many as each expert has when all have the same, and 1/128 of all pairs, so that the few rows more that most
    routings give to some experts need no second tile, and still some expert fills one, or nearly. At least D / 4, with
    which a tile takes about the memory of the slice that is dequantized for it: in training (2 D + 6 I) numbers a row,
    and 2 * D * I of the slice, for I of 0.3 to 3.5 D as published models have.
    """
    rows = max(-(-pairs // experts) + pairs // 128, hidden // 4)
    unit = ROWS if rows > 4 * ROWS else ROWS // 4  # a CPU multiplies many rows in multiples of it
    return unit * -(-rows // unit)


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
    """Without data: for how many of its height each tile stands; 0 where another stands for it."""
    heights = Counter(rows)
    return [heights.pop(high, 0) for high in rows]


# What they say to whoever traces tensors without data: for how many of its like each following operation stands; and
# for how many each following tile stands in time alone, as their rows are the same in all
torch.library.define("lowmem_ft::stands_for", "(Tensor x, int times) -> ()")
torch.library.define("lowmem_ft::each_is", "(Tensor x, float tiles) -> ()")
STANDS_FOR = torch.ops.lowmem_ft.stands_for.default
EACH_IS = torch.ops.lowmem_ft.each_is.default


@torch.library.register_fake("lowmem_ft::stands_for")  # type: ignore[untyped-decorator]
def _(x: Tensor, times: int) -> None:
    return None


@torch.library.register_fake("lowmem_ft::each_is")  # type: ignore[untyped-decorator]
def _(x: Tensor, tiles: float) -> None:
    return None


def _first(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _adapters(experts: Any) -> dict[str, Any]:
    """Those that compute products, by the name of the stack."""
    found = {name: getattr(getattr(experts, name), "adapter", None) for name in (_first(experts), "down_proj")}
    return {name: adapter for name, adapter in found.items() if adapter is not None and adapter.enabled}


def _factors(adapters: Mapping[str, Any]) -> list[Tensor]:
    return [factor for adapter in adapters.values() for factor in (adapter.lora_A, adapter.lora_B)]


def _width(experts: Any) -> int:
    """H."""
    width: int = getattr(experts, _first(experts)).shape[2 if experts.is_transposed else 1]
    return width


def _inner(experts: Any, first_RH: Tensor) -> Tensor:
    """What the activation makes of the outputs of the first product, (R, I)."""
    inner_RI: Tensor = (experts._apply_gate if experts.has_gate else experts.act_fn)(first_RH)
    return inner_RI


def _with(factors: list[Tensor] | None) -> dict[str, Any]:
    """What to give to a product; a stack without an adapter takes no factors."""
    return {"factors": factors} if factors else {}


def _normed(experts: Any, out_RD: Tensor) -> Tensor:
    normed: Tensor = experts.post_expert_norm(out_RD) if getattr(experts, "has_post_expert_norm", False) else out_RD
    return normed


def _product(experts: Any, name: str, e: int, x: Tensor, **how: Any) -> Tensor:
    """The product with slice `e` of the stack `name`; `how` is as of `StackSlice.product`."""
    stack, transposed = getattr(experts, name), experts.is_transposed
    bias = getattr(experts, f"{name}_bias")[e] if experts.has_bias else None
    if not isinstance(stack, Tensor):
        product: Tensor = stack[e].product(x, transposed, bias, **how)
        return product
    if not stack.requires_grad:
        return frozen_product(stack, x, e, transposed, bias, **how)
    return F.linear(x, stack[e].t() if transposed else stack[e], bias)
