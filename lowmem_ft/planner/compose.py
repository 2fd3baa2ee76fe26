"""A deep model's step from that of a few of its blocks.

What a decoder layer allocates depends on what kind it is, what it does with its activations, and on the same of its two
neighbours (whose inputs and gradients change hands). So one block of each such window is traced, and a step of any
depth is put together from their segments: forward through every block, the loss, backward through every block.
`tests/unit/planner/test_compose.py` holds the result against whole traces, event by event.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from lowmem_ft.core.host import LARGE
from lowmem_ft.planner.trace import Event, Tier, Trace

Window: TypeAlias = tuple[Hashable, Hashable, Hashable]  # classes of a block's neighbours and its own; None: no block
Part: TypeAlias = Literal["load", "start", "reference", "forward", "loss", "backward", "end", "update"]
_OUTSIDE: tuple[Part, ...] = ("start", "loss", "end", "update")
_OF_A_STEP = frozenset({"reference", "forward", "loss", "backward", "update"})
_WITHOUT_BLOCK = frozenset({"reference", "loss", "update"})  # a pass without gradients leaves nothing in its blocks
# What is born in these and given back in backward or in the update goes at the end of the backward pass, see `segments`
_AT_END: Mapping[Part, Collection[Part]] = {
    "backward": ("start", "reference"),
    "update": ("reference", "forward", "loss", "backward"),  # what came first of all, such as token ids, stays
}


def windows(classes: Sequence[Hashable]) -> list[Window]:
    """Each block's class between those of its neighbours."""
    padded = [None, *classes, None]
    return [(padded[i], padded[i + 1], padded[i + 2]) for i in range(len(classes))]


def shorten(classes: Sequence[Hashable], wanted: Collection[Window] | None = None) -> list[int]:
    """Indices of a few blocks that, one after the other, have every window that all of them have.

    Of windows that are `wanted` alone, these: then other blocks may go, too, while only those at the ends get
    neighbours that no block has.
    """
    kept = list(range(len(classes)))
    every = set(windows(classes))
    needed = every if wanted is None else set(wanted)
    while True:
        now = windows([classes[i] for i in kept])
        cuts = ((i, j) for i in range(len(kept)) for j in range(len(kept) - 1, i, -1) if now[i] == now[j])
        # what lies between two equal windows can go, if what it holds is found elsewhere
        for i, j in sorted(cuts, key=lambda cut: cut[0] - cut[1]):
            if needed <= {*now[: i + 1], *now[j + 1 :]}:
                del kept[i + 1 : j + 1]
                break
        else:
            break
    if wanted is None:
        return kept

    def serve(few: list[int]) -> bool:
        now = windows([classes[i] for i in few])
        return needed <= set(now) and every.issuperset(now[1:-1])

    for ends in (slice(1, None), slice(None, -1)):
        while len(kept) > 1 and serve(kept[ends]):
            kept = kept[ends]
    for at in kept[1:-1]:
        rest = [other for other in kept if other != at]
        kept = rest if serve(rest) else kept
    return kept


class Birth(NamedTuple):
    """Where a piece of memory was taken: in a segment of which block, and as its which piece.

    Attributes:
        distance: in blocks from the one that gives it back; from the last one in the loss, in the update from the
            lowest that gradients reach; None: taken outside of the blocks.
    """

    part: Part
    distance: int | None
    ordinal: int


_birth: Callable[[tuple[Any, ...]], Birth] = partial(tuple.__new__, Birth)  # see `trace._event`
Step: TypeAlias = tuple[Event, Birth | None]
_NOWHERE = -(1 << 40)  # begin of keys that no piece has


@dataclass(frozen=True, slots=True)
class Segment:
    """What happens between two marks of a step.

    Attributes:
        block: the decoder layer at work, in the model that was traced.
        events: in order; beside each that gives a piece back, where that was taken.
        delta, high: bytes held at the end and at most, more than at its begin, in the tiers that were asked for.
        seconds: predicted.
        heap_delta, heap_high: on a CPU the same of the pieces that lie in the heap (`core.host.LARGE`).
    """

    part: Part
    block: int | None
    events: tuple[Step, ...]
    delta: int
    high: int
    seconds: float
    heap_delta: int = 0
    heap_high: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A segment standing at block `at` of a composed step."""

    segment: Segment
    at: int | None


def segments(trace: Trace, seconds: Mapping[tuple[str, int | None], float], tier: Tier | None = None) -> list[Segment]:
    """The segments of one traced step, in order. Loading and evaluation are left out.

    What is made before the first block, such as masks, goes back to the allocator with the last block that used it;
    here at the end of the backward pass, because in another depth that is another block. There, too, goes what is left
    to the update, so that an update fits every backward pass.

    Args:
        seconds: by phase and block, as the Tracer sums them. Of the reference's pass those outside of its blocks
            count: its blocks take as long as they do forward.
        tier: whose bytes are counted; None for both together (a CPU, where they are the same memory).
    """
    born: dict[int, tuple[Part, int | None, int]] = {}  # by key, in segments that are over
    own: dict[int, int] = {}  # by key, in the one at work: as its which piece
    groups: list[tuple[Part, int | None, list[Step]]] = [("start", None, [])]
    end: list[Step] = []
    part, block, steps = groups[0]
    ordinal, last, lowest, origin = 0, 0, None, 0  # type: int, int, int | None, int
    distance: int | None = None  # of what is born in this segment
    early: Collection[Part] = ()
    before, worked_before = "forward", None  # phase and block of the event before
    for event in trace.events:
        key, nbytes, _, _, phase, worker, _ = event
        if phase not in _OF_A_STEP:
            continue
        if phase != before or worker != worked_before:
            before, worked_before = phase, worker
            now: tuple[Part, int | None] = part, block
            if phase in _WITHOUT_BLOCK:
                now = cast(Part, phase), None
            elif worker is not None:
                now = cast(Part, phase), worker
                last = max(last, worker)
                if phase == "backward":
                    lowest = worker if lowest is None else min(lowest, worker)
            if now != (part, block):
                born.update((key, (part, block, number)) for key, number in own.items())
                (part, block), own, steps, ordinal = now, {}, [], 0
                groups.append((part, block, steps))
                early = _AT_END.get(part, ())
                origin = block if block is not None else last if part == "loss" else lowest or 0
                distance = None if block is None else 0
        if nbytes > 0:
            own[key] = ordinal
            ordinal += 1
            steps.append((event, None))
            continue
        number = own.pop(key, None)
        if number is not None:
            steps.append((event, _birth((part, distance, number))))
            continue
        there, at, number = born.get(key) or ("load", None, key)
        birth = _birth((there, None if at is None else at - origin, number))
        (end if there in early else steps).append((event, birth))
    groups.insert(len(groups) - (groups[-1][0] == "update"), ("end", None, end))
    phases = {"start": "forward"}
    return [
        segment_of(part, block, steps, seconds.get((phases.get(part, part), block), 0.0), tier)
        for part, block, steps in groups
    ]


def segment_of(part: Part, block: int | None, steps: Sequence[Step], seconds: float, tier: Tier | None) -> Segment:
    """A segment of these events, with its sizes in `tier`."""
    sizes = [event.nbytes for event, _ in steps if tier is None or event.tier == tier]
    small = [nbytes for nbytes in sizes if abs(nbytes) < LARGE] if tier is None else ()
    levels, heap = [0, *accumulate(sizes)], [0, *accumulate(small)]
    return Segment(part, block, tuple(steps), levels[-1], max(levels), seconds, heap[-1], max(heap))


class Pieces:
    """Segments of traced steps by window, from which steps of any depth are put together.

    All traces must be of the same micro-batch and loss chunk.
    """

    def __init__(self) -> None:
        self.outside: dict[Part, Segment] = {}
        self.by_window: dict[tuple[Part, Window], Segment] = {}

    def add(self, classes: Sequence[Hashable], found: Sequence[Segment]) -> None:
        """The segments of a traced step through blocks of these classes."""
        at = windows(classes)
        for segment in found:
            if segment.block is None:
                self.outside.setdefault(segment.part, segment)
            else:
                self.by_window.setdefault((segment.part, at[segment.block]), segment)

    def step(self, classes: Sequence[Hashable]) -> list[Place]:
        """A whole step through these blocks.

        A window that was not traced is taken from a block of the same class with other neighbours, which is close, and
        exact but for what neighbours exchange.
        """
        at = windows(classes)
        blocks = [Place(self._nearest("forward", window), i) for i, window in enumerate(at)]
        back = [Place(self._nearest("backward", window), i) for i, window in enumerate(at)]
        start, loss, end, update = (Place(self.outside[part], None) for part in _OUTSIDE)
        reference = self.outside.get("reference")
        return [
            start,
            *([] if reference is None else [Place(reference, None)]),
            *blocks,
            loss,
            *reversed(back),
            end,
            update,
        ]

    def know(self, classes: Sequence[Hashable]) -> bool:
        """Whether a block of each class was traced."""
        return {window[1] for _, window in self.by_window} >= set(classes)

    def take(self, other: Pieces, classes: Sequence[Hashable]) -> None:
        """Add what only `other` has, of windows of blocks of these classes.

        They come in the order of a trace of them all: it decides between pieces that are equally near.
        """
        at = windows(classes)
        order = [*(("forward", window) for window in at), *(("backward", window) for window in reversed(at))]
        both = {**other.by_window, **self.by_window}
        self.outside = {**other.outside, **self.outside}
        self.by_window = {key: both[key] for key in (*order, *self.by_window) if key in both}

    def lack(self, classes: Sequence[Hashable]) -> set[Window]:
        """Windows of these blocks of which none was traced."""
        return {window for window in windows(classes) if ("forward", window) not in self.by_window}

    def with_backward(self, shares: Mapping[Hashable, float]) -> Pieces:
        """The same pieces, the backward pass of a block of each class taking such a share of its time."""
        made = Pieces()
        made.outside = self.outside
        for (part, window), segment in self.by_window.items():
            share = shares.get(window[1], 1.0) if part == "backward" else 1.0
            made.by_window[part, window] = replace(segment, seconds=share * segment.seconds)
        return made

    def with_heads(self, heads: Mapping[Part, Segment]) -> Pieces:
        """The same pieces with loss and reference of another chunk size."""
        made = Pieces()
        made.outside, made.by_window = {**self.outside, **heads}, self.by_window
        return made

    def between(self, other: Pieces, share: float) -> Pieces:
        """Between this micro-batch (`share` 0) and a larger one: sizes and times grow in proportion to tokens.

        What is made so has sizes and times alone, no events.
        """
        made = Pieces()
        for part, segment in self.outside.items():
            if part in other.outside:
                made.outside[part] = _between(segment, other.outside[part], share)
        for key, segment in self.by_window.items():  # in order, which decides between pieces that are equally near
            if key in other.by_window:
                made.by_window[key] = _between(segment, other.by_window[key], share)
        return made

    def _nearest(self, part: Part, window: Window) -> Segment:
        exact = self.by_window.get((part, window))
        if exact is not None:
            return exact
        same = [(w, segment) for (p, w), segment in self.by_window.items() if p == part and w[1] == window[1]]
        if not same:
            assert part == "backward", "a block of each class was traced"
            return Segment("backward", None, (), 0, 0, 0.0)  # nothing is trained in it or below it
        return max(same, key=lambda item: sum(a == b for a, b in zip(item[0], window, strict=True)))[1]


def _between(a: Segment, b: Segment, share: float) -> Segment:
    def mix(x: float, y: float) -> float:
        return x + (y - x) * share

    return Segment(
        a.part,
        a.block,
        (),
        round(mix(a.delta, b.delta)),
        round(mix(a.high, b.high)),
        mix(a.seconds, b.seconds),
        round(mix(a.heap_delta, b.heap_delta)),
        round(mix(a.heap_high, b.heap_high)),
    )


def peaks(places: Iterable[Place], *, offloading: range = range(0), nbytes: int = 0) -> tuple[int, int]:
    """The most bytes held, and of them the most in the heap, more than before the step.

    Args:
        offloading: blocks that will have their inputs, of `nbytes` each, below the device, where in `places` they have
            not: when a block puts its input down, that of the block before it is gone, and in backward one more comes
            up.
    """
    level = most = heap = most_heap = 0
    for place in places:
        segment = place.segment
        if place.at in offloading[1:]:
            shift = -nbytes if segment.part == "forward" else nbytes
            level, heap = level + shift, heap + (shift if nbytes < LARGE else 0)
        most, most_heap = max(most, level + segment.high), max(most_heap, heap + segment.heap_high)
        level, heap = level + segment.delta, heap + segment.heap_delta
    return most, most_heap


class Turn(NamedTuple):
    """A segment at its place in a composed step.

    Attributes:
        events: its own.
        pieces: of each event the piece of memory: of which origin, and as its which.
        firsts: of each origin the key of the first piece.
    """

    events: Sequence[Step]
    pieces: Sequence[tuple[int, int]]
    firsts: Sequence[int]


def turns(places: Sequence[Place], depth: int) -> list[Turn]:
    """A composed step, in which each piece of memory has a key of its own.

    What is born in a block's segment and given back in its own or a neighbour's keeps that distance; nothing is given
    back where a segment of another window has a neighbour that is not there. What was there before the step has the
    negative key that it had when it was traced. Segments that stand at several places are the same objects in all
    their turns.
    """
    known: dict[int, _Linked] = {}  # by segment
    first: dict[tuple[Part, int | None], int] = {("load", None): 0}  # part, block -> key of the segment's first piece
    found: list[Turn] = []
    reached = (it.at for it in places if it.segment.part == "backward" and it.segment.events)
    lowest = min((at for at in reached if at is not None), default=0)
    top = 1
    for place in places:
        segment = place.segment
        if id(segment) not in known:
            known[id(segment)] = _linked(segment)
        linked = known[id(segment)]
        first[segment.part, place.at] = own = top
        origin = place.at if place.at is not None else depth - 1 if segment.part == "loss" else lowest
        others = (first.get((part, None if away is None else origin + away), _NOWHERE) for part, away in linked.others)
        found.append(Turn(segment.events, linked.pieces, [own, *others]))
        top += linked.taken
    return found


class _Linked(NamedTuple):
    """Of a segment's events the pieces, as in `Turn`, where the first origin is the segment itself; the part and
    distance of the other ones; and how many pieces are taken in it."""

    pieces: Sequence[tuple[int, int]]
    others: Sequence[tuple[Part, int | None]]
    taken: int


def _linked(segment: Segment) -> _Linked:
    origins: dict[tuple[Part, int | None], int] = {(segment.part, None if segment.block is None else 0): 0}
    pieces: list[tuple[int, int]] = []
    taken = 0
    for _, birth in segment.events:
        if birth is None:
            pieces.append((0, taken))
            taken += 1
        else:
            part, distance, ordinal = birth
            at = origins.setdefault((part, distance), len(origins))
            pieces.append((at, -ordinal if part == "load" else ordinal))
    return _Linked(pieces, list(origins)[1:], taken)


def holders(places: Sequence[Place]) -> dict[str, int]:
    """Of a composed step the same as `Trace.holders`."""
    curves: dict[int, list[int]] = {}  # by segment: bytes held after each event, more than at its begin
    level, most, end = 0, -math.inf, (0, 0)
    for at, place in enumerate(places):
        events = place.segment.events
        if not events:
            continue
        if id(events) not in curves:
            curves[id(events)] = list(accumulate(event.nbytes for event, _ in events))
        curve = curves[id(events)]
        if level + max(curve) > most:
            most = level + max(curve)
            end = at, curve.index(max(curve)) + 1
        level += curve[-1]
    found = _left(places[end[0]].segment.events[: end[1]])
    whole: dict[int, Counter[str]] = {}
    for place in places[: end[0]]:
        events = place.segment.events
        if id(events) not in whole:
            whole[id(events)] = _left(events)
        found.update(whole[id(events)])
    return {name: found[name] for name in ("activations", "loss", "workspace")}


def _left(steps: Iterable[Step]) -> Counter[str]:
    """Bytes that these events take and leave, by what they are for; negative if they only give them back."""
    found = Counter[str]()
    for event, birth in steps:
        part = event.phase if birth is None else birth.part
        if part != "load":
            found["workspace" if event.inside else "loss" if part == "loss" else "activations"] += event.nbytes
    return found
