"""One real step beside its simulation, by PyTorch's own allocator events."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.packing import Batch
from lowmem_ft.step import train_step


def measured_train_peak(config: RunConfig, policy: Policy, batches: Sequence[Batch]) -> int:
    """The most bytes in tensors during one real training step on the CPU, weights and batches included.

    What other tensors exist in the process is left out.
    """
    before = held_bytes() - sum(tensor.nbytes for batch in batches for tensor in _tensors(batch))
    ready = assemble(config, policy, torch.device("cpu"))
    held = held_bytes() - before
    return held + max(accumulate(allocator_events(lambda: train_step(ready, batches, lr=1e-4))))


def held_bytes() -> int:
    """Bytes of all tensors that exist in this process and hold memory of the host, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def allocator_events(function: Callable[[], object]) -> list[int]:
    """Bytes that `function` takes (> 0) and gives back (< 0) on the CPU, in order."""
    gc.collect()  # what an earlier step left must not be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()  # what it returns counts as held
    del kept
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids]
