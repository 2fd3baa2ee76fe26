"""Every architecture that the page of models calls served is planned: of its own config, with few layers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

import lowmem_ft
from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner.simulate import Stage
from tests.unit.export.runs import policy_of

PAGE = (Path(lowmem_ft.__file__).parent / "docs" / "models.md").read_text(encoding="utf-8")
LISTS = {
    "packed": r"packed into rows\*\*: ([^*]*?)\n- ",
    "alone": r"packing: false` alone\*\*: ([^*]*?): of most",
    "decoders": r"stored by themselves \(([^)]*)\)",
}
# what their configs leave open
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 8},
}


def named(sort: str) -> list[str]:
    found = re.search(LISTS[sort], PAGE)
    assert found is not None
    return [it.strip() for it in found[1].split(",")]


def test_the_page_names_as_many_as_it_did() -> None:
    assert [len(named(sort)) for sort in LISTS] == [98, 24, 11]


@pytest.mark.parametrize(("name", "sort"), [(name, sort) for sort in LISTS for name in named(sort)])
def test_a_step_is_traced(name: str, sort: str, tmp_path: Path) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip("newer than this version of transformers")
    depth = {"encoder_layers": 2, "decoder_layers": 2} if sort == "decoders" else {"num_hidden_layers": 2}
    alone = {"is_decoder": True, "is_encoder_decoder": False} if sort == "decoders" else {}
    settings = {"pad_token_id": 0, **depth, **alone, **OWN.get(name, {})}
    AutoConfig.for_model(name, **settings).save_pretrained(tmp_path / "model")
    sections = {
        "adapter": {"rank": 4},
        "data": {"seq_len": 64, "packing": sort == "packed"},
        "train": {"tokens_per_step": 128},
    }
    config = RunConfig.from_dict({"model": str(tmp_path / "model"), "output": str(tmp_path / "run"), **sections})
    policy = replace(policy_of(4), micro_batch_tokens=128, loss_chunk_tokens=64)
    stage = Stage(config, policy, kind="cpu")
    phases = {event.phase for event in stage.step(policy, keep=1).events}
    assert {"forward", "loss", "backward", "update"} <= phases
