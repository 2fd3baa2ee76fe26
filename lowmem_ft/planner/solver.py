"""A budget goes in, a plan comes out: the fastest policy whose predicted peak stays under the budget.

Every policy in the space is weighed by an estimate that takes microseconds (`planner.weigh`). In the order of the
objective those that seem to fit are then weighed exactly, and the first that fits is the plan.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Literal

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import BudgetError, UnsupportedError
from lowmem_ft.core.plan import Plan, Policy
from lowmem_ft.core.plan_words import budget_words
from lowmem_ft.core.sizes import format_size
from lowmem_ft.planner.answer import Answer, Option, write_plan
from lowmem_ft.planner.changes import cheapest_changes
from lowmem_ft.planner.device import Device, cost_of, find_device
from lowmem_ft.planner.phases import OF_A_RUN, Aside, Base
from lowmem_ft.planner.reserve import process_estimate, process_peak
from lowmem_ft.planner.scratch_cuda import Card
from lowmem_ft.planner.weigh import Scales, Weighed

LOSS_CHUNKS = (32, 128, 512)  # tokens; a larger one reads the head's weight less often, which saves no time any more
NEAR = 1.02  # estimates this much above the budget are weighed too
TRIES = 16  # policies that are weighed exactly before the next smaller micro-batch or precision is tried
CONTEXT_STEP = 256  # the longest sequence is found to this many tokens


def make_plan(config: RunConfig, *, device: Device | None = None) -> Plan:
    """Plan a run. Nothing is read but the model's config and the headers of its files.

    Returns:
        the policy that fits and serves `policy.objective` best, with safer ones as alternatives; or the smallest one
        with `fits` False.

    Raises:
        UnsupportedError: the config pins what this version cannot run.
    """
    _refuse_what_cannot_run(config)
    with _without_collections():
        return _make_plan(config, device)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Tracing makes objects by the million and no garbage in cycles, for which Python would search again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _make_plan(config: RunConfig, device: Device | None) -> Plan:
    device = device or find_device(config.budget.device)
    if config.policy.objective == "context":
        config = _with_longest_sequence(config, device)
    budget = _budget(config, device)
    for bits in _precisions(config):
        search = Search(config, device, bits)
        answer = search.best(budget)
        if answer.fits:
            return write_plan(answer)  # with the highest precision that fits
    return write_plan(replace(answer, changes=cheapest_changes(config, _smallest(search, budget))))


def _budget(config: RunConfig, device: Device) -> int:
    """Bytes that the process may take of the device, which on a CPU is the host."""
    stated = (config.budget.memory, config.budget.host if device.kind == "cpu" else None)
    return min([device.free_bytes, *(size for size in stated if size)])


def _smallest(first: Search, budget: int) -> Callable[[RunConfig], Answer | None]:
    """The answer for a config's smallest policy, if that fits; of the config of `first`, or one that differs a little.

    What differs in the data alone is weighed on the same model, and what was asked before is not weighed again.
    """
    data = first.config.data
    searches = [(first.config, first)]  # by config, but for its data
    known: list[tuple[RunConfig, Answer | None]] = []

    def of(config: RunConfig) -> Answer | None:
        if config not in [asked for asked, _ in known]:
            known.append((config, weighed(config)))
        return next(answer for asked, answer in known if asked == config)

    def weighed(config: RunConfig) -> Answer | None:
        apart = config.model_copy(update={"data": data})
        search = next((search for own, search in searches if own == apart), None)
        if search is None:
            bits = _precisions(config)[-1]
            base = next((search.base for _, search in searches if search.bits == bits), None)
            if base is not None and process_estimate(first.device, base.reading) > NEAR * budget:
                return None  # loading alone takes too much
            search = Search(config, first.device, bits, base=base)
            searches.append((apart, search))
        search.lengthen(config)
        if search.process_estimate(0) > NEAR * budget:
            return None  # without a trace
        step = search.scales.weigh(search.least, timed=False)
        if search.process_estimate(step.allocated) > NEAR * budget:
            return None
        answer = search.answer(step, (), budget)
        return answer if answer.fits else None

    return of


def require_fit(plan: Plan) -> Plan:
    """`plan`, if it fits.

    Raises:
        BudgetError: nothing fits; says the smallest budget that does and what binds.
    """
    if plan.fits:
        return plan
    predicted = plan.predicted
    tight, least = [], [format_size(predicted.process_peak_bytes)]
    holder, size = max(plan.breakdown.items(), key=lambda item: item[1])
    if predicted.process_peak_bytes > plan.budget["device_bytes"]:
        tight.append("budget.memory")
    if plan.host_binds:
        tight.append("budget.host")
        least.append(f"{format_size(predicted.host_peak_bytes)} of the host")
    if tight == ["budget.host"]:
        holder, size = "the host", predicted.host_peak_bytes
    changes = "; ".join(f"{change.key}={change.value}" for change in plan.changes)
    raise BudgetError(
        "Nothing fits the budget.",
        given=budget_words(plan),
        allowed=f"at least {' and '.join(least)} ({plan.policy.describe()})",
        fix=f"what binds most is {holder} ({format_size(size)}); "
        + (f"any one of these fits: {changes}" if changes else f"raise {' and '.join(tight)}"),
    )


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
        self.scales = Scales(config, self._start, kind=device.kind, cost=cost_of(device), card=Card.of(device))
        self._keep = self._keep_choices()
        self.scales.keep = self._keep
        self._base = base
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
        choices = {math.ceil(rows / times) for times in range(1, rows + 1)}
        self._rows = sorted(choices) if pinned is None else [max(1, pinned // seq_len)]

    def best(self, budget: int) -> Answer:
        """The policy that serves the objective best within `budget` bytes of the process."""
        options = {option.policy: option for option in self.options()}
        for option in self._in_order([*options.values()], budget):
            answer = self.answer(self.scales.weigh(option.policy), options.values(), budget)
            if answer.fits:
                return answer
            if answer.host_binds:
                break  # of the host all policies take the same
            refused = replace(option, allocated=answer.weighed.allocated, process=answer.process)
            options[option.policy] = refused  # or it would pass for a safer one
        return self.answer(self.smallest(), options.values(), budget)

    @cached_property
    def _aside(self) -> Aside:
        return Aside.of(self.config, self._start, self.scales, self.base)

    @cached_property
    def base(self) -> Base:
        """What the base model alone takes in the other phases."""
        return self._base or Base.of(self.config, self._start, self.scales.stage)

    def process_estimate(self, allocated: int) -> int:
        """What the process takes in all phases when the tensors of a training step take `allocated`, about."""
        most = max(allocated, self._aside.load.device, self._aside.save.device)
        return process_estimate(self.device, most)

    def smallest(self, *, timed: bool = True) -> Weighed:
        """The policy with the smallest peak. Where the loss takes little, the last block may as well keep: its backward
        is the first thing that follows."""
        few = (self.scales.weigh(self._blocks(self.least, keep), timed=timed) for keep in self._keep[:2])
        return min(few, key=lambda it: it.allocated)

    @property
    def least(self) -> Policy:
        """The policy with the smallest peak, give or take the last block."""
        fewest = replace_rows(self._start, self._rows[0], self.config.data.seq_len, self.tokens)
        chunk = self._chunks(fewest.micro_batch_tokens)[0]
        return self._blocks(replace(fewest, loss_chunk_tokens=chunk), self._keep[0])

    def options(self) -> Iterator[Option]:
        """Every policy with its estimate."""
        seq_len = self.config.data.seq_len
        sizes = self._rows[0] * seq_len, self._rows[-1] * seq_len
        for rows in self._rows:
            sized = replace_rows(self._start, rows, seq_len, self.tokens)
            for chunk in self._chunks(rows * seq_len):
                for keep in self._keep:
                    policy = self._blocks(replace(sized, loss_chunk_tokens=chunk), keep)
                    weighed = self.scales.estimate(policy, *sizes)
                    process = self.process_estimate(weighed.allocated)
                    yield Option(policy, weighed.allocated, process, weighed.seconds)

    def _in_order(self, options: Sequence[Option], budget: int) -> list[Option]:
        """Those that may fit, the best first, as many as are worth an exact weighing."""
        order: Callable[[Option], tuple[float, float]] = {
            "speed": lambda it: (it.seconds, it.process),
            "memory": lambda it: (it.process, it.seconds),
            "batch": lambda it: (-it.policy.micro_batch_tokens, it.seconds),
            "context": lambda it: (it.seconds, it.process),
        }[self.config.policy.objective]
        near = sorted((it for it in options if it.process <= NEAR * budget), key=order)
        certain = [it for it in near if it.process <= budget]
        return [*near[:TRIES], *[it for it in certain if it not in near[:TRIES]][:TRIES]]

    def answer(self, weighed: Weighed, options: Iterable[Option], budget: int) -> Answer:
        """What a policy that was weighed takes in all phases, and whether that fits."""
        peak = process_peak(self.device, self.scales, weighed)
        evaluation = process_estimate(self.device, self.scales.evaluation_peak(weighed.policy))
        phases = self._aside.phases(self.device, train=peak.process, evaluation=evaluation)
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
        return range(depth + 1) if pinned.keep_blocks is None else (min(pinned.keep_blocks, depth),)

    def _chunks(self, tokens: int) -> list[int]:
        pinned = self.config.policy.loss_chunk_tokens
        return [min(pinned, tokens)] if pinned else sorted({min(chunk, tokens) for chunk in LOSS_CHUNKS})

    def _blocks(self, policy: Policy, keep: int) -> Policy:
        depth = self.scales.depth
        return replace(policy, resident_blocks=depth, keep_blocks=keep, recompute_blocks=depth - keep)


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
    )


def replace_rows(policy: Policy, rows: int, seq_len: int, tokens: int) -> Policy:
    """`policy` in micro-batches of so many rows, as many as a step of `tokens` needs."""
    return replace(policy, micro_batch_tokens=rows * seq_len, accumulation=math.ceil(tokens / (rows * seq_len)))


def _precisions(config: RunConfig) -> tuple[Literal[4, 8, 16], ...]:
    return (16, 8, 4) if config.quant.bits == "auto" else (config.quant.bits,)


def _with_longest_sequence(config: RunConfig, device: Device) -> RunConfig:
    """`config` with the longest sequences whose smallest policy fits; as it is if not even the shortest does."""
    budget = _budget(config, device)

    def of(steps: int) -> RunConfig:
        data = config.data.model_copy(update={"seq_len": steps * CONTEXT_STEP})
        tokens = max(steps * CONTEXT_STEP, config.train.tokens_per_step)
        train = config.train.model_copy(update={"tokens_per_step": tokens})
        return config.model_copy(update={"data": data, "train": train})

    search = Search(of(1), device, _precisions(config)[-1])
    low, high = 0, search.scales.longest // CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        search.lengthen(of(middle))
        if search.process_estimate(search.smallest(timed=False).allocated) <= budget:
            low = middle
        else:
            high = middle - 1
    search.lengthen(of(max(low, 1)))
    while low and process_peak(device, search.scales, search.smallest(timed=False)).process > budget:
        low -= max(1, low // 64)  # the estimate was too low
        search.lengthen(of(max(low, 1)))
    return search.config if low else config


def _refuse_what_cannot_run(config: RunConfig) -> None:
    pinned = config.policy
    refused = {
        "policy.activations: offload": pinned.activations == "offload",
        "policy.optimizer_on: host": pinned.optimizer_on == "host",
        "policy.stream_from": pinned.stream_from is not None,
        "policy.resident_blocks": pinned.resident_blocks is not None,
    }
    for what, asked in refused.items():
        if asked:
            raise UnsupportedError(
                f"{what} needs streaming, which this version does not have.",
                allowed="every block resident, activations keep or recompute, the optimizer on the device",
                fix=f"remove {what.partition(':')[0]}",
            )
