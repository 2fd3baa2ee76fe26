"""Folders that are no runs, and adapters that are none, told before anything is loaded."""

from pathlib import Path
from typing import Any, NoReturn

import pytest

from lowmem_ft.planner import solver

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
