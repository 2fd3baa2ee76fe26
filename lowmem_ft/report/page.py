"""report.html: one self-contained page about a run."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from lowmem_ft.core.preference import learns_preferences
from lowmem_ft.core.run import Run
from lowmem_ft.report.tables import measured_rows

COLUMNS = 800  # of the plot, of which each shows no more than its lowest and its highest point
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{border-bottom:1px solid #ccc;padding:.2rem .8rem;text-align:left}"
    "svg{width:100%;height:auto;border:1px solid #ccc}"
)


def run_page(run: Run) -> str:
    """The page as HTML text."""
    # None is what was not finite
    losses = ((m["step"], m["loss"]) for m in run.read_metrics() if m.get("loss") is not None)
    train = list(_visible(losses, run.step))
    held_out = list(_visible(((m["step"], m["eval_loss"]) for m in run.evaluations), run.step))
    rows = [("status", run.status), ("step", str(run.step)), *run.plan.rows()]
    parts = [
        f"<h1>{html.escape(run.folder.name)}</h1>",
        _table((), rows),
        "<h2>Planned against measured</h2>",
        _table(("", "planned", "measured", "of plan"), measured_rows(run)),
        f"<h2>Loss</h2><p>{_unit(run)}; blue: training, orange: held-out</p>",
        _plot((train, "#1f6feb"), (held_out, "#d9730d")),
    ]
    if answered := [
        (it["prompt"], it["answer"], it["reference"]) for it in run.read_samples() if it["step"] == run.step
    ]:
        parts += ["<h2>Answers to held-out prompts</h2>", _table(("prompt", "answer", "reference"), answered)]
    title = html.escape(run.folder.name)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _unit(run: Run) -> str:
    config = run.plan.run_config
    return f"{config.train.objective}, mean of a step" if learns_preferences(config) else "nats per token"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [("th", header)] if header else []
    lines += [("td", row) for row in rows]
    cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) for tag, line in lines)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"


def _visible(points: Iterable[tuple[float, float]], last: float) -> Iterator[tuple[float, float]]:
    """Of (x, y) points, in the order of their x up to `last`, those that show in a plot of `COLUMNS`."""
    for _, column in groupby(points, key=lambda point: int(point[0] * COLUMNS / max(last, 1))):
        found = list(column)
        yield from sorted({min(found, key=lambda point: point[1]), max(found, key=lambda point: point[1])})


def _plot(*series: tuple[Sequence[tuple[float, float]], str]) -> str:
    """Polylines of (x, y) points on common axes, as inline SVG."""
    points = [point for line, _ in series for point in line]
    if not points:
        return "<p>No step was recorded.</p>"
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    width, height, pad = float(COLUMNS), 300.0, 40.0

    def place(x: float, y: float) -> str:
        across = pad + (x - x0) / ((x1 - x0) or 1) * (width - 2 * pad)
        return f"{across:.1f},{height - pad - (y - y0) / ((y1 - y0) or 1) * (height - 2 * pad):.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{colour}" points="{" ".join(place(x, y) for x, y in line)}"/>'
        for line, colour in series
    )
    labels = "".join(
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="12">{text}</text>'
        for x, y, text in ((2, pad, f"{y1:.3f}"), (2, height - pad, f"{y0:.3f}"), (width - pad, height - 8, f"{x1:g}"))
    )
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}">{lines}{labels}</svg>'
