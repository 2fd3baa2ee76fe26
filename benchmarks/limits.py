"""How little memory is enough, how long a sequence fits, and what experts gain that work together: what plans predict
for models of 2B to 70B parameters.

For each model the smallest budget of the device at which a plan exists, its speed, and plans at several budgets; and
the longest sequence of the 8B model on cards of 8, 12 and 24 GB. Beside it stands what peers report on their pages.
Nothing here is measured on a card: these are predictions, the same that `lowmem-ft plan` makes.

    python benchmarks/limits.py --out benchmarks/results/limits.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

GIB = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "Qwen3-14B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "Qwen3-32B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "Llama-3-70B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072,
    },
    "Gemma-3n-E2B": {  # half of its bytes are embeddings of each layer
        "model_type": "gemma3n_text", "vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 30, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
        "num_kv_shared_layers": 10, "vocab_size_per_layer_input": 262144, "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
}  # fmt: skip
SEQ_LENS, BUDGETS_GIB = (256, 512), (4, 6, 8, 12, 16, 24)
CARD = "rtx-3090-24gb"  # with 24 GB and PCIe 4; smaller ones are played by the budget
CONTEXT_CARDS = {
    "rtx-4060-8gb": 32,
    "rtx-3060-12gb": 32,
    "rtx-4090-24gb": 32,
}  # and the rank, as the peer's figures have it
# Of mixtures, with a step of the default length: cards, and the longer sequences of one of them
MIXTURES = ("Qwen3-30B-A3B", "gpt-oss-20b")
MIXTURE_CARDS = {
    "rtx-3090-24gb": (2048,),
    "rtx-4090-24gb": (2048, 16384),
    "rtx-5090-32gb": (2048,),
    "h200-141gb": (2048,),
}
PEERS = {
    "Llama-3.1-8B, 512 tokens": "3.3 GB (Soup, RTX 3050 4 GB)",
    "Llama-3.1-8B, 256 tokens": "1.8 GB (Soup, embeddings and head streamed)",
    "Llama-3-70B, 512 tokens": "4.4 GB (Soup, 8 GB card, from NVMe)",
    "Llama-3.1-8B, longest": "8 GB 2,972; 12 GB 21,848; 24 GB 78,475 tokens (Unsloth, rank 32)",
}


def planned(model: Path, *, device: str, budget: int | None, seq_len: int, **sections: Any) -> dict[str, Any]:
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.planner.solver import make_plan

    limits: dict[str, Any] = {"device": device} if budget is None else {"device": device, "memory": budget}
    keys = {"model": str(model), "budget": limits, "data": {"seq_len": seq_len}, "train": {"tokens_per_step": seq_len}}
    start = time.perf_counter()
    plan = make_plan(RunConfig.from_dict({**keys, **sections}))
    return {
        "fits": plan.fits,
        "process_peak_bytes": plan.predicted.process_peak_bytes,
        "host_peak_bytes": plan.predicted.host_peak_bytes,
        "tokens_per_second": round(plan.predicted.tokens_per_second, 1),
        "seq_len": plan.run_config.data.seq_len,
        "policy": plan.policy.describe(),
        "planning_seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="the smallest budgets and the longest sequences, as plans predict them"
    )
    parser.add_argument("--models", nargs="*", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--seq-len", type=int, nargs="*", default=[*SEQ_LENS])
    parser.add_argument("--budgets", type=int, nargs="*", default=[*BUDGETS_GIB], help="GiB")
    parser.add_argument("--no-context", action="store_true", help="leave out the longest sequences")
    parser.add_argument("--no-mixtures", action="store_true", help="leave out mixtures on several cards")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    warnings.simplefilter("ignore")

    from lowmem_ft.planner.alloc_conf import prefer_expandable_segments

    prefer_expandable_segments()  # as the command line does

    import torch
    from transformers import AutoConfig

    found: list[dict[str, Any]] = []

    def add(what: str, plan: dict[str, Any]) -> None:
        found.append({"what": what, **plan})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="lowmem-ft-limits-") as name:
        mixtures = () if options.no_mixtures else MIXTURES
        for model in {*options.models, *mixtures, *([] if options.no_context else ["Llama-3.1-8B"])}:
            own = dict(SHAPES[model])
            kind = own.pop("model_type")
            config = AutoConfig.for_model(kind, dtype="bfloat16", **{"tie_word_embeddings": False, **own})
            config.save_pretrained(Path(name) / model)
        for model in options.models:
            for length in options.seq_len:
                least = planned(Path(name) / model, device=CARD, budget=1 << 20, seq_len=length)
                add(f"{model}, {length} tokens, the smallest", least)
            for budget in options.budgets:
                plan = planned(Path(name) / model, device=CARD, budget=budget * GIB, seq_len=max(options.seq_len))
                add(f"{model}, {max(options.seq_len)} tokens in {budget} GiB", plan)
        for card, rank in {} if options.no_context else CONTEXT_CARDS.items():
            for packing in (True, False):
                longest = {"adapter": {"rank": rank}, "policy": {"objective": "context"}}
                data = {"seq_len": 2048, "packing": packing}
                plan = planned(
                    Path(name) / "Llama-3.1-8B", device=card, budget=None, seq_len=2048, data=data, **longest
                )
                add(f"Llama-3.1-8B, rank {rank}, the longest on {card}, {'' if packing else 'not '}packed", plan)
        for model, card in itertools.product(mixtures, MIXTURE_CARDS):
            for length, together in itertools.product(MIXTURE_CARDS[card], (1, None)):
                step = {"train": {"tokens_per_step": 16384}, "policy": {"experts_together": together}}
                plan = planned(Path(name) / model, device=card, budget=None, seq_len=length, **step)
                add(f"{model}, {length} tokens on {card}, {'one by one' if together else 'as planned'}", plan)
    from common import leave, stamp  # beside this file, where scripts are run

    result = {
        **stamp(torch.get_num_threads()),
        "card": CARD,
        "measured": "nothing on a card: predictions",
        "peers": PEERS,
        "plans": found,
    }
    leave(result, options.out)


if __name__ == "__main__":
    main()
