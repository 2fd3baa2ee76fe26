"""From bytes in tensors to bytes that the process takes of the device."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lowmem_ft.planner.alloc_conf import expandable_segments
from lowmem_ft.planner.allocator import CachingAllocator
from lowmem_ft.planner.compose import Turn
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.replay import Peaks, Script, replay
from lowmem_ft.planner.trace import Event
from lowmem_ft.planner.weigh import Scales, Weighed

FRAGMENTATION = 1.02  # of an estimate only: what counts comes from the allocator's model
# On a CPU beside tensors: later imports, thread stacks, kernels, packed matrices of MKL; and the holes in glibc's heap,
# which keeps freed pieces of less than 4 MiB. Measured in MiB after two bare steps of 24 configurations: 21 to 27 where
# the heap holds up to 18, 28 to 45 at 25 to 35 (78 once, in fp32), 77 at 87; in runs that read data, evaluate and save
# 138 at 192, 89 to 93 for the demo. In fp32 more, see `weigh.FP32_HEAP`.
PROCESS_SLACK, HEAP_SHARE = 64 << 20, 0.5
_KEPT = 1 << 60  # the key of a piece that nothing gives back
REPEATS = 2  # micro-batches that are replayed: holes that one leaves are there for the next


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes of the device in tensors, held by PyTorch's allocator, and taken by the process.

    On CUDA the allocator counts the first of them: rounded up, and with the workspaces of cuBLAS.
    """

    allocated: int
    reserved: int
    process: int


def process_estimate(device: Device, allocated: int, heap: int = 0, kernels: int = 0) -> int:
    """What the process takes when its tensors take `allocated`, about; on a CPU `heap` of them lie in the heap, and
    kernels that are compiled take `kernels`."""
    if device.kind == "cpu":
        return device.process_bytes + allocated + PROCESS_SLACK + kernels + int(HEAP_SHARE * heap)
    return device.process_bytes + workspace_bytes(device) + int(allocated * FRAGMENTATION)


def workspace_bytes(device: Device) -> int:
    """What cuBLAS keeps of the pool."""
    return device.forward_workspace + device.bias_workspace + device.backward_workspace


def process_peak(device: Device, scales: Scales, weighed: Weighed, *, most: int | None = None) -> Peak:
    """What the process takes during a training step of the policy that was weighed.

    Args:
        most: if that is more than so many bytes, it matters no more how many.
    """
    enough = None if most is None else most - device.process_bytes
    if device.kind == "cpu":
        process = process_estimate(device, weighed.allocated, weighed.heap, scales.kernels)
        return Peak(weighed.allocated, weighed.allocated, process)
    peaks = replayed(device, scales.base(weighed.policy), weighed.turns, scripts=scales.scripts, enough=enough)
    return Peak(peaks.allocated, peaks.reserved, device.process_bytes + peaks.reserved)


def allocator_of(device: Device) -> CachingAllocator:
    """The allocator that a run on `device` will have, with the settings of this process's environment."""
    return CachingAllocator(
        expandable_segments=expandable_segments(),
        address_space=device.memory_bytes + device.memory_bytes // 8,
        oldest_block_first=torch.__version__.startswith("2.12."),
    )


def replayed(
    device: Device,
    base: Iterable[Event],
    step: Sequence[Turn],
    *,
    scripts: dict[Hashable, Script] | None = None,
    enough: int | None = None,
) -> Peaks:
    """The peaks of steps with the pieces of `base` held, and with the workspaces of cuBLAS.

    Args:
        scripts: those of steps before by their events, to which these are added: most blocks of a kind take the same.
        enough: as of `replay`.
    """
    scripts = {} if scripts is None else scripts
    before = [(-event.key, event.nbytes) for event in base if event.tier == "device"]
    workspaces = [(_KEPT, nbytes) for nbytes in (device.forward_workspace, device.bias_workspace) if nbytes]
    held, waiting = {key for key, _ in before}, device.backward_workspace
    known: dict[int, _OnDevice] = {}
    own: dict[Hashable, Script] = {}  # found without their events
    played = []
    for turn in [*step] * REPEATS:
        if id(turn.events) not in known:
            known[id(turn.events)] = _OnDevice.of(turn)
        events = known[id(turn.events)]
        gone, backward = events.before & held, events.backward if waiting else None
        held -= gone
        key = id(turn.events), gone, backward
        if key not in own:
            pieces = list(events.pieces)
            if backward is not None:
                pieces.insert(backward, (waiting, 0, _KEPT))
            same = tuple([it for it in pieces if it[2] >= 0 or it[2] in gone])
            if same not in scripts:
                scripts[same] = Script.of(same)
            own[key] = scripts[same]
        waiting = 0 if backward is not None else waiting
        played.append((own[key], turn.firsts))
    return replay(lambda: allocator_of(device), [*workspaces, *before], played, enough=enough)


class _OnDevice(NamedTuple):
    """The events of a turn that are the device's.

    Attributes:
        pieces: bytes, origin and number of each.
        before: keys of pieces from before the step that it gives back.
        backward: the index of the first in backward, if there is one.
    """

    pieces: Sequence[tuple[int, int, int]]
    before: frozenset[int]
    backward: int | None

    @classmethod
    def of(cls, turn: Turn) -> _OnDevice:
        both = [(event, it) for (event, _), it in zip(turn.events, turn.pieces, strict=True) if event.tier == "device"]
        pieces = [(event.nbytes, *it) for event, it in both]
        backward = next((at for at, (event, _) in enumerate(both) if event.phase == "backward"), None)
        return cls(pieces, frozenset(ordinal for _, _, ordinal in pieces if ordinal < 0), backward)
