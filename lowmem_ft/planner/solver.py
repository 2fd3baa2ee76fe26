"""A budget goes in, a plan comes out: the fastest policy whose predicted peak stays under the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import BudgetError, UnsupportedError
from lowmem_ft.core.plan import Plan, Policy, Predicted
from lowmem_ft.core.sizes import format_size
from lowmem_ft.planner.device import Device, find_device
from lowmem_ft.planner.footprint import Footprint

LOSS_CHUNK_BYTES = 64 * 2**20  # logits of one chunk in fp32 and in the compute dtype stay under this
PROCESS_SLACK = 128 * 2**20  # later imports, thread stacks, compiled kernels (60-100 MiB measured on the demo)
FRAGMENTATION = 1.07  # reserved exceeds allocated by 1-7% (design.md)
DEQUANTIZE_TOKENS = 64  # dequantizing a matrix takes about as long as multiplying this many tokens with it


def make_plan(config: RunConfig, *, device: Device | None = None) -> Plan:
    """Plan a run. Nothing is read but the model's config and the headers of its files.

    Returns:
        the fastest policy that fits with safer ones as alternatives, or the smallest one with `fits` False.

    Raises:
        UnsupportedError: the config pins what this version cannot run.
    """
    _refuse_what_cannot_run(config)
    device = device or find_device(config.budget.device)
    budget = min(config.budget.memory or device.free_bytes, device.free_bytes)
    candidates: list[tuple[float, int, Policy, Footprint]] = []
    ready: Assembled | None = None
    for bits in (16, 8, 4) if config.quant.bits == "auto" else (config.quant.bits,):
        start = _first_policy(config, device, bits)
        ready = assemble(config, start, torch.device("meta"))
        footprint = Footprint.of(ready)
        for policy in _policies(config, start, footprint):
            peak = _process_peak(footprint, policy, config.data.seq_len, device)
            candidates.append((_relative_seconds(policy, footprint), peak, policy, footprint))
        if any(peak <= budget for _, peak, _, _ in candidates):
            break  # the highest precision that fits
    assert ready is not None, "there is at least one precision"
    fitting = sorted((c for c in candidates if c[1] <= budget), key=lambda c: (c[0], c[1]))
    _, peak, policy, footprint = fitting[0] if fitting else min(candidates, key=lambda c: c[1])
    safer = sorted((c for c in fitting if c[1] < peak), key=lambda c: -c[1])
    return Plan(
        fits=bool(fitting),
        model=_describe(config, ready, footprint),
        device=device.to_dict(),
        budget={"device_bytes": budget, "host_bytes": config.budget.host or device.free_bytes},
        policy=policy,
        predicted=_predict(footprint, policy, config, device),
        phases=_phases(footprint, policy, config.data.seq_len, device),
        breakdown={
            **footprint.breakdown(policy, config.data.seq_len),
            "overhead": device.process_bytes + PROCESS_SLACK,
        },
        alternatives=tuple(c[2] for c in safer[:8]),
        config=config.model_dump(mode="json"),
    )


def require_fit(plan: Plan) -> Plan:
    """`plan`, if it fits.

    Raises:
        BudgetError: nothing fits; says the smallest budget that does and what binds.
    """
    if plan.fits:
        return plan
    largest = max(plan.breakdown.items(), key=lambda item: item[1])
    raise BudgetError(
        "Nothing fits the budget.",
        given=f"{format_size(plan.budget['device_bytes'])} on {plan.device['name']}",
        allowed=f"at least {format_size(plan.predicted.process_peak_bytes)} ({plan.policy.describe()})",
        fix=f"raise budget.memory, or shrink what binds most: {largest[0]} ({format_size(largest[1])}); "
        "data.seq_len, adapter.rank and quant.bits are what shrinks it",
    )


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


def _first_policy(config: RunConfig, device: Device, bits: Literal[4, 8, 16]) -> Policy:
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


def _policies(config: RunConfig, start: Policy, footprint: Footprint) -> Iterator[Policy]:
    """Every micro-batch (whole rows, halving from the step's) with every number of kept blocks."""
    seq_len, pinned = config.data.seq_len, config.policy
    rows_per_step = max(1, config.train.tokens_per_step // seq_len)
    if pinned.micro_batch_tokens is not None:
        choices = [max(1, pinned.micro_batch_tokens // seq_len)]
    else:
        choices = sorted({math.ceil(rows_per_step / 2**power) for power in range(rows_per_step.bit_length())})
    keep = range(footprint.blocks + 1)
    if pinned.activations is not None or config.adapter.prompt_learning:
        keep = range(footprint.blocks, footprint.blocks + 1) if pinned.activations != "recompute" else range(1)
    row_bytes = footprint.vocab * (4 + footprint.itemsize)
    chunk = pinned.loss_chunk_tokens or max(16, min(1024, 2 ** int(math.log2(max(1, LOSS_CHUNK_BYTES // row_bytes)))))
    for rows in choices:
        for kept in keep:
            yield Policy(
                **{name: getattr(start, name) for name in ("bits", "quant", "double_quant", "compute_dtype")},
                micro_batch_tokens=rows * seq_len,
                accumulation=math.ceil(rows_per_step / rows),
                resident_blocks=footprint.blocks,
                streamed_blocks=0,
                stream_from=start.stream_from,
                keep_blocks=kept,
                recompute_blocks=footprint.blocks - kept,
                offload_blocks=0,
                optimizer=start.optimizer,
                loss_chunk_tokens=min(chunk, rows * seq_len),
            )


def _process_peak(footprint: Footprint, policy: Policy, seq_len: int, device: Device) -> int:
    allocated = sum(footprint.breakdown(policy, seq_len).values())
    return device.process_bytes + int(allocated * FRAGMENTATION) + PROCESS_SLACK


def _relative_seconds(policy: Policy, footprint: Footprint) -> float:
    """Seconds per token up to a factor: a frozen base costs a forward and a backward, recomputing one more forward."""
    recomputed = policy.recompute_blocks / footprint.blocks
    return (2 + recomputed) * (1 + DEQUANTIZE_TOKENS / policy.micro_batch_tokens)


def _predict(footprint: Footprint, policy: Policy, config: RunConfig, device: Device) -> Predicted:
    allocated = sum(footprint.breakdown(policy, config.data.seq_len).values())
    process = _process_peak(footprint, policy, config.data.seq_len, device)
    flops_per_second = device.flops
    seconds_per_token = footprint.flops_per_token * _relative_seconds(policy, footprint) / flops_per_second
    tokens = policy.micro_batch_tokens * policy.accumulation
    checkpoint = footprint.adapter + footprint.optimizer
    return Predicted(
        allocated_peak_bytes=allocated,
        reserved_peak_bytes=int(allocated * FRAGMENTATION),
        process_peak_bytes=process,
        host_peak_bytes=process if device.kind == "cpu" else device.process_bytes + footprint.largest_matrix * 8,
        pinned_bytes=0,
        disk_bytes=3 * checkpoint + 2 * footprint.adapter,  # two checkpoints and one being written, best and adapter
        step_seconds=tokens * seconds_per_token,
        tokens_per_second=1 / seconds_per_token,
    )


def _phases(footprint: Footprint, policy: Policy, seq_len: int, device: Device) -> dict[str, dict[str, int]]:
    train = sum(footprint.breakdown(policy, seq_len).values())
    stored = footprint.base_weights + footprint.adapter + footprint.gradients + footprint.optimizer
    loading = footprint.base_weights + footprint.largest_matrix * (footprint.itemsize + 8)
    allocated = {
        "load": loading,
        "train": train,
        "eval": footprint.evaluation_bytes(policy, seq_len),
        "save": stored + footprint.adapter + footprint.optimizer,
    }
    return {
        **{name: {"device_bytes": device.process_bytes + size} for name, size in allocated.items()},
        "merge": {},  # planned by `merge`, which this run does not do
    }


def _describe(config: RunConfig, ready: Assembled, footprint: Footprint) -> dict[str, Any]:
    model = ready.model.get_base_model() if hasattr(ready.model, "get_base_model") else ready.model
    return {
        "name": Path(config.model).name,
        "path": config.model,
        "architecture": type(model).__name__,
        "parameters": footprint.parameters,
        "trainable_parameters": sum(p.numel() for p in ready.trainable.values()),
        "blocks": footprint.blocks,
    }
