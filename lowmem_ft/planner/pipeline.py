"""How long a micro-batch takes whose weights or block inputs are copied from and to the tiers below while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowmem_ft.planner.compose import Place
from lowmem_ft.runtime.ring import SLOTS, Ring


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Bytes per second between a device and the tiers below it.

    Attributes:
        host, disk: of streamed weights on their way up from there.
        down, up: of block inputs, which go to the host, or, where that is the device, to the disk.
        lookup: seconds that a row of a table takes on the disk beside its bytes.
    """

    host: float = math.inf
    disk: float = math.inf
    down: float = math.inf
    up: float = math.inf
    lookup: float = 0.0


class Inputs(NamedTuple):
    """Which blocks offload their inputs, and the seconds of each copy. The last one's stays."""

    blocks: range
    down: float
    up: float


def streamed_seconds(places: Sequence[Place], copies: Mapping[int, float], inputs: Inputs) -> float:
    """Seconds of a micro-batch that follows another one.

    Work and copies go on side by side, and copies one after the other on one link. Work waits for the copy of its own
    block, and streamed weights for the slot that they go to, which is free once the next block is at work. An input
    goes down while its block works forward, which the next one waits for; in backward it comes up while the block
    above works.

    Args:
        places: of the micro-batch, without the update.
        copies: seconds that a block's weights take to be copied, by index of the streamed blocks.
    """
    if not copies and not inputs.blocks:
        return sum(place.segment.seconds for place in places)
    order = sorted(copies)
    index_of = {block: index for index, block in enumerate(order)}
    ring, ready = Ring(len(order)), [0.0] * SLOTS
    now = free = 0.0  # of the work, of the link
    for _ in range(2):  # the second begins with what the first has left on the device
        begin = gone = coming = now  # when an input is down, and the next one up
        for place in places:
            at = place.at
            if at is not None and at in inputs.blocks and place.segment.part != "reference":
                if place.segment.part == "forward":
                    now = max(now, gone)
                    if at != inputs.blocks[-1]:
                        gone = free = max(now, free) + inputs.down
                else:
                    came = coming
                    if at - 1 in inputs.blocks:
                        coming = free = max(now, free) + inputs.up
                    now = max(now, came)
            if at is not None and at in copies:
                index = index_of[at]
                if index != ring.current:
                    for slot, block in ring.ask(index, returns=True):
                        ready[slot] = free = max(now, free) + copies[order[block]]
                now = max(now, ready[ring.slot_of(index)])
            now += place.segment.seconds
    return now - begin


def at_least(place: Place, seconds: float) -> Place:
    """`place`, and so long that the head's tiles can come meanwhile."""
    segment = place.segment
    if segment.seconds >= seconds:
        return place
    return replace(place, segment=replace(segment, seconds=seconds))


def forward_again(places: Sequence[Place], passes: int) -> list[Place]:
    """So many passes without gradients through the blocks of a step, which put no inputs down."""
    blocks = [it for it in places if it.segment.part == "forward"] if passes else []
    return passes * [replace(it, segment=replace(it.segment, part="reference")) for it in blocks]
