"""A config as a YAML file in which every key says what it is for. One table has the words; a test holds it against
the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from lowmem_ft.core.config import RunConfig

WIDTH = 40  # column in which comments begin, where the value leaves room

COMMENTS: Mapping[str, str] = {
    "model": "a folder, or a hub id",
    "quant": "how the frozen base weights are stored",
    "quant.bits": "4, 8, 16, or auto: the most that fit",
    "quant.type": "nf4 or fp4; of 4 bits only",
    "quant.double_quant": "scales in 8 bits, too; of 4 bits only",
    "adapter": "what is trained",
    "adapter.method": "lora, or peft: any method of the peft library",
    "adapter.rank": "a higher one can learn more, and takes more memory",
    "adapter.alpha": "the update is scaled by alpha / rank",
    "adapter.dropout": "share of the adapter's inputs that is dropped",
    "adapter.targets": "all-linear, or names of layers",
    "adapter.rslora": "scale by alpha / sqrt(rank)",
    "adapter.dora": "learn magnitude and direction apart",
    "adapter.init": "default, gaussian, or the folder of a saved adapter to go on from",
    "adapter.bias": "train biases: none, all or lora_only",
    "adapter.rank_pattern": "{name: rank} of layers with another rank",
    "adapter.alpha_pattern": "{name: alpha} of layers with another alpha",
    "adapter.layers": "indices of the blocks that get adapters; null: all",
    "adapter.train_modules": "modules that are trained whole, such as lm_head",
    "adapter.lora_plus_ratio": "learning rate of B over that of A (LoRA+); null: 1",
    "adapter.peft": "of method peft: {peft_type: IA3, ...}",
    "budget": "what the process may take",
    "budget.device": "auto, cpu, cuda, cuda:N, or a profile to plan for",
    "budget.memory": "of the device, such as 8GiB (on a CPU: RAM); null: what is free",
    "budget.host": "of RAM, beside a card; null: what is free",
    "budget.profile": "whose rates it has: here.yaml of `lowmem-ft profiles measure`; null: of a similar one",
    "data": "records, and how they become sequences",
    "data.train": "a file, a pattern, a saved dataset, a hub id, or a list of them",
    "data.eval": "held-out records, likewise, or a share of the training records: 0.05; null: none",
    "data.format": "auto, messages, sharegpt, alpaca, prompt_completion, text, chosen, preference, kto",
    "data.columns": "{role: column} where columns have other names",
    "data.invalid": "records that cannot be used: error or skip",
    "data.seq_len": "tokens of a row",
    "data.packing": "several examples in a row, which do not see each other",
    "data.assistant_only": "loss on answers only",
    "data.overlong": "examples longer than seq_len: truncate, drop or error",
    "data.order": "shuffled, or longest_first: finds out first whether memory suffices",
    "data.cache": "folder of tokenized data; auto: the user's; null: keep nothing",
    "train": "the optimization",
    "train.objective": "sft, or from preferences: dpo, ipo, orpo, simpo or kto",
    "train.tokens_per_step": "of one update, in as many micro-batches as are needed",
    "train.epochs": "passes over the data",
    "train.steps": "updates, in place of epochs",
    "train.lr": "learning rate at its highest",
    "train.schedule": "cosine, linear or constant",
    "train.warmup": "share of the steps, or from 1 on their number",
    "train.optimizer": "adamw, adamw8bit, paged_adamw or paged_adamw8bit",
    "train.weight_decay": "of the trained weights",
    "train.grad_clip": "largest norm of the gradient; null: any",
    "train.seed": "of initial weights, order and dropout",
    "train.eval_every": "steps",
    "train.save_every": "steps",
    "train.keep_best": "the adapter is that of the lowest eval loss",
    "train.max_time": "such as 3h: stop then with a checkpoint; null: no limit",
    "train.track": "metrics go to these too: tensorboard, wandb, mlflow",
    "preference": "how the objective learns from preferences; null: its own default",
    "preference.beta": "closeness to the reference; simpo: scale; orpo: weight of the odds",
    "preference.label_smoothing": "of dpo, simpo: share of pairs taken to be the wrong way round",
    "preference.gamma": "of simpo: margin between the rewards",
    "preference.desirable_weight": "of kto: of good answers in the loss",
    "preference.undesirable_weight": "of kto: of bad answers in the loss",
    "eval": "what an evaluation does beside the held-out loss",
    "eval.samples": "held-out prompts that are answered",
    "eval.max_new_tokens": "of each answer",
    "policy": "null leaves a decision to the planner",
    "policy.objective": "what to go for, never null: speed, context, batch or memory",
    "policy.resident_blocks": "blocks that stay on the device; the others are streamed",
    "policy.keep_blocks": "last blocks that keep their activations",
    "policy.activations": "keep, recompute or offload; beside keep_blocks of the other blocks",
    "policy.keep_attention": "blocks that recompute keep what attention gave",
    "policy.recompute_mlp_act": "blocks that keep run the activation function of their MLP again",
    "policy.micro_batch_tokens": "tokens of one forward pass",
    "policy.loss_chunk_tokens": "tokens whose logits exist at a time",
    "policy.stream_from": "host or disk",
    "policy.stream_embeddings": "none, input or both (the output head, too)",
    "policy.optimizer_on": "device or host",
    "policy.compute_dtype": "bfloat16, float16 or float32",
    "policy.mlp_tile_tokens": "tokens that MLPs work on at a time; 0: all",
    "policy.experts_together": "experts of a mixture whose products a card makes at once",
    "output": "the run's folder",
    "trust_remote_code": "run Python code that comes with the model",
    "cache": "folder for quantized weights, so that they load faster; null: none",
}


def commented_yaml(config: RunConfig) -> str:
    """Every key of `config` with its value and a comment; `RunConfig.load` reads it back equal."""
    return "\n".join(_lines(config, "", config.model_dump(mode="json"))) + "\n"


def _lines(section: BaseModel, prefix: str, values: Mapping[str, Any]) -> Iterator[str]:
    indent, below = "  " if prefix else "", False
    for name in type(section).model_fields:
        key, inner = f"{prefix}{name}", getattr(section, name)
        if not prefix and isinstance(inner, BaseModel):
            yield f"\n{name}:  # {COMMENTS[key]}"
            yield from _lines(inner, f"{name}.", values[name])
            below = True
        else:
            if below:
                yield ""
            below = False
            value = _size(values[name]) if key in ("budget.memory", "budget.host") else values[name]
            yield f"{indent}{_pair(name, value)}".ljust(WIDTH) + f"  # {COMMENTS[key]}"


def _size(value: int | None) -> int | str | None:
    """Bytes as people write them, where that says the same."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if value and value % (1 << power) == 0:
            return f"{value >> power}{unit}"
    return value


def _pair(name: str, value: Any) -> str:
    """`name: value` on one line. What YAML reads in a flow mapping it reads in a block mapping, too."""
    text: str = yaml.safe_dump(
        {name: value}, default_flow_style=True, width=1 << 30, allow_unicode=True, sort_keys=False
    )
    return text.strip()[1:-1]
