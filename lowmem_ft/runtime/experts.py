"""A mixture-of-experts layer whose memory does not depend on where tokens are routed.

transformers' eager forward asks the device for each expert which tokens are its own, and keeps for backward several
times as much as its input. Here the (token, expert) pairs are sorted, the device is waited for once in each run of a
block, and each expert's rows are worked on in tiles of limited height, of which nothing but the outputs of the first
product survives. In the second run of a block that recomputes, not even those: backward then runs a tile's first
product once more and differentiates that tile at once. So a plan made without data holds for every routing.

Registered with transformers as the experts implementation `EXPERTS`. The products are those of the weights themselves
(`stack[e]`), whether dense, quantized or adapted.

Letters in shapes: T tokens, K experts per token, E experts, P = T * K pairs, D hidden size, I inner size, H outputs of
the first product (2 * I with a gate), R a tile's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from lowmem_ft.quant.experts import frozen_product, slices_of
from lowmem_ft.quant.products import mm
from lowmem_ft.runtime.expert_tiles import Routing, Rows, Tile, route
from lowmem_ft.runtime.rerun import active_autocast, as_before, random_states, runs_again
from lowmem_ft.runtime.traced import EACH_IS, standing_for, traced_tiles

EXPERTS = "lowmem_ft"


class ExpertLayers:
    """The layers of experts of a model, if they go by transformers' experts interface: they run through
    `experts_forward` from now on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers: list[Any] = []
        if type(model)._can_set_experts_implementation():
            ExpertsInterface.register(EXPERTS, experts_forward)
            for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
                config._experts_implementation = EXPERTS
            self._layers = [it for it in model.modules() if hasattr(it, "has_gate") and hasattr(it, "is_transposed")]
        for layer in self._layers:
            layer.unread = False  # set while nobody reads the values of the output, see runtime.activations

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def count(self) -> int:
        """Experts of a layer, of the one with the most."""
        return max(int(layer.num_experts) for layer in self._layers)

    @property
    def slice_values(self) -> int:
        """Values of the larger matrix of an expert, of the layer with the largest."""
        stacks = (getattr(layer, name) for layer in self._layers for name in (_first(layer), "down_proj"))
        return max(int(prod(stack.shape[1:])) for stack in stacks)

    def work_on(self, together: int) -> None:
        """Let each layer make the products of up to so many experts at once from now on."""
        for layer in self._layers:
            layer.together = together


def experts_forward(experts: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's experts, (T, D). An index of E or more belongs to no expert."""
    factors = _factors(_adapters(experts))
    trained = {id(it) for it in experts.parameters() if it.requires_grad} - {id(it) for it in factors}
    differs = any(it.requires_grad for it in (hidden_TD, top_k_weights_TK, *factors))
    if trained or not (differs and torch.is_grad_enabled()):
        routing = _route(experts, hidden_TD, top_k_index_TK, together=1 if trained else None)
        return _run(experts, hidden_TD, top_k_weights_TK, routing)
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
        kept_PH = order_P = told_3S = ctx.tiles = None
        if getattr(experts, "unread", False) and not draws:  # what draws is run all the same: others draw after it
            out_TD = torch.empty_like(hidden_TD)
        else:
            order_P, ctx.tiles, told_3S = routing = _route(experts, hidden_TD, index_TK)
            if not runs_again() and not ctx.autocast:  # under which products have other dtypes
                kept_PH = hidden_TD.new_empty(len(order_P), _width(experts))
            out_TD = _run(experts, hidden_TD, weights_TK, routing, kept_PH)
        ctx.save_for_backward(index_TK, hidden_TD, weights_TK, order_P, told_3S, kept_PH, *states)
        return out_TD

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if dout_TD is None:
            return None, None, *[None] * len(wanted)
        index_TK, hidden_TD, weights_TK, order_P, told_3S, kept_PH, *states = ctx.saved_tensors
        with as_before(hidden_TD.device, states, ctx.autocast):
            known = None if order_P is None else Routing(order_P, ctx.tiles, told_3S)
            routing = known or _route(ctx.owner, hidden_TD, index_TK)
            return None, None, *_differentiate(ctx.owner, hidden_TD, weights_TK, dout_TD, routing, kept_PH, wanted)


def _route(experts: Any, hidden_TD: Tensor, index_TK: Tensor, *, together: int | None = None) -> Routing:
    most = getattr(experts, "together", 1) if together is None else together
    return route(index_TK, experts=experts.num_experts, hidden=hidden_TD.shape[1], together=most)


def _run(
    experts: Any, hidden_TD: Tensor, weights_TK: Tensor, routing: Routing, kept_PH: Tensor | None = None
) -> Tensor:
    """The layer's output; the outputs of the first product to `kept_PH`."""
    token_P, weights_P = _of_pairs(routing, weights_TK)
    out_TD = torch.zeros_like(hidden_TD)

    def work(tile: Tile) -> None:  # a function, so that nothing of a tile is held while the next is worked on
        rows = Rows(routing, tile)
        kept_RH = kept_PH[tile.pairs] if kept_PH is not None and len(rows.shape) == 1 else None
        first_RH = _product(experts, _first(experts), rows.experts, rows.of_tokens(hidden_TD, token_P), out=kept_RH)
        if kept_PH is not None and kept_RH is None:
            rows.pairs_of(first_RH, out=kept_PH[tile.pairs])
        out_RD = _normed(experts, _product(experts, "down_proj", rows.experts, _inner(experts, first_RH)))
        weighted_RD = (out_RD * rows.weights(weights_P).unsqueeze(-1)).to(out_TD.dtype)
        rows.add_to_tokens(out_TD, token_P, weighted_RD)

    for tile in _worked_on(experts, hidden_TD, routing):
        work(tile)
    return out_TD


def _differentiate(
    experts: Any,
    hidden_TD: Tensor,
    weights_TK: Tensor,
    dout_TD: Tensor,
    routing: Routing,
    kept_PH: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the input, of the weights and of the adapters' factors, where they are wanted."""
    token_P, weights_P = _of_pairs(routing, weights_TK)
    first, adapters = _first(experts), _adapters(experts)
    like = [hidden_TD, weights_TK, *_factors(adapters)]
    found = [it.new_zeros(it.shape) if want else None for it, want in zip(like, wanted, strict=True)]
    dhidden_TD, dweights_TK = found[:2]
    stacks = {}  # by the name of the stack: the adapter's factors, expert by expert, and their gradients
    for at, (name, adapter) in enumerate(adapters.items()):
        dA, dB = found[2 + 2 * at : 4 + 2 * at]
        if dA is not None and dB is not None:
            stacks[name] = adapter.stacked(adapter.lora_A, adapter.lora_B), adapter.stacked(dA, dB)

    def work(tile: Tile) -> None:
        rows = Rows(routing, tile)
        leaves = {
            name: [slices_of(of, rows.experts).detach().requires_grad_() for of in factors]
            for name, (factors, _) in stacks.items()
        }
        x_RD = rows.of_tokens(hidden_TD, token_P).requires_grad_(wanted[0])
        known = {} if kept_PH is None else {"unread": True, "out": rows.take(kept_PH)}
        with torch.enable_grad():
            first_RH = _product(experts, first, rows.experts, x_RD, **_with(leaves.get(first)), **known)
            inner_RI = _inner(experts, first_RH)
        del first_RH, known
        dout_RD = rows.of_tokens(dout_TD, token_P)
        dinner_RI, dweights_R, *dfactors = _back_to_inner(
            experts, rows.experts, inner_RI.detach(), rows.weights(weights_P), dout_RD, leaves.get("down_proj", [])
        )
        del dout_RD
        if dweights_TK is not None:
            dweights_own = rows.pairs_of(dweights_R).to(dweights_TK.dtype)
            dweights_TK.view(-1).index_copy_(0, routing.order_P[tile.pairs], dweights_own)
        into = [x_RD] * wanted[0] + leaves.get(first, [])
        dinto = list(torch.autograd.grad(inner_RI, into, dinner_RI)) if into else []
        if dhidden_TD is not None:
            rows.add_to_tokens(dhidden_TD, token_P, dinto.pop(0))
        for name, more in ((first, dinto), ("down_proj", dfactors)):
            for of, gradient in zip(stacks[name][1] if more else (), more, strict=True):
                rows.add_to_experts(of, gradient)

    for tile in _worked_on(experts, hidden_TD, routing):
        work(tile)
    return found


def _back_to_inner(
    experts: Any,
    e: int | tuple[int, ...],
    inner_RI: Tensor,
    weights_R: Tensor,
    dout_RD: Tensor,
    factors: list[Tensor],
) -> tuple[Tensor, ...]:
    """The gradients of the inner values, of the weights (R,), and of the factors."""
    if getattr(experts, "has_post_expert_norm", False):
        inner_RI, weights_R = inner_RI.requires_grad_(), weights_R.detach().requires_grad_()
        with torch.enable_grad():
            out_RD = _normed(experts, _product(experts, "down_proj", e, inner_RI, **_with(factors)))
            weighted_RD = (out_RD * weights_R.unsqueeze(-1)).to(dout_RD.dtype)
        return torch.autograd.grad(weighted_RD, [inner_RI, weights_R, *factors], dout_RD)
    # without a norm w * (h W) is (w * h) W, whose gradients need no values of the product
    weighted_RI = (inner_RI * weights_R.unsqueeze(-1)).to(inner_RI.dtype).requires_grad_()
    with torch.enable_grad():
        out_RD = _product(experts, "down_proj", e, weighted_RI, unread=True, **_with(factors))
        edge = get_gradient_edge(out_RD)
    del out_RD
    dweighted_RI, *dfactors = torch.autograd.grad([edge], [weighted_RI, *factors], [dout_RD])
    dweights_R = (inner_RI * dweighted_RI).sum(-1, dtype=torch.float32)
    if experts.has_bias:
        bias_D = slices_of(experts.down_proj_bias, e).to(dout_RD.dtype)
        dweights_R += mm(dout_RD, bias_D.unsqueeze(-1)).squeeze(-1)
    return (dweighted_RI * weights_R.unsqueeze(-1)).to(inner_RI.dtype), dweights_R, *dfactors


def _of_pairs(routing: Routing, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each pair, and its weight."""
    token_P = routing.order_P.div(weights_TK.shape[1], rounding_mode="floor")
    return token_P, weights_TK.reshape(-1).index_select(0, routing.order_P)


def _worked_on(experts: Any, hidden_TD: Tensor, routing: Routing) -> Iterator[Tile]:
    """Each tile; without data some tiles stand for others like them."""
    if not hidden_TD.is_meta or torch.is_grad_enabled():  # a graph of few tiles would not be differentiated as of all
        yield from routing.tiles
        return
    times = traced_tiles([len(tile.experts) * tile.height for tile in routing.tiles])
    together = max(len(tile.experts) for tile in routing.tiles)
    balanced = -(-min(experts.num_experts, len(routing.order_P)) // together)  # tiles of such a routing
    EACH_IS(hidden_TD, balanced / len(routing.tiles))
    for tile, each in compress(zip(routing.tiles, times, strict=True), times):
        with standing_for(hidden_TD, each):
            yield tile
    EACH_IS(hidden_TD, 1.0)


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


def _product(experts: Any, name: str, e: int | tuple[int, ...], x: Tensor, **how: Any) -> Tensor:
    """The product with slice `e` of the stack `name`, or with several; `how` is as of `StackSlice.product`."""
    stack, transposed = getattr(experts, name), experts.is_transposed
    bias = slices_of(getattr(experts, f"{name}_bias"), e) if experts.has_bias else None
    if not isinstance(stack, Tensor):
        product: Tensor = (stack.matmul if stack.adapter is None else stack.adapter)(x, e, transposed, bias, **how)
        return product
    if not stack.requires_grad:
        return frozen_product(stack, x, e, transposed, bias, **how)
    return F.linear(x, stack[e].t() if transposed else stack[e], bias)
