"""`lowmem-ft init`: by flags, by asking, what is refused, and that what it writes plans and trains."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lowmem_ft.cli import doctor
from lowmem_ft.cli.app import app
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import DataError
from lowmem_ft.planner.suggest import suggest_data, suggest_every, suggest_step
from tests.models import save_tiny
from tests.unit.cli.conftest import ASSETS, Command

MODEL = ASSETS / "doclm-7m"
TRAIN, EVAL = ASSETS / "whatis-train.jsonl", ASSETS / "whatis-eval.jsonl"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `init` as on a terminal, with these answers."""
    monkeypatch.setattr("lowmem_ft.cli.init._is_terminal", lambda: True)

    def run(*arguments: str | Path, answers: str) -> Any:
        return CliRunner().invoke(app, ["init", *map(str, arguments)], input=answers)

    return run


def test_by_flags(command: Command) -> None:
    given = ("--model", MODEL, "--data", TRAIN, "--eval", EVAL, "--budget", "3GiB", "--seq-len", "300")
    code, out, err = command("init", "mine.yaml", *given, "--method", "dora", "--rank", "4")
    assert code == 0, err
    config = RunConfig.load("mine.yaml")
    assert (config.model, config.data.train, config.data.eval) == (str(MODEL), str(TRAIN), str(EVAL))
    assert (config.budget.memory, config.data.seq_len, config.data.format) == (3 << 30, 300, "messages")
    assert (config.adapter.dora, config.adapter.rslora, config.adapter.rank, config.adapter.alpha) == (
        True,
        False,
        4,
        8,
    )
    assert config.output == "runs/mine"
    assert "the longest example has 90 tokens" in err
    plan, train = out.splitlines()[1:]
    assert shlex.split(train) == ["lowmem-ft", "train", "mine.yaml"]
    code, out, err = command(*shlex.split(plan)[1:], "--json")
    assert code == 0, err
    planned = RunConfig.from_dict(json.loads(out)["config"])
    assert (planned.adapter, planned.budget) == (config.adapter, config.budget)
    assert planned.train.tokens_per_step == config.train.tokens_per_step
    assert planned.data.seq_len == 300


def test_what_it_writes_trains(command: Command) -> None:
    lines = TRAIN.read_text().splitlines(keepends=True)[:40]
    Path("few.jsonl").write_text("".join(lines))
    assert command("init", "--model", MODEL, "--data", "few.jsonl", "--yes")[0] == 0
    assert RunConfig.load("config.yaml").data.seq_len == 256
    code, _, err = command("train", "config.yaml", "train.steps=1", "train.tokens_per_step=256")
    assert code == 0, err
    assert Path("runs/config/adapter/adapter_model.safetensors").exists()


def test_code_that_comes_with_the_model(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor` finds the same model."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    shutil.copytree(MODEL, "remote")
    settings = json.loads(Path("remote/config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code_of_mine.Config"}}
    Path("remote/config.json").write_text(json.dumps(settings))
    source = "from transformers import LlamaConfig\n\n\nclass Config(LlamaConfig):\n    model_type = 'mine'\n"
    Path("remote/code_of_mine.py").write_text(source)
    given = ("init", "mine.yaml", "--model", "remote", "--data", EVAL, "--yes")
    code, _, err = command(*given)
    assert (code, "which are not run" in err) == (2, True), err
    code, out, err = command(*given, "--trust-remote-code")
    assert (code, "trust_remote_code=true" in out) == (0, True), err
    assert RunConfig.load("mine.yaml").trust_remote_code
    config = RunConfig.from_dict({"model": "remote", "trust_remote_code": True})
    assert doctor._within_positions(config).data.seq_len <= 2048


def test_missing_flags_are_listed(command: Command) -> None:
    code, out, err = command("init")
    assert (code, out) == (2, "")
    assert "give --model and --data and --budget and --seq-len" in err
    code, _, err = command("init", "--yes", "--data", TRAIN)
    assert (code, "give --model\n" in err) == (2, True)
    assert list(Path().iterdir()) == []


def test_it_asks_for_what_is_missing(asked: Callable[..., Any]) -> None:
    done = asked("--data", TRAIN, answers=f"{MODEL}\n\n2000\n\nmuch\n2GiB\nqlora\nrslora\n0\n8\n")
    assert done.exit_code == 0, done.output
    for question in (
        "Model (a folder",
        "evaluate on",
        "Tokens of a sequence [256]",
        "Method",
        "Rank of the adapter [16]",
    ):
        assert question in done.stderr
    assert "The model has fewer positions" in done.stderr
    assert "Not a size" in done.stderr
    assert "No such method" in done.stderr
    assert "The rank is too small" in done.stderr
    config = RunConfig.load("config.yaml")
    assert (config.data.seq_len, config.data.eval, config.budget.memory) == (256, None, 2 << 30)
    assert (config.adapter.rslora, config.adapter.rank) == (True, 8)


def test_a_share_is_held_out(command: Command) -> None:
    arguments = ["--yes", "--model", MODEL, "--data", TRAIN, "--budget", "1GiB"]
    assert command("init", "shared.yaml", *arguments, "--eval", "0.2")[0] == 0
    assert RunConfig.load("shared.yaml").data.eval == 0.2
    code, _, err = command("init", "other.yaml", *arguments, "--eval", "2")
    assert (code, "no share of the training records" in err) == (2, True), err


def test_an_end_of_input_ends_it(asked: Callable[..., Any]) -> None:
    assert asked(answers="").exit_code == 130
    assert list(Path().iterdir()) == []


def test_bad_input(command: Command, tmp_path: Path) -> None:
    Path("there.yaml").write_text("mine\n")
    code, _, err = command("init", "there.yaml", "--yes", "--model", MODEL, "--data", TRAIN)
    assert (code, "there already" in err, Path("there.yaml").read_text()) == (2, True, "mine\n")
    good = {"--model": MODEL, "--data": TRAIN, "--budget": "1GiB", "--seq-len": "64"}
    cases = {
        "--method": ("qlora", "lora, dora, rslora"),
        "--budget": ("much", "Not a size"),
        "--seq-len": ("2000", "at most 1024"),
        "--data": ("gone.jsonl", "cannot be read"),
        "--eval": ("gone.jsonl", "cannot be read"),
        "--model": (save_tiny("llama", tmp_path / "tiny"), "holds no tokenizer"),
    }
    for flag, (value, words) in cases.items():
        options = [str(part) for pair in {**good, flag: value}.items() for part in pair]
        code, _, err = command("init", "new.yaml", *options)
        assert (code, words in err, "Traceback" in err) == (2, True, False), (flag, err)
    code, _, err = command("init", "no/folder/new.yaml", *[str(it) for pair in good.items() for it in pair])
    assert (code, "cannot be written" in err) == (2, True)
    assert not Path("new.yaml").exists()


def test_an_epoch_has_enough_updates(command: Command) -> None:
    Path("few.jsonl").write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:60]))
    code, _, err = command("init", "--model", MODEL, "--data", "few.jsonl", "--yes", "--seq-len", "64")
    assert code == 0, err
    assert RunConfig.load("config.yaml").train.tokens_per_step == 64
    assert "Updates of 64 tokens (train.tokens_per_step): about " in err
    assert [suggest_step(tokens, 256) for tokens in (1, 50 * 1024, 50 * 16384, 10**9)] == [256, 1024, 16384, 16384]
    assert suggest_step(10, 300) == 512
    assert suggest_step(10**9, 32768) == 32768


def test_an_epoch_is_evaluated_more_than_once(command: Command) -> None:
    """Or the adapter of the lowest held-out loss would be the last one, and a crash would cost the whole run."""
    Path("few.jsonl").write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:60]))
    code, _, err = command("init", "--model", MODEL, "--data", "few.jsonl", "--eval", EVAL, "--yes", "--seq-len", "64")
    assert code == 0, err
    updates = int(re.search(r"about (\d+) in an epoch, evaluated and saved every \d+", err)[1])  # type: ignore[index]
    settings = RunConfig.load("config.yaml").train
    assert settings.eval_every == settings.save_every == updates // 4 < 100
    assert [suggest_every(updates) for updates in (1, 7, 50, 399, 400, 10**6)] == [1, 1, 12, 99, 100, 100]


def test_tokens_of_a_file_that_is_not_read_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    record = json.dumps({"text": "a" + " a" * 9}) + "\n"
    for count in (2000, 6000):
        Path("many.jsonl").write_text(record * count)
        assert suggest_data("many.jsonl", tokenizer, 1024).tokens == pytest.approx(11 * count, rel=0.05)


def test_suggestions() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def suggested(*records: dict[str, Any], positions: int | None = 1024) -> Any:
        Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return suggest_data("data.jsonl", tokenizer, positions)

    pair = {"prompt": "a", "completion": " b"}
    assert (suggested(pair).seq_len, suggested(pair).format) == (256, "prompt_completion")
    assert suggested(pair, {"text": "a" + " a" * 300}).seq_len == 512
    assert suggested(pair, {"text": "a"}).format == "auto"
    long = suggested({"text": " a" * 3000}, pair)
    assert long.seq_len == 1024
    assert "1 of them are longer than the 1024 tokens" in long.notes[1]
    assert suggested({"text": " a" * 3000}, positions=None).seq_len == 3072
    assert suggested({"prompt": "a", "chosen": " b", "rejected": " c"}).format == "chosen"
    assert "1 cannot be used" in suggested(pair, {"x": 1}).notes[1]
    with pytest.raises(DataError, match="no record that can be used"):
        suggested({"x": 1})
    with pytest.raises(DataError, match="bad answers"):
        suggested({**pair, "label": False})
