"""A step through the model of the caching allocator, without the events that change nothing.

In a mixture of experts most events are temporary: an expert's tile takes some pieces, gives them back, and so does the
next. Which of them can be left out, so that both peaks stay the same to the byte:

- The small and the large pool know nothing of each other, and nothing is returned to the driver here. So each is
  replayed alone; reserved bytes are the sum of both.
- The free blocks of a pool follow from its segments and from what is in use, as free neighbours merge. So events that
  give back all that they take, and nothing else, leave it as it was, unless the driver is asked for memory. It is not
  if one free block has the bytes of all their pieces together: of what has not been used of it, the end is large
  enough for each next piece. (Not so in torch 2.12, where blocks also have an age.)
- Nor is it if the very same events came before in the same state and asked for none. In the small pool the backward
  pass of a block that recomputes is such a run as a whole, and nothing is left between it and the next block's.
- The bytes in use are those of the pieces, rounded up, but for rests of up to 1 MiB that stay with a piece of the
  large pool. So it is known beforehand up to which peak such events matter.
- Of equal blocks one after the other, of which each gives back what the one before made, each may put what it makes to
  the same place. Then the same is free, and all the rest of them do so, too. (Left out only where no rests stay.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, TypeAlias

from lowmem_ft.planner.allocator import SLACK, SMALL_MAX, CachingAllocator, rounded

_LONGEST = 128  # events that are looked through for the end of such a run: then it is not worth the search

# Bytes taken, negative where they are given back; the piece as in `compose.Turn`; and how many bytes of the small pool,
# more than at the begin of the script, are in use at most until the next event of the large one
Op: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Neighbouring events of one pool that give back all that they take, and nothing else.

    Attributes:
        need: bytes of a free block with which they ask the driver for nothing.
        high: bytes in use at most, more than those of the large pool before and of the small one at the begin of the
            script.
        items: the same events, of which some may be runs again.
    """

    need: int
    high: int
    items: Sequence[Op | Run]


@dataclass(frozen=True, slots=True)
class Script:
    """What happens between two points of a step, pool by pool.

    Attributes:
        large, small: in order.
        lead: bytes of the small pool at most, more than at the begin, before the first event of the large one.
        small_delta: and at the end.
        delta, high: bytes of both pools in use at the end and at most, without the rests that stay with a piece.
        left: which of its own pieces of the large pool it does not give back.
        others: origins of what else it gives back there.
    """

    large: Sequence[Op | Run]
    small: Sequence[Op | Run]
    lead: int
    small_delta: int
    delta: int
    high: int
    left: Sequence[int]
    others: frozenset[int]

    @classmethod
    def of(cls, events: Iterable[tuple[int, int, int]]) -> Script:
        """Of events of the device: bytes, negative where they are given back, and the piece as in `compose.Turn`."""
        ops: tuple[list[Op], list[Op]] = [], []
        lead = high = small = both = 0
        beside: list[int] = []
        left: dict[tuple[int, int], None] = {}
        others = set[int]()
        for nbytes, origin, ordinal in events:
            size = rounded(nbytes) if nbytes > 0 else -rounded(-nbytes)
            both += size
            high = max(high, both)
            if abs(size) > SMALL_MAX:
                ops[0].append((size, origin, ordinal, 0))
                beside.append(small)
                if size > 0:
                    left[origin, ordinal] = None
                elif (origin, ordinal) in left:
                    del left[origin, ordinal]
                else:
                    others.add(origin)
                continue
            ops[1].append((size, origin, ordinal, 0))
            small += size
            if not beside:
                lead = max(lead, small)
            elif small > beside[-1]:
                beside[-1] = small
        large = [(size, origin, ordinal, most) for (size, origin, ordinal, _), most in zip(ops[0], beside, strict=True)]
        own = [ordinal for _, ordinal in left]
        return cls(_items(large), _items(ops[1]), lead, small, both, high, own, frozenset(others))


def _items(ops: Sequence[Op]) -> list[Op | Run]:
    """The events of one pool, in which runs are found."""
    ends = [-1] * len(ops)  # of each event the index of the other one of its piece; -1: not here
    taken: dict[tuple[int, int], int] = {}
    levels = [0]
    for at, (size, origin, ordinal, _) in enumerate(ops):
        levels.append(levels[-1] + size)
        if size > 0:
            taken[origin, ordinal] = at
        elif (origin, ordinal) in taken:
            ends[at] = taken.pop((origin, ordinal))
            ends[ends[at]] = at

    def end_of(begin: int) -> int:
        """The last event of the shortest run from this one on; -1 if there is none."""
        end, at = ends[begin], begin
        while at <= end < begin + _LONGEST:
            if ends[at] < begin:
                return -1
            end = max(end, ends[at])
            at += 1
        return end if begin < end < at else -1

    def run(begin: int, end: int, items: Sequence[Op | Run]) -> Run:
        sizes = [size for size, *_ in ops[begin:end] if size > 0]
        most = max(levels[at + 1] + ops[at][3] for at in range(begin, end)) - levels[begin]
        slack = SLACK * len(sizes) if ops[begin][0] > SMALL_MAX else 0
        return Run(sum(sizes), most + slack, items)

    def between(begin: int, end: int) -> list[Op | Run]:
        found: list[Op | Run] = []
        runs: list[Run] = []
        while begin < end:
            last = end_of(begin)
            if last > 0:
                runs.append(run(begin, last + 1, [ops[begin], *between(begin + 1, last), ops[last]]))
                begin = last + 1
                continue
            found += _as_one(runs)
            runs = []
            found.append(ops[begin])
            begin += 1
        return [*found, *_as_one(runs)]

    items = between(0, len(ops))
    return [run(0, len(ops), items)] if len(items) > 1 and min(ends) >= 0 else items


def _as_one(runs: list[Run]) -> list[Run]:
    """Each of them leaves all as it was for the next."""
    if len(runs) < 2:
        return runs
    return [Run(max(run.need for run in runs), max(run.high for run in runs), runs)]


class Peaks(NamedTuple):
    """The most bytes in use and held, as PyTorch's allocator counts them."""

    allocated: int
    reserved: int


Played: TypeAlias = tuple[Script, Sequence[int]]  # with the first key of each origin, see `compose.Turn`


def replay(
    new: Callable[[], CachingAllocator],
    held: Sequence[tuple[int, int]],
    step: Sequence[Played],
    *,
    enough: int | None = None,
    pool: int = 0,
) -> Peaks:
    """The peaks of scripts one after the other.

    Args:
        new: makes an allocator.
        held: key and bytes of what came before, negative where it was given back. What was free at its end is, too.
        enough: if more bytes are reserved, it matters no more how many: then the peaks are those until then.
        pool: bytes that are held before the step, see `runtime.budget.fill_pool`.
    """
    small, large = _Pool(new(), held, small=True), _Pool(new(), held, small=False)
    missing = pool - small.allocator.reserved - large.allocator.reserved
    if missing > 0:
        large.allocator.free(large.allocator.allocate(missing))
    beside = small.allocator.allocated
    level = large.peak = beside + large.allocator.allocated
    for script, _ in step:
        large.peak = max(large.peak, level + script.high)
        level += script.delta
    small.peak = large.peak  # which it cannot reach alone
    if enough is not None and large.peak > enough:
        return Peaks(large.peak, large.peak)  # what is in use is held, too
    next_large = 0
    for at, (script, firsts) in enumerate(step):
        large.peak = max(large.peak, large.allocator.allocated + beside + script.lead)
        if at == next_large:
            large.play(script.large, firsts, beside)
            next_large += 1 + large.settled(step, at)
        small.play(script.small, firsts, 0)
        beside += script.small_delta
        if enough is not None and large.allocator.reserved + small.allocator.reserved > enough:
            break
    return Peaks(large.peak, large.allocator.reserved_peak + small.allocator.reserved_peak)


def _goes_on(step: Sequence[Played], at: int) -> bool:
    """Whether turn `at` does what the one before does, and gives back only what that has made, and its own."""
    if at >= len(step) or step[at][0] is not step[at - 1][0]:
        return False
    (script, firsts), (_, before) = step[at], step[at - 1]
    return all(firsts[origin] == before[0] for origin in script.others)


class _Pool:
    """An allocator of which one pool is used.

    Attributes:
        peak: the most bytes in use of both pools.
    """

    def __init__(self, allocator: CachingAllocator, held: Sequence[tuple[int, int]], *, small: bool) -> None:
        self.allocator, self.peak, self._small = allocator, 0, small
        self._state, self._states = 0, count(1)  # its number: the same for the same free blocks
        self._known: dict[Run, tuple[int, int]] = {}  # in which state, and beside what, it was the same afterwards
        self._handles: dict[int, int] = {}
        for key, nbytes in held:
            if (abs(nbytes) <= SMALL_MAX) != small:
                continue
            if nbytes > 0:
                self._handles[key] = allocator.allocate(nbytes)
            else:
                allocator.free(self._handles.pop(key))
        allocator.empty_cache()  # as `assemble` does at its end
        allocator.reserved_peak = allocator.reserved
        self._before: list[Hashable] = []  # after equal turns what was reserved, and where lay what they had made

    def play(self, items: Sequence[Op | Run], firsts: Sequence[int], beside: int) -> None:
        """What happens in it while of the other one at least `beside` bytes are in use."""
        allocator, handles = self.allocator, self._handles
        for item in items:
            if isinstance(item, Run):
                self._run(item, firsts, beside)
                continue
            self._state = next(self._states)
            size, origin, ordinal, most = item
            if size > 0:
                handles[firsts[origin] + ordinal] = allocator.allocate(size)
            else:
                allocator.free(handles.pop(firsts[origin] + ordinal, 0))
            if allocator.allocated + beside + most > self.peak:
                self.peak = allocator.allocated + beside + most

    def settled(self, step: Sequence[Played], at: int) -> int:
        """How many turns after that with number `at`, which was played, need not be: they leave all as it is."""
        script, firsts = step[at]
        last = at
        while _goes_on(step, last + 1):
            last += 1
        allocator = self.allocator
        if last == at or not allocator.expandable_segments or allocator.oldest_block_first:
            self._before = []
            return 0
        places = tuple([self._handles[firsts[0] + ordinal] for ordinal in script.left])
        self._before = [*self._before[-2:], (allocator.reserved, places)]
        # a block may put its result to where the one before that had put its own
        period = next((it for it in (1, 2) if self._before[-1] in self._before[-1 - it : -it]), None)
        if period is None:
            return 0
        left_out = (last - at) // period * period
        for ordinal in script.left:
            self._handles[step[at + left_out][1][0] + ordinal] = self._handles.pop(firsts[0] + ordinal)
        return left_out

    def _run(self, run: Run, firsts: Sequence[int], beside: int) -> None:
        """Play it, unless it changes nothing."""
        state, reserved = self._state, self.allocator.reserved
        known, before = self._known.get(run, (-1, 0))
        if known == state and before >= beside:
            return
        stays = self.allocator.stays(run.need, small=self._small)
        if stays and self.allocator.allocated + beside + run.high <= self.peak:
            return
        self.play(run.items, firsts, beside)
        if self.allocator.reserved == reserved and not self.allocator.oldest_block_first:
            self._state = state
            self._known[run] = state, beside
