"""The command line in this process."""

import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from lowmem_ft.cli import main

ASSETS = Path(str(files("lowmem_ft") / "assets"))
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `lowmem-ft ARGUMENTS`: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowmem-ft", *map(str, arguments)])
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return call
