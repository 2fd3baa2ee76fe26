"""How long a micro-batch takes whose weights are partly copied in while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowmem_ft.planner.compose import Place
from lowmem_ft.runtime.streaming import SLOTS, Ring


def streamed_seconds(places: Sequence[Place], copies: Mapping[int, float]) -> float:
    """Seconds of a micro-batch that follows another one.

    Work and copies go on side by side: work waits for the copy of its own block, and copies, one after the other, for
    the slot that they go to, which is free once the next block is at work.

    Args:
        places: of the micro-batch, without the update.
        copies: seconds that a block takes to be copied, by index of the streamed blocks.
    """
    if not copies:
        return sum(place.segment.seconds for place in places)
    order = sorted(copies)
    ring, ready = Ring(len(order)), [0.0] * SLOTS
    now = free = 0.0  # of the work, of the link
    for _ in range(2):  # the second begins with what the first has left on the device
        begin = now
        for place in places:
            if place.at is not None and place.at in copies:
                at = order.index(place.at)
                if at != ring.current:
                    for slot, coming in ring.ask(at, returns=True):
                        ready[slot] = free = max(now, free) + copies[order[coming]]
                now = max(now, ready[ring.slot_of(at)])
            now += place.segment.seconds
    return now - begin
