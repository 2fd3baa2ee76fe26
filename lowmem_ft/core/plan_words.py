"""What a plan says, in sentences and rows of text; terminal and notebook only set them in their own way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from lowmem_ft.core.sizes import format_size

if TYPE_CHECKING:
    from lowmem_ft.core.plan import Plan

SHOWN = 4  # alternatives; the page and the JSON have all
PLAN_TOLERANCE = 0.03  # a step that takes this much more or less than planned is worth a warning
LESS_ON_CPU = 0.15  # and less of a resident set, which plans take for up to 13% more than it is


class Listing(NamedTuple):
    """Rows of text under a header, which may be empty. A float is a share of one, to be drawn as a bar."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str | float, ...]]


def model_words(plan: Plan) -> str:
    """`Qwen3-0.6B (Qwen3ForCausalLM, 596.0M)`"""
    return f"{plan.model['name']} ({plan.model['architecture']}, {plan.model['parameters'] / 1e6:,.1f}M)"


def fit_words(plan: Plan) -> str:
    """`5.85 GiB of 5.59 GiB`: the process's peak and its budget."""
    return f"{format_size(plan.predicted.process_peak_bytes)} of {format_size(plan.budget['device_bytes'])}"


def budget_words(plan: Plan) -> str:
    """`5.59 GiB on rtx-3060-12gb`, and what is allowed of the host where that binds."""
    host = f" with {format_size(plan.budget['host_bytes'])} of the host" if plan.host_binds else ""
    return f"{format_size(plan.budget['device_bytes'])} on {plan.device['name']}{host}"


def host_words(plan: Plan) -> str:
    """`; host: 2.10 GiB of 1.00 GiB` where that binds."""
    taken, allowed = format_size(plan.predicted.host_peak_bytes), format_size(plan.budget["host_bytes"])
    return f"; host: {taken} of {allowed}" if plan.host_binds else ""


def speed_words(plan: Plan) -> str:
    """`2.31 s per step, 7,092 tokens per second.`"""
    predicted = plan.predicted
    seconds = predicted.step_seconds
    shown = f"{seconds:,.0f}" if seconds >= 1000 else f"{seconds:.3g}"  # which of larger ones writes 1.65e+03
    return f"{shown} s per step, {predicted.tokens_per_second:,.0f} tokens per second."


def cost_words(plan: Plan, dataset_tokens: int | None, price_per_hour: float | None) -> str:
    """How long an epoch takes and what it costs, as far as that is known."""
    if dataset_tokens is None:
        return ""
    hours = dataset_tokens / plan.predicted.tokens_per_second / 3600
    cost = "" if price_per_hour is None else f", {hours * price_per_hour:,.2f} at {price_per_hour:g} an hour"
    return f" {dataset_tokens:,} tokens take {hours:,.2f} hours{cost}."


def measured_words(plan: Plan, name: str) -> str:
    """`process peak`: what was measured; of a process that takes as much as planned only later, when that is."""
    growing = plan.device.get("kind") == "cpu" and plan.config.get("data", {}).get("packing") is False
    late = name == "process_peak_bytes" and growing  # a CPU keeps what was compiled for each length
    return _words(name) + (", once rows had every length" if late else "")


def listings(plan: Plan) -> Iterator[Listing]:
    """What fills the memory, the phases, what else there is, and what was measured; only those that have rows."""
    total = max(1, sum(plan.breakdown.values()))
    held = [(_words(name), format_size(nbytes), nbytes / total) for name, nbytes in plan.breakdown.items() if nbytes]
    found = [
        Listing("What fills it", (), [*held]),
        _phases(plan),
        Listing("Safer, by estimate", ("saves", "slower", "policy"), [*_safer(plan)] if plan.fits else []),
        Listing("What would make it fit", ("change", "peak", "tokens/s"), [*_changes(plan)]),
        Listing("Verified", ("", "predicted", "measured", "error"), [*_verified(plan)]),
    ]
    return (listing for listing in found if listing.rows)


def _phases(plan: Plan) -> Listing:
    planned = {name: sizes for name, sizes in plan.phases.items() if sizes}
    tiers = list(dict.fromkeys(tier for sizes in planned.values() for tier in sizes))
    rows = [
        (name, *(format_size(sizes[tier]) if sizes.get(tier) else "-" for tier in tiers))
        for name, sizes in planned.items()
    ]
    return Listing("Peak by phase", ("phase", *(_words(tier) for tier in tiers)), [*rows])


def _safer(plan: Plan) -> Iterator[tuple[str, ...]]:
    for candidate in plan.alternatives[:SHOWN]:
        saved = plan.predicted.process_peak_bytes - candidate.process_peak_bytes
        slower = candidate.step_seconds / plan.predicted.step_seconds - 1
        yield format_size(saved), f"{max(slower, 0.0):.0%}", candidate.policy.describe()


def _changes(plan: Plan) -> Iterator[tuple[str, ...]]:
    for change in plan.changes:
        size, speed = format_size(change.process_peak_bytes), f"{change.tokens_per_second:,.0f}"
        yield f"{change.key}={change.value}", size, speed


def _verified(plan: Plan) -> Iterator[tuple[str, ...]]:
    for name, measured in plan.measured.items():
        predicted = getattr(plan.predicted, name)
        shown = format_size if name.endswith("_bytes") else "{:,.3g}".format
        yield measured_words(plan, name), shown(predicted), shown(measured), f"{predicted / measured - 1:+.1%}"


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def planned_against_measured(plan: Plan, measured: int) -> str:
    """What to say after the first step, in which memory peaks: on CUDA of what is reserved, on a CPU of the process."""
    predicted = plan.predicted
    planned = predicted.reserved_peak_bytes if plan.device["kind"] == "cuda" else predicted.process_peak_bytes
    error = measured / planned - 1
    words = f"After the first step: {format_size(measured)} of {format_size(planned)} planned ({error:+.1%})."
    direction = "more" if error > 0 else "less"
    tolerance = LESS_ON_CPU if error < 0 and plan.device["kind"] == "cpu" else PLAN_TOLERANCE
    if abs(error) <= tolerance:
        return words
    return f"{words} Warning: over {tolerance:.0%} {direction} than planned; `lowmem-ft plan --verify` says where."
