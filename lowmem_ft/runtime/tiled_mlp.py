"""The MLP of a block in tiles of tokens, so that what it holds does not grow with the sequence.

An MLP works on each token alone. Its hidden layer is several times as wide as the model, and of it backward wants the
values and the gradients of some tensors at once: with long sequences that is the most that a block takes. So a tile of
tokens is worked on at a time. Forward keeps the input alone; backward runs each tile once more, with the same random
numbers, and differentiates it at once. Bekman et al. 2025, "Arctic Long Sequence Training" (arXiv:2506.13996).

In a block that recomputes, the products are those of recomputing without tiles: where the MLP's values only reach a sum
the block's second run leaves all of it out (`runtime.activations`), and each tile's second run its last product.

Letters in shapes: B rows, T tokens of a row, N = B * T, R tokens of a tile, D features
of an input, O features of the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.quant.swap import is_linear
from lowmem_ft.runtime.activations import unread_layers
from lowmem_ft.runtime.blocks import find_blocks
from lowmem_ft.runtime.mlp_act import linears_of, run_keeping_products
from lowmem_ft.runtime.rerun import Unread, active_autocast, as_before, random_states, runs_again
from lowmem_ft.runtime.traced import standing_for, traced_tiles

_NAMES = frozenset({"mlp", "ffn", "feed_forward", "shared_mlp"})  # of MLPs in transformers' decoder layers


def find_mlps(model: nn.Module) -> list[nn.Module]:
    """The MLPs of the decoder layers that work on each token alone, each once.

    A mixture of experts is none of them: it has tiles of its own (`runtime.experts`). Nor is one whose layers are those
    of the block itself (OPT).
    """
    children = (child for block in find_blocks(model)[1] for child in block.named_children())
    found = {id(module): module for name, module in children if name in _NAMES}
    return [module for module in found.values() if any(True for _ in module.children()) and _of_tokens(module)]


def _of_tokens(module: nn.Module) -> bool:
    """Whether `module` is made of nothing but what works on each token alone."""
    wrapped = getattr(module, "base_layer", None)
    if isinstance(wrapped, nn.Module):  # an adapter on it
        return _of_tokens(wrapped)
    if is_linear(module):
        return True
    own = next(module.parameters(recurse=False), None), next(module.buffers(recurse=False), None)
    if own != (None, None):
        return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    children = list(module.children())
    if children:
        return all(map(_of_tokens, children))
    if isinstance(module, nn.Dropout | nn.Identity):
        return True
    home = type(module).__module__  # activations are PyTorch's, transformers' or the model's own
    return home == "torch.nn.modules.activation" or not home.startswith("torch.")


class TiledMlps:
    """The MLPs of a model's blocks. `work_in(0)` gives every MLP its own forward back."""

    def __init__(self, model: nn.Module) -> None:
        self._mlps = [TiledMlp(module) for module in find_mlps(model)]

    def __len__(self) -> int:
        return len(self._mlps)

    def work_in(self, tokens: int, *, recompute_act: bool = False) -> None:
        """Let each MLP work in tiles of so many tokens from now on; with 0, on all tokens at once.

        Args:
            recompute_act: what backward wants is kept of products alone, see `runtime.mlp_act`.
        """
        for mlp in self._mlps:
            mlp.work_in(tokens, recompute_act=recompute_act)

    def forget(self) -> None:
        """Forget what a first backward found, as if there had been none."""
        for mlp in self._mlps:
            mlp.inner.layers = None


class TiledMlp:
    """One MLP.

    Attributes:
        unread: set while nobody reads the values of the output, see `runtime.activations`.
        inner: the layers of it that a tile's second run leaves out.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.tokens, self.unread, self.inner = module, 0, False, Unread()
        self.recompute_act = False
        self._own: tuple[Any, Callable[..., Tensor]] | None = None  # the forward on the instance, and the one it has
        self._like: tuple[int, torch.dtype] | None = None  # O and dtype of the output

    def work_in(self, tokens: int, *, recompute_act: bool) -> None:
        """See `TiledMlps.work_in`."""
        self.tokens, self.recompute_act = tokens, recompute_act
        works = tokens > 0 or recompute_act
        if works and self._own is None:
            self._own = vars(self.module).get("forward"), self.module.forward
            self.module.forward = functools.wraps(self.module.forward)(functools.partial(_called, self))
        elif not works and self._own is not None:
            before, self._own = self._own[0], None
            del self.module.forward
            if before is not None:
                self.module.forward = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP's own forward."""
        assert self._own is not None
        own, tensors = self._own[1], all(isinstance(it, Tensor) for it in args)
        keeps = torch.is_grad_enabled() and not runs_again()  # else what is kept is wanted at once
        if self.recompute_act and keeps and tensors and not kwargs:
            linears = linears_of(self.module)
            inside = {module for linear in linears for module in linear.modules()}
            if not self.draws(besides=inside):
                return run_keeping_products(own, linears, args)
        return own(*args, **kwargs)

    def draws(self, *, besides: Collection[nn.Module] = ()) -> bool:
        """Whether it draws random numbers now, or modules of it that are not among these."""
        for module in (it for it in self.module.modules() if it not in besides):
            rates = [rate for name, rate in vars(module).items() if "drop" in name and isinstance(rate, float)]
            rates += [module.p] if isinstance(module, nn.Dropout) else []
            if module.training and any(rate > 0 for rate in rates):
                return True
        return False

    def trains(self) -> bool:
        """Whether it has parameters that get gradients."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def run(self, inputs_BTD: Sequence[Tensor], tokens: int) -> Tensor:
        """(B, T, O), in tiles of so many tokens, without a graph."""
        flat_1ND, out_BTO = [_flat(it) for it in inputs_BTD], None
        for rows in _tiles(flat_1ND[0], tokens):
            out_BTO = self._run_tile([it[:, rows] for it in flat_1ND], rows, out_BTO, inputs_BTD[0])
        assert out_BTO is not None
        return out_BTO

    def _run_tile(self, tiles_1RD: Sequence[Tensor], rows: slice, out_BTO: Tensor | None, like_BTD: Tensor) -> Tensor:
        # a function, so that nothing of a tile is held while the next is worked on
        y_1RO = self.forward(*tiles_1RD)
        if out_BTO is None:
            self._like = y_1RO.shape[-1], y_1RO.dtype
            # not a view of (1, N, O), which the model could not change in place (Falcon does)
            out_BTO = y_1RO.new_empty(*like_BTD.shape[:-1], y_1RO.shape[-1])
        _flat(out_BTO)[:, rows] = y_1RO
        return out_BTO

    def left_out(self, like_BTD: Tensor) -> Tensor | None:
        """(B, T, O) that is not filled, if nobody reads it; what draws random numbers is run all the same, as others
        draw after it."""
        if not self.unread or self._like is None or self.draws():
            return None
        width, dtype = self._like
        return like_BTD.new_empty(*like_BTD.shape[:-1], width, dtype=dtype)

    def differentiate(
        self, inputs_BTD: Sequence[Tensor], wanted: Sequence[bool], dy_BTO: Tensor, tokens: int
    ) -> list[Tensor | None]:
        """The gradients of the inputs, where they are wanted. Parameters get theirs by accumulation, tile by tile."""
        found = [it.new_empty(it.shape) if want else None for it, want in zip(inputs_BTD, wanted, strict=True)]
        flat_1ND, dy_1NO = [_flat(it) for it in inputs_BTD], _flat(dy_BTO)
        gradients_1ND = [None if it is None else _flat(it) for it in found]
        for rows in _tiles(flat_1ND[0], tokens):
            parts = [None if it is None else it[:, rows] for it in gradients_1ND]
            self._differentiate_tile([it[:, rows] for it in flat_1ND], parts, dy_1NO[:, rows])
        return found

    def _differentiate_tile(
        self, tiles_1RD: Sequence[Tensor], gradients_1RD: Sequence[Tensor | None], dy_1RO: Tensor
    ) -> None:
        wanted = [gradient is not None for gradient in gradients_1RD]
        inputs = [it.detach().requires_grad_(want) for it, want in zip(tiles_1RD, wanted, strict=True)]
        with torch.enable_grad(), self.inner.left_out():
            y_1RO = self.forward(*inputs)
        if self.inner.layers is None:
            self.inner.layers = unread_layers([y_1RO])
        if y_1RO.requires_grad:
            torch.autograd.backward(y_1RO, dy_1RO)
        for leaf, gradient in zip(inputs, gradients_1RD, strict=True):
            if gradient is not None:
                gradient.copy_(torch.zeros_like(gradient) if leaf.grad is None else leaf.grad)


class _InTiles(torch.autograd.Function):
    """An MLP of which only the inputs survive until backward, which runs and differentiates one tile at a time.

    `anchor` is a leaf that requires grad: inputs that need no gradient may still meet parameters that do.
    """

    @staticmethod
    def forward(ctx: Any, mlp: TiledMlp, anchor: Tensor, *inputs_BTD: Tensor) -> Tensor:
        device = inputs_BTD[0].device
        ctx.owner, ctx.tokens, ctx.autocast = mlp, mlp.tokens, active_autocast(device)
        states = random_states(device) if mlp.draws() else []
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs_BTD, *states)
        left_out = mlp.left_out(inputs_BTD[0])
        return mlp.run(inputs_BTD, mlp.tokens) if left_out is None else left_out

    @staticmethod
    def backward(ctx: Any, dy_BTO: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if dy_BTO is None:
            return None, None, *([None] * len(wanted))
        inputs_BTD, states = ctx.saved_tensors[: len(wanted)], ctx.saved_tensors[len(wanted) :]
        if dy_BTO.device.type == "cpu":
            # a step takes the most here, on top of the holes of what came before: half a billion int8 weights with DoRA
            # 1134 MiB without this, and 1091 with it
            release_freed_memory()
        with as_before(inputs_BTD[0].device, states, ctx.autocast):
            return None, None, *ctx.owner.differentiate(inputs_BTD, wanted, dy_BTO, ctx.tokens)


def _called(mlp: TiledMlp, *args: Any, **kwargs: Any) -> Any:
    """What calling the MLP's module does."""
    shapes = {tuple(it.shape[:2]) if isinstance(it, Tensor) and it.ndim == 3 else None for it in args}
    whole = not mlp.tokens or kwargs or len(shapes) != 1 or None in shapes
    if whole or args[0].shape[:2].numel() <= mlp.tokens:
        return mlp.forward(*args, **kwargs)
    if torch.is_grad_enabled() and (mlp.trains() or any(it.requires_grad for it in args)):
        anchor = torch.empty(0, requires_grad=True)
        return _InTiles.apply(mlp, anchor, *args)  # type: ignore[no-untyped-call]
    return mlp.run(args, mlp.tokens)


def _tiles(like_1ND: Tensor, tokens: int) -> Iterator[slice]:
    """The tokens of each tile, of N; without data some tiles stand for others like them."""
    count = like_1ND.shape[1]
    starts = range(0, count, tokens)
    if not like_1ND.is_meta:
        yield from (slice(start, min(start + tokens, count)) for start in starts)
        return
    heights = [tokens] * (count // tokens) + [count % tokens] * (count % tokens > 0)
    times = [1, *traced_tiles(heights[1:])]  # the first one makes what all of them write to
    for start, each in compress(zip(starts, times, strict=True), times):
        with standing_for(like_1ND, each):
            yield slice(start, min(start + tokens, count))


def _flat(t_BTD: Tensor) -> Tensor:
    """(1, N, D)."""
    return t_BTD.reshape(1, -1, t_BTD.shape[-1])
