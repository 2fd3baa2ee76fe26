"""From bytes in tensors to bytes that the process takes of the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lowmem_ft.planner.alloc_conf import expandable_segments
from lowmem_ft.planner.allocator import CachingAllocator
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.trace import Event, Move
from lowmem_ft.planner.weigh import Scales, Weighed

FRAGMENTATION = 1.02  # of an estimate only: what counts comes from the allocator's model
# On a CPU beside tensors: later imports, thread stacks, kernels, packed matrices of MKL; and the holes in glibc's heap,
# which keeps freed pieces of less than 4 MiB. Measured in MiB after two bare steps of 24 configurations: 21 to 27 where
# the heap holds up to 18, 28 to 45 at 25 to 35 (78 once, in fp32), 77 at 87; in runs that read data, evaluate and save
# 138 at 192, 89 to 93 for the demo. In fp32 more, see `weigh.FP32_HEAP`.
PROCESS_SLACK, HEAP_SHARE = 64 << 20, 0.5
REPEATS = 2  # micro-batches that are replayed: holes that one leaves are there for the next


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes of the device in tensors, held by PyTorch's allocator, and taken by the process.

    On CUDA the allocator counts the first of them: rounded up, and with the workspaces of cuBLAS.
    """

    allocated: int
    reserved: int
    process: int


def process_estimate(device: Device, allocated: int, heap: int = 0) -> int:
    """What the process takes when its tensors take `allocated`, about; on a CPU `heap` of them lie in the heap."""
    if device.kind == "cpu":
        return device.process_bytes + allocated + PROCESS_SLACK + int(HEAP_SHARE * heap)
    return device.process_bytes + workspace_bytes(device) + int(allocated * FRAGMENTATION)


def workspace_bytes(device: Device) -> int:
    """What cuBLAS keeps of the pool."""
    return device.forward_workspace + device.bias_workspace + device.backward_workspace


def process_peak(device: Device, scales: Scales, weighed: Weighed) -> Peak:
    """What the process takes during a training step of the policy that was weighed."""
    if device.kind == "cpu":
        return Peak(weighed.allocated, weighed.allocated, process_estimate(device, weighed.allocated, weighed.heap))
    allocator = replayed(device, scales.base(weighed.policy), weighed.moves)
    reserved = allocator.reserved_peak
    return Peak(allocator.allocated_peak, reserved, device.process_bytes + reserved)


def allocator_of(device: Device) -> CachingAllocator:
    """The allocator that a run on `device` will have, with the settings of this process's environment."""
    return CachingAllocator(
        expandable_segments=expandable_segments(),
        address_space=device.memory_bytes + device.memory_bytes // 8,
        oldest_block_first=torch.__version__.startswith("2.12."),
    )


def replayed(device: Device, base: Iterable[Event], step: Iterable[Move]) -> CachingAllocator:
    """The allocator after steps with the pieces of `base` held, and with the workspaces of cuBLAS."""
    allocator = allocator_of(device)
    for nbytes in (device.forward_workspace, device.bias_workspace):
        allocator.allocate(nbytes)
    handles = {-event.key: allocator.allocate(event.nbytes) for event in base if event.tier == "device"}
    moves = [(key, event.nbytes, event.phase) for key, event in step if event.tier == "device"]
    waiting = device.backward_workspace
    for _ in range(REPEATS):
        for key, nbytes, phase in moves:
            if waiting and phase == "backward":
                allocator.allocate(waiting)
                waiting = 0
            if nbytes > 0:
                handles[key] = allocator.allocate(nbytes)
            else:
                allocator.free(handles.pop(key, 0))
    return allocator
