"""The policies of one precision: which there are, what they take by an estimate, and the best within a budget."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from heapq import heapify, heappop, heappush
from typing import Literal, NamedTuple

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.core.preference import lanes, step_tokens
from lowmem_ft.planner.answer import Answer, Option
from lowmem_ft.planner.choices import (
    MLP_TILES,
    MOST_TOKENS,
    WORTH_TILES,
    Choices,
    Place,
    as_stored,
    first_policy,
    groups_of,
    refuse_sizes,
    replace_rows,
)
from lowmem_ft.planner.device import Device, cost_of, links_of
from lowmem_ft.planner.improve import NEAR, improved, lacks_room, sort_of, with_acts_kept
from lowmem_ft.planner.phases import OF_A_RUN, Aside, Base
from lowmem_ft.planner.reserve import Shorter, process_estimate, process_peak
from lowmem_ft.planner.scratch_cuda import Card
from lowmem_ft.planner.weigh import Scales, Weighed
from lowmem_ft.quant.prequantized import stored_spec
from lowmem_ft.runtime.loss import scratch_bytes

TRIES = 32  # policies that are weighed exactly before the smallest is taken
WORTH_COPIES = 1.02  # how many times faster a policy must be that copies what another one leaves on the device
# Estimates of a card's bytes may be too low by so much: then the fastest that seems to fit is refused. Holes between
# the large pieces of a long sequence took 11% to 20% of 24 GB
MARGINS = (1.0, 1.01, 1.03, 1.1, 1.15, 1.2)
WORTH_PLACE = 0.05  # of the budget that the optimizer's state must be, for its other place to be worth a search
SHOWN = 4  # numbers of streamed blocks, of each micro-batch, that show what streaming buys


class _Start(NamedTuple):
    """A policy of which more blocks will be streamed.

    Attributes:
        known: the same with other embeddings, and nothing that offloads.
        least: bytes that the process takes at least.
    """

    policy: Policy
    known: Option
    least: int


class Search:
    """All policies of one precision that this version can run.

    Args:
        base: if it is known from another adapter or optimizer, in the same precision.

    Attributes:
        choices: what each decision may be.
        scales: weigh them.
        tokens: of a step.
    """

    def __init__(self, config: RunConfig, device: Device, bits: Literal[4, 8, 16], *, base: Base | None = None) -> None:
        refuse_sizes(config)
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
        self._start = as_stored(self._start, stored_spec(self.scales.stage.checkpoint))
        scales, start = self.scales, self._start
        if base is not None:
            scales.stage.footprint = base.footprint  # which takes half a second to find for a large mixture
        # Neither names this search, or its events by the million would wait until Python looks for cycles
        base_of = cache(lambda: base or Base.of(scales.stage.config, start, scales.stage))
        aside_of = cache(lambda: Aside.of(scales.stage.config, start, scales, base_of()))
        self._base_of, self._aside_of = base_of, aside_of
        self.choices = Choices(device, start, scales, host=lambda: aside_of().host)
        kept, together = start.keep_attention and self.choices.attends, self.choices.togethers(0)[0]
        again = self.choices.recomputes_act
        self._start = replace(start, keep_attention=kept, experts_together=together, recompute_mlp_act=again)
        scales.keep = self.choices.keep
        self._beside: dict[tuple[int, str, str], int] = {}  # by what is streamed, optimizer: what loading, saving take
        self._size(config)

    def lengthen(self, config: RunConfig) -> None:
        """Go on with another sequence length, on which the model does not depend."""
        self.config = self.scales.stage.config = config
        self._start = replace(self._start, micro_batch_tokens=lanes(config) * config.data.seq_len)
        self._size(config)

    def _size(self, config: RunConfig) -> None:
        seq_len, pinned = config.data.seq_len, config.policy.micro_batch_tokens
        together = lanes(config)
        self.tokens = step_tokens(config)
        groups = self.tokens // (together * seq_len)
        self._estimated: dict[Policy, Option] = {}
        # of steps in which the fewest and the most blocks keep, by tiles and experts together
        self._shorters: dict[Hashable, list[Shorter]] = {}
        most = max(1, MOST_TOKENS // (together * seq_len))
        taken = groups_of(groups, most) if pinned is None else [min(groups, max(1, pinned // (together * seq_len)))]
        self.rows = [together * group for group in taken]
        self.scales.tried = [rows * seq_len for rows in self.rows]
        self.attentions = self.choices.attentions()

    def best(self, budget: int) -> Answer:
        """The policy that serves the objective best within `budget` bytes of the process."""
        first, *others = self.choices.optimizers
        options: dict[Policy, Option] = {}
        answer = self._smallest(budget, first, options) if others and lacks_room(self, budget, first) else None
        if answer is None or answer.fits:
            answer = self._best(budget, first, options, tiled=False)
        if answer.fits and self._may_gain_by_tiles(answer.weighed.policy):
            answer = self._best(budget, first, options, tiled=True)
        for place in others:
            if not answer.fits:
                answer = self._smallest(budget, place, options)  # says whether it is worth the search
                answer = self._best(budget, place, options, tiled=True) if answer.fits else answer
            elif self._may_gain_by(place, answer):
                other = self._best(budget, place, options, tiled=True)
                better = other.fits and self.rank(other) < self.rank(answer)
                answer = replace(other if better else answer, options=tuple(options.values()))
        return with_acts_kept(self, answer, options)

    def rank(self, answer: Answer) -> tuple[float, ...]:
        """How well it serves the objective: the less the better."""
        policy, seconds = answer.weighed.policy, answer.weighed.seconds
        return {
            "memory": (answer.process, seconds),
            "batch": (-policy.micro_batch_tokens, seconds),
        }.get(self.config.policy.objective, (seconds, answer.process))

    def _may_gain_by(self, place: Place, answer: Answer) -> bool:
        """Whether another place of the optimizer is worth a search, where `answer` fits with the first: no policy can
        be faster than the fastest of all with an update there."""
        if self.config.policy.objective in ("memory", "batch"):
            return True
        policy = answer.weighed.policy
        if self.scales.optimizer_stored(replace(policy, optimizer_on=place)) < WORTH_PLACE * answer.budget:
            return False
        fastest = min(option.seconds for option in answer.options)
        return fastest + self.scales.slower_on_host < answer.weighed.seconds

    def _may_gain_by_tiles(self, policy: Policy) -> bool:
        """Whether tiles are worth a search, if `policy` is what serves best without, or the smallest of all."""
        longest = replace_rows(policy, self.rows[-1], self.config.data.seq_len, self.tokens)
        if len(self.choices.tiles(longest)) == 1:
            return False
        # with shorter sequences no plan was found faster, and the search takes as long as all before
        long = self.config.data.seq_len >= WORTH_TILES * MLP_TILES[0]
        copies = long and (policy.streams or policy.offload_blocks > 0)
        return policy.mlp_tile_tokens > 0 or copies or self.config.policy.objective != "speed"

    def _best(self, budget: int, place: Place, options: dict[Policy, Option], *, tiled: bool) -> Answer:
        """The same with the optimizer in this place, of policies without tiles, or of those with tiles too. What was
        estimated is added to `options`. Where nothing fits it is the smallest of all; what that takes is exact if no
        other place is left."""
        alone, *more = self.choices.togethers(budget)
        objective, answer = self.config.policy.objective, None

        def sized(togethers: Sequence[int]) -> dict[Policy, Option]:
            found = self.options(budget, optimizer_on=place, tiled=tiled, togethers=togethers)
            return {option.policy: option for option in found}

        found = sized([alone])
        options |= found
        if more and objective != "memory" and any(it.process <= self.times(budget, NEAR) for it in found.values()):
            several = sized(more)
            options |= several
            answer = self._first_that_fits(several, options, budget)
        if answer is not None and objective == "speed":
            found = {it: option for it, option in found.items() if option.seconds < NEAR * answer.weighed.seconds}
        other = self._first_that_fits(found, options, budget)
        if other is not None and (answer is None or self.rank(other) < self.rank(answer)):
            answer = other
        if answer is None or objective == "memory":
            most = None if place == self.choices.optimizers[-1] else budget
            smallest = self._smallest(budget, place, options, most=most)
            if smallest.fits and objective == "speed":
                smallest = improved(self, smallest, options)
            return smallest if answer is None or (smallest.fits and smallest.process < answer.process) else answer
        return replace(answer, options=tuple(options.values()))

    def _first_that_fits(
        self, found: dict[Policy, Option], options: dict[Policy, Option], budget: int
    ) -> Answer | None:
        """The best of those that were found that fits, if any does. What is weighed is exact in `options` then."""
        learned: dict[Hashable, float] = {}
        for option in self._in_turn(found, budget, learned):
            options.setdefault(option.policy, option)
            answer = self.answer(self.scales.weigh(option.policy), options.values(), budget)
            if answer.fits:
                improves = learned and self.config.policy.objective == "speed"
                return improved(self, answer, options) if improves else answer
            if answer.host_binds and not option.policy.offload_blocks:
                break  # nor will any other: what can lie on the disk does
            context, sort = self.device.process_bytes, sort_of(option.policy)
            times = (answer.process - context) / (option.process - context)
            learned[sort] = max(times, learned.get(sort, 0.0))
            refused = replace(option, allocated=answer.weighed.allocated, process=answer.process)
            options[option.policy] = refused  # or it would pass for a safer one
        return None

    def _smallest(self, budget: int, place: Place, options: dict[Policy, Option], *, most: int | None = None) -> Answer:
        """`smallest_answer`, whose policy is added to `options` if it is not there."""
        found = self.smallest_answer(budget, place, most=most)
        policy = found.weighed.policy
        options.setdefault(policy, self.option(policy))
        return replace(found, options=tuple(options.values()))

    def smallest_answer(self, budget: int, place: Place, *, most: int | None = None) -> Answer:
        """The policy with the smallest peak of the process; if that fits but for the host, the one of those that fit
        so which takes the least of it. `most` as of `process_peak`."""
        found: Answer | None = None
        for weighed in sorted(self.few(place, timed=True), key=lambda it: it.allocated):
            # on a card one that takes more in tensors may have fewer holes
            least = self.device.process_bytes + weighed.allocated
            may = found is None or (not found.fits and least <= (found.process if most is None else budget))
            if may or self.device.kind == "cpu" or self.config.policy.objective == "memory":
                answer = self.answer(weighed, (), budget, most=most if found is None else found.process)
                found = answer if found is None or answer.process < found.process else found
        assert found is not None
        if found.fits or not found.less_may_serve:
            return found
        others = (self.answer(self.scales.weigh(it), (), budget) for it in self._with_less_below(found.weighed.policy))
        return min((found, *others), key=lambda it: (not it.fits, max(it.process, budget), it.host))

    def any_answer(self, budget: int) -> Answer | None:
        """One of the smallest policies that fits, if one does; its time is that of a first micro-batch."""
        least, near = self.least, self.times(budget, NEAR)
        if min(self.process_estimate(it, 0, 0) for it in (least, *self._with_less_below(least))) > near:
            return None  # without a trace
        less = False
        for weighed in self.few(self.choices.optimizers[-1], timed=False):
            if self.process_estimate(weighed.policy, weighed.allocated, weighed.heap) <= near:
                answer = self.answer(weighed, (), budget, most=budget)
                if answer.fits:
                    return answer
                less |= answer.less_may_serve
            else:
                less |= self.process_estimate(weighed.policy, 0, 0) > near
                break
        others = self._with_less_below(least) if less else ()
        answers = (self.answer(self.scales.weigh(it, timed=False), (), budget, most=budget) for it in others)
        return next((it for it in answers if it.fits), None)

    def _with_less_below(self, policy: Policy) -> Iterator[Policy]:
        """The same with fewer blocks and less of the embeddings streamed, and with inputs on the device: a step takes
        the least with all of that below, but loading, or the host, may not."""
        choices = self.choices
        for level, streamed in itertools.product(choices.levels, sorted({choices.streams[0], choices.most_saved})):
            below = replace(policy, stream_embeddings=level)
            below = replace(below, loss_chunk_tokens=choices.chunks(below)[0])
            for offload in choices.offloads(below, policy.keep_blocks):
                other = choices.blocks(below, policy.keep_blocks, streamed=streamed, offload=offload)
                if other != policy:
                    yield other

    @property
    def base(self) -> Base:
        """What the base model alone takes in the other phases."""
        return self._base_of()

    def process_estimate(self, policy: Policy, allocated: int, heap: int) -> int:
        """What the process takes in all phases when the tensors of a training step take `allocated`, about; on a CPU
        `heap` of them lie in the heap."""
        key = policy.streamed_blocks, policy.stream_embeddings, policy.optimizer_on
        if key not in self._beside:
            self._beside[key] = self._aside_of().most(policy)
        kernels = self.scales.kernels(policy)
        allocated += self._shorter(policy) if allocated else 0
        beside = process_estimate(self.device, self._beside[key], self.scales.heap_held(policy), kernels)
        return max(process_estimate(self.device, allocated, heap, kernels), beside)

    def times(self, process: int, factor: float) -> int:
        """`process` bytes, of which those beside the context become `factor` times as many: estimates are of those."""
        context = self.device.process_bytes
        return int(context + (process - context) * factor)

    def _shorter(self, policy: Policy) -> int:
        """What micro-batches of fewer tokens add to PyTorch's pool on a card, about."""
        rows, packed = self.rows[-1], self.config.data.packing
        if self.device.kind == "cpu" or (packed and policy.micro_batch_tokens == self.config.data.seq_len):
            return 0
        keeps, longest = (self.choices.keep[0], self.choices.keep[-1]), rows * self.config.data.seq_len
        key = policy.mlp_tile_tokens, policy.experts_together
        if key not in self._shorters:
            self._shorters[key] = [
                Shorter(self.scales.turns_of(policy, longest, keep)) for keep in dict.fromkeys(keeps)
            ]
        share = policy.micro_batch_tokens / longest
        sizes = [it.bytes(rows=rows if packed else None, share=share) for it in self._shorters[key]]
        kept = (policy.keep_blocks - keeps[0]) / max(keeps[1] - keeps[0], 1)
        return round(sizes[0] + (sizes[-1] - sizes[0]) * kept)

    def few(self, place: Place, *, timed: bool) -> Iterator[Weighed]:
        """Policies of which one is the smallest, with the optimizer in `place`. Where the loss takes little, the last
        block may as well keep: its backward is the first thing that follows. Where all have to keep, tiles save more
        than a larger micro-batch takes."""
        rows = self.rows[:1]
        if self.choices.keep[0] == self.scales.depth:
            tiled = (it for it in self.rows if len(self.choices.tiles(self.sized(it))) > 1)
            rows = [*dict.fromkeys((*rows, *itertools.islice(tiled, 1)))]
        both = itertools.product(rows, self.choices.keep[:2])
        return (self.scales.weigh(self.least_of(keep, place, row), timed=timed) for row, keep in both)

    def smallest_process(self) -> int:
        """What the process takes at least, about."""
        weighed = min(self.few(self.choices.optimizers[-1], timed=False), key=lambda it: it.allocated)
        return self.process_estimate(weighed.policy, weighed.allocated, weighed.heap)

    @property
    def least(self) -> Policy:
        """The policy with the smallest peak, give or take the last block."""
        return self.least_of(self.choices.keep[0], self.choices.optimizers[-1], self.rows[0])

    def sized(self, rows: int) -> Policy:
        """The first policy in micro-batches of so many rows."""
        return replace_rows(self._start, rows, self.config.data.seq_len, self.tokens)

    def least_of(self, keep: int, place: Place, rows: int) -> Policy:
        """The smallest with so many blocks that keep and rows in a micro-batch, and the optimizer in `place`."""
        choices = self.choices
        below = replace(self.sized(rows), stream_embeddings=choices.levels[-1], optimizer_on=place)
        sized = replace(below, loss_chunk_tokens=choices.chunks(below)[0], mlp_tile_tokens=choices.tiles(below)[-1])
        return choices.blocks(sized, keep, streamed=choices.most_saved, offload=choices.offloads(sized, keep)[-1])

    def options(
        self,
        budget: int,
        *,
        optimizer_on: Place = "device",
        tiled: bool = True,
        togethers: Sequence[int] | None = None,
    ) -> Iterator[Option]:
        """Policies with their estimates: every one with no more below the device than is asked for, then for those that
        do not fit the fewest streamed blocks with which they do, with inputs on the device and with inputs below."""
        resident = []
        for rows, together in itertools.product(self.rows, togethers or self.choices.togethers(budget)):
            sized = replace(self.sized(rows), optimizer_on=optimizer_on, stream_embeddings=self.choices.levels[0])
            sized = replace(sized, experts_together=together)
            tiles = self.choices.tiles(sized)
            for tile, chunk in itertools.product(tiles if tiled else tiles[:1], self.choices.chunks(sized)):
                for kept, keep in itertools.product(self.attentions, self.choices.keep):
                    if kept and keep == self.scales.depth and len(self.attentions) > 1:
                        continue  # as they are without
                    offload = self.choices.offloads(sized, keep)[0]
                    chunked = replace(sized, loss_chunk_tokens=chunk, keep_attention=kept, mlp_tile_tokens=tile)
                    policy = self.choices.blocks(chunked, keep, streamed=self.choices.streams[0], offload=offload)
                    resident.append(self.option(policy))
        yield from resident
        yield from self._below(resident, budget)

    def _below(self, resident: Sequence[Option], budget: int) -> Iterator[Option]:
        """The same with more below the device: enough to fit, and of the smallest ones more, to show what that buys."""
        every = self.config.policy.objective != "speed"
        margins = MARGINS[:1] if every else MARGINS
        large = (it for it in resident if it.process > self.times(budget, 1 / margins[-1]))
        starts = [start for it in sorted(large, key=lambda it: it.seconds) for start in self._starts(it)]
        for margin in margins:
            most = self.times(budget, 1 / margin)
            best: dict[tuple[str, bool, bool], float] = {}  # seconds of the fastest, by what of it is stored where
            for start in starts:
                policy, seconds = start.policy, start.known.seconds
                if start.known.process <= most or start.least > most:
                    continue
                sort = policy.stream_embeddings, policy.offload_blocks > 0, policy.keep_attention
                if every or seconds < best.get(sort, math.inf):  # none of it makes any faster
                    found = self.fewest_streamed(policy, most)
                    if found is not None:
                        best[sort] = min(best.get(sort, math.inf), found.seconds)
                        yield found
        small = [it.policy for it in resident if it.policy.keep_blocks == self.choices.keep[0]]
        least = {policy.micro_batch_tokens: policy for policy in reversed(small)}  # of each size the smallest chunk
        shown = {self.choices.streams[-1] * part // SHOWN for part in range(SHOWN + 1)} & set(self.choices.streams)
        for policy in least.values():
            for level in self.choices.levels:
                below = replace(policy, stream_embeddings=level)
                for offload in self.choices.offloads(below, below.keep_blocks):
                    for streamed in shown:
                        other = self.choices.blocks(below, below.keep_blocks, streamed=streamed, offload=offload)
                        if other != policy:
                            yield self.option(other)

    def _with_embeddings(self, policy: Policy) -> Iterator[Policy]:
        """The same with the embeddings where they may lie. Loss chunks are other ones if the head does not stay."""
        stage = self.scales.stage
        for level in self.choices.levels:
            below = replace(policy, stream_embeddings=level)
            if stage.streams_head(below) == stage.streams_head(policy):
                yield below
            elif policy.loss_chunk_tokens == self.choices.chunks(policy)[0]:  # once for all of them
                yield from (replace(below, loss_chunk_tokens=chunk) for chunk in self.choices.chunks(below))

    def option(self, policy: Policy) -> Option:
        if policy not in self._estimated:
            tokens, tile = [rows * self.config.data.seq_len for rows in self.rows], policy.mlp_tile_tokens
            if tile:  # with less than a tile memory grows otherwise
                tokens = [it for it in tokens if (it > tile) == (policy.micro_batch_tokens > tile)]
            weighed = self.scales.estimate(policy, tokens[0], tokens[-1])
            process = self.process_estimate(policy, weighed.allocated, weighed.heap)
            self._estimated[policy] = Option(policy, weighed.allocated, weighed.heap, process, weighed.seconds)
        return self._estimated[policy]

    def _starts(self, known: Option) -> Iterator[_Start]:
        """Policies with as many blocks that keep as in the known one, and more below the device."""
        scales = self.scales
        held, heads = scales.held_by(known.policy), scales.stage.streams_head(known.policy)
        for policy in self._with_embeddings(known.policy):
            for offload in self.choices.offloads(policy, policy.keep_blocks):
                least, most = (
                    self.choices.blocks(policy, policy.keep_blocks, streamed=streamed, offload=offload)
                    for streamed in (self.choices.streams[0], self.choices.most_saved)
                )
                more = held - scales.held_by(most) + scales.inputs_stored(most)
                if scales.stage.streams_head(policy) != heads:  # the loss may take nothing
                    more += scratch_bytes(scales.stage.ready.head, known.policy.loss_chunk_tokens)
                yield _Start(least, known, self.process_estimate(most, known.allocated - more, 0))

    def fewest_streamed(self, start: Policy, budget: int) -> Option | None:
        """`start` with as few streamed blocks as let it fit, by the estimate."""

        def other(streamed: int) -> Policy:
            return self.choices.blocks(start, start.keep_blocks, streamed=streamed, offload=start.offload_blocks)

        scales, few = self.scales, self.option(other(self.choices.streams[0]))
        held, heap_held = scales.held_by(few.policy), scales.heap_held(few.policy)

        def fits(streamed: int) -> bool:
            policy = other(streamed)
            allocated = few.allocated - held + scales.held_by(policy)
            return self.process_estimate(policy, allocated, few.heap - heap_held + scales.heap_held(policy)) <= budget

        at = bisect_left(self.choices.streams, True, key=fits)
        return self.option(other(self.choices.streams[at])) if at < len(self.choices.streams) else None

    def order(self, option: Option) -> tuple[float, float]:
        """How well it seems to serve the objective: the less the better."""
        copies = option.policy.streams or option.policy.offload_blocks
        seconds = round(option.seconds * (WORTH_COPIES if copies else 1.0), 9)  # sums of as much may end in other bits
        return {
            "memory": (option.process, option.seconds),
            "batch": (-option.policy.micro_batch_tokens, seconds),
        }.get(self.config.policy.objective, (seconds, option.process))

    def _in_turn(self, found: dict[Policy, Option], budget: int, learned: Mapping[Hashable, float]) -> Iterator[Option]:
        """Those that may fit, the best first, as many as are worth an exact weighing.

        Where what was learned says that one does not fit, the same with more streamed blocks is added to `found`: it
        may lack a single one, and all others be far slower.

        Args:
            learned: how many times what was estimated one of a sort took that was weighed meanwhile, and refused.
        """
        queue = [(*self.order(option), at, option) for at, option in enumerate(found.values())]
        heapify(queue)
        tries = 0
        while queue and tries < TRIES:
            option = heappop(queue)[-1]
            sort = sort_of(option.policy)
            if self.times(option.process, learned.get(sort, 1 / NEAR)) <= budget:
                yield option
                tries += 1
            if sort in learned and option.process <= self.times(budget, NEAR):
                closer = self.fewest_streamed(option.policy, self.times(budget, 1 / learned[sort]))
                if closer is not None and closer.policy not in found:
                    found[closer.policy] = closer
                    heappush(queue, (*self.order(closer), len(found), closer))

    def answer(self, weighed: Weighed, options: Iterable[Option], budget: int, *, most: int | None = None) -> Answer:
        """What a policy that was weighed takes in all phases, and whether that fits; `most` as of `process_peak`."""
        peak = process_peak(self.device, self.scales, weighed, most=most)
        evaluation = 0  # of what takes too much already
        if most is None or peak.process <= most:
            evaluated = self.scales.evaluation_peak(weighed.policy)
            evaluation = process_estimate(self.device, evaluated, weighed.heap, self.scales.kernels(weighed.policy))
        phases = self._aside_of().phases(self.device, weighed.policy, train=peak.process, evaluation=evaluation)
        return Answer(
            config=self.config, device=self.device, budget=budget, scales=self.scales, weighed=weighed,
            process=max(phases[name]["device_bytes"] for name in OF_A_RUN), allocated=peak.allocated,
            reserved=peak.reserved, pool=peak.pool, phases=phases, options=tuple(options), tokens=self.tokens,
        )  # fmt: skip
