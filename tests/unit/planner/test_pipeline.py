"""Copies beside work: who waits for whom."""

from collections.abc import Sequence

import pytest

from lowmem_ft.planner.compose import Part, Place, Segment
from lowmem_ft.planner.pipeline import streamed_seconds

DEPTH = 6


def step(seconds: float) -> list[Place]:
    """Forward and backward through all blocks, each taking as long."""

    def place(part: Part, at: int) -> Place:
        return Place(Segment(part, at, (), 0, 0, seconds), at)

    return [*(place("forward", at) for at in range(DEPTH)), *(place("backward", at) for at in reversed(range(DEPTH)))]


@pytest.mark.parametrize(
    ("streamed", "copy", "expected"),
    [
        ([], 1.0, 12.0),
        (range(DEPTH), 0.5, 12.0),  # hidden
        (range(DEPTH), 1.0, 12.0),
        # copies alone count: those of blocks 2 to 5 and then 3 to 0, as two stay over each turn
        # hidden but for one of work at each turn: copies are of blocks 2 to 5, and back of 3 to 0
        (range(DEPTH), 100.0, 804.0),
        ([2, 5], 100.0, 12.0),  # two have their slots for good
        ([1, 3, 5], 2.0, 12.0),  # of three one is copied in each direction, while two blocks work
        ([1, 3, 5], 3.0, 14.0),
        ([1, 3, 5], 100.0, 208.0),
    ],
)
def test_seconds(streamed: Sequence[int], copy: float, expected: float) -> None:
    assert streamed_seconds(step(1.0), dict.fromkeys(streamed, copy)) == pytest.approx(expected)
