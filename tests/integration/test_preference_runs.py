"""Runs over preferences from outside: the README's example, what it leaves, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError, DataError
from lowmem_ft.core.run import Run
from lowmem_ft.export.parity import held_out
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer import loop
from tests.assets import ASSETS, write_pairs, write_share
from tests.unit.cli.conftest import command  # noqa: F401 - a fixture

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
Command = Callable[..., tuple[int, str, str]]
QUIET = Reporter(quiet=True)
SAID = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
POLICY = {"micro_batch_tokens": 256, "loss_chunk_tokens": 64, "activations": "keep"}  # quickly planned
VERDICTS = [{"prompt": f"What is {it}?", "completion": f" It is {it}.", "label": it < "m"} for it in "abcmnopqxyz"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_share(tmp_path, train=24, eval=8)
    write_pairs(tmp_path, train=24, eval=8)
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(it) + "\n" for it in VERDICTS))
    return tmp_path


def config(folder: Path, objective: str, file: str = "pairs-train.jsonl", **sections: Any) -> RunConfig:
    keys: dict[str, Any] = {
        "model": str(ASSETS / "doclm-7m"),
        "data": {"train": str(folder / file), "eval": str(folder / "pairs-eval.jsonl"), "seq_len": 64},
        "train": {"objective": objective, "tokens_per_step": 512, "steps": 3, "lr": 1e-3, "eval_every": 3},
        "adapter": {"rank": 4},
        "policy": POLICY,
        "output": str(folder / objective),
    }
    for name, section in sections.items():
        keys[name] = {**keys[name], **section}
    return RunConfig.from_dict(keys)


def test_the_readmes_example(folder: Path, command: Command) -> None:  # noqa: F811
    (text,) = re.findall(r"```yaml\n(# dpo\.yaml\n.*?)```", README, re.DOTALL)
    (line,) = re.findall(r"^lowmem-ft (train dpo\.yaml .*)$", README, re.MULTILINE)
    (folder / "dpo.yaml").write_text(text)
    told = line.replace("$assets", str(ASSETS)).replace("dpo.yaml", str(folder / "dpo.yaml")).split()
    assert yaml.safe_load(text)["train"]["objective"] == "dpo"
    short = ["train.steps=2", f"output={folder / 'run'}", *(f"policy.{key}={value}" for key, value in POLICY.items())]
    code, _, err = command(*told, *short)
    assert code == 0, err
    lines = [json.loads(it) for it in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [it["eval_loss"] for it in lines if it["step"] == 0] == [pytest.approx(0.693147, rel=1e-5)]
    code, out, err = command("eval", folder / "run", "eval.samples=2", "eval.max_new_tokens=4", "--json")
    assert code == 0, err
    found = json.loads(out)
    last = lines[-1]
    assert found["eval_loss"] == last["eval_loss"]
    assert found["examples"] == 80
    assert [set(it) for it in found["samples"]] == [{"prompt", "answer", "reference"}] * 2
    assert {f"eval_{name}": found[name] for name in SAID} == {f"eval_{name}": last[f"eval_{name}"] for name in SAID}


@pytest.mark.parametrize("objective", ["ipo", "orpo", "simpo", "kto"])
def test_every_objective_trains(folder: Path, objective: str) -> None:
    train = ("pairs-train.jsonl", "verdicts.jsonl") if objective == "kto" else ("pairs-train.jsonl",)
    sources = [str(folder / it) for it in train]
    track = ["tensorboard"]
    run: Run = loop.train(config(folder, objective, data={"train": sources}, train={"track": track}), reporter=QUIET)
    assert run.status == "finished"
    steps = [line for line in run.metrics if "loss" in line]
    own = {"orpo": "nll_loss", "kto": "kl"}.get(objective)
    for line in steps:
        assert all(name in line for name in (*SAID, *([own] if own else [])))
    held = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert held[-1] != held[0]
    assert all(f"eval_{name}" in run.metrics[-1] for name in SAID)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard" / run.folder.name)).Reload()
    assert [it.value for it in events.Scalars("train/rewards/margins")] == pytest.approx(
        [line["rewards/margins"] for line in steps]
    )
    assert f"{objective}, mean of a step" in (run.folder / "report.html").read_text()
    text = held_out(config(folder, objective), Checkpoint.open(ASSETS / "doclm-7m"))
    assert text.origin == "data.eval"
    assert len(text.sequences) >= 8


def test_a_merge_after_preferences_is_checked_on_their_answers(folder: Path, command: Command) -> None:  # noqa: F811
    run = loop.train(config(folder, "dpo"), reporter=QUIET)
    code, _, err = command("merge", run.folder)
    assert code == 0, err
    assert (run.folder / "merged" / "config.json").exists()


@pytest.mark.parametrize(
    ("objective", "train", "match", "fix"),
    [
        ("dpo", "train.jsonl", "the record is no preference", None),
        ("dpo", "verdicts.jsonl", "one answer with a verdict", "set train.objective: kto"),
        ("sft", "pairs-train.jsonl", "the record is a preference", "chosen"),
    ],
)
def test_data_of_another_objective_is_refused(
    folder: Path, objective: str, train: str, match: str, fix: str | None
) -> None:
    with pytest.raises(DataError, match=match) as error:
        loop.train(config(folder, objective, train), reporter=QUIET)
    assert fix is None or fix in str(error.value.fix)
    assert not (folder / objective).exists(), "nothing is left"


def test_wrong_keys_end_with_one_message(folder: Path, command: Command) -> None:  # noqa: F811
    (folder / "config.yaml").write_text(config(folder, "dpo").to_yaml())
    code, _, err = command("train", folder / "config.yaml", "preference.gamma=1")
    assert code == 2
    assert "preference.gamma does not concern train.objective: dpo" in err
    assert "Traceback" not in err
    with pytest.raises(ConfigError, match=r"did you mean 'preference\.beta'"):
        config(folder, "dpo").from_dict({"model": "m"}, ["preference.bta=1"])
