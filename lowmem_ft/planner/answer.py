"""The solver's answer, written down as a Plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Candidate, Change, Plan, Policy, Predicted, Sample, binds_host
from lowmem_ft.core.sizes import format_size
from lowmem_ft.planner.compose import Place, holders
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.phases import OF_A_RUN
from lowmem_ft.planner.stored import Stored
from lowmem_ft.planner.weigh import Scales, Weighed
from lowmem_ft.runtime.blocks import causal_model

ALTERNATIVES, FRONTIER = 8, 60  # at most so many in a plan
WORTH = 0.01  # of speed that more memory would buy, to be told


@dataclass(frozen=True, slots=True)
class Option:
    """A policy with its estimated price: bytes of tensors, of the heap and of the process, and seconds of a step.

    Of one that was weighed exactly and refused the bytes are exact; seconds stay estimates, to be compared.
    """

    policy: Policy
    allocated: int
    heap: int
    process: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The policy that was chosen and what was found about it.

    Attributes:
        budget, process: bytes of the device: allowed to the process, and its peak over all phases of the run.
        allocated, reserved: what PyTorch counts as in use, and what its allocator holds, at most during training.
        pool: of that what it holds before the first step, see `Predicted`.
        phases: peak bytes by phase and tier, as in a plan.
        options: all policies that were estimated.
        tokens: of a step.
    """

    config: RunConfig
    device: Device
    budget: int
    scales: Scales
    weighed: Weighed
    process: int
    allocated: int
    reserved: int
    pool: int
    phases: dict[str, dict[str, int]]
    options: tuple[Option, ...]
    tokens: int
    changes: tuple[Change, ...] = ()

    @property
    def host(self) -> int:
        """What the process takes of the host; of a CPU that is what it takes of the device."""
        return max(self.phases[name].get("host_bytes", self.process) for name in OF_A_RUN)

    @property
    def host_budget(self) -> int:
        """What it may take of the host; 0 where that is unknown."""
        return self.budget if self.device.kind == "cpu" else host_budget(self.config, self.device)

    @property
    def host_binds(self) -> bool:
        """Whether it does not fit the host, when that is not the device."""
        return binds_host(self.device.kind, taken=self.host, allowed=self.host_budget)

    @property
    def less_may_serve(self) -> bool:
        """Whether the host or a phase without steps is what does not fit."""
        return self.host_binds or max(self.phases[name]["device_bytes"] for name in ("load", "save")) >= self.process

    @property
    def fits(self) -> bool:
        return self.process <= self.budget and not self.host_binds

    def candidate(self, option: Option) -> Candidate:
        """An option in the plan's form."""
        return Candidate(
            policy=option.policy,
            allocated_peak_bytes=option.allocated,
            process_peak_bytes=option.process,
            step_seconds=option.seconds,
            tokens_per_second=self.tokens / option.seconds,
        )


def host_budget(config: RunConfig, device: Device) -> int:
    """Bytes that a run on a card may take of the host; 0 where that is unknown."""
    return min((size for size in (config.budget.host, device.host_free_bytes) if size), default=0)  # a profile has none


def write_plan(answer: Answer) -> Plan:
    """The plan that says so."""
    weighed, device = answer.weighed, answer.device
    stored = Stored.of(answer.scales.stage.ready)
    frontier = pareto(answer.options)
    own = next(it for it in answer.options if it.policy == weighed.policy)
    below = min(answer.process, own.process) if answer.fits else 0  # what was estimated is below the estimate, too
    safer = [it for it in reversed(frontier) if it.process < below]
    run = [answer.phases[name] for name in OF_A_RUN]
    return Plan(
        fits=answer.fits,
        model=_describe(answer, stored),
        device=device.to_dict(),
        budget={"device_bytes": answer.budget, "host_bytes": answer.host_budget},
        policy=weighed.policy,
        predicted=Predicted(
            allocated_peak_bytes=answer.allocated,
            reserved_peak_bytes=answer.reserved,
            process_peak_bytes=answer.process,
            host_peak_bytes=answer.host,
            pinned_bytes=max(sizes["pinned_bytes"] for sizes in run),
            disk_bytes=sum(sizes["disk_bytes"] for sizes in run),  # nothing on the disk goes with its phase
            step_seconds=weighed.seconds,
            tokens_per_second=answer.tokens / weighed.seconds,
            pool_bytes=answer.pool,
        ),
        phases=answer.phases,
        breakdown=_breakdown(answer, stored),
        alternatives=tuple(answer.candidate(option) for option in _thinned(safer, ALTERNATIVES)),
        reason=_reason(answer, own, frontier),
        changes=answer.changes,
        frontier=tuple(answer.candidate(option) for option in _thinned(frontier, FRONTIER)),
        timeline=tuple(_timeline(answer.scales.held_by(weighed.policy), weighed.places)),
        config=answer.config.model_dump(mode="json"),
    )


def pareto(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in both memory and speed, by memory."""
    best: list[Option] = []
    for option in sorted(options, key=lambda it: (it.process, it.seconds)):
        if not best or option.seconds < best[-1].seconds:
            best.append(option)
    return best


def _thinned(options: Sequence[Option], count: int) -> list[Option]:
    """At most `count` of them, evenly, with the first and the last."""
    if len(options) <= count:
        return list(options)
    return [options[round(at * (len(options) - 1) / (count - 1))] for at in range(count)]


def _describe(answer: Answer, stored: Stored) -> dict[str, Any]:
    ready = answer.scales.stage.ready
    return {
        "name": Path(answer.config.model).name,
        "path": answer.config.model,
        "architecture": type(causal_model(ready.model)).__name__,
        "parameters": stored.parameters,
        "trainable_parameters": sum(p.numel() for p in ready.trainable.values()),
        "blocks": answer.scales.depth,
    }


def _breakdown(answer: Answer, stored: Stored) -> dict[str, int]:
    """Bytes at the training peak by what holds them; together they are the process's."""
    held = holders(answer.weighed.places)
    found = {name: held[name] for name in ("loss", "workspace")}
    policy = answer.weighed.policy
    below = answer.scales.moved(policy).saved
    optimizer = stored.optimizer if policy.optimizer_on == "device" else 0
    return {
        "base_weights": stored.base_weights - below,
        "adapter": stored.adapter,
        "gradients": stored.gradients,
        "optimizer": optimizer,
        "activations": answer.weighed.allocated
        - (stored.total - stored.optimizer + optimizer - below)
        - sum(found.values()),
        **found,
        "overhead": answer.process - answer.weighed.allocated,
    }


def _reason(answer: Answer, own: Option, frontier: Sequence[Option]) -> str:
    count, budget = len(answer.options), format_size(answer.budget)
    refused = []
    if answer.process > answer.budget:
        refused.append(f"None of {count} policies fits {budget}: the smallest takes {format_size(answer.process)}.")
    if answer.host_binds:
        allowed = format_size(answer.host_budget)
        taken = format_size(answer.host)
        refused.append(f"The host binds: {taken} of it are the least that was found, and {allowed} is allowed.")
    if refused:
        return " ".join(refused)
    goal = {
        "speed": "the fastest",
        "memory": "the smallest",
        "batch": "of the largest micro-batch the fastest",
        "context": f"with {answer.config.data.seq_len} tokens the longest sequences, and then the fastest,",
    }[answer.config.policy.objective]
    sentence = f"Of {count} policies {goal} that fits {budget}"
    faster = (it for it in frontier if it.process > answer.budget and own.seconds >= (1 + WORTH) * it.seconds)
    more = next(faster, None)
    if more is None or answer.config.policy.objective != "speed":
        return f"{sentence}."
    return f"{sentence}; {format_size(more.process)} would buy {own.seconds / more.seconds - 1:.0%} more speed."


def _timeline(held: int, places: Sequence[Place]) -> Iterator[Sample]:
    """Three samples of each segment: begin, peak and end."""
    level = held
    for place in places:
        phase = {"start": "forward", "end": "backward"}.get(place.segment.part, place.segment.part)
        for nbytes in (level, level + place.segment.high, level + place.segment.delta):
            yield Sample(nbytes, phase, place.at)
        level += place.segment.delta
