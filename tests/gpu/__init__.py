"""Tests that need a CUDA device."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run_alone(module: str, *arguments: object, expandable: bool) -> None:
    """Run a module of these tests in a process of its own, for the allocator's settings; fails as that does."""
    setting = f"expandable_segments:{expandable}"
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
