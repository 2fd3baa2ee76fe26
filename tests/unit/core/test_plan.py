"""Plan: the JSON form is the contract, and it survives a round trip."""

import json
from dataclasses import replace

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.plan import BREAKDOWN, Candidate, Change, Plan, Policy, Predicted, Sample

POLICY = Policy(
    bits=4, quant="nf4", double_quant=True, compute_dtype="bfloat16", micro_batch_tokens=512, accumulation=4,
    resident_blocks=8, streamed_blocks=0, stream_from="host", keep_blocks=6, recompute_blocks=2, offload_blocks=0,
    optimizer="adamw8bit", loss_chunk_tokens=256,
)  # fmt: skip
CANDIDATE = Candidate(
    policy=POLICY, allocated_peak_bytes=1, process_peak_bytes=2, step_seconds=0.5, tokens_per_second=4096.0
)
PLAN = Plan(
    fits=True,
    model={"name": "m", "architecture": "LlamaForCausalLM", "parameters": 7_000_000, "blocks": 8, "bytes": 14_000_000},
    device={"name": "cpu", "kind": "cpu"},
    budget={"device_bytes": 2**30, "host_bytes": 2**31},
    policy=POLICY,
    predicted=Predicted(
        allocated_peak_bytes=1, reserved_peak_bytes=2, process_peak_bytes=3, host_peak_bytes=4, pinned_bytes=0,
        disk_bytes=5, step_seconds=0.5, tokens_per_second=4096.0,
    ),
    phases={"load": {}, "train": {}, "eval": {}, "save": {}, "merge": {}},
    breakdown=dict.fromkeys(BREAKDOWN, 7),
    alternatives=(CANDIDATE,),
    reason="Because.",
    changes=(Change(key="quant.bits", value=4, process_peak_bytes=5, tokens_per_second=6.0),),
    frontier=(CANDIDATE, CANDIDATE),
    timeline=(Sample(1, "forward", None), Sample(2, "backward", 7)),
    config=RunConfig.from_dict({"model": "m"}).model_dump(mode="json"),
)  # fmt: skip


def test_json_form_has_the_keys_of_the_contract() -> None:
    data = json.loads(PLAN.to_json())
    assert list(data) == [
        *("schema", "fits", "model", "device", "budget", "policy"),
        *("predicted", "phases", "breakdown", "alternatives", "reason", "changes", "frontier", "timeline", "config"),
    ]
    assert data["schema"] == 1
    assert set(data["budget"]) == {"device_bytes", "host_bytes"}
    assert list(data["breakdown"]) == list(BREAKDOWN)
    assert set(data["phases"]) == {"load", "train", "eval", "save", "merge"}


def test_round_trip() -> None:
    assert Plan.from_dict(json.loads(PLAN.to_json())) == PLAN
    assert PLAN.run_config == RunConfig.from_dict({"model": "m"})


def test_a_plan_does_not_tell_again_what_its_config_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    plan = replace(PLAN, config={"model": "m", "quant": {"bits": 8, "type": "fp4"}})
    assert plan.run_config.quant.bits == 8
    assert not recwarn.list, "it was told when the config was given"


def test_a_plan_of_another_schema_or_half_a_plan_is_refused() -> None:
    data = PLAN.to_dict()
    with pytest.raises(ConfigError, match="another schema"):
        Plan.from_dict({**data, "schema": 2})
    del data["policy"]["bits"]
    with pytest.raises(ConfigError, match="incomplete"):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("policy", "compute_dtype", "load"),  # it would be looked up in torch
        ("policy", "keep_blocks", "8"),
        ("policy", "streamed_blocks", None),
        ("policy", "mlp_tile_tokens", -3),
        ("predicted", "process_peak_bytes", [1]),
        ("budget", "host_bytes", "much"),
    ],
)
def test_a_plan_with_values_of_another_kind_is_refused(section: str, key: str, value: object) -> None:
    data = PLAN.to_dict()
    data[section][key] = value
    with pytest.raises(ConfigError, match=rf"(?s){section}\.{key} cannot have.*given: .*plan again"):
        Plan.from_dict(data)


def test_text_and_notebook_forms_say_the_same() -> None:
    for form in (str(PLAN), repr(PLAN), PLAN._repr_html_()):
        for words in ("LlamaForCausalLM", "6 keep + 2 recompute", "512 tokens x 4", "nf4 double-quantized", "Because."):
            assert words in form
    assert "fits" in str(PLAN)
    assert "0.5 s per step" in str(PLAN)
