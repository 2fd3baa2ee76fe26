"""A plan or a run as tables."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowmem_ft.core.plan import Plan
from lowmem_ft.core.plan_words import (
    Listing,
    cost_words,
    fit_words,
    host_words,
    listings,
    measured_words,
    model_words,
    speed_words,
)
from lowmem_ft.core.run import Run
from lowmem_ft.core.sizes import format_size
from lowmem_ft.report.columns import columns

BAR = 30  # characters of a full bar


def plan_table(plan: Plan, *, dataset_tokens: int | None = None, price_per_hour: float | None = None) -> RenderableType:
    """The plan: does it fit, what fills the memory, why so, how fast, what else there is, and what was measured."""
    facts = plan_facts(plan, cost_words(plan, dataset_tokens, price_per_hour))
    return Group(facts, *(_table(listing) for listing in listings(plan)))


def _bar(share: float) -> str:
    return "#" * min(BAR, max(round(share * BAR), int(share > 0)))


def plan_facts(plan: Plan, cost: str = "") -> Table:
    """Of the plan what a run is told by: does it fit, with which policy, why so, how fast."""
    table = Table(title="Plan", show_header=False, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    used = plan.predicted.process_peak_bytes / plan.budget["device_bytes"]
    table.add_row("model", Text(model_words(plan)))
    table.add_row("device", Text(f"{plan.device['name']}"))
    table.add_row("fits", f"{'yes' if plan.fits else 'no'}: {fit_words(plan)}{host_words(plan)}")
    table.add_row("", Text(f"|{_bar(used):<{BAR}}| {used:.0%}"))
    table.add_row("policy", plan.policy.describe())
    table.add_row("why", plan.reason)
    table.add_row("speed", speed_words(plan) + cost)
    return table


def _table(listing: Listing) -> Table:
    table = Table(*listing.header, title=listing.title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.show_header = bool(listing.header)
    for row in listing.rows:
        table.add_row(*(_cell(cell) for cell in row))
    return table


def _cell(cell: str | float) -> Text:
    if isinstance(cell, float):
        return Text(_bar(cell))
    return Text(cell, justify="right" if cell[:1].isdigit() else "left", overflow="fold")


def measured_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """(what, planned, measured, measured as a share of planned) for every figure that was measured."""
    rows = []
    for name, measured in run.measured.items():
        planned = int(getattr(run.plan.predicted, name))
        label = measured_words(run.plan, name)
        rows.append((label, format_size(planned), format_size(measured), f"{measured / max(planned, 1):.0%}"))
    told = (line["tokens_per_second"] for line in run.read_metrics() if "tokens_per_second" in line)
    if len(rates := np.fromiter(told, dtype=float)):
        planned_rate, rate = run.plan.predicted.tokens_per_second, np.median(rates)  # steps now and then take long
        rows.append(("tokens per second", f"{planned_rate:,.0f}", f"{rate:,.0f}", f"{rate / planned_rate:.0%}"))
    return rows


def measured_table(run: Run) -> Table:
    """Planned against measured memory and speed."""
    header = columns("", "planned", "measured", "of plan")
    table = Table(*header, title="Planned against measured", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for row in measured_rows(run):
        table.add_row(*row)
    return table
