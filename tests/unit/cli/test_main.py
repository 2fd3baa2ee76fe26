"""What the command line makes of errors that have no message for users, of others' text, and of folders in use."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_group

from lowmem_ft.cli import demo, export, format_warning
from lowmem_ft.cli.app import app
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import LowMemError
from lowmem_ft.core.host import prefer_short_waits
from lowmem_ft.export.gguf_file import TYPES
from lowmem_ft.export.write import refuse_filled
from lowmem_ft.planner import solver
from tests.unit.cli.conftest import ASSETS

Command = Callable[..., tuple[int, str, str]]


def raising(error: BaseException) -> Callable[..., Any]:
    def make_plan(*_: Any, **__: Any) -> Any:
        raise error

    return make_plan


@pytest.mark.parametrize(
    ("error", "given"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"), "2.00 GiB."),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), "enforce"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_memory_that_runs_out(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, given: str
) -> None:
    monkeypatch.setattr(solver, "make_plan", raising(error))
    code, out, err = command("plan", ASSETS / "doclm-7m")
    assert (code, out) == (3, ""), err
    assert "Memory ran out" in err
    assert given in err
    assert "See the documentation" not in err


def test_names_that_the_system_does_not_take(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of what lies where nobody may look, which a test that root runs cannot show."""
    name, model = "a" * 300, ASSETS / "doclm-7m"
    monkeypatch.setattr(solver, "make_plan", raising(AssertionError("it plans")))
    for words, said in {
        ("data", ASSETS / "whatis-eval.jsonl", "--model", name): "neither a local folder nor a hub repository",
        ("init", f"{name}.yaml", "--yes"): "file cannot be written",
        ("plan", model, "--html", name): "file cannot be written",
        ("push", name, "me/mine"): "no adapter to upload",
    }.items():
        code, out, err = command(*words)
        assert (code, out, said in err) == (2, "", True), err
    refuse_filled(Path(name))  # making it says why
    monkeypatch.setattr(solver, "make_plan", raising(PermissionError(errno.EACCES, "Permission denied", name)))
    code, _, err = command("plan", model)
    assert (code, f"given:   [Errno 13] Permission denied: '{name}'" in err) == (2, True), err


def test_names_that_the_locale_has_no_letters_for(tmp_path: Path) -> None:
    """As under LC_ALL=de_DE.ISO-8859-1; under C alone Python takes UTF-8."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "lowmem_ft", "train", "config.yaml"]
    (tmp_path / "config.yaml").write_text(f"model: {ASSETS / 'doclm-7m'}\ndata: {{train: träin.jsonl}}\n", "utf-8")
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **locale}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "The locale has no letters for a file's name" in done.stderr
    assert "tr\\xe4in.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_errors_are_bugs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "make_plan", raising(RuntimeError("of our own")))
    with pytest.raises(RuntimeError, match="of our own"):
        command("plan", ASSETS / "doclm-7m")


def test_what_an_export_says_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["Exported: /runs/[draft]/gguf", "white space beside [/INST], which the tokenizer drops"]
    export._show({}, lines, as_json=False)
    assert capsys.readouterr().out.splitlines() == lines


def test_a_demo_does_not_begin_over_another_run(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "make_plan", raising(AssertionError("it plans")))
    (tmp_path / "metrics.jsonl").write_text("")
    code, _, err = command("demo", "--out", tmp_path)
    assert code == 2
    assert "holds a run already" in err


def test_warnings_say_no_place_in_the_code() -> None:
    """But for those that are not this package's."""
    assert format_warning("ignored", UserWarning, "/venv/lowmem_ft/cli/app.py", 94) == "Warning: ignored\n"
    assert "linear.py:7: UserWarning" in format_warning("slow", UserWarning, "/venv/torch/nn/linear.py", 7)


def test_what_names_in_messages_tell_a_terminal_to_do_is_written_out(command: Command, tmp_path: Path) -> None:
    assert format_warning("\x1b[2J", UserWarning, "/venv/lowmem_ft/a.py", 1) == "Warning: \\x1b[2J\n"
    assert str(LowMemError("no", given="\x1b[2Ja\r", fix="b\n")) == "no\n  given:   \\x1b[2Ja\\x0d\n  fix:     b\n"
    code, _, err = command("train", tmp_path / "\x1b[2J.yaml")
    assert code == 2
    assert "\\x1b[2J.yaml" in err
    assert "\x1b" not in err


def test_versions(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_ft.core.checks.metadata.version", {"lowmem-ft": "1.2", "torch": "2.13.0+cpu"}.get)
    code, out, err = command("--version")
    told = ["lowmem-ft 1.2", "torch 2.13.0+cpu", "transformers is not installed as a package"]
    assert (code, out.splitlines(), err) == (0, told, "")


def test_what_needs_no_pytorch_does_not_wait_for_it() -> None:
    """Importing it takes seconds."""
    code = """
import sys
from lowmem_ft.cli import main
for words in ("--version", "--help", "plan --help", "profiles list", "profiles show cpu", "docs"):
    sys.argv = ["lowmem-ft", *words.split()]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, words
    assert not {"torch", "transformers", "numpy"} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"torch {metadata.version('torch')}" in done.stdout


def test_help_is_set_as_wide_as_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer keeps where a docstring's lines end, and puts brackets around what may be left out, but in old versions."""
    for name, one in get_group(app).commands.items():
        assert all("\n" not in paragraph for paragraph in (one.help or "").split("\n\n")), name
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("plan", "train", "eval", "data"):
        assert re.search(r" \[?KEY=VALUE\]?(\.\.\.)?  ", command(name, "--help")[1]), name
    assert re.search(r" \[?OUT\.yaml\]?  ", command("init", "--help")[1])


def test_help_names_every_type_of_gguf(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without importing them, which would import PyTorch."""
    monkeypatch.setenv("COLUMNS", "200")
    assert f"{', '.join(TYPES[:-1])} or {TYPES[-1]}." in command("export", "--help")[1]


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_the_config_that_will_be_trained_is_planned(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str
) -> None:
    asked: list[RunConfig] = []

    def make_plan(config: RunConfig) -> Any:
        asked.append(config)
        raise MemoryError

    monkeypatch.setattr(solver, "make_plan", make_plan)
    path = (tmp_path / "run").with_suffix(suffix)
    path.write_text("model: some/model\nadapter: {rank: 4}\ndata: {seq_len: 512}\n", encoding="utf-8")
    assert command("plan", path, "--seq-len", 256, "train.lr=1e-5")[0] == 3, "flags are above the file"
    assert asked == [RunConfig.load(path, ["data.seq_len=256", "train.lr=1e-5"])]


@pytest.mark.parametrize(("given", "spins"), [(None, "1000"), ("active", None)])
def test_threads_wait_shortly_unless_told_otherwise(
    given: str | None, spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {} if given is None else {"OMP_WAIT_POLICY": given}
    monkeypatch.setattr("lowmem_ft.core.host.os.environ", environment)
    prefer_short_waits()
    assert (environment["OMP_WAIT_POLICY"], environment.get("GOMP_SPINCOUNT")) == (given or "passive", spins)
