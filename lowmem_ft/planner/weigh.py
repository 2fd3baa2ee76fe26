"""What a policy takes and how long its step lasts, from steps of a few blocks without data.

Two ways: `estimate` puts a policy together from what was traced for the smallest and the largest micro-batch, in
microseconds; `weigh` traces the blocks that it needs at its own micro-batch, and is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.host import LARGE
from lowmem_ft.core.plan import Policy
from lowmem_ft.core.positions import positions_of
from lowmem_ft.core.preference import step_tokens
from lowmem_ft.data.packing import ROW_MULTIPLE
from lowmem_ft.planner.compose import Pieces, Place, Segment, Turn, peaks, turns
from lowmem_ft.planner.cost import HOST_UPDATES
from lowmem_ft.planner.cut import lowest_trained
from lowmem_ft.planner.pipeline import Inputs, Links, at_least, forward_again, streamed_seconds
from lowmem_ft.planner.replay import Script
from lowmem_ft.planner.scratch_cuda import Card
from lowmem_ft.planner.simulate import UNSEEN_BYTES, Stage
from lowmem_ft.planner.steps import LISTING, Steps, classes_of, in_loss_of, pieces_of, way_of
from lowmem_ft.planner.trace import Cost, Event, Tier, Trace
from lowmem_ft.quant.products import multiplies
from lowmem_ft.runtime.blocks import causal_model
from lowmem_ft.runtime.streaming import Moved
from lowmem_ft.runtime.tiers import PAGE
from lowmem_ft.runtime.vocabulary import chosen

# In fp32 the heap keeps more beside its tensors than in 16 bits, among it what MKL packs: measured in MiB 189 where
# tensors take 137 of the heap, 78 where they take 35
FP32_HEAP = 1.8
IN_FP32 = 14 << 20  # the rooms of `quant.products` (12 MiB) and copies of factors, or what MKL packs of all matrices
LONGEST = 1 << 17  # positions of models whose config names none
_RING = "ring"  # of slots and of what stays of streamed weights


@dataclass(frozen=True)
class Weighed:
    """A policy and its price.

    Attributes:
        allocated: peak bytes in tensors of the device during a training step.
        heap: on a CPU those of them that lie in the heap, at most; in fp32 more, see `FP32_HEAP`.
        seconds: of a whole step with all its micro-batches.
        places: the composed step of one micro-batch.
    """

    policy: Policy
    allocated: int
    heap: int
    seconds: float
    places: Sequence[Place]

    @cached_property
    def turns(self) -> list[Turn]:
        """That step, as if it had been traced whole."""
        return turns(self.places, sum(place.segment.part == "forward" for place in self.places))


class Scales:
    """Weighs the policies of one precision for one device.

    Args:
        start: of it precision, compute dtype and kind of optimizer hold for all. That lies on the device.
        kind: of the device.
        cost: of its operations, see `Tracer`.
        card: see `Stage`.
        links: of it with the tiers below; by default copies take no time.

    Attributes:
        stage: the model without data.
        depth: number of blocks.
        held: bytes of the device before a step, with every block resident.
        longest: positions that the model knows.
        keep: numbers of keeping blocks that `estimate` will be asked for, ascending.
        tried: tokens of the micro-batches that a search may try, the fewest first.
        scripts: of steps that were replayed, see `reserve.replayed`.
    """

    def __init__(
        self,
        config: RunConfig,
        start: Policy,
        *,
        kind: Literal["cpu", "cuda"],
        cost: Cost,
        card: Card | None = None,
        links: Links | None = None,
    ) -> None:
        self.stage = Stage(config, start, kind=kind, cost=cost, card=card)
        self.depth = len(self.stage.blocks)
        self._tier: Tier | None = None if kind == "cpu" else "device"
        self._steps = Steps(self.stage, self._tier)
        self.held = next(reversed(list(self.stage.tracer.trace.curve(self._tier))))
        text = causal_model(self.stage.ready.model).config.get_text_config()
        self.longest = positions_of(text) or LONGEST
        self._kinds = self.stage.kinds
        assert self.stage.ready.optimizer is not None, "a plan is made for training"
        self._optimizer = self.stage.ready.optimizer
        self._hidden, self._lowest = int(text.hidden_size), lowest_trained(self.stage.ready.model)
        self._links = links or Links()
        self._moved: dict[tuple[int, str], Moved] = {}  # by number of streamed blocks, and embeddings
        self._heaps: dict[tuple[int, str], int] = {}  # by the same
        self._heap_counts = FP32_HEAP if start.compute_dtype == "float32" else 1.0
        self.keep: Sequence[int] = range(self.depth + 1)
        self.tried: Sequence[int] = ()
        self.scripts: dict[Hashable, Script] = {}
        self._between: dict[Hashable, Pieces] = {}
        self._evaluations: dict[Hashable, int] = {}  # by all that and the length: peak bytes
        self._samples: dict[Hashable, int] = {}  # by length, tiles and experts together: peak bytes
        self._latest: dict[Hashable, list[Place]] = {}  # the last two steps that were weighed
        self._kernels: dict[tuple[int, int], int] = {}  # by length and tokens of the micro-batch: bytes

    def estimate(self, policy: Policy, smallest: int, largest: int) -> Weighed:
        """The price of `policy` from micro-batches of `smallest` and `largest` tokens, in proportion."""
        tokens, chunk = policy.micro_batch_tokens, policy.loss_chunk_tokens
        key = tokens, chunk, self.stage.streams_head(policy), way_of(policy)
        if key not in self._between:
            low, high = (self._steps.typical(policy, size, min(chunk, size), self.keep) for size in (smallest, largest))
            share = 0.0 if largest == smallest else (tokens - smallest) / (largest - smallest)
            self._between[key] = low.between(high, share)
        # what offloading changes is known without a trace
        places = self._between[key].step(classes_of(self._kinds, policy.keep_blocks))
        return self._weighed(policy, places, gone=self.input_bytes(policy))

    def turns_of(self, policy: Policy, tokens: int, keep: int) -> list[Turn]:
        """A step in micro-batches of `tokens`, one of the two sizes that `estimate` was asked for; `keep` blocks keep,
        and all others compute again."""
        pieces = self._steps.typical(policy, tokens, min(policy.loss_chunk_tokens, tokens), self.keep)
        return turns(pieces.step(classes_of(self._kinds, keep)), self.depth)

    def weigh(self, policy: Policy, *, timed: bool = True) -> Weighed:
        """The price of `policy`: the peak of its first micro-batch, which is the highest, and the time of the later.

        Not `timed`, the time is that of the first micro-batch too, which recomputes more than the later ones.
        """
        classes = tuple(classes_of(self._kinds, policy.keep_blocks, policy.offload_blocks))
        key = self._loss_key(policy), policy.keep_attention, classes, timed
        if key not in self._latest:
            pieces = self._steps.exact(policy, classes, timed=timed)
            self._latest = {**dict([*self._latest.items()][-1:]), key: pieces.step(classes)}
        return self._weighed(policy, self._latest[key])

    def evaluation_peak(self, policy: Policy) -> int:
        """Bytes in tensors of the device during an evaluation in micro-batches of the same size, and its samples."""
        tokens, key = policy.micro_batch_tokens, self._loss_key(policy)
        if key not in self._evaluations:
            self.stage.tracer.begin()
            in_loss = in_loss_of(policy)
            trace = self.stage.evaluate(policy, only=self.stage.showing(self._kinds), loss_tokens=in_loss)
            listed = {event.key for event in trace.events if event.op == LISTING}
            longer = tokens / in_loss
            events = [e._replace(nbytes=round(e.nbytes * longer)) if e.key in listed else e for e in trace.events]
            self._evaluations[key] = max(Trace(events).curve(self._tier))
        most = max(self._evaluations[key], self._sample_peak(policy) if self.stage.config.eval.samples else 0)
        return most - self.held + self.held_by(policy) + UNSEEN_BYTES

    def _sample_peak(self, policy: Policy) -> int:
        """The same during a sample, with every block resident.

        Of a few blocks it is traced; each other one adds its cache, whichever block is at work when most is held.
        """
        key = self.stage.config.data.seq_len, *pieces_of(policy)
        if key not in self._samples:
            few = self.stage.showing(self._kinds)
            curve = self._sampled(policy, few)
            most = max(curve)
            for kind in set(self._kinds):
                others = [at for at, other in enumerate(self._kinds) if other == kind and at not in few]
                if others:
                    most += len(others) * (self._sampled(policy, sorted([*few, others[0]]))[-1] - curve[-1])
            self._samples[key] = most
        return self._samples[key]

    def _sampled(self, policy: Policy, blocks: Sequence[int]) -> list[int]:
        """Bytes that are held, from event to event of a sample through these blocks."""
        return list(self.stage.sample(policy, only=blocks).curve(self._tier))

    def _loss_key(self, policy: Policy) -> Hashable:
        streams = self.stage.streams_head(policy)
        sizes = policy.micro_batch_tokens, policy.loss_chunk_tokens, *pieces_of(policy)
        return self.stage.config.data.seq_len, *sizes, streams

    def kernels(self, policy: Policy) -> int:
        """Bytes of what a CPU compiles to plan and run a step of `policy`, about, or keeps to multiply it in fp32; 0
        before one was traced.

        A process that plans its own run has multiplied for the micro-batches that it tried, too: for the smallest and
        the largest, of which estimates are made, and for one next to its own, such as the last that did not fit.
        """
        if self._steps.products is None:
            return 0
        dtype: torch.dtype = getattr(torch, policy.compute_dtype)
        if dtype == torch.float32 or not multiplies(dtype):
            return IN_FP32
        config, tokens = self.stage.config, policy.micro_batch_tokens
        key = config.data.seq_len, tokens
        if key not in self._kernels:
            beside = [it for it in self.tried if it > tokens][:1] or [it for it in self.tried if it < tokens][-1:]
            self._kernels[key] = self._steps.products.kernel_bytes(
                sizes={*self.tried[:1], *self.tried[-1:], *beside, tokens, step_tokens(config) % tokens} - {0},
                most=None if config.data.packing else tokens,
                lengths=config.data.seq_len // ROW_MULTIPLE,
                routed=self.stage.routed,
                samples=config.eval.samples,
                prompt=config.data.seq_len,
            )
        return self._kernels[key]

    def moved(self, policy: Policy) -> Moved:
        """What changes where `policy` has weights below the device."""
        key = policy.streamed_blocks, policy.stream_embeddings
        if key not in self._moved:
            ready = self.stage.ready
            matrices = chosen(ready.below.matrices, policy.stream_embeddings)
            self._moved[key] = Moved.of(ready.below.streamable, policy.streamed_blocks, matrices)
        return self._moved[key]

    def input_bytes(self, policy: Policy) -> int:
        """Bytes of one offloaded block's input in the tier below."""
        dtype: torch.dtype = getattr(torch, policy.compute_dtype)
        # models that add blocks' outputs up in fp32 (Mamba), or in several streams (Gemma 3n), hand more on
        a_token = max(self._hidden * dtype.itemsize, self.stage.handed_on)
        return -(-policy.micro_batch_tokens * a_token // PAGE) * PAGE

    def inputs_stored(self, policy: Policy) -> int:
        """Bytes of all offloaded inputs there; the last one stays on the device."""
        return max(0, policy.offload_blocks - 1) * self.input_bytes(policy)

    def _offloading(self, policy: Policy) -> range:
        """The blocks whose inputs wait below for their backward; below what is trained there is none."""
        return range(max(self._lowest, 0), policy.offload_blocks)

    def held_by(self, policy: Policy) -> int:
        """Bytes of the device before a step of `policy`."""
        state = self._state[1] if policy.optimizer_on == "host" else ()
        return self.held - self.moved(policy).saved - sum(state)

    def optimizer_stored(self, policy: Policy) -> int:
        """Bytes of the optimizer's state on the host, if `policy` has it there."""
        return self._state[0] if policy.optimizer_on == "host" else 0

    @cached_property
    def _state(self) -> tuple[int, list[int]]:
        """Bytes of all that the optimizer holds, and of each tensor that it has on the device if that is its place."""
        held = self._optimizer.held()
        return sum(it.nbytes for it in held), [it.nbytes for it in held if it.is_meta]

    def heap_held(self, policy: Policy) -> int:
        """On a CPU the bytes of the heap before a step of `policy`."""
        key = policy.streamed_blocks, policy.stream_embeddings
        if key not in self._heaps:
            sizes = [event.nbytes for event in self.base(policy)] if self._tier is None else []
            self._heaps[key] = round(self._heap_counts * sum(nbytes for nbytes in sizes if nbytes < LARGE))
        return self._heaps[key]

    def base(self, policy: Policy) -> list[Event]:
        """The births of all that is held before a step of `policy`."""
        moved, kept = self.moved(policy), []
        gone = Counter(moved.tensors)
        gone.update(self._state[1] if policy.optimizer_on == "host" else ())
        for event in self.stage.tracer.alive():
            if event.tier == "device" and gone[event.nbytes]:
                gone[event.nbytes] -= 1
            else:
                kept.append(event)
        return [Event(0, nbytes, "device", _RING, "load", None) for nbytes in (*moved.slots, *moved.stubs)] + kept

    def made(self, policy: Policy) -> list[tuple[int, int]]:
        """Key and bytes of each piece that comes, negative where it is given back again, until a step of `policy`."""
        base = self.base(policy)
        dropped = {event.key for event in self.stage.tracer.alive()} - {event.key for event in base}
        ring = [(event.key, event.nbytes) for event in base if event.op == _RING]
        return ring + [(key, nbytes) for key, nbytes in self.stage.made if key not in dropped]

    def _weighed(self, policy: Policy, places: Sequence[Place], *, gone: int = 0) -> Weighed:
        """`gone`: bytes of each offloaded input, if `places` have them still on the device."""
        if policy.optimizer_on == "host":
            places = [*places[:-1], Place(self._host_update, None)]
        most, heap = peaks(places, offloading=self._offloading(policy), nbytes=gone)
        allocated = self.held_by(policy) + most + UNSEEN_BYTES
        heap = self.heap_held(policy) + round(self._heap_counts * heap)
        return Weighed(policy, allocated, heap, self._seconds(policy, places), places)

    @property
    def slower_on_host(self) -> float:
        """Seconds that an update takes more there, of a model that was weighed."""
        assert self._steps.update is not None
        return self._host_update.seconds - self._steps.update.seconds

    @cached_property
    def _host_update(self) -> Segment:
        """An update that takes nothing of the device: gradients in fp32 and values go down, new values come up, with as
        many calls as there."""
        trained = self.stage.ready.trainable.values()
        elements, values = sum(it.numel() for it in trained), sum(it.nbytes for it in trained)
        copies = (4 * elements + values) / self._links.down + values / self._links.up
        assert self._steps.update is not None
        seconds = copies + elements / HOST_UPDATES[self._optimizer.bits] + self._steps.update.seconds
        return Segment("update", None, (), 0, 0, seconds)

    def _seconds(self, policy: Policy, places: Sequence[Place]) -> float:
        """Micro-batches in proportion to their tokens, and one update."""
        moved, links = self.moved(policy), self._links
        rate = links.host if policy.stream_from == "host" else links.disk
        copies = {block: nbytes / rate for block, nbytes in moved.blocks.items()}
        size, tokens = self.input_bytes(policy), policy.micro_batch_tokens
        inputs = Inputs(self._offloading(policy), size / links.down, size / links.up)
        chunks = -(-tokens // policy.loss_chunk_tokens)
        head = chunks * moved.copied / rate
        objective = self.stage.ready.objective
        passes = 0 if objective is None else objective.forwards
        # without gradients, as in the first sweep over preferences, the head passes once instead of twice
        heads = {"loss": head if objective is None else 1.5 * head, "reference": passes * head / 2}
        work = [at_least(place, heads.get(place.segment.part, 0.0)) for place in places[:-1]]
        one = streamed_seconds([*forward_again(work, passes), *work], copies, inputs)
        for matrix in moved.matrices:
            if matrix.embedding is not None:
                one += tokens * (matrix.row_bytes / rate + (links.lookup if policy.stream_from == "disk" else 0.0))
        return one * max(step_tokens(self.stage.config), tokens) / tokens + places[-1].segment.seconds
