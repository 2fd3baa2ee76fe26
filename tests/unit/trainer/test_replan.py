"""A run that goes on keeps what its plan decided, whatever is free and however fast the machine seems by then."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Plan, Policy
from lowmem_ft.planner import search, solver
from lowmem_ft.planner.cost import CostModel, Rates
from lowmem_ft.planner.device import Device, find_device
from lowmem_ft.planner.profile import load_profile
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer import loop
from lowmem_ft.trainer.replan import plan_again
from tests.assets import ASSETS, write_share
from tests.killing import exact_metrics

QUIET = Reporter(quiet=True)
MIB = 1 << 20


def config(folder: Path, output: str, **sections: Any) -> RunConfig:
    keys: dict[str, Any] = {
        "model": str(ASSETS / "doclm-7m"),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "seq_len": 64},
        "train": {"tokens_per_step": 512, "steps": 2, "lr": 1e-3, "save_every": 1},
        "adapter": {"rank": 4},
        "output": str(folder / output),
    }
    for name, value in sections.items():
        keys[name] = {**keys.get(name, {}), **value}
    return RunConfig.from_dict(keys)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets a machine have so many bytes free beside what the process holds, and calls take next to no time there: where
    they take much, micro-batches stay as large as they can anyway."""
    device = find_device("cpu")
    rates = replace(Rates.of(load_profile("cpu-bf16")), call=1e-6)
    monkeypatch.setattr(search, "cost_of", lambda _: CostModel(rates, kind="cpu").seconds)

    def let(room: int) -> None:
        def found(name: str, rates: str | None = None) -> Device:
            return replace(device, free_bytes=device.process_bytes + room)

        monkeypatch.setattr(solver, "find_device", found)

    return let


def of_sums(policy: Policy) -> tuple[int, int]:
    return policy.micro_batch_tokens, policy.loss_chunk_tokens


def begin(settings: RunConfig) -> loop.Run:
    """Its first step."""
    limited = settings.model_copy(update={"train": settings.train.model_copy(update={"max_time": 1e-3})})
    return loop.train(limited, reporter=QUIET)


def test_a_run_goes_on_with_its_micro_batches_where_less_is_free(tmp_path: Path, free: Callable[[int], None]) -> None:
    write_share(tmp_path, train=40, eval=4)
    free(2048 * MIB)
    whole = loop.train(config(tmp_path, "whole"), reporter=QUIET)
    begun = begin(config(tmp_path, "begun"))
    room = begun.plan.predicted.process_peak_bytes - begun.plan.device["process_bytes"]
    free(room - 4 * MIB)
    again = loop.train(config(tmp_path, "begun"), resume=True, reporter=QUIET)
    fresh = solver.make_plan(config(tmp_path, "fresh"))
    ours, theirs = again.plan.policy, whole.plan.policy
    assert of_sums(fresh.policy) != of_sums(theirs), "or this would show nothing"
    assert of_sums(ours) == of_sums(theirs)
    assert again.plan.predicted.process_peak_bytes <= again.plan.budget["device_bytes"]
    assert exact_metrics(again.folder) == exact_metrics(whole.folder)
    tensors = [load_file(run.adapter / "adapter_model.safetensors") for run in (again, whole)]
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[1])
    assert again.plan.run_config == config(tmp_path, "begun")


def test_the_longest_sequences_and_the_precision_stay_what_they_were(
    tmp_path: Path, free: Callable[[int], None]
) -> None:
    write_share(tmp_path, train=40, eval=4)
    sections = {"policy": {"objective": "context"}, "quant": {"bits": "auto"}, "train": {"tokens_per_step": 1}}
    free(2048 * MIB)
    begun = begin(config(tmp_path, "begun", **sections))
    free(900 * MIB)
    again = loop.train(config(tmp_path, "begun", **sections), resume=True, reporter=QUIET)
    assert again.status == "finished"
    assert again.plan.run_config.data.seq_len == begun.plan.run_config.data.seq_len
    assert again.plan.policy.bits == begun.plan.policy.bits == 16
    assert again.plan.run_config.policy.objective == "context"
    assert again.plan.run_config.quant.bits == "auto"


@pytest.mark.parametrize("room", [100, 120])  # where blocks recompute, and where they offload
def test_all_that_was_decided_stays_where_there_is_room(tmp_path: Path, free: Callable[[int], None], room: int) -> None:
    settings = config(tmp_path, "run")
    free(room * MIB)
    begun = Plan.from_dict(json.loads(solver.make_plan(settings).to_json()))
    free(4096 * MIB)
    again = plan_again(settings, begun)
    assert again.policy == begun.policy
    assert again.alternatives == begun.alternatives
    fresh = solver.make_plan(settings)
    assert fresh.policy != begun.policy, "or this would show nothing"
    moved = config(tmp_path, "run", budget={"memory": 2048 * MIB})
    assert plan_again(moved, begun).policy != begun.policy, "another budget counts"
