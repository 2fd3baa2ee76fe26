"""A run without data: the trainer's own code, without weights and without the device that is planned for.

`assemble` and `train_step` run unchanged on tensors that have a shape and no data. What lies on the device is on
`meta`, what lies on the host on `cpu`; where the device is a CPU both are the same memory.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowmem_ft.assemble import Assembled, assemble, quant_spec
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.core.mode import evaluating
from lowmem_ft.core.plan import Policy
from lowmem_ft.core.preference import lanes, learns_preferences
from lowmem_ft.data.packing import Answers, Batch, as_bounds
from lowmem_ft.generate import keeps_cache
from lowmem_ft.planner.compose import shorten
from lowmem_ft.planner.cut import block_kinds, numbered, only_blocks
from lowmem_ft.planner.onednn import Products
from lowmem_ft.planner.scratch import scratch_of, whole_of
from lowmem_ft.planner.scratch_cuda import Card
from lowmem_ft.planner.sdpa import planned_attention
from lowmem_ft.planner.served import check_served
from lowmem_ft.planner.trace import Cost, Trace, Tracer
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.footprint import LoadFootprint, load_footprint
from lowmem_ft.runtime.activations import apply_activation_policy
from lowmem_ft.runtime.blocks import causal_model, find_blocks, find_decoder, stand_alone
from lowmem_ft.runtime.shelf import Shelf
from lowmem_ft.runtime.tiers import NoTier
from lowmem_ft.runtime.traced import STANDS_FOR
from lowmem_ft.runtime.vocabulary import chosen
from lowmem_ft.step import eval_step, evaluate_preferences, train_step

# What a simulation cannot see: tables that libraries make once per process (bitsandbytes' codes: 1276 bytes measured),
# what PyTorch's own code takes for a moment, and the random state (5056 bytes) from which a run could repeat a step.
UNSEEN_BYTES = 10 << 10
_LOADING = 1 << 61  # the key of the piece that loading works in


def mismatched_of(config: RunConfig, batches: Sequence[Batch]) -> Sequence[Batch]:
    """What KTO looks at beside `batches`: micro-batches that are as large."""
    return batches if config.train.objective == "kto" else ()


def evaluate(ready: Assembled, config: RunConfig, batch: Batch) -> None:
    """One evaluation step, for what it allocates."""
    if ready.objective is None:
        eval_step(ready, batch)
    else:
        evaluate_preferences(ready, [batch], mismatched_of(config, [batch]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What a simulated run allocated, in bytes.

    Attributes:
        trace: of one training step and one evaluation step, after the births of what is held.
        held: by the weights, the adapter, its gradients and the optimizer, before the step.
        train_peak, eval_peak: the most held at once, on the device and the host together, `UNSEEN_BYTES` included.
    """

    trace: Trace
    held: int
    train_peak: int
    eval_peak: int

    def holders(self) -> dict[str, int]:
        """Bytes at the training peak that the step itself holds: `activations`, `loss` and `workspace`."""
        found = self.trace.holders()
        return {**found, "activations": found["activations"] + UNSEEN_BYTES}


def simulate(
    config: RunConfig,
    policy: Policy,
    *,
    kind: Literal["cpu", "cuda"],
    loss_tokens: int | None = None,
    card: Card | None = None,
) -> Simulation:
    """Run one step of `config` under `policy` without data.

    The step has one micro-batch: all of them allocate the same, and each is made when its turn comes.

    Args:
        kind: of the device that is planned for.
        loss_tokens: of each micro-batch; by default all of its tokens, which is the most.
        card: see `Stage`.
    """
    stage = Stage(config, policy, kind=kind, card=card)
    trace = stage.step(policy, keep=policy.keep_blocks, offload=policy.offload_blocks, loss_tokens=loss_tokens)
    trained = len(trace.events)
    stage.evaluate(policy, loss_tokens=loss_tokens)
    levels = list(trace.curve())
    return Simulation(
        trace=trace,
        held=stage.held,
        train_peak=max(levels[:trained]) + UNSEEN_BYTES,
        eval_peak=max(levels[trained:]) + UNSEEN_BYTES,
    )


class Stage:
    """A model that is assembled once without data, and steps of it under different decisions.

    Args:
        policy: of it precision, compute dtype and optimizer hold for all steps.
        kind: of the device that is planned for.
        cost: see `Tracer`.
        card: of CUDA; by default an A100.

    Attributes:
        ready: the assembled model.
        held: bytes of weights, adapter, gradients and optimizer.
        blocks: the decoder layers.
        kinds: of each of them, see `cut.block_kinds`.
        whole: blocks need each other, so a step goes through all of them, but for estimates.
        few: a block of each kind, one after the other; None where they do not run without the others.
        products: what was multiplied on a CPU that multiplies 16-bit floats.
        handed_on: bytes that a block hands to the next one for a token, at most.
        learning: of each trained parameter that was in a step, whether a gradient has reached it.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        *,
        kind: Literal["cpu", "cuda"],
        cost: Cost | None = None,
        card: Card | None = None,
    ) -> None:
        self.config, self.kind, self._start = config, kind, policy
        self._card = card = card or Card()
        self.products = Products()
        self.tracer = Tracer(scratch_of(kind, card, self.products), whole_of(kind, card), cost)
        marks: list[int] = []
        with self.tracer:
            self.ready = assemble(
                config,
                policy,
                torch.device("meta"),
                on_card=kind == "cuda",
                loaded=lambda: marks.append(len(self.tracer.trace.events)),
            )
        self._assembled = self.tracer.trace.events, marks[0]
        self.ready.activations.remove()  # each step decides anew
        learnt = getattr(self.ready.model, "active_peft_config", None)
        prefixed = getattr(learnt, "peft_type", None) == "PREFIX_TUNING"  # keys and values of each block
        self.whole = prefixed or not stand_alone(self.ready.model)
        self.kinds = block_kinds(self.ready.model)
        last = {kind: at for at, kind in enumerate(self.kinds)}
        self.few = None if prefixed else sorted(last.values())
        self._try_forward(policy)
        self.tracer.begin()  # what loading allocates on meta for a moment, a real run does not
        self.held = sum(event.nbytes for event in self.tracer.trace.events)
        self.blocks = find_blocks(self.ready.model)[1]
        self._unread: dict[nn.Module, list[Any] | None] = {}  # by block, as backward has found them
        self.learning: dict[nn.Parameter, bool] = {}

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's, of which no weights need be there."""
        return Checkpoint.open(self.config.model, trust_remote_code=self.config.trust_remote_code, weights=False)

    @functools.cached_property
    def footprint(self) -> LoadFootprint:
        """What loading takes."""
        dtype: torch.dtype = getattr(torch, self._start.compute_dtype)
        return load_footprint(self.checkpoint, spec=quant_spec(self._start), dtype=dtype)

    @functools.cached_property
    def made(self) -> list[tuple[int, int]]:
        """Key and bytes of the device's pieces that came until all was ready, negative where they were given back: what
        loading works in, the weights that stay, and all that came after them."""
        (events, loaded), scratch = self._assembled, self.footprint.scratch
        weights = {event.key: event.nbytes for event in events[:loaded] if event.tier == "device" and event.nbytes > 0}
        for event in events[:loaded]:
            if event.nbytes < 0:
                weights.pop(event.key, None)
        after = [(event.key, event.nbytes) for event in events[loaded:] if event.tier == "device"]
        works = [(_LOADING, scratch)] if scratch else []
        return [*works, *weights.items(), *((key, -nbytes) for key, nbytes in works), *after]

    @functools.cached_property
    def routed(self) -> bool:
        """Whether there are experts, each of which gets some of the tokens."""
        return any(name.endswith(".experts") for name, _ in self.ready.model.named_modules())

    def attending(self) -> AbstractContextManager[None]:
        """Within it the blocks that the model has then attend as on the planned device."""
        return planned_attention(find_blocks(self.ready.model)[1], self.kind, self._card.capability)

    def _try_forward(self, policy: Policy) -> None:
        """Give the decoder what a step would: one block of each kind, or all where those do not run alone."""
        if self.few is not None:
            try:
                self.handed_on = self._handed_on(policy, self.few)
            except UnsupportedError:
                self.few, self.whole = None, True  # such as Zamba 2's, which look themselves up by number
        if self.whole:
            self.handed_on = self._handed_on(policy, None)

    def _handed_on(self, policy: Policy, blocks: Sequence[int] | None) -> int:
        batch = _batch(self.config, policy, "cpu", None)
        with self.only(blocks), self.tracer, _handing_on(self.ready.model, batch) as sizes:
            check_served(self.ready.model, batch, dtype=self.ready.compute_dtype)
        return max(sizes)

    def showing(self, classes: Sequence[Hashable]) -> list[int]:
        """Blocks that, one after the other, show all that a step through blocks of these classes takes."""
        return list(range(len(classes))) if self.whole else shorten(classes)

    def only(self, blocks: Sequence[int] | None) -> AbstractContextManager[None]:
        """Within it the model has these of its blocks alone; None: all."""
        every = blocks is None or len(blocks) == len(self.kinds)
        return only_blocks(self.ready.model, None if every else blocks, counted=not self.whole)

    def step(
        self,
        policy: Policy,
        *,
        keep: int,
        offload: int = 0,
        only: Sequence[int] | None = None,
        update: bool = True,
        settled: bool = False,
        loss_tokens: int | None = None,
        through: Literal["loss", "update"] = "update",
    ) -> Trace:
        """The trace of a training step with one micro-batch, after the births of all that is held.

        Args:
            policy: of it micro-batch, tiles, loss chunk, head and `keep_attention` hold; `keep` and `offload` take the
                place of its counts.
            keep: blocks that keep their activations, the last ones.
            offload: blocks whose inputs lie below the device, the first ones.
            only: the blocks that run; by default all. The update is always that of all.
            update: without it the optimizer does nothing, as it depends on neither micro-batch nor activations.
            settled: as a later micro-batch, in which recomputing leaves out what an earlier backward found unread.
            through: the last thing that is traced.
        """
        tracer = self.tracer
        self.ready.work_as(policy)
        if not settled:
            self.ready.mlps.forget()
        with self.only(only), self.attending():
            shelf = Shelf(offload, open_tier=lambda sizes: NoTier())
            activations = apply_activation_policy(
                causal_model(self.ready.model),
                keep=keep,
                offload=offload,
                shelf=shelf,
                keep_attention=policy.keep_attention,
            )
            recomputing = list(zip(find_blocks(self.ready.model)[1], activations.unread, strict=False))
            if settled:
                for block, unread in recomputing:
                    unread.layers = self._unread.get(block)
            tracer.begin()
            trace = tracer.trace
            try:
                with tracer, _marked(tracer, self.ready.model, through=through):
                    tracer.phase, tracer.block = "forward", None
                    ready: Any = self._with_loss(policy)
                    ready.optimizer = _Update(self, run=update)
                    batch = _batch(self.config, policy, self.kind, loss_tokens)
                    self.products.begin(batch.tokens, batch.input_ids.shape[1])
                    train_step(ready, [batch], lr=1e-4, mismatched=mismatched_of(self.config, [batch]))
                    del batch
                self._unread.update((block, unread.layers) for block, unread in recomputing)
            except _LossIsDone as done:
                trace = Trace(trace.events[: done.events])
            activations.remove()
        return trace

    def streams_head(self, policy: Policy) -> bool:
        """Whether the output head comes up in tiles under `policy`, so that logits of one exist at a time."""
        matrices = chosen(self.ready.below.matrices, policy.stream_embeddings)
        return any(matrix.head is not None for matrix in matrices)

    def _with_loss(self, policy: Policy) -> Assembled:
        head = replace(self.ready.head, keeps=not self.streams_head(policy))
        return replace(self.ready, loss_chunk_tokens=policy.loss_chunk_tokens, head=head)

    def evaluate(self, policy: Policy, *, only: Sequence[int] | None = None, loss_tokens: int | None = None) -> Trace:
        """The same trace, gone on with an evaluation step."""
        tracer, ready = self.tracer, self._with_loss(policy)
        ready.work_as(policy)
        with self.only(only), self.attending(), tracer:
            tracer.phase, tracer.block = "eval", None
            batch = _batch(self.config, policy, self.kind, loss_tokens)
            evaluate(ready, self.config, batch)
            del batch
        return tracer.trace

    def sample(self, policy: Policy, *, only: Sequence[int] | None = None) -> Trace:
        """The trace of what a sample (`eval.samples`) takes at most, after the births of all that is held; what is left
        at its end is the cache of the blocks that ran, and the logits of one token.

        That is all its tokens at once, as if they were the prompt: blocks then hold more for the tokens they work on
        than a later token's turn takes for the cache. A learnt prompt comes before them, without a cache.
        """
        tracer, model = self.tracer, self.ready.model
        virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
        causal, length = causal_model(model), self.config.data.seq_len
        answering = model if virtual else causal
        keeps = "logits_to_keep" in inspect.signature(type(causal).forward).parameters
        self.ready.work_as(policy)
        tracer.begin()
        with (
            evaluating(model),
            numbered(list(self.blocks), only),
            self.only(only),
            self.attending(),
            tracer,
            torch.no_grad(),
        ):
            tracer.phase, tracer.block = "eval", None
            ids_1T = torch.zeros((1, length), dtype=torch.int64, device="meta")
            # masks and positions, which generating makes; before a prompt that is learnt each twice
            beside = [ids_1T.new_zeros((1, virtual + length)) for _ in range(4 if virtual else 2)]
            options: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
            if virtual:
                options["attention_mask"] = torch.ones_like(ids_1T)
            said = answering(input_ids=ids_1T, use_cache=keeps_cache(model), **options)
            said.logits = said.logits[:, -1].to(copy=True, dtype=torch.float32)
            said.logits.argmax(-1)
            del beside
        return Trace(tracer.trace.events[:])


@dataclass(frozen=True, slots=True)
class _Update:
    """A stage's optimizer, which marks its work in the trace and updates also what no gradient has reached."""

    stage: Stage
    run: bool

    def set_lr(self, lr: float) -> None:
        assert self.stage.ready.optimizer is not None
        self.stage.ready.optimizer.set_lr(lr)

    def step(self, *, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        optimizer, accumulator = self.stage.ready.optimizer, self.stage.ready.accumulator
        assert optimizer is not None
        assert accumulator is not None
        self.stage.tracer.phase, self.stage.tracer.block = "update", None
        learning = self.stage.learning
        for parameter in self.stage.ready.trainable.values():  # of the blocks that ran
            learning[parameter] = learning.get(parameter, False) or gradient(parameter) is not None
        if not self.run:
            return
        sizes = [(tuple(it.shape for it in run), run[0].dtype) for run in optimizer.runs]
        left, taken = Counter(sizes), dict[nn.Parameter, int]()
        for size, run in zip(sizes, optimizer.runs, strict=True):
            taken.update(dict.fromkeys(run, left.pop(size, 0)))

        def first(parameter: nn.Parameter) -> Tensor | None:
            """The gradients of the first of equal runs, whose update stands for all: when done they hold nothing."""
            times = taken[parameter]
            if times:
                STANDS_FOR(parameter, times)
            return accumulator.buffer(parameter) if times else None

        optimizer.step(gradient=first)
        STANDS_FOR(next(iter(taken)), 1)


def _batch(config: RunConfig, policy: Policy, kind: str, loss_tokens: int | None) -> Batch:
    """A full micro-batch; where the device is the CPU it lies there already."""
    length, together = config.data.seq_len, lanes(config)
    shape = (max(together, policy.micro_batch_tokens // length), length)
    count = shape[0] * shape[1]
    device = "meta" if kind == "cpu" else "cpu"
    names: dict[str, Any] = {"input_ids": torch.int64, "labels": torch.int64, "position_ids": torch.int64}
    tensors: dict[str, Any] = {name: torch.zeros(shape, dtype=dtype, device=device) for name, dtype in names.items()}
    return Batch(
        **tensors,
        segment_ids=torch.zeros(shape, dtype=torch.int32, device=device),
        bounds=as_bounds(range(0, count + 1, length)),  # one document in each row
        tokens=count,
        loss_tokens=count if loss_tokens is None else loss_tokens,
        packed=config.data.packing,
        answers=_answers(*shape) if learns_preferences(config) else None,
    )


def _answers(rows: int, length: int) -> Answers:
    """One in each row, half of them good."""
    spans = tuple((row * length, (row + 1) * length - 1) for row in range(rows))
    good = (rows + 1) // 2
    return Answers(spans=spans, whole=spans, tokens=(length - 1,) * rows, good=good, likely=good * (length - 1))


def _hidden(output: Any) -> Any:
    """What a block returned hands on to the next one; of what else it returned the first (GPT's is a list)."""
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def _handing_on(model: nn.Module, batch: Batch) -> Iterator[set[int]]:
    """Within it bytes are gathered that blocks hand to the next one for a token of rows like those of `batch`."""
    sizes, rows = set[int](), len(batch.input_ids)

    def see(block: nn.Module, args: Any, output: Any) -> None:
        hidden = _hidden(output)
        sizes.add(hidden.nbytes // (rows * hidden.shape[-2]))

    hooks = [block.register_forward_hook(see) for block in find_blocks(model)[1]]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


class _LossIsDone(Exception):  # noqa: N818 - nothing is wrong
    """Backward has come to the last block, after so many events."""

    def __init__(self, events: int) -> None:
        self.events = events


@contextmanager
def _marked(tracer: Tracer, model: nn.Module, *, through: Literal["loss", "update"]) -> Iterator[None]:
    """Within it the tracer knows which block is at work, in forward and in backward.

    Raises:
        _LossIsDone: where no more is traced.
    """
    blocks = list(find_blocks(model)[1])

    def enter(index: int) -> Any:
        def hook(*_: Any) -> None:
            tracer.block = index

        return hook

    def leave(index: int) -> Any:
        def arrived(_: Any) -> None:
            if through == "loss":
                raise _LossIsDone(len(tracer.trace.events))
            tracer.phase, tracer.block = "backward", index

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tracer.block = None
            if tracer.phase == "forward" and index == len(blocks) - 1:
                tracer.phase = "loss"
            hidden = _hidden(output)
            if torch.is_tensor(hidden) and hidden.requires_grad:
                hidden.register_hook(arrived)  # type: ignore[no-untyped-call]

        return hook

    def begins(*_: Any) -> None:
        tracer.phase = "forward" if torch.is_grad_enabled() else "reference"

    handles = [find_decoder(model).register_forward_pre_hook(begins)]
    handles += [block.register_forward_pre_hook(enter(index)) for index, block in enumerate(blocks)]
    handles += [block.register_forward_hook(leave(index)) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
