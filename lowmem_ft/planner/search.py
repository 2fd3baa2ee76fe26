"""The policies of one precision: which there are, what they take by an estimate, and the best within a budget."""

from __future__ import annotations

import itertools
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import nn

from lowmem_ft.adapters.inject import injection_of, is_injected
from lowmem_ft.adapters.targets import is_inside
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.isolation import ATTENTION
from lowmem_ft.planner.answer import Answer, Option, host_budget
from lowmem_ft.planner.device import Device, cost_of, links_of
from lowmem_ft.planner.phases import OF_A_RUN, Aside, Base
from lowmem_ft.planner.reserve import process_estimate, process_peak
from lowmem_ft.planner.scratch_cuda import Card
from lowmem_ft.planner.weigh import Scales, Weighed
from lowmem_ft.runtime import shelf
from lowmem_ft.runtime.blocks import causal_model, find_blocks
from lowmem_ft.runtime.loss import scratch_bytes
from lowmem_ft.runtime.ring import SLOTS
from lowmem_ft.runtime.vocabulary import Which, chosen, is_trained, refuse_trained

Place: TypeAlias = Literal["device", "host"]

LOSS_CHUNKS = (32, 128, 512)  # tokens; a larger one reads the head's weight less often, which saves no time any more
STREAMED_CHUNKS = (32, 512, 2048)  # but where the head comes up for each chunk; it keeps logits of one tile
MLP_TILES = (4096, 1024)  # tokens; each tile dequantizes the MLP's weights again, which takes less time with large ones
_WORTH_TILES = 2  # tiles that a micro-batch has at least, as the sum of their gradients takes memory, too
NEAR = 1.02  # estimates this much above the budget are weighed too
TRIES = 32  # policies that are weighed exactly before the smallest is taken
WORTH_COPIES = 1.02  # how many times faster a policy must be that copies what another one leaves on the device
# Estimates of a card's bytes may be too low by so much: then the fastest that seems to fit is refused. Holes between
# the large pieces of a long sequence took 11% to 20% of 24 GB
MARGINS = (1.0, 1.01, 1.03, 1.1, 1.15, 1.2)
ATTENDING = 0.15  # of a block's products: below it, keeping attention was planned to make a step 0.1% faster
SHOWN = 4  # numbers of streamed blocks, of each micro-batch, that show what streaming buys


class Search:
    """All policies of one precision that this version can run.

    Args:
        base: if it is known from another adapter or optimizer, in the same precision.

    Attributes:
        scales: weigh them.
        tokens: of a step.
    """

    def __init__(self, config: RunConfig, device: Device, bits: Literal[4, 8, 16], *, base: Base | None = None) -> None:
        self.config, self.device, self.bits = config, device, bits
        self._start = first_policy(config, device, bits)
        self.scales = Scales(
            config,
            self._start,
            kind=device.kind,
            cost=cost_of(device),
            card=Card.of(device),
            links=links_of(device),
        )
        self._keep = self._keep_choices()
        self.scales.keep = self._keep
        self._base = base
        self._beside: dict[tuple[int, str, str], int] = {}  # by what is streamed, optimizer: what loading, saving take
        _refuse_pins(config, device, self.scales.depth)
        if config.policy.mlp_tile_tokens and not len(self.scales.stage.ready.mlps):
            warnings.warn("policy.mlp_tile_tokens has no effect on a model without plain MLPs", stacklevel=4)
        if config.policy.keep_attention and not self._attends:
            warnings.warn("policy.keep_attention has no effect on this model, whose attention is its own", stacklevel=4)
        self._streams = self._stream_choices()
        self._levels = self._level_choices()
        self._size(config)

    def lengthen(self, config: RunConfig) -> None:
        """Go on with another sequence length, of which the model does not depend."""
        self.config = self.scales.stage.config = config
        self._start = replace(self._start, micro_batch_tokens=config.data.seq_len)
        self._size(config)

    def _size(self, config: RunConfig) -> None:
        seq_len, pinned = config.data.seq_len, config.policy.micro_batch_tokens
        rows = max(1, config.train.tokens_per_step // seq_len)
        self.tokens = rows * seq_len
        self._estimated: dict[Policy, Option] = {}
        choices = {math.ceil(rows / times) for times in range(1, rows + 1)}
        self._rows = sorted(choices) if pinned is None else [max(1, pinned // seq_len)]
        self._attentions = self._attention_choices()

    def best(self, budget: int) -> Answer:
        """The policy that serves the objective best within `budget` bytes of the process."""
        first, *others = self._optimizers
        options: dict[Policy, Option] = {}
        answer = self._best(budget, first, options, tiled=False)
        if answer.fits and self._may_gain_by_tiles(answer.weighed.policy):
            answer = self._best(budget, first, options, tiled=True)
        for place in others:
            if not answer.fits:
                answer = self._smallest(budget, place, options)  # says whether it is worth the search
                answer = self._best(budget, place, options, tiled=True) if answer.fits else answer
        return answer

    def _may_gain_by_tiles(self, policy: Policy) -> bool:
        """Whether tiles are worth a search, if `policy` is what serves best without, or the smallest of all."""
        longest = replace_rows(policy, self._rows[-1], self.config.data.seq_len, self.tokens)
        if len(self._tiles(longest)) == 1:
            return False
        # with shorter sequences no plan was found faster, and the search takes as long as all before
        long = self.config.data.seq_len >= _WORTH_TILES * MLP_TILES[0]
        copies = long and (policy.streams or policy.offload_blocks > 0)
        return policy.mlp_tile_tokens > 0 or copies or self.config.policy.objective != "speed"

    def _best(self, budget: int, place: Place, options: dict[Policy, Option], *, tiled: bool) -> Answer:
        """The same with the optimizer in this place, of policies without tiles, or of those with tiles too. What was
        estimated is added to `options`. Where nothing fits it is the smallest of all."""
        found = {option.policy: option for option in self.options(budget, optimizer_on=place, tiled=tiled)}
        options |= found
        learned: dict[Hashable, float] = {}
        for option in self._in_turn([*found.values()], budget, learned):
            answer = self.answer(self.scales.weigh(option.policy), options.values(), budget)
            if answer.fits and self.config.policy.objective == "memory":
                smallest = self._smallest(budget, place, options)
                return smallest if smallest.fits and smallest.process < answer.process else answer
            if answer.fits:
                return answer
            if answer.host_binds and not option.policy.offload_blocks:
                break  # nor will any other: what can lie on the disk does
            learned[_sort(option.policy)] = max(answer.process / option.process, learned.get(_sort(option.policy), 0.0))
            refused = replace(option, allocated=answer.weighed.allocated, process=answer.process)
            options[option.policy] = refused  # or it would pass for a safer one
        return self._smallest(budget, place, options)

    def _smallest(self, budget: int, place: Place, options: dict[Policy, Option]) -> Answer:
        """The policy with the smallest peak of the process, added to `options` if it is not there."""
        found: Answer | None = None
        for weighed in sorted(self._few(place, timed=True), key=lambda it: it.allocated):
            # at least what is in use is reserved, so that on a card a look at it may save a replay
            if found is None or self.device.kind == "cpu" or weighed.allocated < found.reserved:
                answer = self.answer(weighed, (), budget, most=None if found is None else found.process)
                found = answer if found is None or answer.process < found.process else found
        assert found is not None
        policy = found.weighed.policy
        options.setdefault(policy, self._option(policy))
        return replace(found, options=tuple(options.values()))

    @cached_property
    def _aside(self) -> Aside:
        return Aside.of(self.config, self._start, self.scales, self.base)

    @cached_property
    def base(self) -> Base:
        """What the base model alone takes in the other phases."""
        return self._base or Base.of(self.config, self._start, self.scales.stage)

    def process_estimate(self, policy: Policy, allocated: int, heap: int) -> int:
        """What the process takes in all phases when the tensors of a training step take `allocated`, about; on a CPU
        `heap` of them lie in the heap."""
        key = policy.streamed_blocks, policy.stream_embeddings, policy.optimizer_on
        if key not in self._beside:
            self._beside[key] = self._aside.most(policy)
        beside = process_estimate(self.device, self._beside[key], self.scales.heap_held(policy))
        return max(process_estimate(self.device, allocated, heap), beside)

    def smallest(self) -> Weighed:
        """The policy with the smallest peak of bytes in tensors; its time is that of a first micro-batch."""
        return min(self._few(self._optimizers[-1], timed=False), key=lambda it: it.allocated)

    def _few(self, place: Place, *, timed: bool) -> list[Weighed]:
        """Policies of which one is the smallest, with the optimizer in `place`. Where the loss takes little, the last
        block may as well keep: its backward is the first thing that follows."""
        return [self.scales.weigh(self._least(keep, place), timed=timed) for keep in self._keep[:2]]

    def smallest_process(self) -> int:
        """What the process takes under that policy, about."""
        weighed = self.smallest()
        return self.process_estimate(weighed.policy, weighed.allocated, weighed.heap)

    @property
    def least(self) -> Policy:
        """The policy with the smallest peak, give or take the last block."""
        return self._least(self._keep[0], self._optimizers[-1])

    def _least(self, keep: int, place: Place) -> Policy:
        fewest = replace_rows(self._start, self._rows[0], self.config.data.seq_len, self.tokens)
        below = replace(fewest, stream_embeddings=self._levels[-1], optimizer_on=place)
        sized = replace(below, loss_chunk_tokens=self._chunks(below)[0], mlp_tile_tokens=self._tiles(below)[-1])
        return self._blocks(sized, keep, streamed=self._most_saved, offload=self._offloads(sized, keep)[-1])

    def options(self, budget: int, *, optimizer_on: Place = "device", tiled: bool = True) -> Iterator[Option]:
        """Policies with their estimates: every one with no more below the device than is asked for, then for those that
        do not fit the fewest streamed blocks with which they do, with inputs on the device and with inputs below."""
        seq_len = self.config.data.seq_len
        resident = []
        for rows in self._rows:
            start = replace(self._start, optimizer_on=optimizer_on, stream_embeddings=self._levels[0])
            sized = replace_rows(start, rows, seq_len, self.tokens)
            tiles = self._tiles(sized)
            for tile, chunk in itertools.product(tiles if tiled else tiles[:1], self._chunks(sized)):
                for kept, keep in itertools.product(self._attentions, self._keep):
                    if kept and keep == self.scales.depth and len(self._attentions) > 1:
                        continue  # as they are without
                    offload = self._offloads(sized, keep)[0]
                    chunked = replace(sized, loss_chunk_tokens=chunk, keep_attention=kept, mlp_tile_tokens=tile)
                    policy = self._blocks(chunked, keep, streamed=self._streams[0], offload=offload)
                    resident.append(self._option(policy))
        yield from resident
        yield from self._below(resident, budget)

    def _below(self, resident: Sequence[Option], budget: int) -> Iterator[Option]:
        """The same with more below the device: enough to fit, and of the smallest ones more, to show what that buys."""
        every = self.config.policy.objective != "speed"
        for margin in MARGINS[:1] if every else MARGINS:
            best: dict[tuple[str, bool, bool], float] = {}  # seconds of the fastest, by what of it is stored where
            for option in sorted(resident, key=lambda it: it.seconds):
                if option.process <= budget / margin:
                    continue
                for policy in self._with_embeddings(option.policy):
                    for offload in self._offloads(policy, policy.keep_blocks):
                        sort = policy.stream_embeddings, offload > 0, policy.keep_attention
                        if every or option.seconds < best.get(sort, math.inf):  # none of it makes any faster
                            found = self._fewest_streamed(policy, offload, int(budget / margin), option)
                            if found is not None:
                                best[sort] = min(best.get(sort, math.inf), found.seconds)
                                yield found
        small = [it.policy for it in resident if it.policy.keep_blocks == self._keep[0]]
        least = {policy.micro_batch_tokens: policy for policy in reversed(small)}  # of each size the smallest chunk
        shown = {self._streams[-1] * part // SHOWN for part in range(SHOWN + 1)} & set(self._streams)
        for policy in least.values():
            for level in self._levels:
                below = replace(policy, stream_embeddings=level)
                for offload in self._offloads(below, below.keep_blocks):
                    for streamed in shown:
                        other = self._blocks(below, below.keep_blocks, streamed=streamed, offload=offload)
                        if other != policy:
                            yield self._option(other)

    def _with_embeddings(self, policy: Policy) -> Iterator[Policy]:
        """The same with the embeddings where they may lie. Loss chunks are other ones if the head does not stay."""
        stage = self.scales.stage
        for level in self._levels:
            below = replace(policy, stream_embeddings=level)
            if stage.streams_head(below) == stage.streams_head(policy):
                yield below
            elif policy.loss_chunk_tokens == self._chunks(policy)[0]:  # once for all of them
                yield from (replace(below, loss_chunk_tokens=chunk) for chunk in self._chunks(below))

    def _option(self, policy: Policy) -> Option:
        if policy not in self._estimated:
            tokens, tile = [rows * self.config.data.seq_len for rows in self._rows], policy.mlp_tile_tokens
            if tile:  # with less than a tile memory grows otherwise
                tokens = [it for it in tokens if (it > tile) == (policy.micro_batch_tokens > tile)]
            weighed = self.scales.estimate(policy, tokens[0], tokens[-1])
            process = self.process_estimate(policy, weighed.allocated, weighed.heap)
            self._estimated[policy] = Option(policy, weighed.allocated, weighed.heap, process, weighed.seconds)
        return self._estimated[policy]

    def _fewest_streamed(self, start: Policy, offload: int, budget: int, known: Option) -> Option | None:
        """`start` with so many offloading blocks and as few streamed ones as let it fit, by the estimate.

        Args:
            known: with other embeddings and as many blocks that keep.
        """

        def other(streamed: int) -> Policy:
            return self._blocks(start, start.keep_blocks, streamed=streamed, offload=offload)

        scales, most = self.scales, other(self._most_saved)
        more = scales.held_by(known.policy) - scales.held_by(most) + scales.inputs_stored(most)
        if scales.stage.streams_head(start) != scales.stage.streams_head(known.policy):
            more += scratch_bytes(scales.stage.ready.head, known.policy.loss_chunk_tokens)  # the loss may take nothing
        if self.process_estimate(most, known.allocated - more, 0) > budget:
            return None  # which says in a moment what holds for most
        few = self._option(other(self._streams[0]))
        held, heap_held = scales.held_by(few.policy), scales.heap_held(few.policy)

        def fits(streamed: int) -> bool:
            policy = other(streamed)
            allocated = few.allocated - held + scales.held_by(policy)
            return self.process_estimate(policy, allocated, few.heap - heap_held + scales.heap_held(policy)) <= budget

        at = bisect_left(self._streams, True, key=fits)
        return self._option(other(self._streams[at])) if at < len(self._streams) else None

    def _in_turn(self, options: Sequence[Option], budget: int, learned: Mapping[Hashable, float]) -> Iterator[Option]:
        """Those that may fit, the best first, as many as are worth an exact weighing.

        Args:
            learned: how many times what was estimated one of a sort took that was weighed meanwhile.
        """

        def seconds(option: Option) -> float:
            copies = option.policy.streams or option.policy.offload_blocks
            return option.seconds * (WORTH_COPIES if copies else 1.0)

        order: Callable[[Option], tuple[float, float]] = {
            "speed": lambda it: (seconds(it), it.process),
            "memory": lambda it: (it.process, it.seconds),
            "batch": lambda it: (-it.policy.micro_batch_tokens, seconds(it)),
            "context": lambda it: (seconds(it), it.process),
        }[self.config.policy.objective]
        tries = 0
        for option in sorted(options, key=order):
            if option.process * learned.get(_sort(option.policy), 1 / NEAR) <= budget:
                yield option
                tries += 1
            if tries == TRIES:
                return

    def answer(self, weighed: Weighed, options: Iterable[Option], budget: int, *, most: int | None = None) -> Answer:
        """What a policy that was weighed takes in all phases, and whether that fits; `most` as of `process_peak`."""
        peak = process_peak(self.device, self.scales, weighed, most=most)
        evaluation = process_estimate(self.device, self.scales.evaluation_peak(weighed.policy), weighed.heap)
        phases = self._aside.phases(self.device, weighed.policy, train=peak.process, evaluation=evaluation)
        return Answer(
            config=self.config, device=self.device, budget=budget, scales=self.scales, weighed=weighed,
            process=max(phases[name]["device_bytes"] for name in OF_A_RUN), allocated=peak.allocated,
            reserved=peak.reserved, phases=phases, options=tuple(options), tokens=self.tokens,
        )  # fmt: skip

    def _keep_choices(self) -> Sequence[int]:
        pinned, depth = self.config.policy, self.scales.depth
        if self.config.adapter.prompt_learning or pinned.activations == "keep":
            return (depth,)
        if pinned.activations == "recompute":
            return (0,)
        if pinned.keep_blocks is None:
            return range(depth + 1) if pinned.activations is None else (0,)
        return (min(pinned.keep_blocks, depth),)

    def _offloads(self, policy: Policy, keep: int) -> tuple[int, ...]:
        """Numbers of blocks that may offload where `keep` keep, ascending: none, or all others. Fewer would not be
        faster, as copies hide behind the work of all but tiny blocks, and so few as come up at once save nothing."""
        rest, pinned = self.scales.depth - keep, self.config.policy.activations
        if pinned is not None:
            return (rest if pinned == "offload" else 0,)
        below = self.scales.inputs_stored(replace(policy, offload_blocks=rest)) + self.scales.optimizer_stored(policy)
        return (0, rest) if rest > shelf.SLOTS and self._has_room(below) else (0,)

    @property
    def _attends(self) -> bool:
        """Whether the model's attention is ours, whose results can be kept."""
        return self.scales.stage.ready.attn_implementation == ATTENTION

    def _attention_choices(self) -> tuple[bool, ...]:
        """Whether blocks that recompute may keep what attention gave: where attending takes a part of their time."""
        pinned, stage = self.config.policy.keep_attention, self.scales.stage
        if pinned is not None or not self._attends or self._keep[0] == self.scales.depth:
            return (bool(pinned),)
        text, block = causal_model(stage.ready.model).config.get_text_config(), stage.blocks[0]
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        attending = self.config.data.seq_len * text.num_attention_heads * size
        products = sum(it.in_features * it.out_features for it in block.modules() if isinstance(it, nn.Linear))
        return (False, True) if attending >= ATTENDING * products else (False,)

    def _chunks(self, policy: Policy) -> list[int]:
        """Of the loss, with micro-batch and embeddings of `policy`, ascending."""
        pinned, tokens = self.config.policy.loss_chunk_tokens, policy.micro_batch_tokens
        choices = STREAMED_CHUNKS if self.scales.stage.streams_head(policy) else LOSS_CHUNKS
        return [min(pinned, tokens)] if pinned else sorted({min(chunk, tokens) for chunk in choices})

    def _tiles(self, policy: Policy) -> tuple[int, ...]:
        """Tokens that MLPs may work on at once in a micro-batch of `policy`, descending; 0, which is all, first."""
        pinned, mlps = self.config.policy.mlp_tile_tokens, len(self.scales.stage.ready.mlps)
        if pinned is not None:
            return (pinned,)
        small = [tile for tile in MLP_TILES if mlps and _WORTH_TILES * tile <= policy.micro_batch_tokens]
        return (0, *small)

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
        if pinned is not None:
            streamed = chosen(ready.matrices, pinned)
            refuse_trained(ready.model, streamed)
            if pinned != "none" and not streamed:
                warnings.warn(f"policy.stream_embeddings: {pinned} has no effect on this model", stacklevel=4)
            return (pinned,)
        levels: list[Which] = ["none"]
        for level in ("input", "both"):
            more = [it for it in chosen(ready.matrices, level) if it not in chosen(ready.matrices, levels[-1])]
            saved = sum(it.nbytes - sum(it.slots) for it in more)
            if more and saved > 0 and not any(is_trained(ready.model, it) for it in more):
                levels.append(level)
        return levels

    @cached_property
    def _most_saved(self) -> int:
        """The number of streamed blocks that saves the most memory."""
        start = self._start
        return max(self._streams, key=lambda count: self.scales.moved(replace(start, streamed_blocks=count)).saved)

    @cached_property
    def _optimizers(self) -> tuple[Place, ...]:
        """Where the optimizer may lie, the first place first: on the host updates are slow, and gradients go there."""
        pinned, host = self.config.policy.optimizer_on, replace(self._start, optimizer_on="host")
        if self.device.kind == "cpu":
            return ("device",)  # which is the host
        if pinned is not None:
            return (pinned,)
        paged = self._start.optimizer.startswith("paged")
        return ("device",) if paged or not self._has_room(self.scales.optimizer_stored(host)) else ("device", "host")

    def _blocks(self, policy: Policy, keep: int, *, streamed: int, offload: int = 0) -> Policy:
        depth = self.scales.depth
        chosen = replace(
            policy, resident_blocks=depth - streamed, streamed_blocks=streamed, keep_blocks=keep,
            recompute_blocks=depth - keep - offload, offload_blocks=offload,
        )  # fmt: skip
        return replace(chosen, stream_from=self._tier(chosen))

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
        return self.device.host_process_bytes + self._aside.host + nbytes <= allowed


def _sort(policy: Policy) -> Hashable:
    """The same for policies whose estimates are wrong by about as much."""
    computing = policy.micro_batch_tokens, policy.keep_attention, policy.mlp_tile_tokens
    return *computing, policy.stream_embeddings, policy.offload_blocks > 0


def first_policy(config: RunConfig, device: Device, bits: Literal[4, 8, 16]) -> Policy:
    """What all policies of one precision have in common, with one row per micro-batch."""
    names: dict[int, Literal["nf4", "fp4", "int8", "none"]] = {4: config.quant.type, 8: "int8", 16: "none"}
    return Policy(
        bits=bits,
        quant=names[bits],
        double_quant=config.quant.double_quant and bits == 4,
        compute_dtype=config.policy.compute_dtype or device.compute_dtype,
        micro_batch_tokens=config.data.seq_len,
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
    resident = config.policy.resident_blocks
    if resident is not None and resident > depth:
        raise ConfigError("There are not so many blocks.", given=f"policy.resident_blocks: {resident}", allowed=depth)
    if config.policy.stream_from == "host" and device.kind == "cpu":
        raise ConfigError(
            "On a CPU the host is the device: blocks are streamed from disk.",
            given="policy.stream_from: host",
            allowed="disk",
            fix="remove policy.stream_from",
        )
