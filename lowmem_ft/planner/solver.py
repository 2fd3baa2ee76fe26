"""A budget goes in, a plan comes out: the fastest policy whose predicted peak stays under the budget.

Every policy in the space is weighed by an estimate that takes microseconds (`planner.weigh`). In the order of the
objective those that seem to fit are then weighed exactly, and the first that fits is the plan.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import BudgetError, LowMemError
from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.core.plan import Plan
from lowmem_ft.core.plan_words import budget_words
from lowmem_ft.core.positions import positions_of
from lowmem_ft.core.preference import lanes
from lowmem_ft.core.sizes import format_least, format_size
from lowmem_ft.data.sources import load_readers
from lowmem_ft.planner.answer import Answer, write_plan
from lowmem_ft.planner.changes import cheapest_changes
from lowmem_ft.planner.choices import MOST_TOKENS
from lowmem_ft.planner.device import Device, find_device
from lowmem_ft.planner.improve import NEAR
from lowmem_ft.planner.reserve import process_estimate
from lowmem_ft.planner.search import Search
from lowmem_ft.planner.weigh import LONGEST
from lowmem_ft.quant.checkpoint import Checkpoint

CONTEXT_STEP = 256  # the longest sequence is found to this many tokens


def make_plan(config: RunConfig, *, device: Device | None = None) -> Plan:
    """Plan a run. Nothing is read but the model's config and the headers of its files.

    Returns:
        the policy that fits and serves `policy.objective` best, with safer ones as alternatives; or the smallest one
        with `fits` False.

    Raises:
        LowMemError: as the parts find it, such as a pin that this model or device does not have.
    """
    try:
        with _without_collections():
            return _make_plan(config, device)
    finally:
        release_freed_memory()  # which a run that follows would hold beside its own: 44 of 120 MB for 20 blocks


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
    load_readers(config.data)
    device = device or find_device(config.budget.device, config.budget.profile)
    if config.policy.objective == "context":
        config = _with_longest_sequence(config, device)
    budget = _budget(config, device)
    for bits in _precisions(config):
        search = Search(config, device, bits)
        answer = search.best(budget)
        if answer.fits:
            break  # with the highest precision that does
    for remark in (*_remarks(config, device), *search.choices.remarks()):
        warnings.warn(remark, stacklevel=3)
    if not answer.fits:
        answer = replace(answer, changes=cheapest_changes(config, _smallest(search, budget)))
    return write_plan(answer)


def _remarks(config: RunConfig, device: Device) -> Iterator[str]:
    """What of the budget the device cannot give."""
    memory = config.budget.memory
    if memory is not None and memory > device.free_bytes:
        given, free = format_size(memory), format_size(device.free_bytes)
        yield f"budget.memory: {given} is more than {device.name} has free: planned for {free}"


def _budget(config: RunConfig, device: Device) -> int:
    """Bytes that the process may take of the device, which on a CPU is the host."""
    stated = (config.budget.memory, config.budget.host if device.kind == "cpu" else None)
    return min([device.free_bytes, *(size for size in stated if size is not None)])


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
            if base is not None and process_estimate(first.device, base.least) > NEAR * budget:
                return None  # loading alone takes too much
            try:
                search = Search(config, first.device, bits, base=base)
            except LowMemError:
                return None  # not everything goes in every precision
            searches.append((apart, search))
        search.lengthen(config)
        return search.any_answer(budget)

    return of


def require_fit(plan: Plan) -> Plan:
    """`plan`, if it fits.

    Raises:
        BudgetError: nothing fits; says the smallest budget that does and what binds.
    """
    if plan.fits:
        return plan
    predicted = plan.predicted
    tight, least = [], [format_least(predicted.process_peak_bytes)]
    holder, size = max(plan.breakdown.items(), key=lambda item: item[1])
    if predicted.process_peak_bytes > plan.budget["device_bytes"]:
        tight.append(_device_budget(plan))
    if plan.host_binds:
        tight.append("budget.host")
        least.append(f"{format_least(predicted.host_peak_bytes)} of the host")
    if tight == ["budget.host"]:
        holder, size = "the host", predicted.host_peak_bytes
    changes = "; ".join(f"{change.key}={change.value}" for change in plan.changes)
    more = f"raise {' and '.join(tight)}"
    if tight[:1] == ["budget.memory"] and plan.budget["device_bytes"] >= plan.device["free_bytes"]:
        more = "that is all that the device has free: take one with more memory, or a smaller model"
    raise BudgetError(
        "Nothing fits the budget.",
        given=budget_words(plan),
        allowed=f"at least {' and '.join(least)} ({plan.policy.describe()})",
        fix=f"what binds most is {holder} ({format_size(size)}); "
        + (f"any one of these fits: {changes}" if changes else more),
    )


def _device_budget(plan: Plan) -> str:
    """The key that bounds the device: on a CPU, which is its own host, the smaller one."""
    budget = plan.run_config.budget
    host_is_less = budget.host is not None and (budget.memory is None or budget.host < budget.memory)
    return "budget.host" if plan.device["kind"] == "cpu" and host_is_less else "budget.memory"


def _precisions(config: RunConfig) -> tuple[Literal[4, 8, 16], ...]:
    return (16, 8, 4) if config.quant.bits == "auto" else (config.quant.bits,)


def _with_longest_sequence(config: RunConfig, device: Device) -> RunConfig:
    """`config` with the longest sequences whose smallest policy fits; with the shortest if not even these do."""
    budget = _budget(config, device)
    checkpoint = Checkpoint.open(config.model, trust_remote_code=config.trust_remote_code, weights=False)
    longest = min(positions_of(checkpoint.config) or LONGEST, MOST_TOKENS // lanes(config))

    def of(steps: int) -> RunConfig:
        length = min(steps * CONTEXT_STEP, longest)
        data = config.data.model_copy(update={"seq_len": length})
        train = config.train.model_copy(update={"tokens_per_step": max(length, config.train.tokens_per_step)})
        return config.model_copy(update={"data": data, "train": train})

    search = Search(of(1), device, _precisions(config)[-1])
    low, high = 0, -(-longest // CONTEXT_STEP)
    while low < high:
        middle = (low + high + 1) // 2
        search.lengthen(of(middle))
        if search.smallest_process() <= budget:
            low = middle
        else:
            high = middle - 1

    def fits(steps: int) -> bool:
        search.lengthen(of(steps))
        return search.any_answer(budget) is not None

    high, stride = low + 1, 1
    while low and not fits(low):  # the estimate was too low, maybe by much
        high, low, stride = low, max(0, low - stride), 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return of(max(low, 1))
