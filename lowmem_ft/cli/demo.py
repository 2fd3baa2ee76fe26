"""`lowmem-ft demo`: the main job from end to end on what the package brings along; needs no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.table import Table

from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError, LowMemError
from lowmem_ft.generate import generate
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.solver import make_plan, require_fit
from lowmem_ft.report.progress import Reporter
from lowmem_ft.report.tables import measured_table, plan_table
from lowmem_ft.trainer import loop
from lowmem_ft.trainer.folder import RunFolder

QUESTIONS = 3
STEPS = 60


def demo_config(assets: Path, out: Path, budget: str) -> RunConfig:
    """The run that the demo does: NF4, LoRA of rank 16 on every linear layer, packed rows of 256 tokens."""
    return RunConfig.from_dict(
        {
            "model": str(assets / "doclm-7m"),
            "budget": {"memory": budget},
            "data": {
                "train": str(assets / "whatis-train.jsonl"),
                "eval": str(assets / "whatis-eval.jsonl"),
                "seq_len": 256,
            },
            "train": {"tokens_per_step": 1024, "steps": STEPS, "lr": 2e-3, "eval_every": 30, "save_every": 30},
            "output": str(out),
        }
    )


def run_demo(out: Path, budget: str, reporter: Reporter) -> None:
    """Plan, answer and train, reload in a fresh process, and print what was planned beside what was measured.

    Raises:
        LowMemError: the fresh process does not reproduce the held-out loss to the last bit.
    """
    with as_file(files("lowmem_ft") / "assets") as assets:
        config = demo_config(assets, out, budget)
        if _is_demo(out, config):
            with RunFolder(out).alone():
                shutil.rmtree(out)
        RunFolder(out).refuse_another()  # and not when all else is done
        RunFolder(out).refuse_unwritable()
        plan = require_fit(make_plan(config))
        reporter.say(plan_table(plan))
        questions = _questions(assets / "whatis-eval.jsonl")
        device = find_device(config.budget.device).torch_device
        with reporter.task("Loading weights in NF4", unit="B") as update:
            ready = assemble(config, plan.policy, device, adapter=False, optimizer=False, progress=update)
        before = generate(ready.model, ready.tokenizer, [question for question, _ in questions], max_new_tokens=24)
        del ready

        run = loop.train(config, plan=plan, reporter=reporter)
        losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]

        command = [sys.executable, "-m", "lowmem_ft"]
        asked = [question for question, _ in questions]
        with reporter.task("Reloading in fresh processes", unit="commands") as update:
            update(0, 2)
            again = json.loads(_output([*command, "eval", str(out), "--json"]))["eval_loss"]
            update(1, 2)
            lines = _output([*command, "generate", str(out), "--max-new-tokens", "24", "--json", *asked])
            update(2, 2)
        after = [json.loads(line)["answer"] for line in lines.splitlines()]

    answers = Table("question", "before", "after", "manual page", title="Answers on held-out questions")
    for (question, truth), old, new in zip(questions, before, after, strict=True):
        answers.add_row(question, old, new, truth)
    reporter.say(answers)
    reporter.say(measured_table(run))
    reporter.say(
        f"Held-out answer loss: {losses[0]:.4f} before, {run.eval_loss:.4f} after ({run.eval_loss / losses[0]:.2f}x), "
        f"{again:.4f} in a fresh process"
    )
    if again != run.eval_loss:
        raise LowMemError(
            "A fresh process does not reproduce the held-out loss.",
            given=again,
            allowed=run.eval_loss,
            fix="this is a bug of lowmem-ft: please report it with the run folder",
        )
    reporter.say(f"Everything is in {out}: adapter/ (PEFT format), metrics.jsonl, plan.json, report.html")


def _is_demo(out: Path, config: RunConfig) -> bool:
    """Whether `out` holds an earlier run of the demo, and so nothing that a user would miss."""
    try:
        found = RunConfig.load(out / "config.yaml")
    except ConfigError:
        return False
    return (found.model, found.data, found.train) == (config.model, config.data, config.train)


def _questions(file: Path) -> list[tuple[str, str]]:
    """The first held-out (question, answer) pairs."""
    records: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()[:QUESTIONS]]
    return [(record["messages"][0]["content"], record["messages"][1]["content"]) for record in records]


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LowMemError("A step of the demo failed.", given=" ".join(command), fix=done.stderr.strip())
    return done.stdout
