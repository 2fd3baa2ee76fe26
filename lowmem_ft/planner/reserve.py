"""From bytes in tensors to bytes that the process takes of the device."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem_ft.core.plan import Policy
from lowmem_ft.planner.alloc_conf import expandable_segments
from lowmem_ft.planner.allocator import SMALL_MAX, SMALL_PAGE, CachingAllocator, rounded
from lowmem_ft.planner.compose import Turn
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.replay import Peaks, Script, replay
from lowmem_ft.planner.simulate import UNSEEN_BYTES, Stage
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

    Attributes:
        pool: what it holds before the first step, see `runtime.budget.fill_pool`; 0 where segments grow.
    """

    allocated: int
    reserved: int
    process: int
    pool: int = 0


def process_estimate(device: Device, allocated: int, heap: int = 0, kernels: int = 0) -> int:
    """What the process takes when its tensors take `allocated`, about; on a CPU `heap` of them lie in the heap, and
    kernels that are compiled take `kernels`."""
    if device.kind == "cpu":
        return device.process_bytes + allocated + PROCESS_SLACK + kernels + int(HEAP_SHARE * heap)
    return device.process_bytes + sum(workspaces(device)) + int(allocated * FRAGMENTATION)


def workspaces(device: Device) -> list[int]:
    """Pieces of the pool that are kept for the process's life: of cuBLAS, whose products with a bias have one in each
    thread, and bitsandbytes' code of the second quantization (functional.py, `name2qmap`). And a little for the numbers
    that some models (GPT-Neo) put on the device, of which no operator tells."""
    if device.kind == "cpu":
        return []
    bias = device.bias_workspace
    return [it for it in (device.forward_workspace, bias, device.backward_workspace, bias, 4 * 256, 1024) if it]


def process_peak(device: Device, scales: Scales, weighed: Weighed, *, most: int | None = None) -> Peak:
    """What the process takes during a training step of the policy that was weighed.

    Args:
        most: if that is more than so many bytes, it matters no more how many.
    """
    if device.kind == "cpu":
        process = process_estimate(device, weighed.allocated, weighed.heap, scales.kernels(weighed.policy))
        return Peak(weighed.allocated, weighed.allocated, process)
    expandable = expandable_segments()
    margins = partial(with_margins, scales.stage, weighed.policy, expandable=expandable)
    tensors = weighed.allocated - UNSEEN_BYTES + sum(workspaces(device))
    least = margins(Peaks(tensors, tensors))  # what is in use is held, too
    if most is not None and device.process_bytes + least.reserved > most:
        return Peak(least.allocated, least.reserved, device.process_bytes + least.reserved)
    data, shorter = scales.stage.config.data, 0
    rows = weighed.policy.micro_batch_tokens // data.seq_len
    if rows > 1 or not data.packing:
        shorter = Shorter(weighed.turns).bytes(rows=rows if data.packing else None)
    enough = None
    if most is not None:  # above that margins are no less than these
        enough = max(tensors, most - device.process_bytes - shorter - (least.reserved - tensors))
    play = partial(replayed, device, scales.made(weighed.policy), weighed.turns, scripts=scales.scripts, enough=enough)
    peaks, pool = play(expandable=True), 0
    if not expandable:
        pool = peaks.reserved
        peaks = play(expandable=False, pool=pool)
    allocated, reserved = margins(peaks)
    reserved += shorter
    return Peak(allocated, reserved, device.process_bytes + reserved, pool)


class Shorter:
    """What the small pool takes more, at most, in micro-batches of fewer tokens than that of a step.

    Pieces that were of more than 1 MiB come from it there, while the large pool keeps what it has. In the model of the
    allocator micro-batches of 32 sizes took 32 to 50 MiB more than the largest alone where this says 34 to 55 (8 blocks
    that keep, hidden 1024 to 4096), 16 to 18 where it says 20 (that recompute), and 30 of 588 MiB where it says 34
    (of 16 experts).
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        step = turns[:-1]  # without the update, where nothing has to do with tokens
        different = {id(turn.events): turn for turn in step}
        pieces: dict[int, Any] = {
            name: np.array(_OnDevice.of(turn).pieces, int).reshape(-1, 3) for name, turn in different.items()
        }
        self._step = [id(turn.events) for turn in step]
        of = [pieces[name] for name in self._step]
        keys = [np.array(turn.firsts)[them[:, 1]] + them[:, 2] for turn, them in zip(step, of, strict=True)]
        freed = np.zeros(1 + max((int(key.max()) for key in keys if key.size), default=0), bool)
        for key, them in zip(keys, of, strict=True):
            freed[key[(key > 0) & (them[:, 0] < 0)]] = True  # else it was there before
        self._small: dict[int, NDArray[np.int64]] = {}
        self._large: dict[int, NDArray[np.int64]] = {}
        for name, them, key in zip(self._step, of, keys, strict=True):
            if name not in self._small:
                size = np.sign(them[:, 0]) * rounded(np.abs(them[:, 0]))
                is_small = np.abs(size) <= SMALL_MAX
                passing = freed[np.maximum(key, 0)]  # else it is a gradient, or was there before
                self._small[name], self._large[name] = size * is_small, size * (~is_small & passing)
        larger = np.concatenate([sizes[sizes > 0] for sizes in self._large.values()])
        self._shares: NDArray[np.float64] = SMALL_MAX / np.unique(larger)  # with so many tokens one more is small
        self._known: dict[float, int] = {}
        self._told: dict[tuple[int | None, float], int] = {}

    def bytes(self, *, rows: int | None, share: float = 1.0) -> int:
        """Where the largest micro-batch has this `share` of the tokens of the step.

        Args:
            rows: of that of the step, of which there may be fewer; None: there may be any number of tokens.
        """
        if (rows, share) not in self._told:  # a search asks for each number of blocks that keep
            shares = self._shares if rows is None else np.unique(np.floor(self._shares * rows) / rows)
            growth = max(self._most(it) for it in (share, *shares[shares < share])) - self._most(share)
            self._told[rows, share] = SMALL_PAGE * math.ceil(growth / SMALL_PAGE)
        return self._told[rows, share]

    def _most(self, share: float) -> int:
        """Bytes of the small pool with so much of the tokens, more than before the step."""
        if share not in self._known:
            curves = {}
            for name, sizes in self._large.items():
                shrunk = np.round(share * sizes)
                curves[name] = np.cumsum(self._small[name] + shrunk * (np.abs(shrunk) <= SMALL_MAX))
            level = high = 0
            for curve in (curves[name] for name in self._step if curves[name].size):
                high, level = max(high, level + int(curve.max())), level + int(curve[-1])
            self._known[share] = high
        return self._known[share]


def with_margins(stage: Stage, policy: Policy, peaks: Peaks, *, expandable: bool) -> Peaks:
    """What the pool may hold at most, where it holds `peaks` in a replay.

    Of 262 steps of models without routing that an H200 recorded, with segments that grow, 247 held what their replay
    says to the byte, 14 others 2 MiB less or more, and one 4 MiB more: small pieces lie elsewhere, and of packed
    documents that are shorter than planned there are more. Where tokens are routed, tiles of few rows take of the small
    pool what higher ones take of the large: up to 12 MiB more in replays of 18 steps of OLMoE, gpt-oss and Mixtral
    shapes (1.6 to 14 GB) under twelve routings each, balanced to all to a few; with several experts together up to 26
    MiB, one page of the large pool among them, and 6 MiB of 0.3 GB. What no operator tells is what `UNSEEN_BYTES` says,
    and 1 KiB a block for indices that models make from lists (Falcon).

    Args:
        expandable: whether segments grow. If not, torch 2.11 goes by the addresses that the driver gave, which nobody
            knows before: an H200 held 0.2% more for it.
    """
    most, share = (16, 256) if policy.experts_together == 1 else (32, 64)
    low_tiles = min(most << 20, peaks.reserved // share) if stage.routed else 0
    by_address = 0 if expandable else peaks.reserved // 256
    allocated = peaks.allocated + UNSEEN_BYTES + 1024 * len(stage.blocks)
    return Peaks(allocated, peaks.reserved + 2 * SMALL_PAGE + low_tiles + by_address)


def allocator_of(device: Device, *, expandable: bool) -> CachingAllocator:
    """The allocator that a run on `device` will have."""
    return CachingAllocator(
        expandable_segments=expandable,
        address_space=device.memory_bytes + device.memory_bytes // 8,
        oldest_block_first=torch.__version__.startswith("2.12."),
    )


def replayed(
    device: Device,
    made: Sequence[tuple[int, int]],
    step: Sequence[Turn],
    *,
    scripts: dict[Hashable, Script] | None = None,
    enough: int | None = None,
    expandable: bool,
    pool: int = 0,
) -> Peaks:
    """The peaks of steps, with `workspaces`.

    Args:
        made: key and bytes of what came before them, negative where it was given back.
        scripts: those of steps before by their events, to which these are added: most blocks of a kind take the same.
        enough, pool: as of `replay`.
        expandable: whether segments grow.
    """
    scripts = {} if scripts is None else scripts
    kept = [(_KEPT, nbytes) for nbytes in workspaces(device)]
    before = [(-key, nbytes) for key, nbytes in made]
    held = {key for key, _ in before}
    known: dict[int, _OnDevice] = {}
    own: dict[Hashable, Script] = {}  # found without their events
    played = []
    for turn in [*step] * REPEATS:
        if id(turn.events) not in known:
            known[id(turn.events)] = _OnDevice.of(turn)
        events = known[id(turn.events)]
        gone = events.before & held
        held -= gone
        key = id(turn.events), gone
        if key not in own:
            same = tuple([it for it in events.pieces if it[2] >= 0 or it[2] in gone])
            if same not in scripts:
                scripts[same] = Script.of(same)
            own[key] = scripts[same]
        played.append((own[key], turn.firsts))
    new = partial(allocator_of, device, expandable=expandable)
    return replay(new, [*kept, *before], played, enough=enough, pool=pool)


class _OnDevice(NamedTuple):
    """The events of a turn that are the device's.

    Attributes:
        pieces: bytes, origin and number of each.
        before: keys of pieces from before the step that it gives back.
    """

    pieces: Sequence[tuple[int, int, int]]
    before: frozenset[int]

    @classmethod
    def of(cls, turn: Turn) -> _OnDevice:
        both = zip(turn.events, turn.pieces, strict=True)
        pieces = [(event.nbytes, *it) for (event, _), it in both if event.tier == "device"]
        return cls(pieces, frozenset(ordinal for _, _, ordinal in pieces if ordinal < 0))
