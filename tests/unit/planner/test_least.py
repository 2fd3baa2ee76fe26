"""What takes the least, and what that is told as: where loading or the host binds, where all blocks keep, where the
optimizer lies, and how long sequences may be."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import BudgetError
from lowmem_ft.core.plan import Plan
from lowmem_ft.planner.changes import cheapest_changes
from lowmem_ft.planner.device import Device, find_device
from lowmem_ft.planner.solver import make_plan, require_fit
from tests.models import save_tiny

MIB = 2**20
CPU = Device(
    name="test", kind="cpu", index=0, memory_bytes=2**34, free_bytes=2**33, process_bytes=512 * MIB,
    compute_dtype="bfloat16", flops=1e11,
)  # fmt: skip
CARD = find_device("rtx-3060-12gb")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    wide = {"vocab_size": 20000, "hidden_size": 512, "intermediate_size": 1024}
    return {
        "wide": save_tiny("llama", folder / "wide", max_position_embeddings=4096, **wide),
        "short": save_tiny("llama", folder / "short"),
        "gpt2": save_tiny("gpt2", folder / "gpt2"),
    }


def planned(model: Path, device: Device, **sections: Any) -> Plan:
    keys: dict[str, Any] = {"data": {"seq_len": 512}, "train": {"tokens_per_step": 1024}}
    for name, section in sections.items():
        keys[name] = {**keys.get(name, {}), **section}
    return make_plan(RunConfig.from_dict({"model": str(model), **keys}), device=device)


def test_a_step_has_so_many_full_rows_as_fit(models: dict[str, Path]) -> None:
    """So 1023 tokens are one row of 512, as the loader has it, and take as long."""
    one, other = (planned(models["wide"], CARD, train={"tokens_per_step": it}).predicted for it in (512, 1023))
    assert (one.step_seconds, one.tokens_per_second) == (other.step_seconds, other.tokens_per_second)


def test_a_larger_micro_batch_than_a_step_is_the_step(models: dict[str, Path]) -> None:
    pinned = planned(models["wide"], CARD, policy={"micro_batch_tokens": 4096})
    assert (pinned.policy.micro_batch_tokens, pinned.policy.accumulation) == (1024, 1)


def test_where_loading_binds_the_least_is_not_what_has_most_below(models: dict[str, Path]) -> None:
    refused = planned(models["wide"], CPU, quant={"bits": 8}, budget={"memory": 1})
    least = refused.predicted.process_peak_bytes
    phases = refused.phases
    for pins in ({"resident_blocks": 2, "stream_embeddings": "none"}, {"resident_blocks": 0}):
        pinned = planned(models["wide"], CPU, quant={"bits": 8}, policy=pins, budget={"memory": 1})
        assert pinned.predicted.process_peak_bytes >= least, (pins, phases)
    assert planned(models["wide"], CPU, quant={"bits": 8}, budget={"memory": least}).fits


def test_where_the_host_binds_the_least_of_it_is_told(models: dict[str, Path]) -> None:
    def plan(host: int) -> Plan:
        return planned(models["wide"], CARD, budget={"memory": 2**30, "host": host})

    refused = plan(CARD.host_process_bytes)
    assert refused.host_binds
    assert "the least that was found" in refused.reason
    assert plan(refused.predicted.host_peak_bytes).fits
    for pins in ({"resident_blocks": 0}, {"activations": "offload"}, {"stream_embeddings": "both"}):
        other = planned(models["wide"], CARD, policy=pins, budget={"host": CARD.host_process_bytes})
        assert other.predicted.host_peak_bytes >= refused.predicted.host_peak_bytes


def test_tiles_let_blocks_keep_in_a_larger_micro_batch(models: dict[str, Path]) -> None:
    sections: dict[str, Any] = {"data": {"seq_len": 1024}, "train": {"tokens_per_step": 4096}}
    keep = {"activations": "keep"}
    refused = planned(models["wide"], CARD, **sections, policy=keep, budget={"memory": 1})
    tiled = {**keep, "micro_batch_tokens": 2048, "mlp_tile_tokens": 1024, "loss_chunk_tokens": 32}
    pinned = planned(models["wide"], CARD, **sections, policy=tiled, budget={"memory": 1})
    assert refused.predicted.process_peak_bytes <= pinned.predicted.process_peak_bytes


@pytest.mark.parametrize("objective", ["memory", "batch"])
def test_both_places_of_the_optimizer_are_compared(models: dict[str, Path], objective: str) -> None:
    sections: dict[str, Any] = {"adapter": {"rank": 64}, "train": {"optimizer": "adamw"}}
    policy = {"objective": objective}
    free = planned(models["wide"], CARD, **sections, policy=policy)
    for place in ("device", "host"):
        pinned = planned(models["wide"], CARD, **sections, policy={**policy, "optimizer_on": place})
        if objective == "memory":
            assert free.predicted.process_peak_bytes <= pinned.predicted.process_peak_bytes
        else:
            assert free.policy.micro_batch_tokens >= pinned.policy.micro_batch_tokens


def test_the_longest_sequence_fits_in_all_phases_and_on_the_host(models: dict[str, Path], tmp_path: Path) -> None:
    held_out = {"data": {"eval": str(tmp_path / "x.jsonl")}, "eval": {"samples": 1}, "policy": {"objective": "context"}}
    budget = planned(models["wide"], CARD, policy={"objective": "memory"}).predicted.process_peak_bytes
    for limits in ({"memory": budget}, {"memory": budget, "host": CARD.host_process_bytes + 96 * MIB}):
        plan = planned(models["wide"], CARD, **held_out, budget=limits)
        assert plan.fits, plan.reason
        longer = plan.run_config.data.seq_len + 256
        pinned = {**held_out, "data": {**held_out["data"], "seq_len": longer}, "policy": {"objective": "memory"}}
        assert not planned(models["wide"], CARD, **pinned, train={"tokens_per_step": longer}, budget=limits).fits


def test_of_no_sequence_that_fits_the_shortest_is_told(models: dict[str, Path]) -> None:
    refused = planned(models["wide"], CARD, policy={"objective": "context"}, budget={"memory": 1})
    assert refused.run_config.data.seq_len == 256
    assert not any(change.key == "data.seq_len" for change in refused.changes), "which the plan finds itself"


@pytest.mark.parametrize("name", ["short", "gpt2"])
def test_the_longest_sequence_of_a_model_with_few_positions(models: dict[str, Path], name: str) -> None:
    assert planned(models[name], CPU, policy={"objective": "context"}).run_config.data.seq_len == 128


def test_a_change_leaves_room_for_a_prompt(models: dict[str, Path], tmp_path: Path) -> None:
    sampled = {
        "data": {"seq_len": 2048, "eval": str(tmp_path / "x.jsonl")},
        "eval": {"samples": 1, "max_new_tokens": 1024},
    }
    least = planned(models["wide"], CARD, **sampled, budget={"memory": 1}).predicted.process_peak_bytes
    refused = planned(models["wide"], CARD, **sampled, budget={"memory": least - MIB})
    assert not any(change.key == "data.seq_len" and change.value <= 1024 for change in refused.changes)


def test_a_device_that_has_no_more_is_not_asked_for_more(models: dict[str, Path]) -> None:
    small = replace(CARD, free_bytes=300 * MIB)
    with pytest.warns(UserWarning, match=r"is more than .* has free: planned for 300"):
        plan = planned(models["wide"], small, budget={"memory": 2**34}, adapter={"rank": 4}, data={"seq_len": 256})
    with pytest.raises(BudgetError) as refused:
        require_fit(replace(plan, changes=()))
    assert "raise" not in str(refused.value)
    assert "take one with more memory" in str(refused.value)


@pytest.mark.parametrize(
    ("fitting", "asked"),
    [
        (4, [2048]),
        (3, [2048, 256, 1024]),
        (2, [2048, 256, 1024, 512]),
        (1, [2048, 256, 1024, 512, 256]),
        (0, [2048, 256, 256]),
    ],
)
def test_of_a_key_the_smallest_change_that_fits_is_found_with_few_questions(fitting: int, asked: list[int]) -> None:
    """The first and the last decide most often: each question is a plan of its own, if it was not asked before."""
    config = RunConfig.from_dict({"model": "x", "data": {"seq_len": 4096}, "train": {"optimizer": "adamw8bit"}})
    lengths = [2048, 1024, 512, 256][-fitting:] if fitting else []
    found: list[int] = []

    def smallest(changed: RunConfig) -> Any:
        if changed.data.seq_len == 4096 or changed.adapter.rank != config.adapter.rank:
            return None  # another key
        found.append(changed.data.seq_len)
        fits = changed.data.seq_len in lengths
        return (
            SimpleNamespace(process=changed.data.seq_len, tokens=1, weighed=SimpleNamespace(seconds=1.0))
            if fits
            else None
        )

    changes = cheapest_changes(config, smallest)
    assert [(it.key, it.value) for it in changes] == [("data.seq_len", it) for it in lengths[:1]]
    assert found == asked
