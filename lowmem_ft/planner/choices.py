"""What each decision of a policy may be: for one model, on one device, in one precision, with what is pinned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from lowmem_ft.adapters.inject import injection_of, is_injected
from lowmem_ft.adapters.peft_format import adapter_folder, read_adapter_config
from lowmem_ft.adapters.targets import is_inside
from lowmem_ft.core.config import BESIDE_INIT, Init, RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.plan import Policy
from lowmem_ft.core.positions import has_position_table, positions_of
from lowmem_ft.core.preference import WITH_REFERENCE, lanes, step_tokens
from lowmem_ft.data.isolation import ATTENTION
from lowmem_ft.planner.answer import host_budget
from lowmem_ft.planner.cost import Rates
from lowmem_ft.planner.device import Device, rates_of
from lowmem_ft.planner.served import without_gradient
from lowmem_ft.planner.weigh import Scales
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.quant.prequantized import stored_spec
from lowmem_ft.runtime import shelf
from lowmem_ft.runtime.blocks import causal_model, find_blocks
from lowmem_ft.runtime.ring import SLOTS
from lowmem_ft.runtime.vocabulary import Which, chosen, is_trained, refuse_trained

Place: TypeAlias = Literal["device", "host"]

LOSS_CHUNKS = (32, 128, 512)  # tokens; a larger one reads the head's weight less often, which saves no time any more
STREAMED_CHUNKS = (32, 512, 2048)  # but where the head comes up for each chunk; it keeps logits of one tile
MLP_TILES = (4096, 1024)  # tokens; each tile dequantizes the MLP's weights again, which takes less time with large ones
WORTH_TILES = 2  # tiles that a micro-batch has at least, as the sum of their gradients takes memory, too
# Of a micro-batch. A plan traces every chunk of the loss: it took 5 s of a CPU per million tokens, and memory alike
MOST_TOKENS = 1 << 21
TOGETHER = (16, 8, 4)  # experts; with more the calls that add up what each gives are most of all
WORTH_TOGETHER = 1 / 64  # of the budget that their slices may take; larger ones keep a card busy longer than calls do
# Of the time of a block's products. Plans of Llama-3.1-8B with 4096 tokens became 1% to 2% faster for three cards, with
# 2048 no faster, and take 0.3 s longer; with 128 experts 1.2 s
ATTENDING = 0.1


class Choices:
    """The values that decisions may take.

    Args:
        start: see `first_policy`.
        host: asked once for bytes that the host of a card holds anyway.

    Attributes:
        keep: numbers of blocks that may keep their activations, ascending.
        streams: numbers of blocks that may be streamed, ascending.
        levels: what of the embeddings may lie below the device, ascending.
    """

    def __init__(self, device: Device, start: Policy, scales: Scales, *, host: Callable[[], int]) -> None:
        self.device, self.scales = device, scales
        self._start, self._aside_host = start, host
        self.keep = self._keep_choices()
        _refuse_pins(self.config, device, scales.depth)
        self._refuse_length()
        self.streams = self._stream_choices()
        self.levels = self._level_choices()

    @property
    def config(self) -> RunConfig:
        """What is planned now: a search may go on with another sequence length."""
        return self.scales.stage.config

    def remarks(self) -> Iterator[str]:
        """What the config asks for without effect, and what it asks of the model that this was not made for."""
        config, pinned, ready = self.config, self.config.policy, self.scales.stage.ready
        if self.device.kind == "cpu" and pinned.optimizer_on == "host":
            yield "policy.optimizer_on: host has no effect on a CPU, where it is the device"
        if config.adapter.prompt_learning and pinned.activations in ("recompute", "offload"):
            given = f"policy.activations: {pinned.activations}"
            yield f"{given} has no effect on virtual tokens, whose blocks keep their activations"
        if config.adapter.prompt_learning and pinned.keep_blocks not in (None, self.scales.depth):
            yield f"policy.keep_blocks: {pinned.keep_blocks} has no effect on virtual tokens, all of whose blocks keep"
        if (tokens := pinned.micro_batch_tokens) is not None:
            taken = min(max(1, tokens // self._group) * self._group, step_tokens(config))
            if taken != tokens:
                yield f"policy.micro_batch_tokens: {tokens} is taken for {taken}, whole rows of a step"
        if config.adapter.init not in get_args(Init) and config.adapter.method == "lora":
            saved = read_adapter_config(adapter_folder(config.adapter.init))
            own = {"rank": saved.get("r"), "alpha": saved.get("lora_alpha")}
            differs = {
                it for it in own.keys() & config.adapter.model_fields_set if getattr(config.adapter, it) != own[it]
            }
            unread = sorted((config.adapter.changed() - own.keys() | differs) - BESIDE_INIT)
            if unread:
                yield f"adapter.{', adapter.'.join(unread)}: ignored, as {config.adapter.init} has its own"
        if config.adapter.init not in get_args(Init) and config.train.objective in WITH_REFERENCE:
            yield (
                f"the reference of {config.train.objective} is the base without the adapter that adapter.init names; "
                "merge that into the base first if the reference shall have it"
            )
        silent = without_gradient(ready.trainable, self.scales.stage.learning)
        if silent is not None:
            yield silent
        if stored_spec(self.scales.stage.checkpoint) is not None:
            start, asked = self._start, config.quant
            has = {"bits": start.bits, "type": start.quant, "double_quant": start.double_quant}
            for name, value in asked.model_dump(include=asked.model_fields_set).items():
                if value not in (has[name], "auto"):
                    yield f"quant.{name}: {value} has no effect on a checkpoint that is quantized already"
        if pinned.mlp_tile_tokens and not len(ready.mlps):
            yield "policy.mlp_tile_tokens has no effect on a model without plain MLPs"
        if pinned.recompute_mlp_act and not len(ready.mlps):
            yield "policy.recompute_mlp_act has no effect on a model without plain MLPs"
        if (pinned.experts_together or 1) > 1 and not len(ready.experts):
            yield "policy.experts_together has no effect on a model without experts"
        if pinned.keep_attention and not self.attends:
            yield "policy.keep_attention has no effect on this model, whose attention is its own"
        level = pinned.stream_embeddings or "none"
        if level != "none" and not chosen(ready.below.matrices, level):
            yield f"policy.stream_embeddings: {level} has no effect on this model"
        if self._too_long:
            yield (
                f"data.seq_len: {config.data.seq_len} is more than the {self.scales.longest} positions that the model "
                "was made for: of what lies behind them it may make no sense"
            )

    @property
    def _group(self) -> int:
        """Tokens of the rows that belong together, which are the smallest micro-batch."""
        return lanes(self.config) * self.config.data.seq_len

    @property
    def _too_long(self) -> bool:
        known = positions_of(causal_model(self.scales.stage.ready.model).config)
        return known is not None and self.config.data.seq_len > known

    def _refuse_length(self) -> None:
        """Of sequences: what the model has no positions for."""
        if self._too_long and has_position_table(causal_model(self.scales.stage.ready.model)):
            raise ConfigError(
                "The model has no positions for sequences so long.",
                given=f"data.seq_len: {self.config.data.seq_len}",
                allowed=f"at most {self.scales.longest}",
                fix=f"set data.seq_len: {self.scales.longest}",
            )

    def _keep_choices(self) -> Sequence[int]:
        pinned, depth = self.config.policy, self.scales.depth
        if self.config.adapter.prompt_learning or pinned.activations == "keep":
            return (depth,)
        if pinned.keep_blocks is None:
            return range(depth + 1) if pinned.activations is None else (0,)
        return (pinned.keep_blocks,)

    def offloads(self, policy: Policy, keep: int) -> tuple[int, ...]:
        """Numbers of blocks that may offload where `keep` keep, ascending: none, or all others. Fewer would not be
        faster, as copies hide behind the work of all but tiny blocks, and so few as come up at once save nothing."""
        rest, pinned = self.scales.depth - keep, self.config.policy.activations
        if pinned is not None:
            return (rest if pinned == "offload" else 0,)
        below = self.scales.inputs_stored(replace(policy, offload_blocks=rest)) + self.scales.optimizer_stored(policy)
        return (0, rest) if rest > shelf.SLOTS and self._has_room(below) else (0,)

    @property
    def attends(self) -> bool:
        """Whether the model's attention is ours, whose results can be kept."""
        return self.scales.stage.ready.attn_implementation == ATTENTION

    @cached_property
    def _rates(self) -> Rates:
        """Read from a file, once for all lengths."""
        return rates_of(self.device)

    def attentions(self) -> tuple[bool, ...]:
        """Whether blocks that recompute may keep what attention gave: where attending takes a part of their time."""
        pinned, stage = self.config.policy.keep_attention, self.scales.stage
        if pinned is not None or not self.attends or self.keep[0] == self.scales.depth:
            return (bool(pinned) and self.attends,)
        text, block = causal_model(stage.ready.model).config.get_text_config(), stage.blocks[-1]
        text = text.per_layer_config[-1]  # Gemma 4's layers have heads of different sizes
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rates = self._rates
        attending = self.config.data.seq_len * text.num_attention_heads * size / rates.attention_forward
        products = products_of(block, text) / rates.of_products(getattr(torch, self._start.compute_dtype))
        return (False, True) if attending >= ATTENDING * products else (False,)

    @property
    def recomputes_act(self) -> bool:
        """Whether MLPs may run their activation function again, which costs next to nothing."""
        return self.config.policy.recompute_mlp_act is not False and len(self.scales.stage.ready.mlps) > 0

    def chunks(self, policy: Policy) -> list[int]:
        """Of the loss, with micro-batch and embeddings of `policy`, ascending."""
        pinned, tokens = self.config.policy.loss_chunk_tokens, policy.micro_batch_tokens
        choices = STREAMED_CHUNKS if self.scales.stage.streams_head(policy) else LOSS_CHUNKS
        return [min(pinned, tokens)] if pinned else sorted({min(chunk, tokens) for chunk in choices})

    def tiles(self, policy: Policy) -> tuple[int, ...]:
        """Tokens that MLPs may work on at once in a micro-batch of `policy`, descending; 0, which is all, first."""
        pinned, mlps = self.config.policy.mlp_tile_tokens, len(self.scales.stage.ready.mlps)
        if pinned is not None:
            return (pinned if mlps else 0,)
        small = [tile for tile in MLP_TILES if mlps and WORTH_TILES * tile <= policy.micro_batch_tokens]
        return (0, *small)

    def togethers(self, budget: int) -> tuple[int, ...]:
        """How many experts' products may be made at once: one, or the most that are worth it."""
        pinned, experts = self.config.policy.experts_together, self.scales.stage.ready.experts
        if pinned is not None:
            return (min(pinned, experts.count) if len(experts) else 1,)
        if self.device.kind == "cpu" or not len(experts):  # a CPU makes them one after the other
            return (1,)
        size = experts.slice_values * getattr(torch, self._start.compute_dtype).itemsize
        worth = (it for it in TOGETHER if it <= experts.count and it * size <= WORTH_TOGETHER * budget)
        return (1, *islice(worth, 1))

    def _stream_choices(self) -> Sequence[int]:
        """Numbers of streamed blocks, ascending. So few that the slots are as large as they save nothing."""
        depth, pinned = self.scales.depth, self.config.policy.resident_blocks
        if pinned is not None:
            return (depth - pinned,)
        if _trains_matrices(self.scales.stage.ready.model):
            return (0,)
        return (0, *range(SLOTS + 1, depth + 1))

    def _level_choices(self) -> Sequence[Which]:
        """What of the embeddings may lie below the device, ascending: what saves memory there, and is not trained."""
        ready, pinned = self.scales.stage.ready, self.config.policy.stream_embeddings
        matrices = ready.below.matrices
        if pinned is not None:
            refuse_trained(ready.model, below := chosen(matrices, pinned))
            return (pinned if below else "none",)
        levels: list[Which] = ["none"]
        for level in ("input", "both"):
            more = [it for it in chosen(matrices, level) if it not in chosen(matrices, levels[-1])]
            saved = sum(it.nbytes - sum(it.slots) for it in more)
            if more and saved > 0 and not any(is_trained(ready.model, it) for it in more):
                levels.append(level)
        return levels

    @cached_property
    def most_saved(self) -> int:
        """The number of streamed blocks that saves the most memory."""
        start = self._start
        return max(self.streams, key=lambda count: self.scales.moved(replace(start, streamed_blocks=count)).saved)

    @cached_property
    def optimizers(self) -> tuple[Place, ...]:
        """Where the optimizer may lie, the first place first: on the host updates are slow, and gradients go there."""
        pinned, host = self.config.policy.optimizer_on, replace(self._start, optimizer_on="host")
        if self.device.kind == "cpu":
            return ("device",)  # which is the host
        if pinned is not None:
            return (pinned,)
        paged = self._start.optimizer.startswith("paged")
        return ("device",) if paged or not self._has_room(self.scales.optimizer_stored(host)) else ("device", "host")

    def blocks(self, policy: Policy, keep: int, *, streamed: int, offload: int = 0) -> Policy:
        depth = self.scales.depth
        chosen = replace(
            policy, resident_blocks=depth - streamed, streamed_blocks=streamed, keep_blocks=keep,
            recompute_blocks=depth - keep - offload, offload_blocks=offload,
        )  # fmt: skip
        tier = self._tier(chosen)
        return chosen if chosen.stream_from == tier else replace(chosen, stream_from=tier)

    def _tier(self, policy: Policy) -> Literal["host", "disk"]:
        """Where streamed weights lie: on the host, unless that is the device, or has no room for them."""
        pinned = self.config.policy.stream_from
        if not policy.streams or pinned is not None:
            return pinned or "host"
        below = self.scales.moved(policy).stored + self.scales.inputs_stored(policy)
        below += self.scales.optimizer_stored(policy)
        return "host" if self.device.kind != "cpu" and self._has_room(below) else "disk"

    def _has_room(self, nbytes: int) -> bool:
        """Whether the host of a card has so many bytes for what lies below the device; a CPU's disk is taken to."""
        allowed = host_budget(self.config, self.device)
        if self.device.kind == "cpu" or not allowed:
            return True
        return self.device.host_process_bytes + self._aside_host() + nbytes <= allowed


def products_of(block: nn.Module, text: Any) -> int:
    """How many numbers a block multiplies by for a token, with as many experts as the config `text` has for one."""
    linear = sum(it.in_features * it.out_features for it in block.modules() if isinstance(it, nn.Linear))
    stacks = [it.shape for it in block.modules() if isinstance(it, QuantStack)]
    stacks += [it.shape for it in block.parameters() if it.ndim == 3 and not it.requires_grad]
    active = getattr(text, "num_experts_per_tok", None) or 1
    return linear + active * sum(rows * columns for _, rows, columns in stacks)


def first_policy(config: RunConfig, device: Device, bits: Literal[4, 8, 16]) -> Policy:
    """What all policies of one precision have in common, with as few rows in a micro-batch as there can be."""
    names: dict[int, Literal["nf4", "fp4", "int8", "none"]] = {4: config.quant.type, 8: "int8", 16: "none"}
    return Policy(
        bits=bits,
        quant=names[bits],
        double_quant=config.quant.double_quant and bits == 4,
        compute_dtype=config.policy.compute_dtype or device.compute_dtype,
        micro_batch_tokens=lanes(config) * config.data.seq_len,
        accumulation=1,
        resident_blocks=0,
        streamed_blocks=0,
        stream_from="host",
        keep_blocks=0,
        recompute_blocks=0,
        offload_blocks=0,
        optimizer=config.train.optimizer,
        loss_chunk_tokens=1,
        keep_attention=bool(config.policy.keep_attention),
    )


def as_stored(policy: Policy, stored: QuantSpec | None) -> Policy:
    """`policy` for a checkpoint that is quantized already and stays as it is `stored`, if it is."""
    if stored is None:
        return policy
    return replace(policy, bits=stored.bits, quant=stored.kind, double_quant=stored.double_quant and stored.bits == 4)


def refuse_sizes(config: RunConfig) -> None:
    """Of micro-batches: what is too large to be planned."""
    pinned, shortest = config.policy.micro_batch_tokens or 0, lanes(config) * config.data.seq_len
    if max(pinned, shortest) > MOST_TOKENS:
        key = "data.seq_len" if shortest > MOST_TOKENS else "policy.micro_batch_tokens"
        raise ConfigError(
            "Micro-batches of so many tokens cannot be planned.",
            given=f"{key}: {config.data.seq_len if shortest > MOST_TOKENS else pinned}",
            allowed=f"at most {MOST_TOKENS // (lanes(config) if shortest > MOST_TOKENS else 1)}",
            fix=f"set a smaller {key}",
        )


def groups_of(count: int, most: int) -> list[int]:
    """How large the groups may be into which `count` is divided as evenly as can be: each ceil(count / n) up to `most`,
    ascending, but those that are within 2% of a smaller one."""
    found, times = {1}, math.ceil(count / most)
    while times < count:
        whole = (count - 1) // times
        found.add(whole + 1)
        times = (count - 1) // whole + 1  # the next number of groups with which they are smaller
    apart: list[int] = []
    for size in sorted(found):
        if not apart or size > 1.02 * apart[-1]:
            apart.append(size)
    return apart


def replace_rows(policy: Policy, rows: int, seq_len: int, tokens: int) -> Policy:
    """`policy` in micro-batches of so many rows, as many as a step of `tokens` needs."""
    return replace(policy, micro_batch_tokens=rows * seq_len, accumulation=math.ceil(tokens / (rows * seq_len)))


def _trains_matrices(model: Any) -> bool:
    """Whether matrices of blocks are trained whole, which keeps them on the device."""
    whole = injection_of(model).trained_modules if is_injected(model) else []
    inside = f"{find_blocks(model)[0]}."
    trained = [n for n, it in model.named_parameters() if it.requires_grad and it.ndim > 1 and n.startswith(inside)]
    return any("modules_to_save" in name.split(".") or is_inside(name, whole) for name in trained)


def _refuse_pins(config: RunConfig, device: Device, depth: int) -> None:
    """Of a policy what this model or device does not have."""
    policy = config.policy
    for name, count in (("resident_blocks", policy.resident_blocks), ("keep_blocks", policy.keep_blocks)):
        if count is not None and count > depth:
            raise ConfigError("There are not so many blocks.", given=f"policy.{name}: {count}", allowed=f"0 to {depth}")
    if policy.activations == "keep" and policy.keep_blocks not in (None, depth) and not config.adapter.prompt_learning:
        raise ConfigError(
            "Two pins of the policy say different things.",
            given=f"policy.activations: keep, which concerns all blocks, and policy.keep_blocks: {policy.keep_blocks}",
            allowed=f"policy.keep_blocks: {depth}",
            fix="leave one of them out; keep_blocks alone has the other blocks recompute or offload",
        )
    least, pinned = lanes(config) * config.data.seq_len, policy.micro_batch_tokens
    if pinned is not None and pinned < least and policy.objective != "context":  # which chooses data.seq_len
        rows = "data.seq_len" if lanes(config) == 1 else "two rows of data.seq_len, for a pair"
        raise ConfigError(
            "A micro-batch holds whole rows.",
            given=f"policy.micro_batch_tokens: {pinned}",
            allowed=f"{least} ({rows}), or a multiple of it",
            fix=f"set policy.micro_batch_tokens: {least}, or a smaller data.seq_len",
        )
    if policy.stream_from == "host" and device.kind == "cpu":
        raise ConfigError(
            "On a CPU the host is the device: blocks are streamed from disk.",
            given="policy.stream_from: host",
            allowed="disk",
            fix="remove policy.stream_from",
        )
