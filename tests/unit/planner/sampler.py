"""Draws configurations for tests and benchmarks of the planner, and compares simulated with real steps.

What is drawn follows from the generator alone: architectures x bits x rank x targets x sequence length x micro-batch x
activations x optimizer x packing x loss chunk.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.planner.simulate import simulate
from lowmem_ft.planner.verify import full_batches, measured_eval_peak, measured_train_peak
from tests.models import save_tiny

DENSE = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "opt", "falcon", "stablelm", "olmo2",
    "cohere", "granite", "starcoder2", "phi", "glm4", "smollm3",
]  # fmt: skip
MIXTURES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "olmoe"]


def draw(generator: random.Random, shape: tuple[int, int, int, int] = (48, 80, 2, 131)) -> dict[str, Any]:
    """An architecture, its size (hidden, inner, blocks, vocabulary) and the sections of a config."""
    name = generator.choice(DENSE * 2 + MIXTURES)
    length, rows = generator.choice([128, 200, 256]), generator.choice([1, 2, 3, 4])
    adapter: dict[str, Any] = {"rank": generator.choice([2, 8, 16]), "dropout": generator.choice([0.0, 0.0, 0.1])}
    adapter |= generator.choice([{}, {}, {"rslora": True}, {"dora": True}] if name in DENSE else [{}])
    if name in ("llama", "qwen2", "mistral", "qwen3") and generator.random() < 0.3:
        adapter["targets"] = ["q_proj", "v_proj"]
    bits = generator.choice([4, 4, 8, 16])
    return {
        "architecture": name,
        "shape": shape,
        "sections": {
            "quant": {"bits": bits, **({"double_quant": generator.choice([True, False])} if bits == 4 else {})},
            "adapter": adapter,
            "data": {"seq_len": length, "packing": generator.choice([True, False])},
            "train": {"tokens_per_step": length * rows, "optimizer": generator.choice(["adamw", "adamw8bit"])},
            "policy": {
                "activations": generator.choice(["keep", "recompute"]),
                "micro_batch_tokens": length * rows,
                "loss_chunk_tokens": generator.choice([16, 64, 256]),
            },
        },
    }


def compare(drawn: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What was drawn, with simulated / measured - 1 of a training and an evaluation step."""
    hidden, inner, blocks, vocabulary = drawn["shape"]
    name = drawn["architecture"]
    key = hashlib.sha256(json.dumps([name, drawn["shape"]]).encode()).hexdigest()[:12]
    if not (folder / key).exists():
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks}
        own = {"head_dim": hidden // 4} if name in ("gemma2", "gemma3", "mistral", "qwen3", "qwen3_moe", "glm4") else {}
        own |= {"ffn_dim": inner, "word_embed_proj_dim": hidden} if name == "opt" else {}
        save_tiny(name, folder / key, vocab_size=vocabulary, max_position_embeddings=512, **{**sizes, **own})
    config = RunConfig.from_dict({"model": str(folder / key), **drawn["sections"]})
    policy = policy_of(config, blocks)
    batches = full_batches(config, policy, vocabulary=100)
    simulated = simulate(config, policy, kind="cpu", loss_tokens=batches[0].loss_tokens)
    train, evaluation = measured_train_peak(config, policy, batches), measured_eval_peak(config, policy, batches[0])
    return {
        **drawn,
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "train_bytes": train,
        "train_error": simulated.train_peak / train - 1,
        "eval_bytes": evaluation,
        "eval_error": simulated.eval_peak / evaluation - 1,
    }


def policy_of(config: RunConfig, blocks: int) -> Policy:
    """The policy that a config pins, in one micro-batch."""
    bits = config.quant.bits
    assert bits != "auto"
    keep = blocks if config.policy.activations == "keep" else 0
    tokens, chunk = config.policy.micro_batch_tokens, config.policy.loss_chunk_tokens
    assert tokens is not None
    assert chunk is not None
    names: dict[int, Any] = {4: config.quant.type, 8: "int8", 16: "none"}
    return Policy(
        bits=bits, quant=names[bits], double_quant=config.quant.double_quant and bits == 4,
        compute_dtype="bfloat16", micro_batch_tokens=tokens, accumulation=1, resident_blocks=blocks,
        streamed_blocks=0, stream_from="host", keep_blocks=keep, recompute_blocks=blocks - keep, offload_blocks=0,
        optimizer=config.train.optimizer, loss_chunk_tokens=min(chunk, tokens),
    )  # fmt: skip


def describe(one: dict[str, Any]) -> str:
    """One line for a table of errors."""
    return f"{one['train_error']:+.3%} {one['eval_error']:+.3%} {one['architecture']} {json.dumps(one['sections'])}"
