"""Folders that are no runs, and adapters that are none, told before anything is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.planner import solver
from lowmem_ft.trainer import loop

from .conftest import ASSETS, Command


@pytest.mark.parametrize(
    ("file", "said"),
    [("adapter_config.json", "it is an adapter"), ("config.json", "it is a model"), ("x", "name the run's folder")],
)
def test_a_folder_that_is_no_run(file: str, said: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    for arguments in (("generate", tmp_path, "hi"), ("eval", tmp_path), ("chat", tmp_path), ("merge", tmp_path)):
        code, _, err = command(*arguments)
        assert (code, "The folder is no run" in err, said in err) == (2, True, True), err


def test_nothing_to_export_is_told_before_it_is_planned(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("it was planned")

    monkeypatch.setattr(solver, "make_plan", planned)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    text = f"model: {ASSETS / 'doclm-7m'}\nbudget: {{device: cpu, memory: 2GB}}\noutput: {run}\n"
    for folder in (tmp_path, run):
        (folder / "config.yaml").write_text(text)
    for target, more, fix in (
        (tmp_path / "config.yaml", [], f"give {run}, or --adapter"),
        (tmp_path / "config.yaml", ["--adapter", "none"], f"give {run}, or --adapter"),
        (run, ["--adapter", "none"], "leave --adapter none out"),
    ):
        for arguments in (("merge", target), ("export", target, "--vllm")):
            code, _, err = command(*arguments, *more)
            assert (code, "There is no adapter to export" in err, fix in err) == (2, True, True), err


def test_an_adapter_that_is_not_there(command: Command, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {ASSETS / 'doclm-7m'}\nbudget: {{device: cpu, memory: 2GB}}\n")
    code, _, err = command("generate", config, "hi", "--adapter", tmp_path / "nowhere")
    assert (code, "the adapter's config cannot be read" in err, "Loading" in err) == (2, True, False), err


def test_a_run_that_was_moved_goes_on_where_it_is(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.yaml names the folder that it was started in; one that the user wrote names where to."""
    asked: list[str] = []

    def train(config: RunConfig, **_: Any) -> NoReturn:
        asked.append(config.output)
        raise ConfigError("enough")

    monkeypatch.setattr(loop, "train", train)
    (moved := tmp_path / "moved").mkdir()
    text = f"model: {ASSETS / 'doclm-7m'}\ndata: {{train: t.jsonl}}\noutput: {tmp_path / 'before'}\n"
    for folder in (tmp_path, moved):
        (folder / "config.yaml").write_text(text)
    (moved / "plan.json").write_text("{}")
    for arguments, expected in (
        ((moved / "config.yaml", "--resume"), moved),
        ((moved / "config.yaml", "--resume", f"output={tmp_path / 'other'}"), tmp_path / "other"),
        ((moved / "config.yaml",), tmp_path / "before"),
        ((tmp_path / "config.yaml", "--resume"), tmp_path / "before"),
    ):
        _, _, err = command("train", *arguments)
        assert asked.pop() == str(expected)
        assert (f"Going on in {moved}" in err) == (expected == moved)


def test_a_run_that_its_time_ended_is_not_done(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {ASSETS / 'doclm-7m'}\ndata: {{train: t.jsonl}}\n")
    monkeypatch.setattr(loop, "train", lambda *_, **__: SimpleNamespace(status="out_of_time"))
    assert command("train", tmp_path / "c.yaml")[0] == 130


def test_what_the_host_may_take(command: Command) -> None:
    given = ("plan", ASSETS / "doclm-7m", "--device", "colab-t4-16gb", "--seq-len", 128, "--json", "--host-budget")
    code, out, _ = command(*given, "6GiB")
    assert (code, json.loads(out)["budget"]["host_bytes"]) == (0, 6 << 30)
    code, out, _ = command(*given, "1MiB")
    assert (code, "host" in json.loads(out)["reason"]) == (3, True)


def test_an_option_that_is_empty(command: Command) -> None:
    code, _, err = command("plan", ASSETS / "doclm-7m", "--budget", "")
    assert (code, "An option is empty" in err) == (2, True)
