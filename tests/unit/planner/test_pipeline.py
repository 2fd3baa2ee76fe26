"""Copies beside work: who waits for whom."""

from collections.abc import Sequence

import pytest

from lowmem_ft.planner.compose import Part, Place, Segment
from lowmem_ft.planner.pipeline import Inputs, streamed_seconds

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
    none = Inputs(range(0), copy, copy)
    assert streamed_seconds(step(1.0), dict.fromkeys(streamed, copy), none) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("blocks", "down", "up", "expected"),
    [
        (range(DEPTH), 1.0, 1.0, 12.0),  # hidden
        (range(DEPTH), 3.0, 0.0, 22.0),  # five go down in 3 where work takes 1: the next block waits for each
        (range(DEPTH), 0.0, 3.0, 22.0),  # and five come up
        (range(2, 4), 3.0, 4.0, 17.0),  # of two one moves, while the block above works
        (range(2, 3), 9.0, 9.0, 12.0),  # one alone stays
    ],
)
def test_offloaded_inputs(blocks: range, down: float, up: float, expected: float) -> None:
    assert streamed_seconds(step(1.0), {}, Inputs(blocks, down, up)) == pytest.approx(expected)


def test_weights_and_inputs_share_the_link() -> None:
    """In each direction 4 blocks and 5 inputs are copied, one after the other, and hide the work."""
    both = streamed_seconds(step(1.0), dict.fromkeys(range(DEPTH), 10.0), Inputs(range(DEPTH), 10.0, 10.0))
    assert 180.0 <= both <= 192.0
