"""`lowmem-ft doctor`: what it prints, and its exit codes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lowmem_ft.cli import doctor as module
from lowmem_ft.cli.doctor import _show, check_hub
from lowmem_ft.core.checks import Check
from lowmem_ft.planner.health import Limit
from tests.models import save_tiny
from tests.unit.cli.conftest import Command

WRONG = Check(name="torch", status="problem", found="1.0, where [lowmem-ft] needs more", fix="pip install torch")


def test_this_machine(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("doctor", "--json")
    told = json.loads(out)
    assert (code, told["ok"], err) == (0, True, "")
    names = {check["name"] for check in told["checks"]}
    assert names > {"python", "torch", "CUDA", "kernel: nf4", "RAM", "disk: runs", "streaming from disk", "profile"}
    assert "hub" not in names
    assert all(check["fix"] for check in told["checks"] if check["status"] != "ok")
    assert told["limit"]["fits"]
    assert "doclm-7m" in told["limit"]["sentence"]
    assert "sequences of 1024 tokens" in told["limit"]["sentence"], "the model has no more positions"
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_problem_ends_with_2_and_shows_everything(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "check_versions", lambda: iter([WRONG]))
    monkeypatch.setattr(module, "_machine", lambda config: iter(()))
    code, out, _ = command("doctor", "--model", save_tiny("llama", tmp_path / "tiny"))
    assert code == 2
    assert out.startswith("problem\ttorch\t1.0, where [lowmem-ft] needs more\tpip install torch\n")
    assert "What would limit you: tiny (LlamaForCausalLM" in out


def test_what_fails_while_it_looks_is_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any) -> Any:
        yield Check(name="CUDA", status="ok", found="well")
        raise AttributeError("module 'triton' has no attribute 'x'\nmore")

    monkeypatch.setattr(module, "_machine", broken)
    code, out, _ = command("doctor", "--json")
    told = json.loads(out)
    assert (code, told["ok"], told["limit"]) == (2, False, None)
    assert [check["name"] for check in told["checks"][-2:]] == ["CUDA", "libraries"]
    assert told["checks"][-1]["found"] == "AttributeError: module 'triton' has no attribute 'x'"


def test_a_model_that_cannot_be_planned(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_machine", lambda config: iter(()))
    code, out, err = command("doctor", "--model", tmp_path)
    assert code == 2
    assert "ok\tpython" in out
    assert str(tmp_path) in err
    assert "Traceback" not in err


def test_the_hub_is_asked_only_with_the_flag(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def no_network(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=no_network))
    found = check_hub()
    assert (found.status, "does not answer (OSError)" in found.found) == ("warning", True)
    answers = SimpleNamespace(head=lambda *_, **__: SimpleNamespace(status_code=200))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: answers)
    assert (check_hub().status, "answers (200)" in check_hub().found) == ("ok", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not asked" in check_hub().found
    monkeypatch.setattr(module, "_machine", lambda config: iter(()))
    assert "hub\tnot asked" in command("doctor", "--hub")[1]


def test_a_terminal_gets_a_table() -> None:
    console = Console(force_terminal=True, width=120, highlight=False, markup=False)
    with console.capture() as capture:
        _show([WRONG], Limit(sentence="[tiny] fits.", fits=True), console)
    shown = capture.get()
    assert "how to fix it" in shown
    assert "needs more" in shown
    assert "What would limit you: [tiny] fits." in shown


def test_a_narrow_terminal_gets_all_of_it() -> None:
    console = Console(force_terminal=True, width=40, color_system=None, highlight=False, markup=False)
    path = "/home/somebody/.cache/huggingface/hub"
    with console.capture() as capture:
        _show([Check(name="disk", status="ok", found=path)], None, console)
    assert path in "".join(line.split()[-1] for line in capture.get().splitlines()[3:] if line.strip())
