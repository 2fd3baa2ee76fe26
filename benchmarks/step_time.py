"""Predicted seconds of a training step beside real ones, on the CPU of this machine.

The machine is measured (`profiles measure`), then models of 2M to 200M parameters with random weights are trained for a
few steps each, under settings and policies that a seed draws. The prediction reads no weights. A machine that others
share is not as fast at the end of a run as it was at its begin, so it is measured again after every few models.

    python benchmarks/step_time.py --out benchmarks/results/step_time.json
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
    "gpt_neox": {"model_type": "gpt_neox"},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
SECONDS = 6  # of steps of each configuration at least: others may take the machine for a second or two
WIDTHS = {256: (4, 704), 512: (6, 1408), 768: (8, 2048)}  # hidden size -> layers, inner size


def draw(generator: random.Random) -> dict[str, Any]:
    """One configuration: a model's shape and the settings of a run."""
    kind, hidden = generator.choice(sorted(KINDS)), generator.choice(sorted(WIDTHS))
    return {
        "kind": kind,
        "hidden": hidden,
        "vocab": generator.choice([8192, 32000]),
        "bits": generator.choice([4, 4, 8, 16]),
        "activations": generator.choice(["keep", "recompute", "offload"]),
        "resident": generator.choice([1.0, 1.0, 0.5, 0.0]),
        "tiled": generator.random() < 0.2,
        "seq_len": generator.choice([128, 256, 512]),
        "rows": generator.choice([1, 2, 4]),
        "rank": generator.choice([4, 16]),
        "dropout": generator.choice([0.0, 0.0, 0.1]),
        "dora": generator.random() < 0.2,
    }


def compare(drawn: dict[str, Any], folder: Path, profile: Path, steps: int) -> dict[str, Any]:
    """Predicted and measured seconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.data.examples import Example
    from lowmem_ft.data.packing import collate
    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.step import train_step

    layers, inner = WIDTHS[drawn["hidden"]]
    shape = {
        "hidden_size": drawn["hidden"], "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": drawn["hidden"] // 64, "num_key_value_heads": drawn["hidden"] // 64,
        "vocab_size": drawn["vocab"], "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    own = dict(KINDS[drawn["kind"]])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(own.pop("model_type"), **shape, **own))
    model.to(torch.bfloat16).save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    del model
    tokens = drawn["seq_len"] * drawn["rows"]
    config = RunConfig.from_dict(
        {
            "model": str(folder),
            "quant": {"bits": drawn["bits"]},
            "adapter": {name: drawn[name] for name in ("rank", "dropout", "dora")}
            | ({"dora": False} if drawn["kind"] == "mixtral" else {}),
            "data": {"seq_len": drawn["seq_len"]},
            "train": {"tokens_per_step": tokens},
            "policy": {
                "activations": drawn["activations"],
                "resident_blocks": int(layers * drawn["resident"]),
                "mlp_tile_tokens": tokens // 4 if drawn["tiled"] and drawn["kind"] != "mixtral" else 0,
                "micro_batch_tokens": tokens,
            },
        }
    )
    plan = make_plan(config, device=find_device(str(profile)))
    ready = assemble(config, plan.policy, torch.device("cpu"))
    generator, times = torch.Generator().manual_seed(0), []
    end = time.perf_counter() + SECONDS
    while len(times) <= steps or time.perf_counter() < end:
        ids = torch.randint(3, drawn["vocab"], (drawn["rows"], drawn["seq_len"]), generator=generator).tolist()
        half = drawn["seq_len"] // 2  # two documents in each row
        parts = [[Example(row[:half], row[:half]), Example(row[half:], row[half:])] for row in ids]
        batch = collate(parts, pad_id=0)
        start = time.perf_counter()
        train_step(ready, [batch], lr=1e-4)
        times.append(time.perf_counter() - start)
    measured = min(times[1:])  # as the profile's rates are the best of several, on machines that others share
    ratio = plan.predicted.step_seconds / measured
    return {
        **drawn,
        "parameters": parameters,
        "predicted": plan.predicted.step_seconds,
        "seconds": measured,
        "ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted step times beside real ones, on the CPU")
    parser.add_argument("--count", type=int, default=24, help="configurations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps at least, of which the fastest counts, after a first one"
    )
    parser.add_argument("--every", type=int, default=4, help="configurations after which the machine is measured again")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    from common import leave, on_cpu, stamp  # beside this file, where scripts are run

    on_cpu(options.threads)

    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.measure import measure
    from lowmem_ft.planner.profile import write_profile

    generator, found, rates = random.Random(options.seed), [], []
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-time-") as name:
        profile = Path(name) / "this.yaml"
        for index in range(options.count):
            if index % options.every == 0:
                measured = measure(find_device("cpu"))
                write_profile(measured, profile)
                rates.append({key: figure.value for key, figure in measured.figures().items()})
            found.append(compare(draw(generator), Path(name) / str(index), profile, options.steps))
            last = found[-1]
            print(
                f"{last['ratio']:6.2f}  {last['predicted']:7.3f} of {last['seconds']:7.3f} s  {last}",
                file=sys.stderr,
                flush=True,
            )
    off = sorted(abs(one["ratio"] - 1) for one in found)
    result = {
        **stamp(options.threads),
        "settings": {name: getattr(options, name) for name in ("count", "seed", "steps", "every")},
        "profiles": rates,
        "within_20_percent": sum(error <= 0.2 for error in off),
        "median_error": statistics.median(off),
        "largest_error": off[-1],
        "configurations": found,
    }
    leave(result, options.out)


if __name__ == "__main__":
    main()
