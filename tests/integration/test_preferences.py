"""Losses over preferences, their gradients and rewards against TRL's trainers, on the same inputs and the same weights.

TRL trains peft's LoRA on the plain transformers model, whose reference is that model with the adapter off; ours is the
native LoRA that peft's file was loaded from. Everything is in fp32.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from lowmem_ft.adapters.inject import inject_lora, trainable_parameters
from lowmem_ft.adapters.peft_format import save_adapter
from lowmem_ft.core.config import RunConfig
from lowmem_ft.data.examples import Example
from lowmem_ft.data.loader import MicroBatches, eval_batches
from lowmem_ft.data.pairs import Preferences
from lowmem_ft.data.preference import PreferenceExample
from lowmem_ft.runtime.preference import objective_of
from lowmem_ft.step import evaluate_preferences, sum_gradients
from tests.assets import ASSETS
from tests.unit.test_step import gradients, make_ready

MODEL = str(ASSETS / "doclm-7m")
SEQ_LEN, PAIRS = 40, 6
COMMON: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False,
    "gradient_checkpointing": False, "per_device_train_batch_size": 2 * PAIRS, "remove_unused_columns": False,
}  # fmt: skip
# objective -> settings of ours, and of TRL's
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"beta": 0.3}, {"beta": 0.3}),
    "ipo": ({"beta": 0.4}, {"beta": 0.4, "loss_type": "ipo"}),
    "orpo": ({"beta": 0.5}, {"beta": 0.5}),
    "simpo": (
        {"beta": 1.5, "gamma": 0.6, "label_smoothing": 0.1},
        {"beta": 1.5, "simpo_gamma": 0.6, "label_smoothing": 0.1, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
    "kto": (
        {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7},
    ),
}


def drawn(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(300, 4000, (length,), generator=generator).tolist()


def pairs() -> list[PreferenceExample]:
    """Of a prompt and two answers, each of another length."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for at in range(PAIRS):
        prompt = drawn(3 + 2 * at, generator)
        sides = [drawn(length, generator) for length in (4 + at, 11 - at)]
        found.append(PreferenceExample(*(Example(prompt + it, [-100] * len(prompt) + it) for it in sides)))
    return found


def verdicts() -> list[PreferenceExample]:
    found = []
    for at, pair in enumerate(pairs()):
        found.append(PreferenceExample(pair.chosen, None) if at % 3 else PreferenceExample(None, pair.rejected))
    return found


def split(example: Example | None) -> tuple[list[int], list[int]]:
    """Prompt and answer."""
    assert example is not None
    begin = sum(label == -100 for label in example.labels)
    return list(example.input_ids[:begin]), list(example.input_ids[begin:])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned something, so that model and reference differ."""
    folder = tmp_path_factory.mktemp("adapter")
    model = ours()
    save_adapter(model, folder, base_model=MODEL)
    return folder


def ours() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    inject_lora(model, rank=4, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            if "lora_B" in name:
                parameter.copy_(-0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def ready_for(objective: str, **overrides: Any) -> SimpleNamespace:
    config = RunConfig.from_dict(
        {"model": MODEL, "train": {"objective": objective}, "preference": OBJECTIVES[objective][0]}
    )
    return make_ready(ours(), objective=objective_of(config), **overrides)


def batches_of(objective: str, tokens: int, *, packing: bool = False) -> MicroBatches:
    kto = objective == "kto"
    form = Preferences(lanes=1 if kto else 2, seq_len=SEQ_LEN, whole=objective == "orpo")
    examples = verdicts() if kto else pairs()
    return eval_batches(
        examples, seq_len=SEQ_LEN, packing=packing, micro_batch_tokens=tokens, pad_id=0, preferences=form
    )


def theirs(objective: str, saved: Path, folder: Path) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """(loss, gradients of the adapter by our names, metrics) of TRL's trainer."""
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, saved, is_trainable=True, adapter_name="default")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    order = [document for row in batches_of(objective, 1 << 20).rows for document in row]
    settings = {**COMMON, **OBJECTIVES[objective][1], "output_dir": str(folder), "max_length": SEQ_LEN}
    record: dict[str, Any] = {"prompt": "What is ls?", "chosen": " It lists.", "rejected": " It copies."}
    if objective == "kto":
        record = {"prompt": "What is ls?", "completion": " It lists.", "label": True}
    makers: dict[str, Any] = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "ipo": (trl.DPOTrainer, trl.DPOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
        "simpo": (CPOTrainer, CPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
    }
    make, config = makers[objective]
    if objective == "kto":
        settings["train_sampling_strategy"] = "sequential"
    data = Dataset.from_list([record] * 4)
    trainer = make(model=model, args=config(**settings), train_dataset=data, processing_class=tokenizer)
    if "ref" in model.peft_config:  # a copy of the adapter that training goes on from; ours is the base
        model.delete_adapter("ref")
    trainer.model.train()
    if objective in ("dpo", "ipo"):
        found = [pairs()[at] for at in order]
        records = [dict(zip(("prompt_ids", "chosen_ids"), split(it.chosen), strict=True)) for it in found]
        records = [{**one, "rejected_ids": split(it.rejected)[1]} for one, it in zip(records, found, strict=True)]
        loss = trainer._compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(records), False)
    elif objective == "kto":
        documents = [(it.chosen or it.rejected, it.chosen is not None) for it in (verdicts()[at] for at in order)]
        parts = [split(document) for document, _ in documents]
        records = [
            {"prompt_ids": prompt, "completion_ids": own, "KL_completion_ids": parts[at - 1][1], "label": good}
            for at, ((prompt, own), (_, good)) in enumerate(zip(parts, documents, strict=True))
        ]
        loss = trainer._compute_loss(trainer.model, DataCollatorForUnpairedPreference(pad_token_id=0)(records), False)
    else:
        loss, said = trainer.get_batch_loss_metrics(trainer.model, padded([pairs()[at] for at in order]))
    loss.backward()
    named = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    if objective in ("dpo", "ipo", "kto"):
        said = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), named, said


def padded(found: list[PreferenceExample]) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        examples = [getattr(it, side) for it in found]
        width = max(len(it) for it in examples)
        for name, rows, fill in (
            ("input_ids", [it.input_ids for it in examples], 0),
            ("attention_mask", [[1] * len(it) for it in examples], 0),
            ("labels", [it.labels for it in examples], -100),
        ):
            batch[f"{side}_{name}"] = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    return batch


def test_smoothed_labels_are_trls(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL has them in a loss that sorts its batch, which one pair is not changed by."""
    smoothed = {
        "dpo": ({"beta": 0.3, "label_smoothing": 0.2}, {"beta": 0.3, "label_smoothing": 0.2, "loss_type": "aot"})
    }
    (one, *_) = pairs()
    monkeypatch.setattr(f"{__name__}.OBJECTIVES", smoothed)
    monkeypatch.setattr(f"{__name__}.pairs", lambda: [one])
    loss, named, _ = theirs("dpo", saved, tmp_path)
    ready = ready_for("dpo")
    assert sum_gradients(ready, batches_of("dpo", 1)).loss == pytest.approx(loss, rel=1e-5)
    for key, gradient in gradients(ready).items():
        assert (gradient - named[key]).norm() < 1e-4 * named[key].norm(), key


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_gradients_and_rewards_are_trls(objective: str, saved: Path, tmp_path: Path) -> None:
    loss, named, said = theirs(objective, saved, tmp_path)
    for tokens, packing in ((1 << 20, False), (2 * SEQ_LEN, False), (2 * SEQ_LEN, True)):
        ready = ready_for(objective)
        batches = batches_of(objective, tokens, packing=packing)
        assert (len(batches) == 1) == (tokens > 2 * SEQ_LEN)
        if packing and objective == "kto":
            continue  # which has whose answer depends on the order of the rows
        result = sum_gradients(ready, batches, batches.mismatched)
        found = gradients(ready)
        # fp32 on both sides, sums in another order: measured up to 1.4e-6, of gradients 1.3e-5, of rewards 5e-6
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == named.keys()
        for key, gradient in found.items():
            assert (gradient - named[key]).norm() < 1e-4 * named[key].norm(), key
        for name, value in result.metrics.items():
            assert value == pytest.approx(said[name], rel=1e-4, abs=1e-5), name
        if objective == "kto":
            assert result.metrics["kl"] > 0, "it is not cut off"
        evaluated = evaluate_preferences(ready, batches, batches.mismatched)
        assert evaluated == pytest.approx({"loss": result.loss, **result.metrics}, rel=1e-5)
