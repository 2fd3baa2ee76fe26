"""Answers to held-out prompts at evaluations: what is asked, that they change nothing, that they may be left out."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lowmem_ft.assemble import load_tokenizer
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.run import Run
from lowmem_ft.data.examples import Example, read_examples
from lowmem_ft.generate import generate
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer import loop, samples
from lowmem_ft.trainer.samples import prompts_of
from tests.assets import ASSETS
from tests.unit.trainer.runs import QUIET, at_step, config, exact

ASKED = {"samples": 2, "max_new_tokens": 6}
FEW = {"steps": 2, "eval_every": 1}
RECORDS = [json.loads(line) for line in (ASSETS / "whatis-eval.jsonl").read_text().splitlines()[:2]]


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "policy", [{}, {"resident_blocks": 0, "stream_embeddings": "both"}], ids=["resident", "streamed"]
)
def test_they_are_told_and_change_nothing(data: Path, policy: dict[str, Any]) -> None:
    without = loop.train(config(data, "without", policy=policy, train=FEW), reporter=QUIET)
    assert without.samples == []
    assert not (without.folder / "samples.jsonl").exists()
    console = Console(record=True, width=200)
    settings = config(data, "with", policy=policy, eval=ASKED, train=FEW)
    run = loop.train(settings, reporter=Reporter(console=console))
    assert exact(run) == exact(without)
    assert all(torch.equal(tensor, adapter(without)[name]) for name, tensor in adapter(run).items())
    assert [line["step"] for line in run.samples] == [0, 0, 1, 1, 2, 2]
    for line, record in zip(run.samples, RECORDS * 3, strict=True):
        question, answer = (message["content"] for message in record["messages"])
        assert question in line["prompt"]
        assert line["reference"] == answer
        assert line["answer"]
    assert " -> " + " ".join(run.samples[0]["answer"].split()) in console.export_text()
    page = (run.folder / "report.html").read_text()
    assert "Answers to held-out prompts" in page
    assert RECORDS[0]["messages"][1]["content"] in page


def test_answers_are_those_of_generate(data: Path) -> None:
    run = loop.train(config(data, eval={"samples": 2, "max_new_tokens": 12}, train={"steps": 2}), reporter=QUIET)
    ready = loop.assemble(
        run.plan.run_config, run.plan.policy, torch.device("cpu"), adapter=run.adapter, optimizer=False
    )
    questions = [record["messages"][0]["content"] for record in RECORDS]
    answers = generate(ready.model, ready.tokenizer, questions, max_new_tokens=12)
    assert [line["answer"] for line in run.samples if line["step"] == 2] == answers


def test_a_resumed_run_has_each_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loop.train(config(data, "whole", eval=ASKED, train=FEW), reporter=QUIET)
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    settings = config(data, "stopped", eval=ASKED, train=FEW)
    stopped = loop.train(settings, reporter=QUIET)
    assert [line["step"] for line in stopped.samples] == [0, 0, 1, 1]
    with (stopped.folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "prompt": "of a step that is done again"}\n{"step": 2, "pro')
    resumed = loop.train(settings, resume=True, reporter=QUIET)
    assert resumed.samples == whole.samples


def test_without_memory_they_are_left_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = loop.train(config(data, "without", train={"steps": 1}), reporter=QUIET)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for a cache")

    monkeypatch.setattr(samples, "complete", fail)
    console = Console(record=True, width=400)
    run = loop.train(config(data, eval=ASKED, train={"steps": 1}), reporter=Reporter(console=console))
    assert run.status == "finished"
    assert run.samples == []
    assert exact(run) == exact(without)
    assert "Memory does not suffice for samples (eval.samples), which are left out: no room" in console.export_text()


def test_nothing_is_asked_without_held_out_data(data: Path) -> None:
    with pytest.warns(UserWarning, match=r"eval\.samples has no effect without data\.eval"):
        run = loop.train(config(data, eval=ASKED, data={"eval": None}, train={"steps": 1}), reporter=QUIET)
    assert run.samples == []


def test_prompts_stand_before_the_first_answer() -> None:
    none = -100
    examples = [
        Example([1, 2, 3, 4, 5, 6, 7, 8], [none, none, none, 4, 5, none, none, 8]),
        Example([1, 2], [none, none]),  # nothing in the loss
        Example([1, 2, 3, 4, 5], [none, 2, 3, 4, 5]),  # text, all of it in the loss
        Example([7], [7]),
        Example([1, 2, 3], [none, none, 3]),
    ]
    assert [(it.prompt, it.answer) for it in prompts_of(examples, 9, length=2)] == [
        ([2, 3], [4, 5]),
        ([1, 2], [3, 4, 5]),
        ([1, 2], [3]),
    ]
    assert len(prompts_of(examples, 2, length=2)) == 2


def test_prompts_of_chats_are_what_a_chat_template_asks_with() -> None:
    tokenizer = load_tokenizer(Checkpoint.open(ASSETS / "doclm-7m"))
    assert tokenizer is not None
    examples, _ = read_examples(ASSETS / "whatis-eval.jsonl", tokenizer, seq_len=64)
    (asked,) = prompts_of(examples, 1, length=60)
    rendered = tokenizer.apply_chat_template(RECORDS[0]["messages"][:1], add_generation_prompt=True, tokenize=True)
    assert list(asked.prompt) == list(rendered["input_ids"])


def test_answers_that_leave_no_room_for_a_prompt_are_refused() -> None:
    keys = {"model": "m", "data": {"seq_len": 64}, "eval": {"max_new_tokens": 64}}
    RunConfig.from_dict(keys)
    with pytest.raises(ConfigError, match="leaves no room for a prompt") as error:
        RunConfig.from_dict(keys, ["eval.samples=1"])
    fix = "eval.max_new_tokens=32"
    assert f"set {fix}" in str(error.value)
    RunConfig.from_dict(keys, ["eval.samples=1", fix])
