"""Draws configurations for tests and benchmarks of the planner, and compares simulated with real steps.

What is drawn follows from the generator alone: architectures x bits x adapter method and its options x sequence length
x micro-batch x accumulation x compute dtype x activations x kept attention x optimizer x packing x loss chunk x
streamed blocks and embeddings x tiles of MLPs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.core.preference import lanes
from lowmem_ft.data.examples import Example
from lowmem_ft.data.packing import ROW_MULTIPLE, Batch, collate
from lowmem_ft.data.pairs import preferences_of
from lowmem_ft.planner.simulate import simulate
from lowmem_ft.planner.verify import FullBatches, judged, measured_eval_peak, measured_train_peak
from tests.models import MOE_ARCHITECTURES, save_tiny

PROJECTED = [  # whose attention has q_proj and v_proj
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "cohere", "granite", "starcoder2", "stablelm",
    "smollm3",
]  # fmt: skip
DENSE = [*PROJECTED, "phi3", "phi", "gpt2", "gpt_neox", "gptj", "gpt_neo", "opt", "falcon", "glm4", "bloom", "mpt"]
MIXTURES = sorted(MOE_ARCHITECTURES)
ATTENTION = ["q_proj", "v_proj"]
PACKED_STEPS = 10  # where rows are as long and as many in each
PEFT: list[dict[str, Any]] = [
    {"peft_type": "IA3", "target_modules": ATTENTION, "feedforward_modules": []},
    {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj"]},
    {"peft_type": "LOHA", "r": 4, "target_modules": ATTENTION},
    {"peft_type": "LOKR", "r": 4, "target_modules": ATTENTION},
    {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ATTENTION},
    {"peft_type": "BOFT", "boft_block_size": 4, "target_modules": ["q_proj"]},
    {"peft_type": "LN_TUNING", "target_modules": ["norm"]},
    {"peft_type": "LORA", "r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 16},
]


def draw(
    generator: random.Random,
    shape: tuple[int, int, int, int] = (48, 80, 2, 131),
    lengths: tuple[int, int, int] = (128, 200, 256),
    togethers: Sequence[int] = (1,),
) -> dict[str, Any]:
    """An architecture, its size (hidden, inner, blocks, vocabulary) and the sections of a config.

    Args:
        lengths: of sequences, of which one is drawn.
        togethers: numbers of experts that may work together.
    """
    pick = generator.choice
    name = pick(DENSE * 2 + MIXTURES)
    length, rows, batches = pick(lengths), pick([1, 2, 3, 4]), pick([1, 1, 2])
    adapter = _adapter(generator, name, shape[2])
    prompted = adapter.get("peft", {}).get("num_virtual_tokens") is not None
    keep = pick([0, shape[2], generator.randrange(shape[2] + 1)])
    offload = not prompted and pick([True, False, False])
    bits = pick([4, 4, 8, 16])
    trains_head = "train_modules" in adapter or "modules_to_save" in adapter.get("peft", {})
    embeddings = "none" if trains_head else pick(["none", "none", "input", "both"])
    # drawn apart, so that everything else is what it was before there were tiles
    tile = random.Random(f"{name} {length} {rows} {keep}").choice([0, 48, 100])
    together = random.Random(f"{name} {length} {rows} {keep} together").choice(togethers) if name in MIXTURES else 1
    act = name in DENSE and random.Random(f"{name} {length} {rows} {keep} act").choice([True, False])
    quant = {"bits": bits, **({"type": pick(["nf4", "fp4"]), "double_quant": pick([True, False])} if bits == 4 else {})}
    return {
        "architecture": name,
        "shape": shape,
        "positions": 2 * max(lengths),
        "sections": {
            "quant": quant,
            "adapter": adapter,
            "data": {"seq_len": length, "packing": pick([True, False]) and not prompted and name != "bloom"},
            "train": {
                "tokens_per_step": length * rows * batches,
                "optimizer": pick(["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]),
            },
            "policy": {
                "compute_dtype": pick(["bfloat16", "bfloat16", "bfloat16", "float32", "float16"]),
                "micro_batch_tokens": length * rows,
                "keep_blocks": shape[2] if prompted else keep,
                **({"activations": "offload"} if offload else {}),
                "keep_attention": pick([True, False]),
                "resident_blocks": pick([shape[2], shape[2], generator.randrange(shape[2] + 1)]),
                "loss_chunk_tokens": pick([16, 64, 256]),
                "stream_embeddings": embeddings,
                "mlp_tile_tokens": tile,
                **({"recompute_mlp_act": True} if act else {}),
                **({"experts_together": together} if together > 1 else {}),
            },
        },
    }


def preferring(drawn: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """What was drawn, with an objective that learns from preferences; a pair takes two rows."""
    sections = {name: dict(section) for name, section in drawn["sections"].items()}
    adapter = sections["adapter"]
    in_place = "train_modules" in adapter or adapter.get("bias", "none") != "none"
    in_place |= "modules_to_save" in adapter.get("peft", {})
    objective = generator.choice(["orpo", "simpo", *(() if in_place else ("dpo", "ipo", "kto"))])
    if objective != "kto":
        sections["train"]["tokens_per_step"] *= 2
        sections["policy"]["micro_batch_tokens"] *= 2
    if objective == "orpo":
        sections["data"]["assistant_only"] = generator.choice([True, False])
    sections["train"]["objective"] = objective
    return {**drawn, "sections": sections}


def _adapter(generator: random.Random, name: str, blocks: int) -> dict[str, Any]:
    """LoRA with one of its options, or a method of the peft library where it finds the names that it needs."""
    if name in PROJECTED and generator.random() < 0.3:
        return {"method": "peft", "peft": generator.choice(PEFT)}
    settings: dict[str, Any] = {
        "rank": generator.choice([2, 8, 16]), "dropout": generator.choice([0.0, 0.0, 0.1])
    }  # fmt: skip
    options: list[dict[str, Any]] = [{}, {"rslora": True}, {"lora_plus_ratio": 4.0}, {"layers": [blocks - 1]}]
    if name in DENSE:
        options += [{"dora": True}, {"bias": "lora_only"}, {"bias": "all"}]
    if name in PROJECTED:
        options += [{"targets": ATTENTION}, {"train_modules": ["lm_head"]}, {"rank_pattern": {"q_proj": 4}}]
    return settings | generator.choice(options)


_HEADS = {"bloom": "n_head", "gpt_neo": "num_heads"}


def settings_of(drawn: dict[str, Any]) -> dict[str, Any]:
    """Of `tests.models.tiny_config`, for what was drawn."""
    name, positions = drawn["architecture"], drawn["positions"]
    return {"max_position_embeddings": positions, **sizes_of(name, drawn["shape"], positions)}


def prepared(drawn: dict[str, Any], folder: Path, *, device: str = "cpu") -> tuple[RunConfig, Policy]:
    """What was drawn as a config, whose model lies in `folder` (its weights drawn on `device`, for speed), and as the
    policy that it pins."""
    name, settings = drawn["architecture"], settings_of(drawn)
    key = hashlib.sha256(json.dumps([name, settings]).encode()).hexdigest()[:12]
    if not (folder / key).exists():
        save_tiny(name, folder / key, device=device, **settings)
    config = RunConfig.from_dict({"model": str(folder / key), "output": str(folder / "run"), **drawn["sections"]})
    return config, policy_of(config, drawn["shape"][2])


def compare(drawn: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What was drawn, with simulated / measured - 1 of a training and an evaluation step."""
    config, policy = prepared(drawn, folder)
    batches = FullBatches(config, policy, vocabulary=100)
    simulated = simulate(config, policy, kind="cpu", loss_tokens=batches[0].loss_tokens)
    train, evaluation = measured_train_peak(config, policy, batches), measured_eval_peak(config, policy, batches)
    return {
        **drawn,
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "train_bytes": train,
        "train_error": simulated.train_peak / train - 1,
        "eval_bytes": evaluation,
        "eval_error": simulated.eval_peak / evaluation - 1,
    }


def of_every_length(config: RunConfig, policy: Policy) -> Iterator[list[Batch]]:
    """Steps of random tokens: without packing micro-batches have rows of all lengths, in any order, as many as fit, and
    as few as there may be in the last one of a step; those of a long run have all that in the end. The last step is a
    full one, which takes the most beside all that the others have left."""
    together, longest, preferences = lanes(config), config.data.seq_len, preferences_of(config)
    generator, most = random.Random(0), policy.micro_batch_tokens
    lengths = list(range(ROW_MULTIPLE, longest + 1, ROW_MULTIPLE))
    generator.shuffle(lengths)
    lengths = PACKED_STEPS * policy.accumulation * [longest] if config.data.packing else lengths

    def full(length: int) -> tuple[int, int]:
        return length, max(1, most // (together * length)) * together

    sizes = [full(length) for length in lengths]
    sizes += [] if config.data.packing else [(length, together) for length in lengths]
    sizes += policy.accumulation * [full(longest)]

    def document(length: int) -> list[Example]:
        ids = generator.choices(range(3, 100), k=length)
        return [Example(ids, ids)]

    def batch(length: int, rows: int) -> Batch:
        documents = [document(length) for _ in range(rows)]
        if preferences is None:
            return collate(documents, pad_id=0)
        return preferences.collate(judged(documents, preferences.lanes), pad_id=0, length=None)

    for start in range(0, len(sizes), policy.accumulation):
        yield [batch(*size) for size in sizes[start : start + policy.accumulation]]


def sizes_of(name: str, shape: tuple[int, int, int, int], positions: int = 512) -> dict[str, Any]:
    """Settings of `tests.models.tiny_config` that give architecture `name` this shape; heads of at most 128."""
    hidden, inner, blocks, vocabulary = shape
    heads = max(4, hidden // 128)
    if name in ("gpt2", "gptj"):
        own = {"n_embd": hidden, "n_layer": blocks, "n_positions": positions, "vocab_size": vocabulary}
        return own | ({"n_head": heads} if heads > 4 else {})
    if name == "mpt":
        own = {"d_model": hidden, "n_layers": blocks, "max_seq_len": positions, "vocab_size": vocabulary}
        return own | ({"n_heads": heads} if heads > 4 else {})
    found = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks, "vocab_size": vocabulary}
    if name in ("gemma2", "gemma3", "mistral", "qwen3", "qwen3_moe", "glm4", "gpt_oss"):
        found["head_dim"] = hidden // heads
    if heads > 4:
        found[_HEADS.get(name, "num_attention_heads")] = heads
        if name == "deepseek_v3":  # whose query heads share no keys
            found["num_key_value_heads"] = heads
    if name == "opt":
        found |= {"ffn_dim": inner, "word_embed_proj_dim": hidden}
    if name == "gpt_neo":
        types = [[["global", "local"], blocks // 2], [["global"], blocks % 2]]
        return found | {"num_layers": blocks, "attention_types": types}
    return found | {"n_layer": blocks} if name == "bloom" else found


def policy_of(config: RunConfig, blocks: int) -> Policy:
    """The policy that a config pins for a CPU, or for a card whose host has room."""
    bits, keep, resident = config.quant.bits, config.policy.keep_blocks, config.policy.resident_blocks
    assert bits != "auto"
    if keep is None:
        keep = blocks if config.policy.activations == "keep" else 0
    offload = blocks - keep if config.policy.activations == "offload" else 0
    resident = blocks if resident is None else resident
    tokens, chunk = config.policy.micro_batch_tokens, config.policy.loss_chunk_tokens
    assert tokens is not None
    assert chunk is not None
    names: dict[int, Any] = {4: config.quant.type, 8: "int8", 16: "none"}
    return Policy(
        bits=bits, quant=names[bits], double_quant=config.quant.double_quant and bits == 4,
        compute_dtype=config.policy.compute_dtype or "bfloat16", micro_batch_tokens=tokens,
        accumulation=config.train.tokens_per_step // tokens, resident_blocks=resident,
        streamed_blocks=blocks - resident, stream_from="host", keep_blocks=keep,
        recompute_blocks=blocks - keep - offload, offload_blocks=offload,
        optimizer=config.train.optimizer, loss_chunk_tokens=min(chunk, tokens),
        stream_embeddings=config.policy.stream_embeddings or "none",
        keep_attention=bool(config.policy.keep_attention),
        mlp_tile_tokens=config.policy.mlp_tile_tokens or 0,
        experts_together=config.policy.experts_together or 1,
        recompute_mlp_act=bool(config.policy.recompute_mlp_act),
    )  # fmt: skip


def describe(one: dict[str, Any]) -> str:
    """One line for a table of errors."""
    return f"{one['train_error']:+.3%} {one['eval_error']:+.3%} {one['architecture']} {json.dumps(one['sections'])}"
