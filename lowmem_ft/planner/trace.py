"""The allocation trace of code that runs on fake tensors: which op took how many bytes, when, for how long.

Tensors of the device tier lie on `meta` and those of the host on `cpu`. A storage is born with the op that returns it
first and dies with its last reference, as under PyTorch's own reference counts. What an op takes inside, and gives back
before it returns, is not seen this way: `planner.scratch` knows it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tier: TypeAlias = Literal["device", "host"]
Scratch: TypeAlias = Callable[..., "list[int]"]  # an op's arguments -> bytes of each piece that it takes inside


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of memory taken (`nbytes` > 0) or given back (< 0).

    Attributes:
        key: the same for both events of a piece.
        op: the operator at work, such as `aten.mm.default`.
        phase: load, forward, loss (all that follows the last block), backward, or eval.
        block: the decoder layer at work, or None outside of them.
        inside: the op gives it back before it returns.
    """

    key: int
    nbytes: int
    tier: Tier
    op: str
    phase: str
    block: int | None
    inside: bool = False


@dataclass(slots=True)
class Trace:
    """Events in order."""

    events: list[Event] = field(default_factory=list)

    def curve(self, tier: Tier | None = None) -> Iterator[int]:
        """Bytes held after each event; of both tiers together without `tier` (a CPU, where they are the same)."""
        held = 0
        for event in self.events:
            if tier is None or event.tier == tier:
                held += event.nbytes
                yield held

    def alive_at_peak(self) -> list[Event]:
        """The births of all pieces that are held when the two tiers together hold the most."""
        levels = list(self.curve())
        alive: dict[int, Event] = {}
        for event in self.events[: levels.index(max(levels)) + 1]:
            if event.nbytes > 0:
                alive[event.key] = event
            else:
                del alive[event.key]
        return list(alive.values())


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it every op on fake tensors is written to `trace`.

    Args:
        scratch: op -> what it takes inside.
        whole: ops that run as their own Python implementation here, so that what happens inside is seen too.
    """

    def __init__(self, scratch: Mapping[Any, Scratch], whole: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.phase, self.block = "load", None  # type: tuple[str, int | None]
        self._scratch, self._whole = scratch, whole
        self._alive: dict[int, tuple[weakref.ref[Any], int, Tier]] = {}  # by the storage's address
        self._op, self._keys = "", 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._op = str(func)
        implementation = self._whole.get(func)
        if implementation is not None:
            with self:
                return implementation(*args, **kwargs)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                self._see(leaf)
        inside = self._scratch.get(func)
        if inside is not None:
            self._pass_through(inside(*args, **kwargs))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None and known[0]() is storage:
            return
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        tier: Tier = "device" if tensor.device.type == "meta" else "host"
        key = self._record(nbytes, tier)

        def died(_: Any, address: int = address, key: int = key, nbytes: int = nbytes) -> None:
            current = self._alive.get(address)
            if current is not None and current[1] == key:
                del self._alive[address]
            self.trace.events.append(Event(key, -nbytes, tier, self._op, self.phase, self.block))

        self._alive[address] = weakref.ref(storage, died), key, tier

    def _pass_through(self, pieces: list[int], tier: Tier = "device") -> None:
        taken = [(self._record(nbytes, tier, inside=True), nbytes) for nbytes in pieces if nbytes]
        for key, nbytes in reversed(taken):
            self.trace.events.append(Event(key, -nbytes, tier, self._op, self.phase, self.block, inside=True))

    def _record(self, nbytes: int, tier: Tier, *, inside: bool = False) -> int:
        self._keys += 1
        self.trace.events.append(Event(self._keys, nbytes, tier, self._op, self.phase, self.block, inside))
        return self._keys
