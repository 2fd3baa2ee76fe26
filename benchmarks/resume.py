"""Runs that are killed at random moments and resumed, beside undisturbed ones: adapters, optimizer state and metrics.

python benchmarks/resume.py --kills 30 --out benchmarks/results/resume.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="killed and resumed runs beside undisturbed ones")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    from common import keep, leave, stamp  # beside this file, where scripts are run

    result: dict[str, Any] = {
        **stamp(1),
        "settings": {name: getattr(options, name) for name in ("kills", "steps", "seed", "device")},
    }
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-resume-") as name:
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": name}
        # and on a card sums of cuBLAS in a fixed order, which it asks for in a variable
        on_device = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **own, **on_device}
        command = [sys.executable, "-m", "tests.killing", f"{name}/runs"]
        command += ["--kills", str(options.kills), "--steps", str(options.steps), "--seed", str(options.seed)]
        command += ["--device", options.device]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as running:
            assert running.stdout is not None
            for line in running.stdout:
                runs.append(json.loads(line))
                result["kills"] = sum(len(run.get("killed", ())) for run in runs)
                result |= {"equal": sum(run.get("differing") == [] for run in runs), "of": len(runs), "runs": runs}
                keep(result, options.out)
    leave(result, options.out)
    sys.exit(running.returncode)


if __name__ == "__main__":
    main()
