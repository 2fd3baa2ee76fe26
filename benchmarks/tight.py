"""Runs at the smallest budget that their plans name, on the CPU: the whole process within it, and no step done again?

A seed draws architectures, precisions, adapters, optimizers, objectives, packing and lengths; everything else is left
to the planner. `lowmem-ft plan` is told a budget in which nothing fits, and answers with the least that does. That is
what `lowmem-ft train` gets, in a process of its own, for a few steps on the packaged questions or preferences with
evaluations, samples and checkpoints. Its resident set is watched from outside, planning and loading included.

    python benchmarks/tight.py --count 40 --seed 0 --out benchmarks/results/tight.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import leave, on_cpu, stamp  # beside this file, as the next one
from fit import peak_of

SHAPES = [(384, 1024, 8, 8192), (512, 1408, 10, 32000), (768, 2048, 6, 16384), (1024, 2816, 4, 50304)]
LENGTHS = (128, 256, 512, 1024)
MOST_TOKENS = 2048  # of a step
STEPS = {"steps": 4, "eval_every": 2, "save_every": 2}
TOO_LITTLE = "100MiB"
COMMAND = [sys.executable, "-m", "lowmem_ft"]
_saving = threading.Lock()


def drawn_run(seed: str, folder: Path) -> dict[str, Any]:
    """The architecture, its size, what was drawn of a run, and its config, whose model is there."""
    from tests.assets import ASSETS
    from tests.unit.planner.sampler import draw, preferring

    generator = random.Random(seed)
    drawn = draw(generator, generator.choice(SHAPES), LENGTHS)
    prefers = generator.random() < 0.25
    if prefers:
        drawn = preferring(drawn, generator)
    sections, kind = drawn["sections"], "whatis-pairs" if prefers else "whatis"
    files = {use: str(ASSETS / f"{kind}-{use}.jsonl") for use in ("train", "eval")}
    tokens = min(sections["train"]["tokens_per_step"], MOST_TOKENS)
    own = {
        **sections,
        "train": {**sections["train"], **STEPS, "tokens_per_step": tokens},
        "eval": {"samples": generator.choice([0, 2]), "max_new_tokens": 16},
        "policy": {"compute_dtype": sections["policy"]["compute_dtype"]},
    }
    return {
        "architecture": drawn["architecture"],
        "shape": drawn["shape"],
        "sections": own,
        "config": {
            **own,
            "model": str(model_of(drawn, folder)),
            "data": {**own["data"], **files, "cache": None},
            "budget": {"device": "cpu"},
            "output": str(folder / seed.replace(" ", "-")),
        },
    }


def model_of(drawn: dict[str, Any], folder: Path) -> Path:
    """Random weights with the embedded model's tokenizer, written once."""
    from transformers import AutoTokenizer

    from tests.assets import ASSETS
    from tests.models import save_tiny
    from tests.unit.planner.sampler import settings_of

    settings = settings_of(drawn)
    named = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    model = folder / "models" / f"{drawn['architecture']}-{named}"
    with _saving:  # weights are drawn from PyTorch's one generator
        if not model.exists():
            save_tiny(drawn["architecture"], model, **settings)
            AutoTokenizer.from_pretrained(ASSETS / "doclm-7m").save_pretrained(model)
    return model


def tight_run(seed: str, folder: Path) -> dict[str, Any]:
    """One run: what it was told that it needs, and what it took."""
    run = drawn_run(seed, folder)
    output = Path(run["config"]["output"])
    file = folder / f"{output.name}.yaml"
    file.write_text(json.dumps(run["config"]), encoding="utf-8")
    asked = subprocess.run([*COMMAND, "plan", str(file), f"--budget={TOO_LITTLE}"], capture_output=True, text=True)
    least = re.search(r"at least ([\d.]+ ?[MG]iB)", asked.stderr)
    if asked.returncode != 3 or least is None:
        raise SystemExit(f"{file}: a plan for {TOO_LITTLE} ended with {asked.returncode}: {asked.stderr}")

    with (folder / f"{output.name}.log").open("w+", encoding="utf-8") as log:
        given = f"budget.memory={least[1]}"
        child = subprocess.Popen([*COMMAND, "train", str(file), given], stdout=log, stderr=log)
        peak = peak_of(child)
        log.seek(0)
        said = [line for line in log.read().splitlines() if "emory" in line or "budget" in line]
    metrics, plan = output / "metrics.jsonl", output / "plan.json"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    made = json.loads(plan.read_text()) if plan.exists() else {"budget": {"device_bytes": 0}, "policy": None}
    budget = made["budget"]["device_bytes"]
    shutil.rmtree(output, ignore_errors=True)
    found = {
        **{key: run[key] for key in ("architecture", "shape", "sections")},
        "budget_bytes": budget,
        "peak_bytes": peak,
        "over": peak / budget - 1 if budget else None,
        "exit_code": child.returncode,
        "repeated": sum(line.get("repeated", 0) for line in lines),
        "policy": made["policy"],
        "said": said,
    }
    print(seed, run["architecture"], found["over"], child.returncode, found["repeated"], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="runs at the smallest budget that their plans name, on the CPU")
    parser.add_argument("--count", type=int, default=40, help="runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, of a thread each")
    parser.add_argument("--folder", type=Path, help="where models and runs go; by default a temporary folder")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    on_cpu(1)
    from common import ROOT

    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-tight-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        seeds = [f"{options.seed} {at}" for at in range(options.count)]
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = list(pool.map(lambda seed: tight_run(seed, folder), seeds))
    over = sorted(run["over"] for run in runs if run["over"] is not None)
    result = {
        **stamp(1),
        "settings": {"count": options.count, "seed": options.seed, "steps": STEPS, "shapes": SHAPES},
        "finished": sum(run["exit_code"] == 0 for run in runs),
        "over_budget": sum(it > 0 for it in over),
        "with_repeated_steps": sum(run["repeated"] > 0 for run in runs),
        "over": {"least": over[0], "median": statistics.median(over), "most": over[-1]},
        "runs": runs,
    }
    leave(result, options.out)


if __name__ == "__main__":
    main()
