"""A plan or a run as tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowmem_ft.core.plan import Plan
from lowmem_ft.core.run import Run
from lowmem_ft.core.sizes import format_size

BAR = 30  # characters of a full bar
SHOWN = 4  # alternatives in the table; the page and the JSON have all


def plan_table(plan: Plan, *, dataset_tokens: int | None = None, price_per_hour: float | None = None) -> RenderableType:
    """The plan: does it fit, what fills the memory, why so, how fast, and what else there is."""
    parts: list[RenderableType] = [_facts(plan, cost_words(plan, dataset_tokens, price_per_hour)), _breakdown(plan)]
    phases = {name: sizes for name, sizes in plan.phases.items() if sizes}
    if phases:
        parts.append(_phases(phases))
    if plan.fits and plan.alternatives:
        parts.append(_alternatives(plan))
    if plan.changes:
        parts.append(_changes(plan))
    return Group(*parts)


def speed_words(plan: Plan) -> str:
    """`2.31 s per step, 7,092 tokens per second.`"""
    predicted = plan.predicted
    return f"{predicted.step_seconds:,.3g} s per step, {predicted.tokens_per_second:,.0f} tokens per second."


def cost_words(plan: Plan, dataset_tokens: int | None, price_per_hour: float | None) -> str:
    """How long an epoch takes and what it costs, as far as that is known."""
    if dataset_tokens is None:
        return ""
    hours = dataset_tokens / plan.predicted.tokens_per_second / 3600
    cost = "" if price_per_hour is None else f", {hours * price_per_hour:,.2f} at {price_per_hour:g} an hour"
    return f" {dataset_tokens:,} tokens take {hours:,.2f} hours{cost}."


def _bar(share: float) -> str:
    return "#" * min(BAR, max(round(share * BAR), int(share > 0)))


def _facts(plan: Plan, cost: str) -> Table:
    table = Table(title="Plan", show_header=False, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    budget, peak = plan.budget["device_bytes"], plan.predicted.process_peak_bytes
    model = f"{plan.model['name']} ({plan.model['architecture']}, {plan.model['parameters'] / 1e6:,.1f}M)"
    table.add_row("model", model)
    table.add_row("device", f"{plan.device['name']}")
    table.add_row("fits", f"{'yes' if plan.fits else 'no'}: {format_size(peak)} of {format_size(budget)}")
    table.add_row("", Text(f"|{_bar(peak / budget):<{BAR}}| {peak / budget:.0%}"))
    table.add_row("policy", plan.policy.describe())
    table.add_row("why", plan.reason)
    table.add_row("speed", speed_words(plan) + cost)
    return table


def _breakdown(plan: Plan) -> Table:
    table = Table(title="What fills it", show_header=False, title_justify="left", box=box.SIMPLE, pad_edge=False)
    total = max(1, sum(plan.breakdown.values()))
    for name, nbytes in plan.breakdown.items():
        if nbytes:
            table.add_row(name.replace("_", " "), Text(format_size(nbytes), justify="right"), _bar(nbytes / total))
    return table


def _phases(phases: Mapping[str, Mapping[str, int]]) -> Table:
    tiers = list(dict.fromkeys(tier for sizes in phases.values() for tier in sizes))
    header = ("phase", *(tier.removesuffix("_bytes") for tier in tiers))
    table = Table(*header, title="Peak by phase", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name, sizes in phases.items():
        table.add_row(name, *(format_size(sizes[tier]) if sizes.get(tier) else "-" for tier in tiers))
    return table


def _alternatives(plan: Plan) -> Table:
    table = Table("saves", "slower", "policy", title="Safer", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for candidate in plan.alternatives[:SHOWN]:
        saved = plan.predicted.process_peak_bytes - candidate.process_peak_bytes
        slower = candidate.step_seconds / plan.predicted.step_seconds - 1
        table.add_row(format_size(saved), f"{max(slower, 0.0):.0%}", candidate.policy.describe())
    return table


def _changes(plan: Plan) -> Table:
    header = ("change", "peak", "tokens/s")
    table = Table(*header, title="What would make it fit", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for change in plan.changes:
        speed = f"{change.tokens_per_second:,.0f}"
        table.add_row(f"{change.key}={change.value}", format_size(change.process_peak_bytes), speed)
    return table


def memory_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """(what, planned, measured, measured as a share of planned) for every figure that was measured."""
    rows = []
    for name, measured in run.measured.items():
        planned = int(getattr(run.plan.predicted, name))
        label = name.removesuffix("_bytes").replace("_", " ")
        rows.append((label, format_size(planned), format_size(measured), f"{measured / max(planned, 1):.0%}"))
    return rows


def verified_table(plan: Plan) -> Table:
    """Predicted against measured, of a plan that was verified."""
    header = ("", "predicted", "measured", "error")
    table = Table(*header, title="Verified", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name, measured in plan.measured.items():
        predicted = getattr(plan.predicted, name)
        shown = format_size if name.endswith("_bytes") else "{:,.3g}".format
        label = name.removesuffix("_bytes").replace("_", " ")
        table.add_row(label, shown(predicted), shown(measured), f"{predicted / measured - 1:+.1%}")
    return table


def memory_table(run: Run) -> Table:
    """Planned against measured memory."""
    table = Table("memory", "planned", "measured", "of plan", title="Planned against measured", title_justify="left")
    for row in memory_rows(run):
        table.add_row(*row)
    return table
