"""An MLP that keeps the outputs of its first products alone.

Between its products an MLP does cheap things to wide tensors: the activation function, and the gate's product. What
these give is a third of all that a Llama block keeps for backward. Here backward computes it once more, from the
outputs of the products, which are kept anyway. That is recomputation as selective as it gets (Korthikanti et al. 2022,
arXiv:2205.05198): no product runs twice.

Which tensors these are shows as the MLP runs, so it holds for every architecture: of what autograd saves there is the
MLP's input, the outputs of its linear layers, what these hold themselves, and the rest, which is computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_ft.quant.swap import is_linear
from lowmem_ft.runtime.rerun import active_autocast, as_before
from lowmem_ft.runtime.saved import keeping

Forward = Callable[..., Tensor]


def linears_of(module: nn.Module) -> list[nn.Module]:
    """The linear layers below `module`, with what adapters have put around them."""
    found: list[nn.Module] = []
    for child in module.children():
        wraps = isinstance(getattr(child, "base_layer", None), nn.Module)
        found += [child] if wraps or is_linear(child) else linears_of(child)
    return found


def run_keeping_products(forward: Forward, linears: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Tensor:
    """`forward(*inputs)` of a module with these linear layers, which draws no random numbers beside them."""
    call = _Call(forward, linears, inputs)
    y = call.run(inputs)
    return forward(*inputs) if call.is_spoiled() else y


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """All that is wanted was computed again."""


class _Call:
    """One call of an MLP: what its backward computes again from.

    A tensor to be computed again is known by its place: ("input", n) of the n-th call of a linear layer, or
    ("other", n), the n-th of all others.
    """

    def __init__(self, forward: Forward, linears: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
        self._forward, self._linears = forward, linears
        self._inputs = [(it.detach(), it.requires_grad) for it in inputs]
        self._autocast = active_autocast(inputs[0].device)
        self._outputs: list[tuple[Tensor, bool]] = []  # of the calls of linear layers, and whether they have gradients
        self._at: Tensor | None = None  # the input of the linear layer at work
        self._wanted: set[tuple[str, int]] = set()
        self._others = 0
        self._needed = 0  # outputs that the last of the wanted depends on
        self._found: dict[tuple[str, int], Tensor] = {}

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The first run, whose graph keeps what it must."""
        self._versions = [it._version for it, _ in self._inputs]
        with _calling(self._linears, self._first), keeping(self._keep):
            y = self._forward(*inputs)
        del self._outputs[self._needed :]
        return y

    def is_spoiled(self) -> bool:
        """Whether something was written over what a second run begins with."""
        begins = (it for it, _ in (*self._inputs, *self._outputs))
        return any(it._version != version for it, version in zip(begins, self._versions, strict=False))

    def _first(self, linear: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._at = x
        try:
            y = linear(x, *args, **kwargs)
        finally:
            self._at = None
        self._outputs.append((y.detach(), y.requires_grad))
        self._versions.append(y._version)
        return y

    def _keep(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """What brings a saved tensor back; None if it is to be kept."""
        place = self._place(tensor)
        if place is None:
            return None
        self._wanted.add(place)
        self._needed = len(self._outputs)
        return functools.partial(self._again, place, tensor.shape, tensor.stride())

    def _place(self, tensor: Tensor) -> tuple[str, int] | None:
        if self._at is not None and not _same(tensor, self._at):
            return None  # what a linear layer holds for itself
        known = [it for it, _ in (*self._inputs, *self._outputs)]
        if isinstance(tensor, nn.Parameter) or any(_same(tensor, it) for it in known):
            return None
        if self._at is not None:
            return "input", len(self._outputs)
        self._others += 1
        return "other", self._others - 1

    def _again(self, place: tuple[str, int], shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """The tensor of a place, which is asked for once in a backward."""
        if place not in self._found:
            self._run_again()
        found = self._found.pop(place)
        return found if found.shape == shape else found.as_strided(shape, stride)

    def _run_again(self) -> None:
        if self.is_spoiled():  # as autograd itself says of what it has kept
            raise RuntimeError("what the gradient of an MLP is computed from was modified by an inplace operation")
        self._found, self._others = {}, 0
        outputs = iter(enumerate(self._outputs))

        def stand_in(_: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """What a linear layer gave."""
            number, (y, has_gradient) = next(outputs, (len(self._outputs), (None, False)))
            self._find(("input", number), x)
            if y is None:
                raise _Enough
            return y.detach().requires_grad_(has_gradient)

        def note(tensor: Tensor) -> None:
            place = self._place(tensor)
            if place is not None:
                self._find(place, tensor)

        inputs = [it.detach().requires_grad_(has_gradient) for it, has_gradient in self._inputs]
        context = as_before(inputs[0].device, [], self._autocast)
        try:
            with context, torch.enable_grad(), _calling(self._linears, stand_in), keeping(note):
                self._forward(*inputs)
        except _Enough:
            return

    def _find(self, place: tuple[str, int], tensor: Tensor) -> None:
        if place in self._wanted:
            self._found[place] = tensor.detach()
        if len(self._found) == len(self._wanted):
            raise _Enough


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same values in the same memory, in whatever shape."""
    if a.dtype != b.dtype or a.numel() != b.numel() or a.storage_offset() != b.storage_offset():
        return False
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


@contextmanager
def _calling(linears: Sequence[nn.Module], call: Callable[..., Tensor]) -> Iterator[None]:
    """Within it calling one of these layers calls `call` with its forward, and what it was given."""
    before = [vars(it).get("forward") for it in linears]
    for it in linears:
        it.forward = functools.partial(call, it.forward)
    try:
        yield
    finally:
        for it, own in zip(linears, before, strict=True):
            if own is None:
                del it.forward
            else:
                it.forward = own
