"""Seconds that a plan takes, for models of real shapes, on the CPU of this machine. Imports are not counted.

Each plan is made in a process of its own from a config.json alone: one where all of a card may be used, one that a
budget 3% below the smallest peak refuses (so that changes which would fit are sought closely), and one that a quarter
of that peak refuses.

    python benchmarks/plan_time.py --out benchmarks/results/plan_time.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from limits import SHAPES  # beside this file

# Shapes as published; the card; the seconds that a plan may take
MODELS: dict[str, tuple[dict[str, Any], str, float]] = {
    "Llama-3.1-8B": (SHAPES["Llama-3.1-8B"], "rtx-3060-12gb", 5.0),
    "Qwen3-30B-A3B": (SHAPES["Qwen3-30B-A3B"], "rtx-5090-32gb", 5.0),
    "Qwen3-32B": (SHAPES["Qwen3-32B"], "rtx-5090-32gb", 15.0),
    "Llama-3-70B": (SHAPES["Llama-3-70B"], "h100-80gb", 15.0),
}


def plan_once(request: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: one plan, with what it says and how long it took."""
    warnings.simplefilter("ignore")

    from lowmem_ft.planner.alloc_conf import prefer_expandable_segments

    prefer_expandable_segments()  # as the command line does

    import peft  # noqa: F401 - imports are not counted
    import transformers  # noqa: F401

    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.planner.solver import make_plan

    config = RunConfig.from_dict(request)
    wall, cpu = time.perf_counter(), time.process_time()
    plan = make_plan(config)
    return {
        "fits": plan.fits,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "process_peak_bytes": plan.predicted.process_peak_bytes,
        "changes": [f"{change.key}={change.value}" for change in plan.changes],
    }


def timed(folder: Path, device: str, seq_len: int, budget: int | None) -> dict[str, Any]:
    """The same, from here."""
    limits: dict[str, Any] = {"device": device} if budget is None else {"device": device, "memory": budget}
    request = {"model": str(folder), "data": {"seq_len": seq_len}, "budget": limits}
    command = [sys.executable, __file__, "--one", json.dumps(request)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds that a plan takes, on the CPU")
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4096, 2048])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    if options.one is not None:
        print(json.dumps(plan_once(options.one)))
        return

    import transformers

    found = []
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-plans-") as name:
        for model in options.models:
            shape, device, target = MODELS[model]
            own = dict(shape)
            kind = own.pop("model_type")
            config = transformers.AutoConfig.for_model(kind, tie_word_embeddings=False, dtype="bfloat16", **own)
            config.save_pretrained(Path(name) / model)
            for length in options.seq_len:
                smallest = timed(Path(name) / model, device, length, 1 << 20)["process_peak_bytes"]
                budgets = {"fits": None, "just refused": int(0.97 * smallest), "far refused": smallest // 4}
                for case, budget in budgets.items():
                    result = timed(Path(name) / model, device, length, budget)
                    load = os.getloadavg()[0]
                    found.append(
                        {"model": model, "device": device, "seq_len": length, "case": case, "target": target}
                        | result | {"load": round(load, 1)}
                    )  # fmt: skip
                    assert result["fits"] == (case == "fits"), found[-1]
                    print(f"{result['seconds']:6.2f} s of {target:.0f}  {found[-1]}", file=sys.stderr, flush=True)
    from common import leave, stamp  # beside this file, where scripts are run

    result = {
        **stamp(options.threads),
        "settings": {"models": options.models, "seq_len": options.seq_len},
        "within_target": sum(one["seconds"] <= one["target"] for one in found),
        "of": len(found),
        "plans": found,
    }
    leave(result, options.out)


if __name__ == "__main__":
    main()
