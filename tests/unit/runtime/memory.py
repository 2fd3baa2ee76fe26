"""Peak memory of a call, from the events of PyTorch's own CPU allocator."""

from collections.abc import Callable
from itertools import accumulate

from lowmem_ft.planner.verify import allocator_events


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that `function` had allocated at once, beyond what was allocated before."""
    peak = max(accumulate(allocator_events(function)), default=0)
    assert peak > 0, "the profiler saw no allocation"
    return peak
