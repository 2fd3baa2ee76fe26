"""From bytes in tensors to bytes that the process takes of the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowmem_ft.planner.allocator import CachingAllocator
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.trace import Event, Move
from lowmem_ft.planner.weigh import Scales, Weighed

FRAGMENTATION = 1.02  # of an estimate only: what counts comes from the allocator's model
# On a CPU beside tensors: later imports, thread stacks, kernels; and the holes in glibc's heap, which keeps freed
# pieces of less than 4 MiB. Measured after four bare steps: 28 MiB where tensors take 12 to 65 MiB, 94 to 110 where
# they take 305 to 374; 89 to 93 for a demo that evaluates and saves.
PROCESS_SLACK, HEAP_SHARE, HEAP_MOST = 92 << 20, 0.10, 96 << 20
BLAS_WORKSPACE = 32 << 20  # cuBLAS keeps 8.1 MiB in the pool, 32 MiB on Hopper (design.md)
REPEATS = 2  # micro-batches that are replayed: holes that one leaves are there for the next


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes that the allocator holds and that the process takes of the device at its peak."""

    reserved: int
    process: int


def process_estimate(device: Device, allocated: int) -> int:
    """What the process takes when its tensors take `allocated`, about."""
    if device.kind == "cpu":
        return device.process_bytes + allocated + PROCESS_SLACK + min(int(HEAP_SHARE * allocated), HEAP_MOST)
    return device.process_bytes + BLAS_WORKSPACE + int(allocated * FRAGMENTATION)


def process_peak(device: Device, scales: Scales, weighed: Weighed) -> Peak:
    """What the process takes during a training step of the policy that was weighed."""
    if device.kind == "cpu":
        return Peak(weighed.allocated, process_estimate(device, weighed.allocated))
    reserved = reserved_peak(scales.stage.tracer.alive(), weighed.moves)
    return Peak(reserved, device.process_bytes + reserved)


def reserved_peak(base: Iterable[Event], step: Iterable[Move]) -> int:
    """The most that PyTorch's caching allocator reserves, with the pieces of `base` held during steps."""
    allocator = CachingAllocator()
    allocator.allocate(BLAS_WORKSPACE)
    handles = {-event.key: allocator.allocate(event.nbytes) for event in base if event.tier == "device"}
    moves = [(key, event.nbytes) for key, event in step if event.tier == "device"]
    for _ in range(REPEATS):
        for key, nbytes in moves:
            if nbytes > 0:
                handles[key] = allocator.allocate(nbytes)
            else:
                allocator.free(handles.pop(key, 0))
    return allocator.reserved_peak
