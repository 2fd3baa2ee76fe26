"""A few tiles of experts that stand for all: the trace is that of all tiles, event by event."""

from __future__ import annotations

from collections import Counter
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner.device import cost_of, find_device
from lowmem_ft.planner.reserve import replayed
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.trace import TURNS, Event, Repeats
from lowmem_ft.planner.weigh import Scales
from lowmem_ft.runtime import experts, loss
from tests.models import tiny_config
from tests.unit.planner.policies import policy
from tests.unit.planner.test_solver import DEVICE

MANY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 16},
    "qwen3_moe": {"num_experts": 32, "num_experts_per_tok": 4},
    "gpt_oss": {"num_local_experts": 16},
    "deepseek_v3": {"n_routed_experts": 16},
}


def stage(name: str, folder: Path, bits: int, dropout: float, length: int) -> Stage:
    tiny_config(name, **MANY[name]).save_pretrained(folder)
    config = RunConfig.from_dict(
        {
            "model": str(folder),
            "data": {"seq_len": length},
            "quant": {"bits": bits},
            "adapter": {"rank": 4, "dropout": dropout, "targets": "all-linear"},
        }
    )
    quant: Any = {4: "nf4", 8: "int8", 16: "none"}[bits]
    start = policy(bits=bits, quant=quant, double_quant=bits == 4)
    return Stage(config, start, kind="cpu", cost=cost_of(DEVICE))


def told(events: list[Event]) -> list[Any]:
    """Each event with where its piece was taken. What one op gives back at once has no order among itself."""
    births = {event.key: at for at, event in enumerate(events) if event.nbytes > 0}
    found: list[Any] = []
    for same, run in groupby(events, lambda event: (event.nbytes < 0, event.op, event.phase, event.block)):
        pieces = [(event.tier, event.nbytes, births[event.key]) for event in run]
        found.append((same, sorted(pieces) if same[0] else pieces))
    return found


@pytest.mark.parametrize(("rows", "length"), [(1, 64), (1, 96), (1, 128), (7, 120)])  # 2, 3, 4 and 27 tiles or twice
@pytest.mark.parametrize(("bits", "dropout"), [(4, 0.0), (8, 0.1), (16, 0.0)])
@pytest.mark.parametrize("name", MANY)
def test_few_tiles_stand_for_all(
    name: str, bits: int, dropout: float, rows: int, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(name, tmp_path, bits, dropout, length)
    made.tracer.turns = 27
    for keep in (0, 2):
        few = made.step(policy(rows=rows, seq_len=length), keep=keep)
        seconds = dict(made.tracer.seconds)
        with monkeypatch.context() as patched:
            patched.setattr(experts, "traced_tiles", lambda rows: [1] * len(rows))
            every = made.step(policy(rows=rows, seq_len=length), keep=keep)
        assert told(few.events) == told(every.events)
        assert max(few.curve()) == max(every.curve())
        assert seconds == pytest.approx(made.tracer.seconds)
        births = [event.key for event in few.events if event.nbytes > 0]
        assert len(set(births)) == len(births)


def test_few_tiles_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 tiles that are equally high one."""
    made = stage("qwen3_moe", tmp_path, 4, 0.0, 128)
    called: list[int] = []
    product = experts._product

    def noted(layer: Any, name: str, e: int, x: Any, **given: Any) -> Any:
        if name == "gate_up_proj":
            called.append(e)
        return product(layer, name, e, x, **given)

    monkeypatch.setattr(experts, "_product", noted)
    made.step(policy(rows=15, seq_len=128), keep=2)
    assert called == [0] * 4, "of two layers, forward and backward"


@pytest.mark.parametrize("embeddings", ["none", "both"])
def test_the_loss_of_chunks_alike_is_traced_once(
    embeddings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Event by event what the loss of every chunk takes, and seconds to the last bit."""
    made = stage("qwen3_moe", tmp_path, 4, 0.0, 64)
    chunked = policy(rows=3, loss_chunk_tokens=32, stream_embeddings=embeddings)
    worked: list[int] = []
    own = loss._Chunk.loss
    monkeypatch.setattr(loss._Chunk, "loss", lambda it, **given: worked.append(it.count) or own(it, **given))

    def traced(keep: int) -> tuple[list[Any], dict[Any, float]]:
        made.step(chunked, keep=keep, loss_tokens=184)
        trace = made.evaluate(chunked, loss_tokens=184)
        return told(trace.events), dict(made.tracer.seconds)

    once = [traced(keep) for keep in (0, 2)]
    assert worked == [32, 24] * 2, "in training and in evaluation"
    monkeypatch.setattr(loss, "_once", lambda work, what, do: do())
    assert [traced(keep) for keep in (0, 2)] == once
    assert len(worked) == 4 + 2 * 2 * 6, "now every one"


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_an_update_stands_for_those_of_all_parameters_of_its_shape(name: str, tmp_path: Path) -> None:
    """The same pieces and seconds, in an order by shapes."""
    made = stage(name, tmp_path, 4, 0.0, 64)
    trace = made.step(policy(rows=1, seq_len=64), keep=2)
    seconds = made.tracer.seconds["update", None]
    own = {e.key for e in trace.events if e.phase == "update" and e.nbytes > 0}  # the step ends in this phase too
    found = [e for e in trace.events if e.key in own]
    made.tracer.begin()
    ready = made.ready
    assert ready.optimizer is not None
    assert ready.accumulator is not None
    with made.tracer:
        made.tracer.phase = "update"
        ready.optimizer.step(gradient=ready.accumulator.buffer)
    every = [e for e in made.tracer.trace.events if e.phase == "update"]
    assert len(found) == len(every) > 0
    assert Counter((e.op, e.nbytes) for e in found) == Counter((e.op, e.nbytes) for e in every)
    assert sum(e.nbytes for e in every) == 0, "an update leaves nothing"
    assert seconds == pytest.approx(made.tracer.seconds["update", None], rel=0.02)


def event(key: int, nbytes: int) -> Event:
    return Event(key, nbytes, "device", "op", "forward", 0)


def test_what_is_repeated_goes_back_where_it_was_taken() -> None:
    repeats = Repeats(count(100))
    forward = repeats.repeat([event(1, 8), event(2, 4), event(1, -8), event(9, -5)], 3)
    assert [(e.key, e.nbytes) for e in forward] == [
        (1, 8), (2, 4), (1, -8),
        (100, 8), (101, 4), (100, -8),
        (102, 8), (103, 4), (102, -8), (9, -5),  # was there before
    ]  # fmt: skip
    assert [e.key for e in repeats.repeat([event(3, 2), event(2, -4)], 3)] == [3, 103, 104, 101, 105, 2]
    assert [e.key for e in repeats.free(event(3, -2))] == [105, 104, 3], "all at once"
    assert repeats.free(event(7, -1)) == [event(7, -1)]


def test_of_many_turns_that_leave_all_as_it_was_the_first_are_written_down() -> None:
    """The others would change nothing, and a tile of one token has one for each."""
    repeats = Repeats(count(100))
    work = [event(1, 8), event(2, 4), event(1, -8), event(2, -4)]
    assert len(repeats.repeat(work, 10)) == 4 * 10
    assert len(repeats.repeat(work, 10**9)) == 4 * TURNS
    assert len(repeats.repeat([event(3, 8)], 1000)) == 1000, "which stay"
    assert len(repeats.repeat([event(3, -8)], 1000)) == 1000


@pytest.mark.parametrize(("name", "tile"), [("llama", 1), ("qwen3_moe", 0)])
def test_many_tiles_take_what_all_of_them_take(name: str, tile: int, tmp_path: Path) -> None:
    """In tensors, in PyTorch's pool, and in seconds: of an MLP, and of experts."""
    experts: dict[str, int] = {} if tile else {"num_experts": 128, "num_experts_per_tok": 64}
    tiny_config(name, **experts).save_pretrained(tmp_path)
    config = RunConfig.from_dict({"model": str(tmp_path), "data": {"seq_len": 256}, "adapter": {"dropout": 0.1}})
    card = find_device("rtx-4090-24gb")
    scales = Scales(config, policy(), kind="cuda", cost=cost_of(card))
    sized = policy(rows=1, seq_len=256, keep=1, mlp_tile_tokens=tile)

    def taken() -> tuple[int, Any, float, int]:
        scales._latest.clear()
        weighed = scales.weigh(sized)
        events = sum(len(place.segment.events) for place in weighed.places)
        pool = replayed(card, scales.made(sized), weighed.turns, expandable=False)
        return weighed.allocated, pool, weighed.seconds, events

    few = taken()
    scales.stage.tracer.turns = 10**9
    every = taken()
    assert few[:3] == every[:3]
    assert few[3] < every[3] / 3
