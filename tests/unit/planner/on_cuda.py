"""A configuration's memory on CUDA as it is planned and as a card records it, and what the one says of the other."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.packing import Batch
from lowmem_ft.planner.alloc_conf import expandable_segments
from lowmem_ft.planner.calibrate import Recording, Taken, compare, record
from lowmem_ft.planner.compose import Turn
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.reserve import replayed, with_margins
from lowmem_ft.planner.scratch_cuda import Card
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.trace import Event
from lowmem_ft.step import train_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """Peak bytes of a first step, and the events of a later micro-batch, which recomputes less."""

    allocated: int
    reserved: int
    process: int
    later: Sequence[Event]


def predict(config: RunConfig, policy: Policy, device: Device, *, loss_tokens: int) -> Predicted:
    """As `planner.reserve` does for a plan, but with every block traced."""
    stage = Stage(config, policy, kind="cuda", card=Card.of(device))

    def step(*, settled: bool) -> list[Event]:
        treated = {"keep": policy.keep_blocks, "offload": policy.offload_blocks}
        return stage.step(policy, **treated, loss_tokens=loss_tokens, settled=settled).events

    held = stage.tracer.alive()
    before = {event.key for event in held}  # which `replayed` knows by negative keys, as in a composed step
    taken = [event for event in step(settled=False) if event.phase != "load"]
    keys = [-event.key if event.key in before else event.key for event in taken]
    turn = Turn([(event, None) for event in taken], [(0, key) for key in keys], [0])
    expandable = expandable_segments()
    peaks = replayed(device, stage.made, [turn], expandable=expandable)
    allocated, reserved = with_margins(stage, policy, peaks, expandable=expandable)
    stage.tracer.turns = 10**9  # a card tells of them all
    return Predicted(
        allocated=allocated,
        reserved=reserved,
        process=device.process_bytes + reserved,
        later=step(settled=True),
    )


def measure(
    config: RunConfig, policy: Policy, device: Device, batches: Sequence[Batch]
) -> tuple[Recording, Recording, Recording]:
    """A first step, a later one with a single micro-batch, and what came before them, loading included."""
    made: list[Assembled] = []
    before = record(lambda: made.append(assemble(config, policy, device.torch_device)), device.torch_device)
    steps = (batches, batches[:1])
    first, later = (record(lambda it=it: train_step(made[0], it, lr=1e-4), device.torch_device) for it in steps)
    return first, later, before


def packed(recording: Recording) -> dict[str, Any]:
    """As JSON: the events' sizes and addresses in units of 512 bytes, and their lines of Python by number."""
    lines = sorted({event.where for event in recording.events})
    at = {line: index for index, line in enumerate(lines)}
    rows = [(event.nbytes // 512, at[event.where], event.address // 512) for event in recording.events]
    numbers = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return {
        **{name: getattr(recording, name) for name in ("allocated", "reserved", "process")},
        "events": base64.b85encode(zlib.compress(numbers.tobytes(), 9)).decode("ascii"),
        "rows": len(numbers),
        "lines": lines,
        "grown": list(recording.grown),
    }


def unpacked(data: dict[str, Any]) -> Recording:
    """Inverse of `packed`. Recordings of before 2026-11-26 have no addresses."""
    numbers = np.frombuffer(zlib.decompress(base64.b85decode(data["events"])), dtype=np.int64)
    columns = numbers.reshape(data.get("rows", 2), -1).T.tolist()
    events = [Taken(512 * nbytes, data["lines"][line], *(512 * it for it in at)) for nbytes, line, *at in columns]
    peaks = {name: data[name] for name in ("allocated", "reserved", "process")}
    return Recording(**peaks, events=events, grown=[(at, nbytes) for at, nbytes in data.get("grown", ())])


def judge(predicted: Predicted, first: Recording, later: Recording) -> dict[str, Any]:
    """Predicted / recorded - 1 of each peak, and the differences event by event."""
    found = compare(predicted.later, later.events)
    pairs = {name: (getattr(predicted, name), getattr(first, name)) for name in ("allocated", "reserved", "process")}
    return {
        **{f"{name}_bytes": recorded for name, (_, recorded) in pairs.items()},
        **{f"{name}_error": ours / theirs - 1 for name, (ours, theirs) in pairs.items() if theirs},
        "events": {"equal": found.equal, "differing": found.differing, "moved": found.moved},
        "first_difference": str(found.differences[0]) if found.differences else None,
        "by_op": found.by_op(),
        "scratch": [[op, list(pieces), times] for (op, pieces), times in found.scratch().items()],
    }
