"""A simulated step, recorded as a card would, with pieces left out, added and changed: all of them are found."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner import calibrate as module
from lowmem_ft.planner.allocator import CachingAllocator
from lowmem_ft.planner.calibrate import Taken, compare, record, recorded_events
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.trace import Event
from tests.models import tiny_config
from tests.unit.planner.policies import policy


def snapshot_of(events: Sequence[Event]) -> dict[str, Any]:
    """What `torch.cuda.memory._snapshot()` would say of a step that allocates so, from an allocator that is empty."""
    allocator, entries = CachingAllocator(), []
    handles: dict[int, int] = {}
    for event in (event for event in events if event.tier == "device"):
        before = allocator.reserved
        if event.nbytes > 0:
            handles[event.key] = allocator.allocate(event.nbytes)
        else:
            allocator.free(handles[event.key])
        address, size = handles[event.key], abs(event.nbytes)
        actions = ["alloc"] if event.nbytes > 0 else ["free_requested", "free_completed"]
        frames = [{"filename": "/home/me/model.py", "line": 7, "name": "forward"}]
        if event.phase == "load":
            continue  # what was there before the recording began
        if allocator.reserved > before:
            entries.append({"action": "segment_alloc", "addr": address, "size": allocator.reserved - before})
        entries += [{"action": it, "addr": address, "size": size, "stream": 0, "frames": frames} for it in actions]
    return {"segments": [], "device_traces": [entries]}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    folder = tmp_path_factory.mktemp("model")
    tiny_config("llama").save_pretrained(folder)
    config = RunConfig.from_dict({"model": str(folder), "data": {"seq_len": 64}, "quant": {"bits": 8}})
    return list(Stage(config, policy(bits=8, quant="int8"), kind="cuda").step(policy(bits=8), keep=1).events)


def recorded(events: Sequence[Event]) -> list[Taken]:
    return recorded_events(snapshot_of(events))


def test_the_same_step_has_no_difference(step: list[Event]) -> None:
    found = compare(step, recorded(step))
    device = [event for event in step if event.tier == "device" and event.phase != "load"]
    assert len(device) > 500
    assert (found.equal, found.differing) == (len(device), 0)
    assert found.report() == f"All {len(device)} events are the same."


def test_scratch_that_is_not_simulated_is_proposed(step: list[Event]) -> None:
    """As if the table had no entry for what documents are told in."""
    flash = "aten._flash_attention_forward.default"
    left_out = [event for event in step if event.inside and event.op == flash]
    known = [event for event in step if event not in left_out]
    found = compare(known, recorded(step))
    assert (found.differing, found.moved) == (len(left_out), 0)
    assert found.by_op() == {flash: (512 * 3, 0)}
    assert found.scratch() == {(flash, (512,)): 3}
    first = found.differences[0]
    assert (first.phase, first.block, first.where) == ("forward", 0, "model.py:7 forward")
    assert "takes inside" in found.report()


def test_what_is_simulated_and_not_recorded(step: list[Event]) -> None:
    births = [event for event in step if event.nbytes > 0 and event.phase == "backward" and event.block == 0]
    dropped = births[3]
    found = compare(step, recorded([event for event in step if event.key != dropped.key]))
    assert found.differing == 2
    assert sum(sum(it.surplus) for it in found.differences) == 0
    assert (found.differences[0].op, found.differences[0].block) == (dropped.op, 0)
    assert not found.scratch()


def test_a_piece_of_another_size_and_one_that_is_freed_later(step: list[Event]) -> None:
    taken = recorded(step)
    larger = next(at for at, it in enumerate(taken) if it.nbytes > 4096)
    changed = [*taken[:larger], Taken(taken[larger].nbytes + 512), *taken[larger + 1 :]]
    found = compare(step, changed)
    assert [(it.missing, it.surplus) for it in found.differences] == [
        ((taken[larger].nbytes + 512,), (taken[larger].nbytes,))
    ]
    free = next(at for at, it in enumerate(taken) if at > 300 and it.nbytes < 0 and it.nbytes != taken[at + 9].nbytes)
    late = [*taken[:free], *taken[free + 1 : free + 40], taken[free], *taken[free + 40 :]]
    found = compare(step, late)
    assert (found.differing, found.moved) == (2, 2)


def test_recording_asks_pytorch_as_it_wants_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions take these arguments, and what they say is read; the recording ends also where the step fails."""
    asked: list[Any] = []
    memory = torch.cuda.memory
    signature = inspect.signature(memory._record_memory_history)

    def switched(enabled: str | None = "all", **settings: Any) -> None:
        signature.bind(enabled, **settings)
        asked.append(enabled)

    entries = [
        {"action": "segment_alloc", "size": 2 << 20, "addr": 4 << 20},
        {"action": "alloc", "size": 700, "frames": [], "addr": 4 << 20},
        {"action": "segment_unmap", "size": 1 << 20, "addr": 5 << 20},
    ]
    monkeypatch.setattr(memory, "_record_memory_history", switched)
    monkeypatch.setattr(memory, "_snapshot", lambda _: {"device_traces": [[], entries]})
    for name, value in {"synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 2 << 20)
    monkeypatch.setattr(module, "cuda_process_bytes", lambda index: 100 + index)
    found = record(lambda: asked.append("step"), torch.device("cuda", 1))
    assert asked == ["all", "step", None]
    assert (found.allocated, found.reserved, found.process) == (700, 2 << 20, 101)
    assert list(found.events) == [Taken(1024, address=4 << 20)]
    assert list(found.grown) == [(0, 2 << 20), (1, -1 << 20)]
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 // 0, torch.device("cuda", 1))
    assert asked[-1] is None


def test_a_step_that_goes_another_way_ends_somewhere(step: list[Event]) -> None:
    found = compare(step, [Taken(512 * number) for number in range(10**6, 10**6 + 50)])
    assert found.equal == 0
    assert len(found.differences) == 1
    assert compare([], []).differing == 0
