"""What the replay leaves out changes nothing: its peaks are those of every event, one by one, to the byte."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from lowmem_ft.planner.allocator import CachingAllocator
from lowmem_ft.planner.compose import Step, Turn
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.replay import Op, Peaks, Run, Script, replay
from lowmem_ft.planner.reserve import REPEATS, replayed, workspaces
from tests.unit.planner.policies import policy
from tests.unit.planner.test_compose import DEPTH
from tests.unit.planner.test_weigh import SEQ_LEN, scales

KIB, MIB = 1 << 10, 1 << 20
SIZES = [512, 3 * KIB, 700 * KIB, MIB, MIB + 512, 3 * MIB, 5 * MIB // 2 + 512, 9 * MIB, 10 * MIB + 512, 33 * MIB]
Pieces = list[tuple[int, int, int]]
Steps = list[tuple[Pieces, list[int]]]
MODES: list[dict[str, Any]] = [{}, {"expandable_segments": True}, {"oldest_block_first": True}]


def drawn(generator: random.Random, length: int) -> Pieces:
    """Nested and crossing pieces, loops of the same temporary ones, and some that stay."""
    found: Pieces = []
    live: list[tuple[int, int]] = []
    number = 0

    def take(size: int) -> None:
        nonlocal number
        found.append((size, 0, number))
        live.append((size, number))
        number += 1

    def give(at: int) -> None:
        size, key = live.pop(at)
        found.append((-size, 0, key))

    while len(found) < length:
        if generator.random() < 0.3:
            sizes = generator.choices(SIZES, k=generator.randint(1, 4))
            order = [generator.randrange(left) for left in range(len(sizes), 0, -1)]
            for _ in range(generator.randint(1, 4)):
                for size in sizes:
                    take(size)
                for at in order:
                    give(len(live) - 1 - at)
        elif live and generator.random() < 0.5:
            give(generator.randrange(len(live)))
        else:
            take(generator.choice(SIZES))
    while live:
        give(generator.randrange(len(live)))
    return found


def one_by_one(allocator: CachingAllocator, held: Sequence[int], steps: Steps) -> Peaks:
    for nbytes in held:
        allocator.allocate(nbytes)
    handles: dict[int, int] = {}
    for pieces, firsts in steps:
        for nbytes, origin, ordinal in pieces:
            if nbytes > 0:
                handles[firsts[origin] + ordinal] = allocator.allocate(nbytes)
            else:
                allocator.free(handles.pop(firsts[origin] + ordinal))
    return Peaks(allocator.allocated_peak, allocator.reserved_peak)


def runs(items: Sequence[Op | Run]) -> Iterator[Run]:
    for item in items:
        if isinstance(item, Run):
            yield item
            yield from runs(item.items)


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("seed", range(16))
def test_peaks_are_those_of_every_event(seed: int, settings: dict[str, Any]) -> None:
    """Of parts that come again and again, with pieces taken and given back between them."""
    generator = random.Random(seed)
    held = generator.choices(SIZES, k=20)
    parts = [drawn(generator, 40) for _ in range(3)]
    scripts = {id(part): Script.of(part) for part in parts}
    steps: Steps = []
    between: list[tuple[int, int]] = []
    for at in range(30):
        steps.append((generator.choice(parts), [1000 * at]))
        if between and generator.random() < 0.5:
            size, first = between.pop(generator.randrange(len(between)))
            steps.append(([(-size, 0, 999)], [first]))
        elif generator.random() < 0.6:
            between.append((generator.choice(SIZES), 1000 * at))
            steps.append(([(between[-1][0], 0, 999)], [1000 * at]))
    played = [(scripts.get(id(pieces)) or Script.of(pieces), firsts) for pieces, firsts in steps]
    before = [(-1 - at, nbytes) for at, nbytes in enumerate(held)]
    wanted = one_by_one(CachingAllocator(**settings), held, steps)
    assert replay(lambda: CachingAllocator(**settings), before, played) == wanted


def in_a_row(generator: random.Random, first: int, long_before: list[tuple[int, int]]) -> Steps:
    """Turns as of blocks in backward: each makes something for the next one, which gives it back. Of some rows each
    turn leaves a piece, too (which the third one after it may give back), or gives one back from long before."""
    kind, size = generator.choice(["plain", "leaves", "three in turn", "gives back"]), generator.choice(SIZES)
    work = drawn(generator, 30)
    place, end = sorted(generator.choices(range(len(work) + 1), k=2))
    before = (-size, 1, 100)
    found: Steps = []
    for key in range(first, first + 12 * 200, 200):
        events, firsts = [*work[:place], (size, 0, 100), *work[place:end]], [key, key - 200]
        events += [before, *work[end:]] if key > first else work[end:]
        if kind in ("leaves", "three in turn"):
            events.append((3 * MIB, 0, 101))
            long_before.append((3 * MIB, key + 101))
        if kind == "three in turn" and key >= first + 600:
            long_before.remove((3 * MIB, key - 600 + 101))
            events.append((-3 * MIB, 2, 101))
            firsts.append(key - 600)
        if kind == "gives back" and long_before:
            nbytes, other = long_before.pop()
            events.append((-nbytes, 2, 0))
            firsts.append(other)
        found.append((events, firsts))
    return [*found, ([before], [key + 200, key])]


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("seed", range(32))
def test_equal_turns_that_go_on_from_each_other(seed: int, settings: dict[str, Any]) -> None:
    generator = random.Random(seed)
    held = generator.choices(SIZES, k=20)
    long_before: list[tuple[int, int]] = []
    steps = [turn for row in range(6) for turn in in_a_row(generator, 10_000 * row, long_before)]
    steps += [([(size, 0, 0)], [100_000 + at]) for at, size in enumerate(generator.choices(SIZES, k=40))]
    scripts: dict[tuple[Any, ...], Script] = {}
    played = [(scripts.setdefault(tuple(events), Script.of(events)), firsts) for events, firsts in steps]
    before = [(-1 - at, nbytes) for at, nbytes in enumerate(held)]
    wanted = one_by_one(CachingAllocator(**settings), held, steps)
    assert replay(lambda: CachingAllocator(**settings), before, played) == wanted


def test_blocks_that_leave_all_as_the_one_before_are_left_out() -> None:
    """What they make lies in one of two places in turn."""
    made: list[CachingAllocator] = []

    class Counted(CachingAllocator):
        requests = 0

        def allocate(self, nbytes: int, *, stream: int = 0) -> int:
            self.requests += 1
            return super().allocate(nbytes, stream=stream)

    def new() -> CachingAllocator:
        made.append(Counted(expandable_segments=True))
        return made[-1]

    script = Script.of([(30 * MIB, 0, 0), (20 * MIB, 0, 1), (-20 * MIB, 1, 1), (-30 * MIB, 0, 0)])
    first = Script.of([(30 * MIB, 0, 0), (20 * MIB, 0, 1), (-30 * MIB, 0, 0)])
    last = Script.of([(-20 * MIB, 1, 1), (40 * MIB, 0, 0)])
    played = [(first, [0]), *((script, [at, at - 10]) for at in range(10, 500, 10)), (last, [500, 490])]
    peaks = replay(new, [], played)
    assert (peaks.allocated, peaks.reserved) == (70 * MIB, 80 * MIB)
    assert sum(it.requests for it in made if isinstance(it, Counted)) < 20


def test_what_is_left_out() -> None:
    """A tile's temporary pieces, also those of all tiles at once; not what is between a piece that stays."""
    tile = [(3 * MIB, 0, 0), (2 * MIB, 0, 1), (-3 * MIB, 0, 0), (4 * KIB, 0, 2), (-2 * MIB, 0, 1), (-4 * KIB, 0, 2)]
    tiles = [(size, origin, 3 * at + ordinal) for at in range(8) for size, origin, ordinal in tile]
    (run,), (small,) = Script.of(tiles).large, Script.of(tiles).small
    assert isinstance(run, Run)
    assert (run.need, len(run.items)) == (5 * MIB, 8)
    assert isinstance(small, Run)
    assert small.need == 4 * KIB
    stays = [(3 * MIB, 0, 0), (2 * MIB, 0, 1), (-3 * MIB, 0, 0)]
    assert not any(runs(Script.of(stays).large))


def test_rests_that_stay_with_a_piece_count_in_the_peak() -> None:
    """A piece takes all of a hole that is 1 MiB larger: no run that may reach the peak so is left out."""
    held, hole, piece = (-1, 40 * MIB), (11 * MIB, 0, 0), (10 * MIB, 0, 1)
    events = [hole, (-11 * MIB, 0, 0), piece, (-10 * MIB, 0, 1)]
    once = one_by_one(CachingAllocator(), [held[1]], [(events, [0])])
    assert once.allocated == 52 * MIB, "the hole is 12 MiB and the first piece leaves 1 of them"
    assert replay(CachingAllocator, [held], [(Script.of(events), [0])]) == once


def test_the_same_once_more_beside_more_of_the_other_pool() -> None:
    """It leaves all as it was, so that it is not replayed again; but in use is more than ever."""
    again = [
        (11 * MIB, 0, 0),
        (19 * MIB, 0, 1),
        (-11 * MIB, 0, 0),
        (11 * MIB, 0, 2),
        (-19 * MIB, 0, 1),
        (-11 * MIB, 0, 2),
    ]
    small = [(MIB // 2, 0, 0)]
    script = Script.of(again)
    played = [(script, [0]), (script, [10]), (Script.of(small), [20]), (script, [30])]
    once = one_by_one(CachingAllocator(), [], [(again, [0]), (again, [10]), (small, [20]), (again, [30])])
    assert once.allocated == 32 * MIB + MIB // 2, "rests of 1 MiB stay with the pieces"
    assert replay(CachingAllocator, [], played) == once


def test_in_torch_2_12_the_same_once_more_makes_blocks_younger() -> None:
    """Of two equal holes twice the same takes one, then the other; a third piece takes the first again."""
    holes = [(8 * MIB, 0, 0), (12 * MIB, 0, 1), (8 * MIB, 0, 2), (12 * MIB, 0, 3), (-8 * MIB, 0, 0), (-8 * MIB, 0, 2)]
    again = [(4 * MIB, 0, 10), (-4 * MIB, 0, 10)]
    script = Script.of(again)
    rest = [(8 * MIB, 0, 4), (-12 * MIB, 0, 1), (18 * MIB, 0, 5)]  # beside the first hole there is no room for the last
    played = [(Script.of(holes), [0]), (script, [0]), (script, [0]), (Script.of(rest), [0])]
    wanted = one_by_one(
        CachingAllocator(oldest_block_first=True), [], [(it, [0]) for it in (holes, again, again, rest)]
    )
    assert wanted.reserved == 58 * MIB
    assert replay(lambda: CachingAllocator(oldest_block_first=True), [], played) == wanted


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[int, int]], list[Turn]]:
    """What came before, and a composed step of blocks with experts, of which some keep their activations."""
    _, made = scales("deepseek_v3", tmp_path_factory.mktemp("model"), kind="cuda")
    asked = policy(rows=2, seq_len=SEQ_LEN, keep=3, depth=DEPTH)
    return made.made(asked), made.weigh(asked, timed=False).turns


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("scale", [1, 40, 900])
def test_a_composed_step(step: tuple[list[tuple[int, int]], list[Turn]], scale: int, expandable: bool) -> None:
    """Of sizes that lie in the small pool, in both, and mostly in the large one."""
    card, larger = find_device("rtx-3060-12gb"), {}

    def scaled(events: Sequence[Step]) -> Sequence[Step]:
        if id(events) not in larger:
            larger[id(events)] = [(event._replace(nbytes=scale * event.nbytes), birth) for event, birth in events]
        return larger[id(events)]

    before = [(key, scale * nbytes) for key, nbytes in step[0]]
    turns = [turn._replace(events=scaled(turn.events)) for turn in step[1]]
    peaks = every_event(card, before, turns, expandable)
    scripts: dict[Hashable, Script] = {}
    play = partial(replayed, card, before, turns, scripts=scripts, expandable=expandable)
    assert play() == peaks
    assert len(scripts) < len({id(turn.events) for turn in turns}), "some take the same"
    assert play(enough=peaks.reserved) == peaks
    assert peaks.reserved - 1 < play(enough=peaks.reserved - 1).reserved


def every_event(card: Any, before: list[tuple[int, int]], turns: list[Turn], expandable: bool) -> Peaks:
    """As a run, with what libraries keep."""
    space = card.memory_bytes + card.memory_bytes // 8
    allocator = CachingAllocator(expandable_segments=expandable, address_space=space)
    for nbytes in workspaces(card):
        allocator.allocate(nbytes)
    handles: dict[int, int] = {}
    for key, nbytes in before:
        if nbytes > 0:
            handles[-key] = allocator.allocate(nbytes)
        else:
            allocator.free(handles.pop(-key))
    allocator.empty_cache()
    allocator.allocated_peak, allocator.reserved_peak = allocator.allocated, allocator.reserved
    for turn in turns * REPEATS:
        for (event, _), (origin, ordinal) in zip(turn.events, turn.pieces, strict=True):
            if event.tier != "device":
                continue
            key = turn.firsts[origin] + ordinal
            if event.nbytes > 0:
                handles[key] = allocator.allocate(event.nbytes)
            else:
                allocator.free(handles.pop(key, 0))
    return Peaks(allocator.allocated_peak, allocator.reserved_peak)
