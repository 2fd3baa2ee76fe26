"""The loaded model in other libraries: TRL's trainers with our loop's losses, transformers' pipeline."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset

import lowmem_ft
from lowmem_ft.assemble import assemble
from lowmem_ft.data.examples import Example, read_examples
from lowmem_ft.data.packing import collate
from lowmem_ft.data.pairs import preferences_of
from lowmem_ft.data.preference import PreferenceExample
from lowmem_ft.step import train_step

ASSETS = Path(str(files("lowmem_ft") / "assets"))
MODEL = str(ASSETS / "doclm-7m")
STEPS, ROWS, PAIRS = 3, 8, 4
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "use_cpu": True, "logging_steps": 1,
    "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip
ASKED = ("ls", "cp", "mv", "rm", "cat", "dd", "df", "du")


@pytest.fixture(scope="module")
def plan() -> lowmem_ft.Plan:
    policy = {"activations": "recompute", "micro_batch_tokens": 512, "loss_chunk_tokens": 64}
    return lowmem_ft.plan(
        MODEL, budget="4GiB", device="cpu", seq_len=64, tokens_per_step=512,
        policy={**policy, "compute_dtype": "float32"}, train={"optimizer": "adamw"},
    )  # fmt: skip


@pytest.fixture
def loaded(plan: lowmem_ft.Plan) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return lowmem_ft.load(MODEL, plan)


def logged(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in names) for line in trainer.state.log_history if "loss" in line]


def our_losses(plan: lowmem_ft.Plan, examples: list[Example]) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    ready = assemble(plan.run_config, plan.policy, torch.device("cpu"))
    batches = [collate([[it] for it in examples[ROWS * at : ROWS * (at + 1)]], pad_id=0) for at in range(STEPS)]
    results = [train_step(ready, [batch], lr=1e-3) for batch in batches]
    return [(it.loss, it.grad_norm) for it in results]


@pytest.mark.parametrize("which", ["transformers.Trainer", "trl.SFTTrainer"])
def test_trainers_have_our_losses(plan: lowmem_ft.Plan, loaded: tuple[Any, Any], tmp_path: Path, which: str) -> None:
    """The same examples in the same order: losses and gradient norms are ours, within fp32's rounding."""
    model, tokenizer = loaded
    examples = list(read_examples(ASSETS / "whatis-train.jsonl", tokenizer, seq_len=64)[0][: STEPS * ROWS])
    records = Dataset.from_list([{"input_ids": list(it.input_ids), "labels": list(it.labels)} for it in examples])
    own = {"output_dir": str(tmp_path), "per_device_train_batch_size": ROWS, "max_grad_norm": 1.0, "weight_decay": 0.0}
    if which == "trl.SFTTrainer":
        settings = trl.SFTConfig(**ARGUMENTS, **own, max_length=64)
        trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=records, processing_class=tokenizer)
    else:
        arguments = transformers.TrainingArguments(**ARGUMENTS, **own)
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=records, data_collator=collator)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(records)
    trainer.train()
    # measured: losses within 1e-7, gradient norms within 5e-5 (sums in another order, fp32)
    expected = our_losses(plan, examples)
    for theirs, ours in zip(logged(trainer, "loss", "grad_norm"), expected, strict=True):
        assert theirs[0] == pytest.approx(ours[0], rel=1e-5)
        assert theirs[1] == pytest.approx(ours[1], rel=1e-3)


def test_preferences_with_trl_and_no_second_model(
    loaded: tuple[Any, Any], plan: lowmem_ft.Plan, tmp_path: Path
) -> None:
    """A fresh adapter changes nothing, so that the reference's log-probabilities are asked of the model itself; losses
    and gradient norms are those of our own steps on the same pairs."""
    model, tokenizer = loaded
    pairs = [
        {"prompt": f"What does {it} do?", "chosen": f" It is {it}.", "rejected": " I do not know."} for it in ASKED
    ]
    settings = trl.DPOConfig(
        **ARGUMENTS, output_dir=str(tmp_path), per_device_train_batch_size=PAIRS, precompute_ref_log_probs=True
    )
    data = Dataset.from_list(pairs)
    trainer = trl.DPOTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    records = trainer.train_dataset
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(records)
    trainer.train()
    theirs = logged(trainer, "loss", "grad_norm")
    assert theirs[0][0] == pytest.approx(0.693147, abs=1e-4), "log 2: policy and reference are the same at first"
    assert theirs[-1][0] < theirs[0][0]
    # measured: losses within 2e-7, gradient norms within 3e-5
    for found, ours in zip(theirs, our_preference_losses(plan, list(records)), strict=True):
        assert found[0] == pytest.approx(ours[0], rel=1e-5)
        assert found[1] == pytest.approx(ours[1], rel=1e-3)


def our_preference_losses(plan: lowmem_ft.Plan, records: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of our own steps with DPO, in turn over these records of token ids."""
    config = plan.run_config.model_copy(update={"train": plan.run_config.train.model_copy(update={"objective": "dpo"})})
    torch.manual_seed(0)
    ready = assemble(config, plan.policy, torch.device("cpu"))

    def answered(record: dict[str, Any], answer: str) -> Example:
        prompt, ids = list(record["prompt_ids"]), list(record[answer])
        return Example([*prompt, *ids], [*[-100] * len(prompt), *ids])

    pairs = [PreferenceExample(answered(it, "chosen_ids"), answered(it, "rejected_ids")) for it in records]
    kind = preferences_of(config)
    assert kind is not None
    found = []
    for step in range(STEPS):
        begin = PAIRS * step % len(pairs)
        batch = kind.collate([[it] for it in pairs[begin : begin + PAIRS]], pad_id=0, length=None)
        result = train_step(ready, [batch], lr=1e-3)
        found.append((result.loss, result.grad_norm))
    return found


def test_grpo_with_trl_takes_steps(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    settings = trl.GRPOConfig(
        **ARGUMENTS, output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4,
        max_completion_length=8, seed=0,
    )  # fmt: skip
    before = {name: it.detach().clone() for name, it in model.named_parameters() if it.requires_grad}

    def letters(completions: list[str], **_: Any) -> list[float]:
        return [float(text.count("e")) for text in completions]

    prompts = Dataset.from_list([{"prompt": f"What does {it} do?"} for it in ASKED])
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=letters, args=settings, train_dataset=prompts, processing_class=tokenizer
    )
    trainer.train()
    assert max(norm for (norm,) in logged(trainer, "grad_norm")) > 0
    assert any(not torch.equal(before[name], it) for name, it in model.named_parameters() if it.requires_grad)


def test_pipelines_generate(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = pipe("What does ls do?", max_new_tokens=8, do_sample=False, return_full_text=False)
    assert found["generated_text"]
    ids = tokenizer("What does ls do?", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert found["generated_text"] == tokenizer.decode(
        written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
    )
