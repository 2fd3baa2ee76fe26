"""Peak memory of a call, from the events of PyTorch's own CPU allocator."""

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that `function` had allocated at once, beyond what was allocated before."""
    gc.collect()  # what an earlier test left must not be freed meanwhile: it would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()  # what it returns counts as held
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    assert peak > 0, "the profiler saw no allocation"
    return peak
