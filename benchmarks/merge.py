"""Merging and exporting a model in less memory than it takes: what the whole process takes, check included, on the CPU.

Random weights of TinyLlama's shape, the packaged tokenizer, and an adapter with random factors. Each command runs in a
process of its own under `budget.memory`, and its resident set is watched from outside.

    python benchmarks/merge.py --out benchmarks/results/merge.json
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

# Not quantized again to 4 bits: random weights, whose tokens are all about as likely, do not pass that check
COMMANDS = {
    "merge": ["merge"],
    "export as q8_0": ["export", "--gguf", "q8_0"],
}
RANK = 16


def write_adapter(model: Path, folder: Path) -> None:
    """An adapter on every linear layer, as if it had been trained: small noise in B."""
    import torch

    from lowmem_ft.adapters.inject import inject_lora, trainable_parameters
    from lowmem_ft.adapters.peft_format import save_adapter
    from lowmem_ft.quant.checkpoint import Checkpoint
    from lowmem_ft.quant.loader import meta_model

    torch.manual_seed(0)
    plain = meta_model(Checkpoint.open(model))
    inject_lora(plain, rank=RANK)
    for name, parameter in trainable_parameters(plain):
        path, _, leaf = name.rpartition(".")
        noise = torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.01
        setattr(plain.get_submodule(path), leaf, torch.nn.Parameter(noise))
    save_adapter(plain, folder, base_model=str(model))


def watched(command: list[str]) -> dict[str, Any]:
    """Peak of the resident set, seconds, and what the command says in JSON."""
    from fit import peak_of  # beside this file, where scripts are run

    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "lowmem_ft", *command, "--json"], stdout=subprocess.PIPE, text=True)
    peak = peak_of(child)
    said = child.stdout.read() if child.stdout is not None else ""
    if child.returncode != 0:
        raise SystemExit(f"{command} ended with {child.returncode}")
    return {"peak_bytes": peak, "seconds": round(time.perf_counter() - start, 1), "said": json.loads(said)}


def measure(folder: Path, budget: str) -> dict[str, Any]:
    from fit import MODELS
    from random_weights import write_model

    model = write_model(folder / "model", MODELS["TinyLlama-1.1B"][0], device="cpu")
    write_adapter(model, folder / "adapter")
    config: dict[str, Any] = {"model": str(model), "data": {"seq_len": 64}, "train": {"tokens_per_step": 64}}
    (folder / "run").mkdir(exist_ok=True)
    file = folder / "run" / "config.yaml"
    file.write_text(
        json.dumps({**config, "budget": {"device": "cpu", "memory": budget}, "output": str(folder / "run")})
    )
    found: dict[str, Any] = {"base_bytes": sum(part.stat().st_size for part in model.glob("*.safetensors"))}
    for name, command in COMMANDS.items():
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        found[name] = watched([*command, str(file), "--adapter", str(folder / "adapter"), "--out", str(out)])
        found[name]["largest_file_bytes"] = max(part.stat().st_size for part in out.iterdir())
        found[name]["said"].pop("folder")
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="merging and exporting in little memory, on the CPU")
    parser.add_argument("--budget", default="1400MB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where the model goes; by default a temporary folder")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    from common import leave, on_cpu, stamp

    on_cpu(options.threads)
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-merge-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        result = {
            **stamp(options.threads),
            "settings": {"model": "TinyLlama-1.1B", "budget": options.budget, "rank": RANK},
            "commands": measure(folder, options.budget),
        }
    leave(result, options.out)


if __name__ == "__main__":
    main()
