"""The allocation trace of code that runs on tensors without data: which op took how many bytes, when, for how long.

Tensors of the device tier lie on `meta` and those of the host on `cpu`. A storage is born with the op that returns it
first and dies with its last reference, as under PyTorch's own reference counts. What an op takes inside, and gives back
before it returns, is not seen this way: `planner.scratch` knows it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.runtime.experts import GO_ALIKE, STANDS_FOR

Tier: TypeAlias = Literal["device", "host"]
Scratch: TypeAlias = Callable[..., "list[int]"]  # an op's arguments -> bytes of each piece that it takes inside
# An operator's own Python implementation, and how many times longer it takes than what is traced of it
Whole: TypeAlias = tuple[Callable[..., Any], Callable[..., float]]
Cost: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], float]


_ASK = torch.ops.aten._local_scalar_dense.default
# PyTorch's derivative formulas work in place, unless a dispatch mode such as the Tracer watches them
_IN_PLACE: Mapping[Any, Any] = {torch.ops.aten.scatter.src: torch.ops.aten.scatter_.src}


def overloads(*names: str) -> frozenset[Any]:
    """aten's operators of these names, `op.overload`."""
    return frozenset(getattr(getattr(torch.ops.aten, name.split(".")[0]), name.split(".")[1]) for name in names)


# Ops whose results are told from their arguments. PyTorch itself tells it in Python too, but for every case there is,
# which took half of all the time that planning a mixture of experts takes.
_POINTWISE = overloads(
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "mul.Scalar", "div.Scalar", "neg.default", "silu.default"
)
_POINTWISE_IN_PLACE = overloads("add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor")
_NEW = overloads("new_empty.default", "new_zeros.default")
_LIKE = overloads("empty_like.default", "zeros_like.default")
_KNOWN = _POINTWISE | _POINTWISE_IN_PLACE | _NEW | _LIKE


def _plain_result(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The result of one of these ops in its plainest case, on dense floats of one dtype, else None."""
    first = args[0]
    if not (first.is_meta and first.is_contiguous()):
        return None
    if func in _NEW or func in _LIKE:
        if kwargs.get("device", first.device).type != "meta" or kwargs.get("memory_format") is not None:
            return None
        shape = args[1] if func in _NEW else first.shape
        return torch.empty(shape, dtype=kwargs.get("dtype") or first.dtype, device="meta")
    second = args[1] if len(args) > 1 else 1.0
    if not first.is_floating_point() or not (isinstance(second, (int, float)) or _fits(second, first)):
        return None
    return first if func in _POINTWISE_IN_PLACE else torch.empty(first.shape, dtype=first.dtype, device="meta")


def _fits(second: Any, first: Tensor) -> bool:
    """Whether `second` is a tensor of the same dtype that broadcasts to the shape of `first`."""
    if not isinstance(second, Tensor) or second.dtype != first.dtype or second.ndim > first.ndim:
        return False
    return all(own in (1, other) for own, other in zip(reversed(second.shape), reversed(first.shape), strict=False))


class Event(NamedTuple):  # of which there are 400,000 in a step of a large mixture of experts
    """A piece of memory taken (`nbytes` > 0) or given back (< 0).

    Attributes:
        key: the same for both events of a piece.
        op: the operator at work, such as `aten.mm.default`.
        phase: load, forward, loss (all that follows the last block), backward, update, or eval.
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
                alive.pop(event.key, None)  # of what was there before, if the trace does not begin with it
        return list(alive.values())

    def holders(self) -> dict[str, int]:
        """Bytes at the peak that the step itself holds: `activations`, `loss` and `workspace`."""
        found = {"activations": 0, "loss": 0, "workspace": 0}
        for event in self.alive_at_peak():
            if event.inside:
                found["workspace"] += event.nbytes
            elif event.phase == "loss":
                found["loss"] += event.nbytes
            elif event.phase != "load":
                found["activations"] += event.nbytes
        return found


class Repeats:
    """Work that is traced once and stands for several equal pieces of work, one after the other.

    What one of them takes is given back by itself, or, if it is held longer, by other work that is repeated as often,
    in reverse (backward), or by work that is not, all at once.

    Args:
        keys: for further pieces of memory.
    """

    def __init__(self, keys: Iterator[int]) -> None:
        self._keys = keys
        self._held: dict[int, list[int]] = {}  # key in what was traced -> keys of all that it stands for, as they came
        self._led: set[int] = set()  # keys that another one stands for

    def go_alike(self, keys: Sequence[int]) -> None:
        """Let the first of these pieces, taken outside of such work, stand for all when it is given back."""
        self._held[keys[0]] = list(keys)
        self._led.update(keys[1:])

    def repeat(self, work: Sequence[Event], times: int) -> list[Event]:
        """The events of all pieces of work."""
        found = []
        for turn in range(times):
            for event in work:
                if event.nbytes > 0:
                    key = next(self._keys) if turn else event.key
                    self._held.setdefault(event.key, []).append(key)
                elif self._held.get(event.key):
                    key = self._held[event.key].pop()
                elif turn == times - 1:
                    key = event.key  # of what was there before
                else:
                    continue
                found.append(with_key(event, key, event.block))
        return found

    def free(self, death: Event) -> list[Event]:
        """A piece given back outside of such work, and all that it stands for."""
        if death.key in self._led:
            self._led.remove(death.key)
            return []
        return [with_key(death, key, death.block) for key in reversed(self._held.pop(death.key, []) or [death.key])]


def with_key(event: Event, key: int, block: int | None) -> Event:
    """The same event under another key and in another block."""
    return Event(key, event.nbytes, event.tier, event.op, event.phase, block, event.inside)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it every op on tensors without data is written to `trace`.

    Args:
        scratch: op -> what it takes inside.
        whole: ops that run as their own Python implementation here, so that what happens inside is seen too.
        cost: (op, args, kwargs, result) -> predicted seconds, summed in `seconds` by phase and block.

    Where `STANDS_FOR` said that operations stand for others too, the trace and the seconds are those of all of them.
    """

    def __init__(
        self,
        scratch: Mapping[Any, Scratch],
        whole: Mapping[Any, Whole],
        cost: Cost | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.seconds: dict[tuple[str, int | None], float] = defaultdict(float)
        self.phase, self.block = "load", None  # type: tuple[str, int | None]
        self._scratch, self._whole, self._cost = scratch, whole, cost
        self._alive: dict[int, tuple[weakref.ref[Any], Event]] = {}  # by the storage's address
        self._names: dict[Any, str] = {}  # of ops: asking each time takes as long as the rest
        self._op = ""
        self._keys = count(1)
        self._repeats = Repeats(self._keys)
        self._times, self._from = 1, 0  # for how many operations each stands, since which event

    def begin(self) -> None:
        """Start a new trace, whose first events are the births of what is alive, and a new sum of seconds."""
        self.trace = Trace(self.alive())
        self._repeats = Repeats(self._keys)
        self.seconds = defaultdict(float)

    def alive(self) -> list[Event]:
        """The births of all that is held now."""
        return [birth for _, birth in self._alive.values()]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its guard around each op takes a quarter of the time, and nothing is compiled here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = str(func)
        self._op = name
        if func is STANDS_FOR:
            self._stand_for(args[1])
            return None
        if func is GO_ALIKE:
            self._repeats.go_alike([self._alive[tensor.untyped_storage()._cdata][1].key for tensor in args[0]])
            return None
        if func in self._whole:
            implementation, times = self._whole[func]
            before = self.seconds[self.phase, self.block]
            with self:
                out = implementation(*args, **kwargs)
            traced = self.seconds[self.phase, self.block] - before
            self.seconds[self.phase, self.block] = before + times(*args, **kwargs) * traced
            return out
        if func is _ASK and args[0].is_meta:
            # transformers asks whether position ids are those of plain rows, and skips a mask if so, as they are here
            return {torch.bool: True}.get(args[0].dtype, 1)
        if self.phase == "backward":
            func = _IN_PLACE.get(func, func)
        try:
            out = _plain_result(func, args, kwargs) if func in _KNOWN else None
            if out is None:
                out = func(*args, **kwargs)
        except NotImplementedError as error:
            raise UnsupportedError(
                "What this model allocates depends on the values of its tensors, so it cannot be planned without them.",
                given=f"{name} ({error})",
                fix="use another model; of mixtures of experts those that go by transformers' experts interface",
            ) from None
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        inside = self._scratch.get(func)
        if inside is not None:
            self._pass_through(inside(*args, **kwargs))
        if self._cost is not None:
            self.seconds[self.phase, self.block] += self._times * self._cost(func, args, kwargs, out)
        return out

    def _stand_for(self, times: int) -> None:
        events = self.trace.events
        if self._times > 1:
            events[self._from :] = self._repeats.repeat(events[self._from :], self._times)
        self._times, self._from = times, len(events)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None and known[0]() is storage:
            return
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        birth = self._record(nbytes, "device" if tensor.device.type == "meta" else "host")

        def died(_: Any) -> None:
            current = self._alive.get(address)
            if current is not None and current[1] is birth:
                del self._alive[address]
            self._free(birth)

        self._alive[address] = weakref.ref(storage, died), birth

    def _pass_through(self, pieces: list[int]) -> None:
        for birth in reversed([self._record(nbytes, "device", inside=True) for nbytes in pieces if nbytes]):
            self._free(birth)

    def _record(self, nbytes: int, tier: Tier, *, inside: bool = False) -> Event:
        birth = Event(next(self._keys), nbytes, tier, self._op, self.phase, self.block, inside)
        self.trace.events.append(birth)
        return birth

    def _free(self, birth: Event) -> None:
        death = Event(birth.key, -birth.nbytes, birth.tier, self._op, self.phase, self.block, birth.inside)
        if self._times > 1:
            self.trace.events.append(death)
        else:
            self.trace.events.extend(self._repeats.free(death))
