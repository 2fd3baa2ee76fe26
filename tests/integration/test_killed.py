"""Runs that are killed and resumed end as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.killing import RUNS

ROOT = Path(__file__).resolve().parents[2]


def test_killed_runs_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Five kills, one of them while a checkpoint is written; adapters, optimizer, data order and metrics are equal."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tests.killing", str(tmp_path / "runs"), "--kills", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **own}, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["run"] for one in found] == [*RUNS]
    assert all(one["differing"] == [] for one in found), found
    killed = [kill for one in found for kill in one["killed"]]
    assert len(killed) == 5
    assert sum(kill.startswith("while saving") for kill in killed) == 1
