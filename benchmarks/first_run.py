"""README's two commands from a fresh clone, each in a fresh environment: what they take and what they end with.

python benchmarks/first_run.py --out benchmarks/results/first_run.json
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMITS = {"wheel_bytes": 25 * 10**6, "demo_seconds": 240.0, "tests_seconds": 600.0}


def timed(command: list[str | Path], folder: Path) -> tuple[float, str]:
    """Seconds of a command that must succeed, and the end of what it says."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return seconds, done.stdout


def environment(folder: Path) -> Path:
    """The programs of a new environment."""
    timed([sys.executable, "-m", "venv", folder], folder.parent)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def first_run(*, tests: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-first-run-") as name:
        clone = Path(name) / "clone"
        timed(["git", "clone", "--quiet", ROOT, clone], Path(name))
        commit = timed(["git", "rev-parse", "HEAD"], clone)[1].strip()
        programs = environment(Path(name) / "user")
        timed([programs / "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", name, "."], clone)
        (wheel,) = Path(name).glob("*.whl")
        installing, _ = timed([programs / "pip", "install", "--quiet", "."], clone)
        demo, said = timed([programs / "lowmem-ft", "demo", "--out", Path(name) / "demo"], clone)
        found = {
            "commit": commit,
            "wheel_bytes": wheel.stat().st_size,
            "install_seconds": round(installing, 1),
            "demo_seconds": round(demo, 1),
            "demo_says": [line for line in said.splitlines() if re.search(r"held-out|planned", line)][-8:],
        }
        if tests:
            testing, said = timed(["bash", ".ci/run"], clone)  # the second command, in an environment of its own
            closing = said.strip().splitlines()[-1]
            ran = re.search(r"in ([0-9.]+)s", closing)
            found |= {
                "ci_seconds": round(testing, 1),
                "tests_say": closing,
                "tests_seconds": float(ran[1]) if ran else None,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="README's commands from a fresh clone of what is committed")
    parser.add_argument("--no-tests", action="store_true", help="the demo alone")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    found = first_run(tests=not options.no_tests)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "limits": LIMITS,
        "within_limits": all(found[name] <= limit for name, limit in LIMITS.items() if name in found),
        **found,
    }
    from common import leave  # beside this file, where scripts are run

    leave(result, options.out)


if __name__ == "__main__":
    main()
