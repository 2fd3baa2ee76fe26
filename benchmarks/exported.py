"""What the benchmarks of exports have in common: a trained run, chat templates, and how they tell their figures."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("What does ls do?", "What does grep do?", "What is tar for?", "How do I copy a file?", "Käse, 日本?")
BEGINNINGS = ("The ls command", "SYNOPSIS\n", "This option", "If the file does not exist,")


def arguments(description: str) -> argparse.ArgumentParser:
    """What all of them take on the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=60, help="of training, of the embedded model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    return parser


def shown(parity: Any) -> dict[str, Any]:
    """Rounded figures of a `Parity`."""
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in asdict(parity).items()}


def base_alone(adapter: Path, folder: Path) -> Path:
    """The same adapter with zeros in B: what is merged with it is the base."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: it * ("lora_B" not in name) for name, it in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def report(name: str, figures: Any) -> None:
    print(json.dumps({name: figures}, ensure_ascii=False), file=sys.stderr, flush=True)


def trained_embedded(folder: Path, steps: int) -> Any:
    """The package's own model after a short training run by the command line in `folder` / "run": a `TrainedRun`."""
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.core.plan import Plan
    from lowmem_ft.export.models import TrainedRun
    from tests.assets import ASSETS
    from tests.unit.export.runs import CPU

    config: dict[str, Any] = {
        "model": str(ASSETS / "doclm-7m"),
        "data": {"train": str(ASSETS / "whatis-train.jsonl"), "eval": str(ASSETS / "whatis-eval.jsonl"), "seq_len": 64},
        "adapter": {"rank": 8},
        "train": {"tokens_per_step": 512, "steps": steps, "lr": 4e-3, "eval_every": steps},
        "policy": {"micro_batch_tokens": 256, "activations": "keep", "compute_dtype": "float32"},
        "output": str(folder / "run"),
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "lowmem_ft", "train", str(file)], check=True, stdout=sys.stderr)
    plan = Plan.from_dict(json.loads((folder / "run" / "plan.json").read_text()))
    return TrainedRun(
        config=RunConfig.load(file), policy=plan.policy, adapter=folder / "run" / "adapter", device=CPU, scratch=folder
    )


def with_templates(folder: Path) -> Iterator[tuple[str, Path, Any, Path]]:
    """The chat templates that the tests have: (name, GGUF file of a tiny model with it, tokenizer, the base's folder).

    The next takes the file's place.
    """
    import torch
    from transformers import AutoTokenizer

    from lowmem_ft.export.gguf import write_gguf
    from lowmem_ft.export.weights import MergedWeights
    from tests.assets import ASSETS
    from tests.unit.data.test_templates import FOLDER, TEMPLATES
    from tests.unit.export.runs import trained
    from tests.unit.export.test_gguf import SIZES

    made = trained("llama", folder, model={**SIZES, "vocab_size": 4128})
    for name, known in TEMPLATES.items():
        if known.parts:  # of models with eyes, which GGUF has here no form for
            continue
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / "doclm-7m")
        tokenizer.add_special_tokens({"bos_token": known.bos, "eos_token": known.eos})
        tokenizer.add_tokens(known.special, special_tokens=True)
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
        tokenizer.save_pretrained(folder / "base")
        weights = MergedWeights(made.config, made.policy, made.adapter, dtype=torch.float32, stored=False)
        write_gguf(weights, "f16", folder / "model.gguf", name="measured")
        yield name, folder / "model.gguf", tokenizer, folder / "base"
