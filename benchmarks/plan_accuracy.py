"""Predicted memory beside real memory, over configurations that a seed draws: the record of the planner.

Each configuration is simulated without data, then one real training step and one real evaluation step are run on the
CPU and measured by PyTorch's own allocator events. For a share of them a fresh process plans and trains as users do,
and its resident set is held against the planned process peak.

    python benchmarks/plan_accuracy.py --count 300 --out benchmarks/results/plan_accuracy.json
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# hidden size, inner size, blocks, vocabulary: 0.3M to 500M parameters, most of them small
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (96, 160, 3, 199), "small": (192, 512, 4, 2048), "medium": (384, 1024, 6, 8192),
    "large": (768, 2048, 12, 32000), "half a billion": (1280, 3456, 20, 50304),
}  # fmt: skip
SHARES = {"tiny": 40, "small": 35, "medium": 19, "large": 5, "half a billion": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted memory beside real memory, on the CPU")
    parser.add_argument("--count", type=int, default=300, help="configurations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=24, help="how many of them also in a fresh process")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    warnings.simplefilter("ignore")
    if options.child:
        print(json.dumps(train_here(json.loads(options.child.read_text()))))
        return
    result = benchmark(options)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        scratch = options.out.with_name(options.out.name + ".part")
        scratch.write_text(text + "\n", encoding="utf-8")
        os.replace(scratch, options.out)


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tests.unit.planner.sampler import compare, draw

    generator, found, processes = random.Random(options.seed), [], []
    every = max(1, options.count // max(1, options.processes))
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-accuracy-") as name:
        for index in range(options.count):
            size = generator.choices(list(SHARES), list(SHARES.values()))[0]
            drawn = draw(generator, SHAPES[size])
            gc.collect()
            gc.freeze()  # imports are never garbage, and each measurement begins with a collection
            start = time.perf_counter()
            one = {"size": size, **compare(drawn, Path(name))}
            found.append(one)
            if index % every == 0 and len(processes) < options.processes:
                one["process"] = in_process(one["config"], Path(name))
                processes.append(one["process"])
            print(
                f"{index:4} {one['train_error']:+8.3%} {one['eval_error']:+8.3%} "
                f"{one.get('process', {}).get('error', float('nan')):+8.2%} {time.perf_counter() - start:5.1f} s "
                f"{size:15} {one['architecture']:12} {json.dumps(one['sections'])}",
                file=sys.stderr,
                flush=True,
            )
    worst = sorted(found, key=lambda one: min(one["train_error"], 0.0) or -one["train_error"])[:10]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "threads": options.threads, "torch": torch.__version__},
        "settings": {name: getattr(options, name) for name in ("count", "seed", "processes")},
        "train": distribution([one["train_error"] for one in found]),
        "eval": distribution([one["eval_error"] for one in found]),
        "process": distribution([one["error"] for one in processes]),
        "process_over_bytes": [one["planned"] - one["measured"] for one in processes],
        "worst": worst,
        "configurations": found,
    }


def distribution(errors: list[float]) -> dict[str, Any]:
    """Of predicted / measured - 1."""
    ordered = sorted(errors)
    if not ordered:
        return {"count": 0}

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return {
        "count": len(ordered),
        "under": sum(error < 0 for error in ordered),
        **{f"{share:.0%}": at(share) for share in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)},
        "median": statistics.median(ordered),
    }


def in_process(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Planned and measured bytes of a process that does nothing else."""
    file = folder / "config.json.part"
    file.write_text(json.dumps(config))
    done = subprocess.run([sys.executable, __file__, "--child", str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train_here(data: dict[str, Any]) -> dict[str, Any]:
    """Plan and train for two steps, as `lowmem-ft train` does."""
    from lowmem_ft.core.host import prefer_huge_pages

    prefer_huge_pages()
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.planner.verify import full_batches
    from lowmem_ft.runtime.memory import process_peak_bytes
    from lowmem_ft.step import train_step

    config = RunConfig.from_dict(data)
    plan = make_plan(config)
    ready = assemble(config, plan.policy, torch.device("cpu"))
    batches = full_batches(config, plan.policy, vocabulary=100)
    for _ in range(2):
        train_step(ready, batches, lr=1e-4)
    planned, measured = plan.predicted.process_peak_bytes, process_peak_bytes()
    base = plan.device["process_bytes"]
    return {
        "planned": planned, "measured": measured, "error": planned / measured - 1, "baseline": base,
        "allocated": plan.predicted.allocated_peak_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
