"""The allocation trace of code that runs on tensors without data: which op took how many bytes, when, for how long.

Tensors of the device tier lie on `meta` and those of the host on `cpu`. A storage is born with the op that returns it
first and dies with its last reference, as under PyTorch's own reference counts. What an op takes inside, and gives back
before it returns, is not seen this way: `planner.scratch` knows it.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.planner.results import Results
from lowmem_ft.runtime.traced import EACH_IS, KNOWN, LEARN, STANDS_FOR

Tier: TypeAlias = Literal["device", "host"]
# An op's arguments -> bytes of each piece that it takes inside, negative where it gives the oldest of that size back
# before it ends; and `RESULT` where its result comes, if not at the beginning
Scratch: TypeAlias = Callable[..., "list[int]"]
RESULT = -1
# An operator's own Python implementation, and how many times longer it takes than what is traced of it
Whole: TypeAlias = tuple[Callable[..., Any], Callable[..., float]]
# Seconds of work and, as the imaginary part, of the host's calls where these go on while the device works
Cost: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, float], complex]


_ASK = torch.ops.aten._local_scalar_dense.default
_SCATTER, _ADD = torch.ops.aten.scatter.src, torch.ops.aten.add.Tensor
# PyTorch's derivative formulas, and its sums of gradients, work in place, unless a dispatch mode such as the Tracer
# watches them
_IN_PLACE: Mapping[Any, Any] = {_SCATTER: torch.ops.aten.scatter_.src, _ADD: torch.ops.aten.add_.Tensor}
_ALONE = 4, 2  # references to a tensor, and to its storage, that only the call itself and its caller hold
_references: Callable[[Tensor], int] = getattr(Tensor, "_use_count", lambda _: 0)  # not in every version
TURNS = 16  # of equal work that leaves nothing are written down: an allocator that has settled goes on alike


def _summed_in_place(total: Tensor, more: Any) -> bool:
    """Whether autograd sums two gradients of a tensor, of which nobody else holds the first.

    It adds to that then (torch/csrc/autograd/input_buffer.cpp, `accumulate`), unless a dispatch mode watches.
    """
    if sys._getframe(2).f_code.co_name != "_engine_run_backward" or total.shape != getattr(more, "shape", None):
        return False
    held = _references(total), torch._C._storage_Use_Count(total.untyped_storage()._cdata)
    return held == _ALONE


def overloads(*names: str) -> frozenset[Any]:
    """aten's operators of these names, `op.overload`."""
    return frozenset(getattr(getattr(torch.ops.aten, name.split(".")[0]), name.split(".")[1]) for name in names)


class _Op(NamedTuple):
    """What the Tracer knows of an operator.

    Attributes:
        name: asking an operator for it each time takes as long as all the rest.
        views: all that it returns lies in one storage, mostly that of an argument.
        told: what it returns is told from shapes, strides and types: new tensors, the argument that it writes (its
            first one, or `out`), or nothing.
    """

    name: str
    views: bool
    told: bool
    scratch: Scratch | None
    whole: Whole | None

    @classmethod
    def of(cls, func: Any, scratch: Mapping[Any, Scratch], whole: Mapping[Any, Whole]) -> _Op:
        infos = [returned.alias_info for returned in func._schema.returns]
        views = len(infos) == 1 and infos[0] is not None
        new = all(info is None for info in infos)
        own = len(infos) == 1 and infos[0] is not None and infos[0].is_write and _returns_written(func._schema)
        return cls(str(func), views, (new or own) and func is not _ASK, scratch.get(func), whole.get(func))


def _returns_written(schema: Any) -> bool:
    """Whether what an operator that writes returns is its first argument, or `out`."""
    infos = [it.alias_info for at, it in enumerate(schema.arguments) if at == 0 or it.name == "out"]
    return any(it is not None and it.before_set == schema.returns[0].alias_info.before_set for it in infos)


class Event(NamedTuple):  # of which there are 400,000 in a step of a large mixture of experts
    """A piece of memory taken (`nbytes` > 0) or given back (< 0).

    Attributes:
        key: the same for both events of a piece.
        op: the operator at work, such as `aten.mm.default`.
        phase: load, reference (a pass without gradients), forward, loss (all that follows the last block), backward,
            update, or eval.
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


# The same from a tuple of all its values: a NamedTuple's own constructor takes a tenth of the time of a trace
_event: Callable[[tuple[Any, ...]], Event] = partial(tuple.__new__, Event)


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

    def holders(self) -> dict[str, int]:
        """Bytes that a step itself holds when both tiers together hold the most: `activations`, `loss`, `workspace`."""
        levels = list(self.curve())
        alive: dict[int, Event] = {}
        for event in self.events[: levels.index(max(levels)) + 1]:
            if event.nbytes > 0:
                alive[event.key] = event
            else:
                alive.pop(event.key, None)  # of what was there before, if the events do not begin with it
        found = {"activations": 0, "loss": 0, "workspace": 0}
        for event in alive.values():
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
        turns: see `Tracer`.
    """

    def __init__(self, keys: Iterator[int], turns: int = TURNS) -> None:
        self._keys, self._turns = keys, turns
        # key in what was traced -> keys of all that it stands for, as they came
        self._held: dict[int, list[int]] = defaultdict(list)

    def repeat(self, work: Sequence[Event], times: int) -> list[Event]:
        """The events of all pieces of work; of many that leave all as it was, the first ones."""
        found, held = [], self._held
        own = {event.key for event in work if event.nbytes > 0}
        if sum(event.nbytes for event in work) == 0 and all(event.key in own for event in work):
            times = min(times, self._turns)
        for turn in range(times):
            for event in work:
                traced, nbytes, tier, op, phase, block, inside = event
                if nbytes > 0:
                    key = next(self._keys) if turn else traced
                    held[traced].append(key)
                elif held.get(traced):
                    key = held[traced].pop()
                elif turn == times - 1:
                    key = traced  # of what was there before
                else:
                    continue
                found.append(_event((key, nbytes, tier, op, phase, block, inside)))
        return found

    def free(self, death: Event) -> list[Event]:
        """A piece given back outside of such work, and all that it stands for."""
        return [with_key(death, key, death.block) for key in reversed(self._held.pop(death.key, []) or [death.key])]


class _Learned(NamedTuple):
    """What work took that is known.

    Attributes:
        events: in order, all of pieces that it took itself.
        costs: seconds of its operations, each of which is added by itself: so the sum is the same to the last bit.
        op: its last one.
        key: of the piece that its result lies in.
        result: makes such a tensor.
    """

    events: Sequence[Event]
    costs: Sequence[complex]
    op: str
    key: int
    result: Callable[[], Tensor]


def with_key(event: Event, key: int, block: int | None) -> Event:
    """The same event under another key and in another block."""
    return _event((key, event.nbytes, event.tier, event.op, event.phase, block, event.inside))


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it every op on tensors without data is written to `trace`.

    Args:
        scratch: op -> what it takes inside.
        whole: ops that run as their own Python implementation here, so that what happens inside is seen too.
        cost: (op, args, kwargs, result, tiles) -> predicted seconds, which `seconds` tells by phase and block, of so
            many tiles with the same rows in all.

    Where `STANDS_FOR` said that operations stand for others too, the trace and the seconds are those of all of them.

    Attributes:
        turns: of equal work that leaves nothing as many are written down at most, from the next `begin` on.
    """

    def __init__(
        self,
        scratch: Mapping[Any, Scratch],
        whole: Mapping[Any, Whole],
        cost: Cost | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._spent: dict[tuple[str, int | None], complex] = defaultdict(complex)
        self.phase, self.block = "load", None  # type: tuple[str, int | None]
        self._scratch, self._whole, self._cost = scratch, whole, cost
        self._alive: dict[int, tuple[weakref.ref[Any], Event]] = {}  # by the storage's address
        self._ops: dict[Any, _Op] = {}
        self._results = Results()
        self._op = ""
        self._keys = count(1)
        self._learned: dict[Hashable, _Learned] = {}  # by what the work is called, phase and block
        self._costs: list[complex] = []  # of all operations
        self._began = 0, 0  # events and costs, when work began that may be learned
        self.turns = TURNS
        self._repeats = Repeats(self._keys)
        self._times, self._from = 1, 0  # for how many operations each stands, since which event
        self._tiles = 1.0  # for how many tiles each stands
        self._tiled: tuple[str, int | None] = "", None  # in which phase and block

    def begin(self) -> None:
        """Start a new trace, whose first events are the births of what is alive, and a new sum of seconds."""
        self.trace = Trace(self.alive())
        self._repeats = Repeats(self._keys, self.turns)
        self._spent = defaultdict(complex)

    @property
    def seconds(self) -> dict[tuple[str, int | None], float]:
        """By phase and block: of the device's work or of the host's calls, whichever takes longer."""
        return {place: max(spent.real, spent.imag) for place, spent in self._spent.items()}

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
        op = self._ops.get(func) or self._know(func)
        if func is KNOWN:
            return self._again(args[1])
        if func is LEARN:
            self._learn(args[1], args[2])
            return None
        self._op = op.name
        if func is STANDS_FOR:
            self._stand_for(args[1])
            return None
        if func is EACH_IS:
            self._tiles, self._tiled = args[1], (self.phase, self.block)
            return None
        if op.whole is not None:
            implementation, times = op.whole
            before = self._spent[self.phase, self.block]
            with self:
                out = implementation(*args, **kwargs)
            traced = self._spent[self.phase, self.block] - before
            self._spent[self.phase, self.block] = before + times(*args, **kwargs) * traced
            return out
        if func is _ASK and args[0].is_meta:
            # transformers asks whether position ids are those of plain rows, and skips a mask if so, as they are here
            return {torch.bool: True}.get(args[0].dtype, 1)
        if (func is _SCATTER and self.phase == "backward") or (
            func is _ADD and getattr(args[0], "is_meta", False) and _summed_in_place(args[0], args[1])
        ):
            func = _IN_PLACE[func]
            op = self._ops.get(func) or self._know(func)
        first, inside = _around(op.scratch(*args, **kwargs)) if op.scratch is not None else ((), ())
        taken = self._take(first) if first else ()
        try:
            out = self._results.of(op.name, func, args, kwargs) if op.told else func(*args, **kwargs)
        except NotImplementedError as error:
            raise UnsupportedError(
                "What this model allocates depends on the values of its tensors, so it cannot be planned without them.",
                given=f"{op.name} ({error})",
                fix="use another model; of mixtures of experts those that go by transformers' experts interface",
            ) from None
        if isinstance(out, Tensor):
            self._see(out)
        else:
            for leaf in out[:1] if op.views else tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        if inside or taken:
            for birth in reversed(self._take(inside, taken)):
                self._free(birth)
        if self._cost is not None:
            tiles = self._tiles if self._tiles != 1.0 and self._tiled == (self.phase, self.block) else 1.0
            seconds = self._times * self._cost(func, args, kwargs, out, tiles)
            self._spent[self.phase, self.block] += seconds
            self._costs.append(seconds)
        return out

    def _know(self, func: Any) -> _Op:
        op = self._ops[func] = _Op.of(func, self._scratch, self._whole)
        return op

    def _stand_for(self, times: int) -> None:
        events = self.trace.events
        if self._times > 1:
            events[self._from :] = self._repeats.repeat(events[self._from :], self._times)
        self._times, self._from = times, len(events)

    def _again(self, work: str) -> list[Tensor]:
        """Write down what this work takes, and return its result; nothing, if it is not known."""
        known = self._learned.get((work, self.phase, self.block))
        if known is None:
            self._began = len(self.trace.events), len(self._costs)
            return []
        keys: dict[int, int] = {}
        births: dict[int, Event] = {}
        for event in known.events:
            if event.nbytes > 0:
                keys[event.key] = next(self._keys)
            again = with_key(event, keys[event.key], event.block)
            self.trace.events.append(again)
            births[event.key] = again
        for seconds in known.costs:
            self._spent[self.phase, self.block] += seconds
        self._op, result = known.op, known.result()
        self._hold(result.untyped_storage(), births[known.key])
        return [result]

    def _learn(self, work: str, result: Tensor) -> None:
        """This work is done, and `result` is all that it leaves."""
        at, cost = self._began
        events = self.trace.events[at:]
        key = self._alive[result.untyped_storage()._cdata][1].key
        held = {event.key: event.nbytes > 0 for event in events}  # whether the last event of a piece is its birth
        assert self._times == 1, "each operation stands for itself"
        assert [it for it, alive in held.items() if alive] == [key], "all but the result is given back"
        assert sum(event.nbytes > 0 for event in events) == len(held), "and nothing else"
        make = partial(torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device="meta")
        self._learned[work, self.phase, self.block] = _Learned(events, self._costs[cost:], self._op, key, make)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None and known[0]() is storage:
            return
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        self._hold(storage, self._record(nbytes, "device" if tensor.device.type == "meta" else "host"))

    def _hold(self, storage: Any, birth: Event) -> None:
        """Write its death down when that comes."""
        address = storage._cdata

        def died(_: Any) -> None:
            current = self._alive.get(address)
            if current is not None and current[1] is birth:
                del self._alive[address]
            self._free(birth)

        self._alive[address] = weakref.ref(storage, died), birth

    def _take(self, pieces: Sequence[int], taken: Sequence[Event] = ()) -> list[Event]:
        """Take an operator's pieces beside those `taken`. Returns those that it holds then."""
        births = list(taken)
        for nbytes in pieces:
            if nbytes > 0:
                births.append(self._record(nbytes, "device", inside=True))
            elif nbytes < 0:
                self._free(births.pop(next(at for at, birth in enumerate(births) if birth.nbytes == -nbytes)))
        return births

    def _record(self, nbytes: int, tier: Tier, *, inside: bool = False) -> Event:
        birth = _event((next(self._keys), nbytes, tier, self._op, self.phase, self.block, inside))
        self.trace.events.append(birth)
        return birth

    def _free(self, birth: Event) -> None:
        death = _event((birth.key, -birth.nbytes, birth.tier, self._op, self.phase, self.block, birth.inside))
        if self._times > 1:
            self.trace.events.append(death)
        else:
            self.trace.events.extend(self._repeats.free(death))


def _around(pieces: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """What comes before an operator's result, and after it."""
    at = pieces.index(RESULT) if RESULT in pieces else 0
    return pieces[:at], pieces[at + (RESULT in pieces) :]
