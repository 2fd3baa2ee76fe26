"""What the benchmark and the tests on a GPU judge by, where the card is a replay of the simulation itself."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_accuracy import CUDA_LENGTHS, CUDA_SHAPES, describe_cuda, summary
from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner.calibrate import Recording, recorded_events
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.planner.trace import Event
from tests.models import tiny_config
from tests.unit.planner.on_cuda import Predicted, judge, packed, predict, unpacked
from tests.unit.planner.sampler import DENSE, MIXTURES, draw, policy_of, settings_of
from tests.unit.planner.test_calibrate import snapshot_of

CARD = find_device("rtx-4090-24gb")


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Predicted:
    """Of grouped heads of 128 without a mask, which FlashAttention takes, in three micro-batches."""
    folder = tmp_path_factory.mktemp("model")
    tiny_config("llama", hidden_size=512, intermediate_size=640).save_pretrained(folder)
    policy = {"micro_batch_tokens": 256, "loss_chunk_tokens": 64, "keep_blocks": 1}
    data = {"seq_len": 128, "packing": False}
    config = RunConfig.from_dict(
        {"model": str(folder), "data": data, "train": {"tokens_per_step": 768}, "policy": policy}
    )
    return predict(config, policy_of(config, 2), CARD, loss_tokens=256)


@pytest.mark.parametrize(
    "pins",
    [
        {"activations": "offload"},
        {"activations": "offload", "keep_blocks": 1, "resident_blocks": 2, "optimizer_on": "host"},
    ],
    ids=["inputs", "all of it"],
)
def test_what_lies_below_is_planned_as_every_block_traced(pins: dict[str, Any], tmp_path: Path) -> None:
    tiny_config("llama", num_hidden_layers=8).save_pretrained(tmp_path)
    small = {"micro_batch_tokens": 256, "loss_chunk_tokens": 64}
    keys = {"data": {"seq_len": 128}, "train": {"tokens_per_step": 512}, "adapter": {"rank": 64}}
    config = RunConfig.from_dict({"model": str(tmp_path), "policy": {**small, **pins}, **keys})
    plan = make_plan(config, device=CARD)
    whole = predict(config, plan.policy, CARD, loss_tokens=256)
    assert plan.predicted.allocated_peak_bytes == whole.allocated
    assert plan.predicted.reserved_peak_bytes == whole.reserved


def recording(predicted: Predicted, events: Sequence[Event], **changes: int | None) -> Recording:
    sizes = {name: getattr(predicted, name) for name in ("allocated", "reserved", "process")}
    return Recording(**{**sizes, **changes}, events=recorded_events(snapshot_of(events)))


def test_a_card_that_does_as_simulated(predicted: Predicted) -> None:
    truth = recording(predicted, predicted.later)
    truth = replace(truth, grown=[(3, 2 << 20), (7, -2 << 20)])
    assert unpacked(json.loads(json.dumps(packed(truth)))) == truth
    assert len({event.address for event in truth.events}) > 20
    judged = judge(predicted, truth, truth)
    assert {judged[f"{name}_error"] for name in ("allocated", "reserved", "process")} == {0.0}
    assert judged["events"]["differing"] == 0
    assert judged["events"]["equal"] > 500
    assert judged["first_difference"] is None
    workspaces = CARD.forward_workspace + CARD.backward_workspace
    assert predicted.reserved >= predicted.allocated > workspaces
    assert predicted.process == CARD.process_bytes + predicted.reserved


def test_a_card_that_takes_more(predicted: Predicted) -> None:
    """The expanded gradients of grouped keys and values are left out of the simulation."""
    flash = "aten._scaled_dot_product_flash_attention_backward.default"
    pieces = [event for event in predicted.later if event.inside and event.op == flash]
    expanded = 2 * 4 * 128 * 128 * 2  # rows x query heads x positions x size, in bf16
    left_out = {event.key for event in pieces if event.nbytes == expanded}
    known = replace(predicted, later=[event for event in predicted.later if event.key not in left_out])
    first = recording(predicted, (), reserved=predicted.reserved * 5 // 4, process=None)
    judged = judge(known, first, recording(predicted, predicted.later))
    assert judged["reserved_error"] == pytest.approx(-0.2)
    assert "process_error" not in judged, "containers hide it"
    assert judged["events"]["differing"] == 2 * len(left_out) == 8
    assert judged["by_op"] == {flash: (4 * expanded, 0)}
    assert judged["scratch"] == [[flash, [expanded, expanded], 2]]
    table = summary([{**judged, "size": "tiny", "architecture": "llama"}, {"failed": "out of memory"}])
    assert table["reserved"]["under"] == 1
    assert table["process"] == {"count": 0}
    assert table["failed"] == 1
    assert table["scratch"] == {f"{flash} {[expanded, expanded]}": 2}
    assert json.loads(json.dumps(table))["bytes_by_op"] == {flash: 4 * expanded}
    assert "-20.00%" in describe_cuda({**judged, "size": "tiny", "architecture": "llama"})


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_every_architecture_has_the_heads_of_the_larger_shapes(name: str) -> None:
    drawn = {**draw(random.Random(0), CUDA_SHAPES["large"], CUDA_LENGTHS), "architecture": name}
    text = tiny_config(name, **settings_of(drawn)).get_text_config()
    assert text.num_attention_heads == 16
    assert text.hidden_size == 2048
    assert drawn["positions"] == 4096


def test_simulated_configurations_of_the_benchmark(tmp_path: Path) -> None:
    drawn = draw(random.Random(1), CUDA_SHAPES["small"], CUDA_LENGTHS)
    tiny_config(drawn["architecture"], **settings_of(drawn)).save_pretrained(tmp_path)
    config = RunConfig.from_dict({"model": str(tmp_path), **drawn["sections"]})
    policy = policy_of(config, CUDA_SHAPES["small"][2])
    found = predict(config, policy, CARD, loss_tokens=policy.micro_batch_tokens)
    # the head alone, of 32000 x 512 in 16 bits at least
    assert found.reserved >= found.allocated > 32000 * 512 * 2
