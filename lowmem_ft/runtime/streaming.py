"""Frozen weights of some blocks live below the device and are on it only while their block works.

The device holds a ring of slots, each as large as the largest streamed block. A block's weights are brought up when
they are first asked for, and while the block works the next one is copied into another slot: forward in order, then in
reverse for backward, where the last blocks are still there from the turn. Whoever reads a weight (layers, adapters,
initialisations, a merge) asks for it in the way that it always does, and cannot meet another block's.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.swap import is_expert_stack, is_plain_linear
from lowmem_ft.runtime.blocks import find_blocks
from lowmem_ft.runtime.ring import SLOTS, Slots
from lowmem_ft.runtime.saved import keeping
from lowmem_ft.runtime.tiers import PAGE, NoTier, Tier, refuse_loading
from lowmem_ft.runtime.vocabulary import Matrix

_ALIGN = 512  # bytes, of each tensor within its block: what CUDA's own allocations start on
_FETCH = "_fetch_streamed"  # the attribute of a module that brings its weights up
_STORED = "_stored_below"  # and the one that tells where each of them lies
_VIEWS = "_without_streamed_views"  # that of a block: what it runs under


def spread(depth: int, count: int) -> list[int]:
    """Which `count` of `depth` blocks are streamed: as evenly as possible, so that each copy has the same time."""
    return [at for at in range(depth) if (at + 1) * count // depth > at * count // depth]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a streamed block and its place in the block's bytes."""

    path: str  # in the model
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, slot: Tensor) -> Tensor:
        """This tensor as a view of the slot that its block lies in."""
        return slot[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


def streamable(model: nn.Module) -> list[list[Piece]]:
    """What can be streamed of each block: matrices and stacks of experts, quantized or not, with their scales.

    Norms, biases and routers stay on the device, and so does what several blocks share.

    Args:
        model: swapped already, before adapters; meta is enough.
    """
    path, layers = find_blocks(model)
    owners = Counter(id(module) for layer in layers for module in layer.modules())
    found: list[list[Piece]] = []
    for index, layer in enumerate(layers):
        found.append([])
        end = 0
        for name, module in layer.named_modules():
            if owners[id(module)] > 1:
                continue
            for leaf, tensor in _streamable(module):
                offset = -(-end // _ALIGN) * _ALIGN
                full = ".".join(filter(None, (path, str(index), name, leaf)))
                found[index].append(Piece(full, offset, tuple(tensor.shape), tensor.dtype))
                end = offset + found[index][-1].nbytes
    return found


def _streamable(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, QuantLinear | QuantStack):
        yield from module.storage().items()
        return
    for name, parameter in module.named_parameters(recurse=False):
        if is_expert_stack(module, parameter) or (name == "weight" and is_plain_linear(module)):
            yield name, parameter


def block_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes of a block in its tier, and the size of its slot."""
    end = max((piece.offset + piece.nbytes for piece in pieces), default=0)
    return -(-end // PAGE) * PAGE


@dataclass(frozen=True)
class Moved:
    """What streaming some blocks and some of the vocabulary's matrices changes, in bytes.

    Attributes:
        blocks: which ones -> bytes of their copies.
        matrices: which ones.
        tensors: of each tensor that leaves the device.
        slots: of each slot that comes to it.
        stubs: of what the model holds of each matrix in its place.
    """

    blocks: Mapping[int, int]
    matrices: Sequence[Matrix]
    tensors: tuple[int, ...]
    slots: tuple[int, ...]
    stubs: tuple[int, ...]

    @classmethod
    def of(cls, pieces: Sequence[list[Piece]], count: int, matrices: Sequence[Matrix] = ()) -> Moved:
        """Of a model with these pieces, `count` of whose blocks are streamed."""
        blocks = {index: block_bytes(pieces[index]) for index in spread(len(pieces), count)}
        tensors = [piece.nbytes for index in blocks for piece in pieces[index]]
        slots = [max(blocks.values()) + PAGE] * SLOTS if blocks else []
        for matrix in matrices:
            tensors.append(matrix.nbytes)
            slots += matrix.slots
        stubs = tuple(matrix.parameter.element_size() for matrix in matrices)
        return cls(blocks, matrices, tuple(tensors), tuple(slots), stubs)

    @functools.cached_property
    def saved(self) -> int:
        """Bytes that the device holds less."""
        return sum(self.tensors) - sum(self.slots) - sum(self.stubs)

    @functools.cached_property
    def stored(self) -> int:
        """Bytes in the tier below."""
        return sum(self.blocks.values()) + sum(sum(matrix.tiles) for matrix in self.matrices)

    @functools.cached_property
    def copied(self) -> int:
        """Bytes of the head that are copied for each chunk of the loss."""
        return sum(sum(matrix.copies) for matrix in self.matrices)


class Holder(NamedTuple):
    """Where the model holds a piece: among a module's buffers, or as a parameter. Adapters that are put around the
    module do not change it."""

    buffers: dict[str, Tensor | None] | None
    parameter: nn.Parameter | None
    piece: Piece

    @property
    def tensor(self) -> Tensor:
        """What it holds now."""
        found = self.parameter if self.buffers is None else self.buffers[self.name]
        assert found is not None
        return found.detach()

    def hold(self, tensor: Tensor) -> None:
        """Hold that instead."""
        if self.buffers is not None:
            self.buffers[self.name] = tensor
        elif self.parameter is not None:
            self.parameter.data = tensor

    @property
    def name(self) -> str:
        return self.piece.path.rpartition(".")[2]


def holders_of(model: nn.Module, pieces: Sequence[Sequence[Piece]]) -> list[list[Holder]]:
    """The holders of each block's pieces, in a model that is loaded and has no adapters yet."""
    return [[_holder_of(model, piece) for piece in block] for block in pieces]


def _holder_of(model: nn.Module, piece: Piece) -> Holder:
    path, _, name = piece.path.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, QuantLinear | QuantStack):
        return Holder(module._buffers, None, piece)
    return Holder(None, module._parameters[name], piece)


class Streaming:
    """The streamed blocks of one model.

    Args:
        model: swapped, on meta, without adapters.
        blocks: what is streamed, by index of the block.
        device: where they work; "meta" simulates.
        open_tier: bytes of each streamed block -> where they lie.

    Attributes:
        blocks: their indices, ascending.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[int, list[Piece]],
        *,
        device: torch.device,
        open_tier: Callable[[list[int]], Tier],
    ) -> None:
        self.blocks, self._pieces = sorted(blocks), blocks
        sizes = [block_bytes(self._pieces[index]) for index in self.blocks]
        self._tier: Tier = NoTier() if device.type == "meta" else open_tier(sizes)
        self._slots = Slots(self._tier, sizes, device)
        self._by_path = {piece.path: (index, piece) for index, found in self._pieces.items() for piece in found}
        self._layers = list(find_blocks(model)[1])
        self._held: Mapping[int, Sequence[Holder]] = {}
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # of each block's pieces in each slot, made once

    def place(self, path: str, tensor: Tensor) -> Tensor | None:
        """Take a weight that was loaded. Returns what the model shall hold instead; None if it is not streamed."""
        if path not in self._by_path:
            return None
        index, piece = self._by_path[path]
        self._tier.write(self.blocks.index(index), piece.offset, tensor)
        # not a view for autograd: to it, each copy into that slot would be a change of the parameter made of this
        return piece.of(self._slots.memory[0]).data

    def attach(self, holders: Sequence[Sequence[Holder]]) -> None:
        """Have the model's modules ask for their weights from now on.

        Args:
            holders: of all blocks of the model.
        """
        self._held = {index: holders[index] for index in self.blocks}
        for index in self.blocks:
            self._bind(index, self._slots.memory[0])
            if any(holder.parameter is not None for holder in self._held[index]):
                self._keep_no_views(index)
        self._have_asked()

    def take_over(self, holders: Sequence[Sequence[Holder]], before: Streaming | None) -> None:
        """The same for a model that is in use: its weights go below the device, where `before` may have some already.

        Raises:
            UnsupportedError: see `attach_to_adapters`; nothing has changed then.
        """
        self._held = {index: holders[index] for index in self.blocks}
        self._refuse_trained()
        for at, index in enumerate(self.blocks):
            if before is not None and index in before.blocks:
                before.fetch(index)
            for holder in holders[index]:
                self._tier.write(at, holder.piece.offset, holder.tensor)
        if before is not None:
            before._slots.settle()
        self.attach(holders)

    def _have_asked(self) -> None:
        """Whatever reads a streamed weight of a block asks for it from now on."""
        for index in self.blocks:
            layer = self._layers[index]
            parameters = {id(holder.parameter): holder.piece for holder in self._held[index] if holder.buffers is None}
            buffers: defaultdict[int, dict[str, Piece]] = defaultdict(dict)
            for holder in self._held[index]:
                if holder.buffers is not None:
                    buffers[id(holder.buffers)][holder.name] = holder.piece
            for module in list(layer.modules()):
                pieces = {name: it for name, own in module._parameters.items() if (it := parameters.get(id(own)))}
                # of what an adapter has taken over (a stack of experts) its former owner lets go
                if isinstance(module, QuantLinear | QuantStack) or pieces or _STORED in vars(module):
                    if _FETCH not in vars(module):
                        module.__class__ = _asking(type(module), tuple(pieces))  # type: ignore[arg-type]
                    setattr(module, _FETCH, functools.partial(self.fetch, index))
                    pieces |= buffers.get(id(module._buffers), {})
                    below = {name: functools.partial(self._stored, index, piece) for name, piece in pieces.items()}
                    setattr(module, _STORED, below)

    def _stored(self, block: int, piece: Piece) -> Tensor:
        """A piece where it lies, below the device."""
        if isinstance(self._tier, NoTier):
            return torch.empty(piece.shape, dtype=piece.dtype, device="meta")
        buffer = self._tier.buffer(self.blocks.index(block), block_bytes(self._pieces[block]))
        # with a storage of its own: torch.save writes whole ones
        found = torch.frombuffer(buffer, dtype=torch.uint8, count=piece.nbytes, offset=piece.offset)
        return found.view(piece.dtype).view(piece.shape)

    def attach_to_adapters(self) -> None:
        """The same for what adapters have put around weights.

        Raises:
            UnsupportedError: a streamed weight is trained.
        """
        self._refuse_trained()
        self._have_asked()

    def _refuse_trained(self) -> None:
        for index in self.blocks:
            streamed = {id(holder.parameter) for holder in self._held[index] if holder.parameter is not None}
            parameters = dict(self._layers[index].named_parameters())
            trained = [name for name, it in parameters.items() if id(it) in streamed and it.requires_grad]
            trained += [name for name in parameters if "modules_to_save" in name.split(".")]
            if trained:
                raise UnsupportedError(
                    "A matrix of a streamed block is trained whole.",
                    given=f"{trained[0]} of block {index}",
                    fix=f"set policy.resident_blocks: {len(self._layers)}, or train adapters only",
                )

    def fetch(self, block: int) -> None:
        """Have a block's weights on the device, and begin to copy those that will be asked for next."""
        at = self.blocks.index(block)
        if at != self._slots.current:
            self._bind(block, self._slots.bring(at, returns=self._layers[block].training))

    def _bind(self, block: int, slot: Tensor) -> None:
        """Let the block's weights be those in `slot`."""
        with torch.inference_mode(False), torch.no_grad():
            views = self._views.get((block, id(slot)))
            if views is None:
                views = self._views[block, id(slot)] = [holder.piece.of(slot) for holder in self._held[block]]
            for holder, view in zip(self._held[block], views, strict=True):
                holder.hold(view)

    def _keep_no_views(self, index: int) -> None:
        """Where autograd would keep a view of a slot for backward, let it keep the view's place instead."""
        begins = {slot.untyped_storage()._cdata: slot.storage_offset() for slot in self._slots.memory}

        def keep(tensor: Tensor) -> Callable[[], Tensor] | None:
            begin = begins.get(tensor.untyped_storage()._cdata)
            if begin is None:
                return None
            offset = int(tensor.storage_offset()) - begin // tensor.element_size()
            return functools.partial(find, tensor.dtype, offset, tensor.shape, tensor.stride())

        def find(dtype: torch.dtype, offset: int, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
            self.fetch(index)
            slot = self._slots.holding(self.blocks.index(index)).view(dtype)
            return slot.as_strided(shape, stride, slot.storage_offset() + offset)

        layer = self._layers[index]
        if _VIEWS not in vars(layer):
            layer.__class__ = _keeping_no_views(type(layer))  # type: ignore[arg-type]
        setattr(layer, _VIEWS, functools.partial(keeping, keep))


@functools.cache
def _keeping_no_views(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, whose objects run under the hooks that they were given. With hooks of the module instead, those for saved
    tensors would stay after Ctrl-C, and hold the model."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with vars(self)[_VIEWS]():
            return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})


@functools.cache
def _asking(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """`cls`, whose objects bring their weights up before they are read."""

    def storage(self: Any) -> dict[str, Tensor]:
        getattr(self, _FETCH)()
        return cls.storage(self)  # type: ignore[attr-defined,no-any-return]

    def reader(name: str) -> property:
        def read(self: Any) -> Any:
            vars(self)[_FETCH]()
            return nn.Module.__getattr__(self, name)

        return property(read)

    def save(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """What lies below, and not the slots, which hold the weights of whichever block is at work."""
        cls._save_to_state_dict(self, destination, prefix, keep_vars)
        destination.update({prefix + name: stored() for name, stored in vars(self)[_STORED].items()})

    def load(self: Any, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        refuse_loading(state_dict, [prefix + name for name in vars(self)[_STORED]])
        cls._load_from_state_dict(self, state_dict, prefix, *rest)

    members: dict[str, Any] = {name: reader(name) for name in names}
    members |= {"_save_to_state_dict": save, "_load_from_state_dict": load}
    if issubclass(cls, QuantLinear | QuantStack):
        members["storage"] = storage
    return type(cls.__name__, (cls,), members)
