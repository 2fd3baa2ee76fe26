"""The budget, kept while a run goes on: what would cross it fails as if memory had run out.

On CUDA PyTorch's allocator is capped, so that nothing is taken beyond. On a CPU the operating system has no such cap
that a process survives; there the process's peak is looked at between the pieces of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.core.sizes import format_size
from lowmem_ft.runtime.blocks import find_blocks
from lowmem_ft.runtime.memory import cuda_process_bytes, process_bytes, process_peak_bytes, reset_process_peak

# A process that is closer to its budget gives back the holes in its heap whenever it is looked at. Where blocks
# offload, pieces of less than 4 MiB (`core.host`) leave 10 MiB of them in a gpt-oss of 8 narrow blocks and 36 in a
# GPT-Neo of 6; without them a step takes up to 7% longer (2 x 1024 tokens, fp16 on a Zen 4 core, 2026-11-28).
_TIGHT = 128 << 20


class OverBudgetError(MemoryError):
    """The process has taken more than its budget."""


@contextmanager
def capped_allocator(device: torch.device, budget: int, *, beside: int) -> Iterator[None]:
    """Within it PyTorch's pool on a CUDA `device` leaves the process within `budget`; its peaks are counted anew. On a
    CPU nothing is done.

    Args:
        budget: bytes of the whole process.
        beside: of them what the plan counts beside the pool: the context, which grows as kernels are loaded. What is
            measured counts where it is more.
    """
    if device.type != "cuda":
        yield
        return
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    total = torch.cuda.get_device_properties(device).total_memory
    free, reserved = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    taken = cuda_process_bytes(device.index)
    share = allowed_share(total, budget, beside=max(beside, (taken or 0) - reserved), free=free + reserved)
    torch.cuda.set_per_process_memory_fraction(share, device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def allowed_share(total: int, budget: int, *, beside: int, free: int) -> float:
    """The share of a card's `total` bytes that the pool may take: the budget without what is `beside` it, and not more
    than is `free`."""
    return max(0.0, min(1.0, min(budget - beside, free) / total))


def fill_pool(device: torch.device, nbytes: int) -> None:
    """Have PyTorch's pool on a CUDA `device` hold `nbytes`: what it lacks is taken as one block and given back.

    Pieces of all sizes are then cut from it. Where segments do not grow (Windows, or without PYTORCH_ALLOC_CONF) each
    would else be as large as the piece that it was taken for, and micro-batches that differ in length leave holes: in
    the model of the allocator up to 3 times as much is held in the end.

    Raises:
        torch.OutOfMemoryError: there is less.
    """
    if not nbytes or device.type != "cuda":
        return
    missing = nbytes - torch.cuda.memory_reserved(device)
    if missing > 0:
        torch.empty(missing, dtype=torch.uint8, device=device)
        torch.cuda.reset_peak_memory_stats(device)  # or that block would count as what tensors took at most


class Watch:
    """Raises OverBudgetError within a step if the process has taken more than `budget` bytes since the last reset.

    It looks whenever a block begins its forward, and whenever one has the first of its gradients. What was taken before
    it was made does not count. Near the budget it also gives freed memory back to the operating system.

    Attributes:
        peak: the most that was seen beyond the budget; 0 while it was not crossed.
    """

    def __init__(self, model: nn.Module, budget: int) -> None:
        self.budget, self.peak, self._resets = budget, 0, True
        blocks = find_blocks(model)[1]
        self._handles: list[RemovableHandle] = [block.register_forward_pre_hook(self._look) for block in blocks]
        for block in blocks:
            trained = next((parameter for parameter in block.parameters() if parameter.requires_grad), None)
            if trained is not None:
                self._handles.append(trained.register_post_accumulate_grad_hook(self._look))  # type: ignore[no-untyped-call]
        before = process_peak_bytes()
        if before > budget:  # else there is no need to forget what loading took
            self.peak = before
            self.reset()

    def reset(self) -> None:
        """Count from now on."""
        self._resets = reset_process_peak()

    def _look(self, *_: Any) -> None:
        if process_bytes() > self.budget - _TIGHT:
            release_freed_memory()
        taken = process_peak_bytes() if self._resets else process_bytes()
        if taken > self.budget:
            self.peak = max(self.peak, taken)
            raise OverBudgetError(f"the process took {format_size(taken)} of {format_size(self.budget)}")

    def remove(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
