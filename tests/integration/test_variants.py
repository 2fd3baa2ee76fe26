"""Every kind of adapter, precision and optimizer goes the whole way: train, save, and load again with the same loss."""

from pathlib import Path
from typing import Any

import pytest

from lowmem_ft.assemble import assemble
from lowmem_ft.trainer import loop
from lowmem_ft.trainer.recovery import Recovery
from tests.unit.trainer.conftest import data
from tests.unit.trainer.runs import QUIET, config

__all__ = ["data"]  # the fixture

VARIANTS: dict[str, dict[str, Any]] = {
    "fp4": {"quant": {"type": "fp4", "double_quant": False}},
    "int8": {"quant": {"bits": 8}},
    "bf16": {"quant": {"bits": 16}},
    "fp32 compute": {"policy": {"compute_dtype": "float32"}},
    "rslora and lora+": {"adapter": {"rslora": True, "lora_plus_ratio": 4.0}},
    "dora": {"adapter": {"dora": True}},
    "whole embeddings": {"adapter": {"train_modules": ["embed_tokens"]}},
    "norms": {"adapter": {"train_modules": ["norm"], "targets": ["q_proj", "v_proj"], "layers": [0, 7]}},
    "patterns": {"adapter": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8}}},
    "recompute": {"policy": {"activations": "recompute", "micro_batch_tokens": 64, "loss_chunk_tokens": 16}},
    "streamed": {"policy": {"resident_blocks": 2}},
    "unpacked": {"data": {"packing": False}},
    "all tokens": {"data": {"assistant_only": False}},
    "paged": {"train": {"optimizer": "paged_adamw8bit"}},
    "ia3": {
        "adapter": {"peft": {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}}
    },
    "vera": {"adapter": {"peft": {"peft_type": "VERA", "target_modules": ["q_proj"], "r": 8}}, "train": {"lr": 0.03}},
    "loha": {
        "adapter": {"peft": {"peft_type": "LOHA", "target_modules": ["q_proj"], "r": 4}},
        "train": {"lr": 0.03},  # a product of two small matrices moves too little in four smaller steps
    },
    "ln tuning": {
        "adapter": {"peft": {"peft_type": "LN_TUNING", "target_modules": ["norm"]}},
        "train": {"lr": 0.03},  # a bf16 norm weight near one takes no smaller step than 2^-8
    },
    "head through peft": {
        "adapter": {"peft": {"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}
    },
    "prompt tuning": {
        "adapter": {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}},
        "data": {"packing": False},
    },
    "prefix tuning": {
        "adapter": {"peft": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}},
        "data": {"packing": False},
        "train": {"lr": 0.1},
    },
    "p-tuning": {
        "adapter": {"peft": {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 16}},
        "data": {"packing": False},
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_train_and_load_again(data: Path, name: str) -> None:
    sections = VARIANTS[name]
    if "peft" in sections.get("adapter", {}):
        sections = {**sections, "adapter": {**sections["adapter"], "method": "peft"}}
    others = {key: value for key, value in sections.items() if key != "train"}
    train = {"steps": 4, "eval_every": 4, **sections.get("train", {})}
    run = loop.train(config(data, train=train, **others), reporter=QUIET)
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert losses[1] < losses[0], "four steps lower the held-out loss"
    settings = run.plan.run_config
    examples = loop.read_split(settings, str(settings.data.eval), QUIET)
    ready = assemble(settings, run.plan.policy, loop.device_of(run.plan), adapter=run.adapter, optimizer=False)
    assert loop.evaluate(Recovery(ready, run.plan.policy), settings, examples, QUIET)[0] == run.eval_loss
