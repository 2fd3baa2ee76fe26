"""A plan or a run as tables."""

from __future__ import annotations

from rich.table import Table

from lowmem_ft.core.plan import Plan
from lowmem_ft.core.run import Run
from lowmem_ft.core.sizes import format_size


def plan_table(plan: Plan) -> Table:
    """The plan, one row per fact."""
    table = Table(title="Plan", show_header=False, title_justify="left")
    for name, value in plan.rows():
        table.add_row(name, value)
    return table


def memory_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """(what, planned, measured, measured as a share of planned) for every figure that was measured."""
    rows = []
    for name, measured in run.measured.items():
        planned = int(getattr(run.plan.predicted, name))
        label = name.removesuffix("_bytes").replace("_", " ")
        rows.append((label, format_size(planned), format_size(measured), f"{measured / max(planned, 1):.0%}"))
    return rows


def memory_table(run: Run) -> Table:
    """Planned against measured memory."""
    table = Table("memory", "planned", "measured", "of plan", title="Planned against measured", title_justify="left")
    for row in memory_rows(run):
        table.add_row(*row)
    return table
