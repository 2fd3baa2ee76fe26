"""One real step beside its plan: by PyTorch's allocator events on the CPU, by the allocator's statistics on CUDA."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch.profiler import ProfilerActivity, profile

from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.core.plan import Plan, Policy
from lowmem_ft.core.preference import lanes
from lowmem_ft.data.examples import Example
from lowmem_ft.data.packing import Batch, collate
from lowmem_ft.data.pairs import preferences_of
from lowmem_ft.data.preference import PreferenceExample
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.simulate import evaluate, mismatched_of
from lowmem_ft.quant.products import kept_bytes
from lowmem_ft.runtime.budget import fill_pool
from lowmem_ft.runtime.memory import cuda_process_bytes, process_peak_bytes, reset_process_peak
from lowmem_ft.step import train_step

SMALLEST_VOCABULARY = 64  # the tokens of a real step are drawn from ids that every model has


def verified(plan: Plan) -> Plan:
    """`plan` with what two real steps on random tokens took here, under the keys of `predicted`.

    Raises:
        UnsupportedError: the plan is for a device that is not here.
        LowMemError: as loading finds it.
    """
    device = Device(**plan.device)
    where, config = device.torch_device, plan.run_config
    batches = FullBatches(config, plan.policy, vocabulary=SMALLEST_VOCABULARY)
    mismatched = mismatched_of(config, batches)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        ready = assemble(config, plan.policy, where)
        fill_pool(where, plan.predicted.pool_bytes)
        train_step(ready, batches, lr=1e-4, mismatched=mismatched)
        measured: dict[str, float] = {
            "allocated_peak_bytes": torch.cuda.max_memory_allocated(where),
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(where),
        }
        total = cuda_process_bytes(device.index)
        if total is not None:
            measured["process_peak_bytes"] = total
    else:
        ready, held = _loaded(config, plan.policy)
        loading = process_peak_bytes()
        first = FullBatches(config, replace(plan.policy, accumulation=1), vocabulary=SMALLEST_VOCABULARY)
        taken = _most(lambda: train_step(ready, first, lr=1e-4, mismatched=mismatched_of(config, first)))
        measured = {"allocated_peak_bytes": held + taken}
        gc.collect()
        release_freed_memory()
        reset_process_peak()  # what the profiler wrote down of a step of many operators is more than the step takes
    start = time.perf_counter()
    train_step(ready, batches, lr=1e-4, mismatched=mismatched)
    measured["step_seconds"] = time.perf_counter() - start
    measured["tokens_per_second"] = sum(batch.tokens for batch in batches) / measured["step_seconds"]
    if where.type == "cpu":
        measured["process_peak_bytes"] = max(loading, process_peak_bytes())
    return replace(plan, measured=measured)


class FullBatches(Sequence[Batch]):
    """A step's micro-batches of random tokens without padding, each made when it is asked for, as those of a run are.

    Where they are packed rows have two documents, all but the first if there are others: on a CPU long documents take
    the most, which is what plans count. Of preferences documents are answers alone.
    """

    def __init__(self, config: RunConfig, policy: Policy, *, vocabulary: int) -> None:
        self._config, self._policy, self._vocabulary = config, policy, vocabulary

    def __len__(self) -> int:
        return self._policy.accumulation

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        at = range(len(self))[index]
        return self._made(at) if isinstance(at, int) else [self._made(each) for each in at]

    def _made(self, index: int) -> Batch:
        config = self._config
        length, together, preferences = config.data.seq_len, lanes(config), preferences_of(config)
        shape = (max(together, self._policy.micro_batch_tokens // length), length)
        ids = torch.randint(3, self._vocabulary, shape, generator=torch.Generator().manual_seed(index)).tolist()
        first = length if shape[0] > together else length - 2
        cuts = [first] * together + [length // 2] * (shape[0] - together)
        cuts = cuts if config.data.packing else [length] * shape[0]
        parts = [[part for part in (row[:cut], row[cut:]) if part] for row, cut in zip(ids, cuts, strict=True)]
        rows = [[Example(part, part) for part in row] for row in parts]
        if preferences is None:
            return collate(rows, pad_id=0, length=length)
        return preferences.collate(judged(rows, preferences.lanes), pad_id=0, length=length)


def judged(rows: Sequence[Sequence[Example]], together: int) -> list[list[PreferenceExample]]:
    """Pairs of the documents of each two rows, or the documents with a verdict, half of them good."""
    if together == 2:
        both = zip(rows[::2], rows[1::2], strict=True)
        return [[PreferenceExample(*pair) for pair in zip(*them, strict=True)] for them in both]
    good = (len(rows) + 1) // 2
    return [[PreferenceExample(it if at < good else None, None if at < good else it) for it in row]
            for at, row in enumerate(rows)]  # fmt: skip


def measured_train_peak(config: RunConfig, policy: Policy, batches: Sequence[Batch]) -> int:
    """The most bytes in tensors during one real training step on the CPU, weights included.

    What other tensors exist in the process is left out, batches that are there already among them.
    """
    mismatched = mismatched_of(config, batches)
    ready, held = _loaded(config, policy)
    return held + _most(lambda: train_step(ready, batches, lr=1e-4, mismatched=mismatched))


def measured_eval_peak(config: RunConfig, policy: Policy, batches: Sequence[Batch]) -> int:
    """The same during an evaluation step of the first, with the optimizer in memory as it is during training."""
    ready, held = _loaded(config, policy)
    return held + _most(lambda: evaluate(ready, config, batches[0]))


def _loaded(config: RunConfig, policy: Policy) -> tuple[Assembled, int]:
    """What is ready for a step on the CPU, and the bytes that it holds."""
    before = held_bytes()
    ready = assemble(config, policy, torch.device("cpu"))
    return ready, held_bytes() - before


def _most(step: Callable[[], object]) -> int:
    """Bytes that `step` holds at most, more than before."""
    return max(itertools.accumulate(allocator_events(step)))


def held_bytes() -> int:
    """Bytes of all tensors that exist in this process and hold memory of the host, each storage once; but for what
    products keep, which a plan counts with the process."""
    gc.collect()
    kept = kept_bytes()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) - kept


def allocator_events(function: Callable[[], object]) -> list[int]:
    """Bytes that `function` takes (> 0) and gives back (< 0) on the CPU, in order."""
    gc.collect()  # what an earlier step left must not be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()  # what it returns counts as held
    del kept
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
