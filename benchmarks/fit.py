"""Models that do not fit, trained in a budget, on the CPU: what the whole process takes, and what streaming costs.

Random weights of real shapes are written once, and `lowmem-ft train` runs on the packaged question-answer pairs under
`budget.memory`. The resident set is watched from outside. TinyLlama's losses are held against those of a run with a
large budget and the same micro-batch and loss chunk: they must be equal to the bit.

The slowdown is that of a step with every block streamed from disk, past the page cache, against a resident one, in
alternation, on a few blocks of TinyLlama's shape.

    python benchmarks/fit.py --out benchmarks/results/fit.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_weights import ASSETS, write_model  # beside this file

MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "TinyLlama-1.1B": (
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
            "max_position_embeddings": 2048, "tie_word_embeddings": False,
        },
        "1400MB",
    ),
    "Llama-3.2-3B": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 131072, "tie_word_embeddings": True,
        },
        "2GB",
    ),
}  # fmt: skip
SEQ_LEN = 512
TIMED = {"num_hidden_layers": 4, "vocab_size": 8192}  # of the slowdown: a few blocks, and a head that takes little


def train(folder: Path, name: str, model: Path, steps: int, **sections: Any) -> dict[str, Any]:
    """A run of the command line in a process of its own, whose resident set is read from outside."""
    config = {
        "model": str(model),
        "data": {"train": str(ASSETS / "whatis-train.jsonl"), "seq_len": SEQ_LEN},
        "train": {"tokens_per_step": SEQ_LEN, "steps": steps, "save_every": steps},
        "output": str(folder / name),
        **sections,
    }
    shutil.rmtree(folder / name, ignore_errors=True)
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "lowmem_ft", "train", str(file)], stdout=subprocess.DEVNULL)
    peak = peak_of(child)
    if child.returncode != 0:
        raise SystemExit(f"{file} ended with {child.returncode}")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((folder / name / "plan.json").read_text())
    later = [line for line in lines if "loss" in line][1:]  # the first one warms up
    return {
        "peak_bytes": peak,
        "planned_bytes": plan["predicted"]["process_peak_bytes"],
        "budget_bytes": plan["budget"]["device_bytes"],
        "policy": plan["policy"],
        "whole_seconds": round(time.perf_counter() - start, 1),
        "step_seconds": [round(line["seconds"], 2) for line in later],
        "tokens_per_second": round(max(line["tokens_per_second"] for line in later), 2),
        "repeated": sum(line.get("repeated", 0) for line in lines),
        "losses": [line["loss"] for line in lines if "loss" in line],
        "grad_norms": [line["grad_norm"] for line in lines if "loss" in line],
    }


def peak_of(child: subprocess.Popen[Any]) -> int:
    """The largest resident set of a process, in bytes, when it has ended."""
    peak = 0
    while child.poll() is None:
        peak = max(peak, high_water(child.pid))
        time.sleep(0.02)
    return peak


def high_water(pid: int) -> int:
    """VmHWM of a process in bytes; 0 if it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:")), 0)


def in_budget(folder: Path, names: list[str], steps: int) -> dict[str, Any]:
    found = {}
    for name in names:
        shape, budget = MODELS[name]
        model = write_model(folder / name, shape, device="cpu")
        small = train(folder, f"{name}-small", model, steps, budget={"device": "cpu", "memory": budget})
        found[name] = {"budget": budget, "small": small, "within": small["peak_bytes"] <= small["budget_bytes"]}
        if name == "TinyLlama-1.1B":
            alike = {key: small["policy"][key] for key in ("micro_batch_tokens", "loss_chunk_tokens")}
            large = train(folder, f"{name}-large", model, steps, budget={"device": "cpu"}, policy=alike)
            equal = all(small[key] == large[key] for key in ("losses", "grad_norms"))
            found[name] |= {"large": large, "equal": equal}
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    return found


def slowdowns(folder: Path, tokens: list[int]) -> list[dict[str, Any]]:
    """Seconds of a step resident and streamed."""
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.core.plan import Policy
    from lowmem_ft.planner.verify import FullBatches
    from lowmem_ft.step import train_step

    shape = MODELS["TinyLlama-1.1B"][0]
    model = write_model(folder / "blocks", {**shape, **TIMED}, device="cpu")
    found, depth = [], TIMED["num_hidden_layers"]
    for count in tokens:
        config = RunConfig.from_dict(
            {
                "model": str(model), "output": str(folder / "run"), "data": {"seq_len": SEQ_LEN},
                "train": {"tokens_per_step": count}, "budget": {"device": "cpu"},
            }
        )  # fmt: skip
        readies = []
        for streamed in (0, depth):
            policy = Policy(
                bits=4, quant="nf4", double_quant=True, compute_dtype="bfloat16", micro_batch_tokens=count,
                accumulation=1, resident_blocks=depth - streamed, streamed_blocks=streamed, stream_from="disk",
                keep_blocks=0, recompute_blocks=depth, offload_blocks=0, optimizer="adamw8bit",
                loss_chunk_tokens=128,
            )  # fmt: skip
            torch.manual_seed(0)
            readies.append(assemble(config, policy, torch.device("cpu")))
        batches = list(FullBatches(config, policy, vocabulary=TIMED["vocab_size"]))
        times: list[list[float]] = [[], []]
        losses: list[list[float]] = [[], []]
        for _ in range(4 if count <= 2048 else 2):
            for ready, seconds, said in zip(readies, times, losses, strict=True):
                start = time.perf_counter()
                said.append(train_step(ready, batches, lr=1e-4).loss)
                seconds.append(time.perf_counter() - start)
        resident, streamed_seconds = (min(seconds[1:]) for seconds in times)
        found.append(
            {
                "tokens_per_step": count,
                "resident_seconds": resident,
                "streamed_seconds": streamed_seconds,
                "slowdown": streamed_seconds / resident,
                "equal": losses[0] == losses[1],
            }
        )
        print(found[-1], file=sys.stderr, flush=True)
        del readies
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="models that do not fit, trained in a budget, on the CPU")
    parser.add_argument("--models", nargs="*", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--steps", type=int, default=4, help="of each run; the first one warms up")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192], help="per step, for the slowdown")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where models and runs go; by default a temporary folder")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    from common import leave, on_cpu, stamp  # beside this file, where scripts are run

    on_cpu(options.threads)
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-fit-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        result = {
            **stamp(options.threads),
            "settings": {"models": options.models, "steps": options.steps, "timed": TIMED},
            "slowdown": slowdowns(folder, options.tokens),
            "budget": in_budget(folder, options.models, options.steps),
        }
    leave(result, options.out)


if __name__ == "__main__":
    main()
