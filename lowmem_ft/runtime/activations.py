"""What each block does with its activations between forward and backward: keep them, compute them again, or offload.

Recomputing is gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): a block's forward runs without a graph and
only its inputs survive; backward runs it once more, with the same random numbers, and differentiates that. A block
that offloads recomputes too, and its input survives below the device (`runtime.shelf`).

Recomputing is selective where attention is kept (as in Korthikanti et al. 2022, arXiv:2205.05198): its output, as large
as the block's input, and one number per query survive too, and the second run does not attend again. Of all that a
block stores this saves the most time per byte in long sequences, since attention's time grows with their square.

The second run leaves out products whose values nobody reads: the gradient of `residual + W h` needs neither W h nor the
sum, so a Llama block computes its down projection only once. That is a quarter of a block's products.
"""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import Cache

from lowmem_ft.core.errors import ConfigError, UnsupportedError
from lowmem_ft.runtime.attention import Attended
from lowmem_ft.runtime.blocks import find_blocks
from lowmem_ft.runtime.rerun import Unread, active_autocast, as_before, random_states
from lowmem_ft.runtime.shelf import Shelf


class ActivationPolicy:
    """The wrapped blocks of a model. `remove()` gives every block its own forward back."""

    def __init__(self, blocks: Sequence[nn.Module], offload: int, shelf: Shelf | None, *, keep_attention: bool) -> None:
        self._shelf = shelf
        # an accelerate hook may have put a forward of its own on the instance
        self._before = [(block, vars(block).get("forward")) for block in blocks]
        self.unread = [Unread() for _ in blocks]
        for at, (block, unread) in enumerate(zip(blocks, self.unread, strict=True)):
            place = _Place(shelf, at) if shelf is not None and at < offload else None
            attended = Attended() if keep_attention else None
            for module in block.modules() if attended is not None else ():
                module.attended = attended  # type: ignore[assignment]
            wrapped = functools.partial(_recomputed, block, block.forward, unread, place, attended)
            block.forward = functools.wraps(block.forward)(wrapped)

    def let_go(self) -> None:
        """Give back what an aborted step has left below the device, or on its way."""
        if self._shelf is not None:
            self._shelf.clear()

    def remove(self) -> None:
        self.let_go()
        for block, forward in self._before:
            del block.forward
            if forward is not None:
                block.forward = forward
            for module in block.modules():
                vars(module).pop("attended", None)
        self._before.clear()


def apply_activation_policy(
    model: nn.Module,
    *,
    keep: int,
    offload: int = 0,
    shelf: Shelf | None = None,
    keep_attention: bool = False,
) -> ActivationPolicy:
    """Let the last `keep` blocks of `model` keep their activations, and all others compute them again in backward.

    The last blocks keep, because theirs are the activations that live shortest. In evaluation and under `no_grad` a
    block runs as it is.

    Args:
        offload: so many blocks, the first ones, have their inputs on `shelf` meanwhile.
        keep_attention: whether those that compute again keep what their attention gave, if it is ours
            (`runtime.attention`).

    Raises:
        ConfigError: there are not so many blocks to keep and to offload.
        UnsupportedError: the blocks were not found.
    """
    _, blocks = find_blocks(model)
    if keep < 0 or offload < 0 or keep + offload > len(blocks):
        given = f"{keep} that keep and {offload} that offload" if offload else keep
        raise ConfigError("There are not so many blocks.", given=given, allowed=len(blocks))
    recomputing = list(blocks)[: len(blocks) - keep]
    return ActivationPolicy(recomputing, offload, shelf, keep_attention=keep_attention)


@dataclass(slots=True)
class _Place:
    """Where a block's input waits below the device: one at a time, so it is known of which call of the block."""

    shelf: Shelf
    at: int
    ticket: object = None


@dataclass(slots=True)
class _Call:
    """One call of a block: everything but the tensors, which autograd holds."""

    forward: Callable[..., Any]
    unread: Unread
    leaves: list[Any]  # arguments without structure; None where a tensor stood
    positions: list[int]  # of the tensors in `leaves`
    spec: TreeSpec
    device: torch.device
    autocast: list[tuple[str, torch.dtype]]
    place: _Place | None  # of the block's input, if it is offloaded
    attended: Attended | None  # if attention is kept
    shared: dict[str, type[UserDict[str, Any]]]  # arguments in which blocks leave keys and values for others
    offloaded: tuple[torch.Size, torch.dtype, torch.device] | None = None  # what it is like
    ticket: object = None  # of the place
    out_leaves: list[Any] = field(default_factory=list)
    out_positions: list[int] = field(default_factory=list)
    out_spec: TreeSpec | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the block returns and shares; what else it returns is kept in `out_leaves`."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        given = {name: kwargs[name] for name in self.shared}
        kwargs |= {name: kind(given[name]) for name, kind in self.shared.items()}
        returned = self.forward(*args, **kwargs)
        left = {
            name: {key: value for key, value in kwargs[name].items() if value is not before.get(key)}
            for name, before in given.items()
        }
        out, self.out_spec = tree_flatten((returned, left))
        self.out_positions = [i for i, leaf in enumerate(out) if isinstance(leaf, Tensor)]
        self.out_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in out]
        return [out[i] for i in self.out_positions]

    def run_first(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same, and what autograd shall hold of what was computed."""
        if self.attended is None:
            return self.run(tensors), []
        kept: list[Tensor] = []
        self.attended.kept = kept
        try:
            return self.run(tensors), kept
        finally:
            self.attended.kept = None

    def run_again(self, tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
        """The same with what was held."""
        if self.attended is None:
            return self.run(tensors)
        self.attended.again = [it.detach() for it in kept]
        try:
            return self.run(tensors)
        finally:
            self.attended.again = None

    def put_down(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What autograd shall hold of the inputs: all, or those after the first, which is offloaded."""
        if self.place is None:
            return tensors
        self.place.shelf.put(self.place.at, tensors[0])
        self.ticket = self.place.ticket = object()
        self.offloaded = tensors[0].shape, tensors[0].dtype, tensors[0].device
        return tensors[1:]

    def take_up(self, held: Sequence[Tensor]) -> Sequence[Tensor]:
        """The inputs again."""
        if self.place is None:
            return held
        assert self.offloaded is not None
        if self.place.ticket is not self.ticket:
            raise UnsupportedError(
                "An offloaded input is gone: another forward came before this backward, or another backward.",
                allowed="forward, backward, forward, backward: inputs of one forward at a time lie below the device",
                fix="put a forward without a backward under torch.no_grad(), or set policy.activations: recompute",
            )
        self.place.ticket = None
        return [self.place.shelf.take(self.place.at, *self.offloaded), *held]

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The block's own return value around `tensors`, and by argument what it has left there."""
        assert self.out_spec is not None
        for position, tensor in zip(self.out_positions, tensors, strict=True):
            self.out_leaves[position] = tensor
        out = tree_unflatten(self.out_leaves, self.out_spec)
        self.out_leaves = []  # this record lives until backward and must not hold the outputs
        return out


class _Recompute(torch.autograd.Function):
    """Forward without a graph; backward builds the graph of this one block and differentiates it.

    Parameters get their gradients by accumulation, so that their hooks fire as they do for a kept block. `anchor` is a
    leaf that requires grad: without one autograd would skip the first block, whose inputs need no gradient.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        held, states = call.put_down(tensors), random_states(call.device)
        outputs, kept = call.run_first(tensors)
        ctx.count = len(states), len(states) + len(held)
        ctx.save_for_backward(*states, *held, *kept)  # all of which autograd gives back with this block
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        wanted = ctx.needs_input_grad[2:]
        drawn, behind = ctx.count
        states, held, kept = (ctx.saved_tensors[at] for at in (slice(drawn), slice(drawn, behind), slice(behind, None)))
        taken = call.take_up(held)
        inputs = [t.detach().requires_grad_(want) for t, want in zip(taken, wanted, strict=True)]
        with as_before(call.device, states, call.autocast), torch.enable_grad(), call.unread.left_out():
            outputs = call.run_again(inputs, kept)
        call.out_leaves = []
        if call.unread.layers is None:
            call.unread.layers = unread_layers(outputs)
        used = [(t, g) for t, g in zip(outputs, gradients, strict=True) if g is not None and t.requires_grad]
        del outputs
        if used:
            torch.autograd.backward([t for t, _ in used], [g for _, g in used])
        return None, None, *(t.grad for t in inputs)


def _recomputed(
    block: nn.Module,
    forward: Callable[..., Any],
    unread: Unread,
    place: _Place | None,
    attended: Attended | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call `forward`, the own forward of `block`, so that backward computes its activations again."""
    shared = {name: value for name, value in kwargs.items() if isinstance(value, UserDict)}
    leaves, spec = tree_flatten((args, kwargs | {name: dict(value) for name, value in shared.items()}))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors: list[Tensor] = [leaves[i] for i in positions]
    differentiable = any(t.requires_grad for t in tensors) or any(p.requires_grad for p in block.parameters())
    if not (block.training and torch.is_grad_enabled() and differentiable):
        return forward(*args, **kwargs)
    for position in positions:
        leaves[position] = None
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    kinds = {name: type(value) for name, value in shared.items()}
    call = _Call(forward, unread, leaves, positions, spec, device, active_autocast(device), place, attended, kinds)
    anchor = torch.empty(0, requires_grad=True)
    outputs = _Recompute.apply(call, anchor, *tensors)  # type: ignore[no-untyped-call]
    if any(len(value) for value in kwargs.values() if isinstance(value, Cache)):
        # tensors in it bypass autograd here, and running twice changes it twice: gradients would silently be wrong
        raise UnsupportedError(
            "Blocks that share keys and values in a cache (prefix tuning) cannot recompute.",
            given=type(block).__name__,
            fix="call the model with use_cache=False, or set policy.activations: keep",
        )
    result, left = call.rebuild(outputs)
    for name, values in left.items():
        shared[name].update(values)
    return result


_SUMS = frozenset({"AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})


def unread_layers(outputs: Sequence[Tensor]) -> list[Any]:
    """The linear layers with a frozen weight, tiled MLPs and experts whose values no gradient of `outputs` depends on.

    Every use of such a layer's output must be a sum, a product with a number (Granite), or a view that leads to the
    outputs alone: their derivatives are constants. Read from autograd's graph, so it holds for every architecture.
    """
    roots = [t.grad_fn for t in outputs if t.grad_fn is not None]
    users: dict[Any, list[Any]] = {root: [] for root in roots}
    todo = list(dict.fromkeys(roots))
    while todo:
        node = todo.pop()
        for source, _ in node.next_functions:
            if source is None:
                continue
            if source not in users:
                users[source] = []
                todo.append(source)
            users[source].append(node)

    owners = {node: getattr(getattr(node, "weight", None), "__self__", getattr(node, "owner", None)) for node in users}
    return [layer for node, layer in owners.items() if hasattr(layer, "unread") and _only_summed(node, users)]


def _only_summed(node: Any, users: Mapping[Any, Sequence[Any]]) -> bool:
    # a function of its own: one that calls itself from within another holds the graph until garbage is collected
    return all((user.name() in _SUMS or _by_number(user)) and _only_summed(user, users) for user in users[node])


def _by_number(node: Any) -> bool:
    """Whether `node` is a product or quotient with a number of Python, which autograd holds in 64 bits; not with a
    tensor, whose values might come from those that are left out."""
    if node.name() not in ("MulBackward0", "DivBackward0"):
        return False
    other = node._saved_other
    return isinstance(other, Tensor) and other.ndim == 0 and other.dtype in (torch.float64, torch.int64)
