"""Steps on a card: their seconds, and what allocator and process hold meanwhile, beside what was planned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LR = 1e-4


@contextmanager
def watched(device: Any) -> Iterator[dict[str, int]]:
    """Peaks of the allocator and of the process while it lasts, in bytes; on a CPU of nothing."""
    import torch

    from lowmem_ft.runtime.memory import cuda_process_bytes

    peaks: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield peaks
    if device.type == "cuda":
        peaks["allocated"] = torch.cuda.max_memory_allocated(device)
        peaks["reserved"] = torch.cuda.max_memory_reserved(device)
        # the pool never shrinks within it, so what is taken at the end is the most
        peaks["process"] = cuda_process_bytes(device.index or 0) or 0


def timed(step: Callable[[], float], device: Any, *, steps: int) -> dict[str, Any]:
    """Seconds of the first step and of `steps` more, and their losses."""
    import torch

    seconds, losses = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        losses.append(step())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "step_seconds": statistics.median(seconds[1:] or seconds),
        "losses": losses,
    }


def our_step(ready: Any, batches: Any) -> Callable[[], float]:
    from lowmem_ft.step import train_step

    return lambda: train_step(ready, batches, lr=LR).loss


def peaks_of(predicted: Any) -> dict[str, int]:
    """What is planned beside what `watched` measures, in bytes."""
    return {name: getattr(predicted, f"{name}_peak_bytes") for name in ("allocated", "reserved", "process", "host")}
