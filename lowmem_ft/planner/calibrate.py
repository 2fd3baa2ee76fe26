"""A step that a CUDA card recorded beside its simulation: where they differ first, in which operators, and by what.

PyTorch records each allocation and each free (`torch.cuda.memory._record_memory_history`). Both sides are sequences of
sizes; they are walked together, and where they part, the fewest differences are sought after which they agree again.
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch

from lowmem_ft.core.sizes import format_size
from lowmem_ft.planner.trace import Event
from lowmem_ft.runtime.memory import cuda_process_bytes

_UNIT = 512  # the allocator's own, so that requests of 1 and of 512 bytes are the same
_AGREE = 16  # events in a row from which both sides are taken to agree again
_MOST_EDITS = 2000  # differences without so many that agree, after which the rest counts as one


_SIGNS: Mapping[str, int] = {"alloc": 1, "free_completed": -1}
_GROWTH: Mapping[str, int] = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass(frozen=True, slots=True)
class Taken:
    """A recorded event.

    Attributes:
        nbytes: as PyTorch rounds them; negative where they are given back.
        where: the innermost line of Python, if that was recorded.
        address: of the piece, which tells pieces of one size apart; 0 where it was not recorded.
    """

    nbytes: int
    where: str = ""
    address: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A step as a card recorded it; sizes in bytes.

    Attributes:
        allocated, reserved: at most during it, as PyTorch counts them.
        process: taken by the process at its end; None where the driver does not tell.
        events: in order.
        grown: (after how many events, by how many bytes) the pool grew, or shrank.
    """

    allocated: int
    reserved: int
    process: int | None
    events: Sequence[Taken]
    grown: Sequence[tuple[int, int]] = ()


def record(step: Callable[[], object], device: torch.device) -> Recording:
    """Run `step` on a CUDA device whose cache is empty."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", clear_history=True)
    try:
        step()
        torch.cuda.synchronize(device)
        snapshot = torch.cuda.memory._snapshot(device)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    index = torch.cuda.current_device() if device.index is None else device.index
    return Recording(
        allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
        process=cuda_process_bytes(index),
        events=recorded_events(snapshot, index),
        grown=_recorded_growth(snapshot, index),
    )


def recorded_events(snapshot: Mapping[str, Any], index: int = 0) -> list[Taken]:
    """What `torch.cuda.memory._snapshot()` tells of device `index`: allocations, and frees once they are complete."""
    return [
        Taken(_SIGNS[entry["action"]] * _rounded(entry["size"]), _where(entry.get("frames", ())), entry["addr"])
        for entry in snapshot["device_traces"][index]
        if entry["action"] in _SIGNS
    ]


def _recorded_growth(snapshot: Mapping[str, Any], index: int) -> list[tuple[int, int]]:
    """See `Recording.grown`."""
    found, events = [], 0
    for entry in snapshot["device_traces"][index]:
        events += entry["action"] in _SIGNS
        if sign := _GROWTH.get(entry["action"]):
            found.append((events, sign * entry["size"]))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A place where the recording and the simulation are not the same.

    Attributes:
        at: index of the simulated event before which it is.
        op, phase, block: at work there in the simulation.
        missing: bytes of recorded events that were not simulated, negative where given back.
        surplus: of simulated events that were not recorded.
        where: the line of Python of the first missing one.
    """

    at: int
    op: str
    phase: str
    block: int | None
    missing: tuple[int, ...]
    surplus: tuple[int, ...]
    where: str

    @property
    def inside(self) -> tuple[int, ...]:
        """Missing pieces that are given back before the two agree again, as an operator's scratch is."""
        frees = Counter(-nbytes for nbytes in self.missing if nbytes < 0)
        found = []
        for nbytes in self.missing:
            if nbytes > 0 and frees[nbytes]:
                frees[nbytes] -= 1
                found.append(nbytes)
        return tuple(found)

    def __str__(self) -> str:
        place = self.phase if self.block is None else f"{self.phase} of block {self.block}"
        parts = [f"event {self.at}, {place}, {self.op}:"]
        for name, sizes in (("not simulated", self.missing), ("not recorded", self.surplus)):
            if sizes:
                parts.append(f"{name} {', '.join(_signed(size) for size in sizes)}")
        return " ".join(parts) + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All differences, in order.

    Attributes:
        equal: events that are the same on both sides.
    """

    equal: int
    differences: Sequence[Difference]

    @property
    def differing(self) -> int:
        """Events that only one side has."""
        return sum(len(it.missing) + len(it.surplus) for it in self.differences)

    @property
    def moved(self) -> int:
        """Those of them that the other side has too, at another time."""
        missing = Counter(nbytes for it in self.differences for nbytes in it.missing)
        surplus = Counter(nbytes for it in self.differences for nbytes in it.surplus)
        return 2 * (missing & surplus).total()

    def by_op(self) -> dict[str, tuple[int, int]]:
        """Operator -> bytes that it takes and that were not simulated, and the reverse; the largest first."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for it in self.differences:
            for side, sizes in enumerate((it.missing, it.surplus)):
                found[it.op][side] += sum(nbytes for nbytes in sizes if nbytes > 0)
        taken = {op: (missing, surplus) for op, (missing, surplus) in found.items() if missing or surplus}
        return dict(sorted(taken.items(), key=lambda item: -max(item[1])))

    def scratch(self) -> dict[tuple[str, tuple[int, ...]], int]:
        """(Operator, pieces that it takes inside) -> how often: entries that `planner.scratch_cuda` lacks."""
        return dict(Counter((it.op, it.inside) for it in self.differences if it.inside).most_common())

    def report(self, lines: int = 10) -> str:
        """What a person reads."""
        if not self.differences:
            return f"All {self.equal} events are the same."
        found = [
            f"{self.equal} events are the same, {self.differing} differ, {self.moved} of them in time only.",
            f"First: {self.differences[0]}",
        ]
        for op, (missing, surplus) in list(self.by_op().items())[:lines]:
            found.append(f"{op}: {format_size(missing)} not simulated, {format_size(surplus)} not recorded")
        for (op, pieces), times in list(self.scratch().items())[:lines]:
            found.append(f"{op} takes inside, {times} times: {', '.join(str(nbytes) for nbytes in pieces)}")
        return "\n".join(found)


def compare(simulated: Iterable[Event], recorded: Sequence[Taken]) -> Comparison:
    """Walk both sides together.

    Args:
        simulated: a step's events; those of the host and of what was there before are left out.
    """
    events = [event for event in simulated if event.tier == "device" and event.phase != "load"]
    ours = [_rounded(event.nbytes) for event in events]
    theirs = [taken.nbytes for taken in recorded]
    at = there = equal = 0
    differences: list[Difference] = []
    while True:
        run = _agreeing(ours, at, theirs, there)
        at, there, equal = at + run, there + run, equal + run
        if at == len(ours) and there == len(theirs):
            return Comparison(equal=equal, differences=differences)
        for same, surplus, missing in _apart(ours, at, theirs, there):
            at, there, equal, run = at + same, there + same, equal + same, run + same
            back = _begin(ours, at, surplus, run) if surplus else _begin(theirs, there, missing, run)
            back = 0 if surplus and missing else back
            start, where = at - back, there - back
            # what is not recorded has an operator of its own; what is not simulated follows what its operator returns
            event = events[start] if surplus else events[max(start - 1, 0)] if events else None
            differences.append(
                Difference(
                    at=start,
                    op=event.op if event else "",
                    phase=event.phase if event else "",
                    block=event.block if event else None,
                    missing=tuple(theirs[where : where + missing]),
                    surplus=tuple(ours[start : start + surplus]),
                    where=recorded[where].where if missing else "",
                )
            )
            at, there, run = at + surplus, there + missing, 0


def _agreeing(ours: Sequence[int], at: int, theirs: Sequence[int], there: int) -> int:
    """For how many events both sides are the same."""
    run, most = 0, min(len(ours) - at, len(theirs) - there)
    while run < most and ours[at + run] == theirs[there + run]:
        run += 1
    return run


def _apart(ours: Sequence[int], at: int, theirs: Sequence[int], there: int) -> list[tuple[int, int, int]]:
    """The differences until both sides agree for some events again, the fewest possible.

    Myers 1986, "An O(ND) Difference Algorithm" (doi:10.1007/BF01840446), which stops at the first long agreement.

    Returns:
        for each difference the number of events that agree before it, and those that only one side has.
    """
    rows, columns = len(ours) - at, len(theirs) - there
    reached: dict[int, int] = {1: 0}  # diagonal (ours - theirs) -> the most events of ours for this many differences
    history: list[dict[int, int]] = []
    for edits in range(_MOST_EDITS + 1):
        history.append(dict(reached))
        for diagonal in range(-edits, edits + 1, 2):
            down = diagonal == -edits or (diagonal != edits and reached[diagonal - 1] < reached[diagonal + 1])
            x = reached[diagonal + 1] if down else reached[diagonal - 1] + 1
            run = _agreeing(ours, at + x, theirs, there + x - diagonal) if x <= rows and x - diagonal <= columns else 0
            reached[diagonal] = x + run
            ended = x + run == rows and x + run - diagonal == columns
            if run >= _AGREE or ended:
                return _script(history, edits, diagonal, x)
    return [(0, rows, columns)]


def _script(history: Sequence[Mapping[int, int]], edits: int, diagonal: int, x: int) -> list[tuple[int, int, int]]:
    """The path to (x, x - diagonal) from its steps: runs of ours alone and of theirs alone, joined where they meet."""
    steps: list[tuple[int, int, int]] = []
    while edits:
        reached = history[edits]
        down = diagonal == -edits or (diagonal != edits and reached[diagonal - 1] < reached[diagonal + 1])
        begin = reached[diagonal + 1] if down else reached[diagonal - 1] + 1
        same = x - begin
        if same == 0 and steps:
            _, surplus, missing = steps.pop()
        else:
            surplus = missing = 0
            if steps:
                steps[-1] = (same, *steps[-1][1:])
        steps.append((0, surplus + (not down), missing + down))
        diagonal += 1 if down else -1
        edits -= 1
        x = reached[diagonal]
    return steps[::-1]


def _begin(side: Sequence[int], at: int, count: int, run: int) -> int:
    """How many events earlier a difference on one side may as well begin, so that it gives back all that it takes.

    After +a -a, a following +a could be the odd one just as well: then it is not clear which operator took it.
    """
    for back in range(min(run, at) + 1):
        if back and side[at - back] != side[at - back + count]:
            return 0
        held = 0
        for nbytes in side[at - back : at - back + count]:
            held += nbytes
            if held < 0:
                break
        else:
            if held == 0:
                return back
    return 0


def _rounded(nbytes: int) -> int:
    size = -(-abs(nbytes) // _UNIT) * _UNIT
    return size if nbytes > 0 else -size


def _signed(nbytes: int) -> str:
    return f"{'+' if nbytes > 0 else '-'}{abs(nbytes)}"


def _where(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost frame; frames come with the innermost first."""
    frame = next(iter(frames), None)
    return "" if frame is None else f"{PurePath(frame['filename']).name}:{frame['line']} {frame['name']}"
