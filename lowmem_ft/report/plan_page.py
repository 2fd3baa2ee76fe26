"""A plan as one self-contained HTML page: no script is needed to read it, and nothing is loaded from anywhere."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from lowmem_ft.core.plan import Candidate, Plan, Sample
from lowmem_ft.core.plan_words import budget_words, cost_words, host_words, speed_words
from lowmem_ft.core.sizes import format_size

WIDTH, HEIGHT, LEFT, BOTTOM = 760.0, 300.0, 100.0, 34.0  # of a chart; room for the labels of its axes
COLOURS = {
    "base_weights": "#4c6ef5", "adapter": "#12b886", "gradients": "#82c91e", "optimizer": "#fab005",
    "activations": "#fd7e14", "loss": "#e64980", "workspace": "#be4bdb", "overhead": "#868e96",
}  # fmt: skip
TIERS = {"device_bytes": "#4c6ef5", "pinned_bytes": "#be4bdb", "host_bytes": "#12b886", "disk_bytes": "#868e96"}
PHASES = {"reference": "#868e96", "forward": "#4c6ef5", "loss": "#e64980", "backward": "#fd7e14", "update": "#12b886"}

_STYLE = """
:root{--ink:#1a1b1e;--paper:#fff;--soft:#5c5f66;--line:#ced4da;--card:#f8f9fa;--good:#2b8a3e;--bad:#c92a2a}
@media(prefers-color-scheme:dark){:root{--ink:#e9ecef;--paper:#141517;--soft:#a6a7ab;--line:#373a40;--card:#1f2023;
--good:#69db7c;--bad:#ff8787}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:52rem;margin:0 auto;
padding:1.2rem}
h1{font-size:1.5rem;line-height:1.25;margin:.6rem 0}h2{font-size:1.1rem;margin:2rem 0 .4rem}
p{margin:.3rem 0}.soft{color:var(--soft);font-size:.9rem}.good{color:var(--good)}.bad{color:var(--bad)}
svg{display:block;width:100%;height:auto;margin:.4rem 0;overflow:visible}svg text{fill:var(--ink);font-size:13px}
svg .soft{fill:var(--soft)}svg .axis{stroke:var(--line)}svg .limit{stroke:var(--bad);stroke-dasharray:6 4}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}
td,th{text-align:left;padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.8rem;overflow-x:auto;
font-size:.85rem}
.key{display:inline-block;margin-right:1rem;font-size:.85rem;white-space:nowrap}
.key i{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.35rem;vertical-align:-1px}
@media(max-width:560px){svg text{font-size:19px}}
@media print{body{max-width:none}pre{white-space:pre-wrap}}
"""


def plan_page(plan: Plan, *, dataset_tokens: int | None = None, price_per_hour: float | None = None) -> str:
    """The page as HTML text.

    Args:
        dataset_tokens: of one epoch, to say how long it takes.
        price_per_hour: of the device, to say what it costs.
    """
    parts = [
        _headline(plan, cost_words(plan, dataset_tokens, price_per_hour)),
        "<h2>What fills the memory</h2>",
        _breakdown(plan),
        "<h2>Memory by phase</h2>",
        _phases(plan),
        "<h2>One training step</h2>",
        _timeline(plan),
        "<h2>Memory against speed</h2>",
        _frontier(plan),
        _changes(plan) if plan.changes else "",
        "<h2>Run it</h2>",
        _commands(plan),
    ]
    title = html.escape(f"{plan.model['name']} on {plan.device['name']}")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _headline(plan: Plan, cost: str) -> str:
    budget, peak = plan.budget["device_bytes"], plan.predicted.process_peak_bytes
    answer = "fits" if plan.fits else "does not fit"
    model = f"{plan.model['name']} ({plan.model['parameters'] / 1e9:,.2f}B parameters)"
    words = [
        f'<h1>{html.escape(model)} <span class="{"good" if plan.fits else "bad"}">{answer}</span> '
        f"{html.escape(budget_words(plan))}</h1>",
        f"<p>The process peaks at <b>{html.escape(format_size(peak))}</b>, {peak / budget:.0%} of the budget"
        f"{html.escape(host_words(plan))}. "
        f"{html.escape(speed_words(plan))}{html.escape(cost)}</p>",
        f"<p>{html.escape(plan.policy.describe())}</p>",
        f'<p class="soft">{html.escape(plan.reason)}</p>',
    ]
    return "".join(words)


def _breakdown(plan: Plan) -> str:
    """One stacked bar up to the budget, and its parts as a table."""
    total = sum(plan.breakdown.values())
    budget = plan.budget["device_bytes"]
    across = (WIDTH - 2) / (max(total, budget) * 1.02)
    bars, at = [], 1.0
    for name, nbytes in plan.breakdown.items():
        width = nbytes * across
        title = _title(f"{_words(name)}: {format_size(nbytes)}")
        bars.append(f'<rect x="{at:.1f}" y="6" width="{width:.1f}" height="40" fill="{COLOURS[name]}">{title}</rect>')
        at += width
    limit = 1 + budget * across
    line = f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="54" stroke-width="2"/>'
    label = f'<text x="{limit - 4:.1f}" y="70" text-anchor="end">budget {html.escape(format_size(budget))}</text>'
    chart = _svg("breakdown", "Bytes by what holds them, against the budget", 78, "".join(bars) + line + label)
    rows = [
        (f'<span class="key"><i style="background:{COLOURS[name]}"></i>{_words(name)}</span>', format_size(nbytes),
         f"{nbytes / max(total, 1):.1%}")
        for name, nbytes in plan.breakdown.items() if nbytes
    ]  # fmt: skip
    return chart + _table(("", "bytes", "share"), rows)


def _phases(plan: Plan) -> str:
    """A bar of each tier in each phase that is planned."""
    planned = [(phase, sizes) for phase, sizes in plan.phases.items() if any(sizes.values())]
    if not planned:
        return "<p>No phase was planned.</p>"
    budget = plan.budget["device_bytes"]
    most = max([budget, *(nbytes for _, sizes in planned for nbytes in sizes.values())]) * 1.02
    across, parts, y = (WIDTH - LEFT) / most, [], 8.0
    for phase, sizes in planned:
        parts.append(f'<text x="{LEFT - 8}" y="{y + 14:.0f}" text-anchor="end">{html.escape(phase)}</text>')
        for tier, nbytes in sizes.items():
            if nbytes:
                title = _title(f"{phase}, {_tier(tier)}: {format_size(nbytes)}")
                parts.append(
                    f'<rect x="{LEFT}" y="{y:.0f}" width="{nbytes * across:.1f}" height="16" fill="{TIERS[tier]}">'
                    f'{title}</rect><text class="soft" x="{LEFT + nbytes * across + 5:.1f}" y="{y + 13:.0f}">'
                    f"{html.escape(format_size(nbytes))}</text>"
                    if nbytes * across < WIDTH - LEFT - 80
                    else f'<rect x="{LEFT}" y="{y:.0f}" width="{nbytes * across:.1f}" height="16" fill="{TIERS[tier]}">'
                    f'{title}</rect><text x="{LEFT + nbytes * across - 5:.1f}" y="{y + 13:.0f}" text-anchor="end" '
                    f'style="fill:#fff">{html.escape(format_size(nbytes))}</text>'
                )
                y += 19
        y += 9
    limit = LEFT + budget * across
    parts.append(f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{y:.0f}" stroke-width="2"/>')
    used = {tier for _, sizes in planned for tier, nbytes in sizes.items() if nbytes}
    keys = _keys((_tier(tier), colour) for tier, colour in TIERS.items() if tier in used)
    return _svg("phases", "Peak of each tier in each phase", y + 4, "".join(parts)) + keys


def _timeline(plan: Plan) -> str:
    """Bytes in tensors over one step, by phase, with the blocks on the axis."""
    if not plan.timeline:
        return "<p>No step was traced.</p>"
    samples, most = plan.timeline, max(sample.nbytes for sample in plan.timeline)
    room = plan.budget["device_bytes"] - plan.breakdown["overhead"]
    top = max(most, room) * 1.05
    step = (WIDTH - LEFT) / max(1, len(samples) - 1)

    def y(nbytes: float) -> float:
        return (HEIGHT - BOTTOM) * (1 - nbytes / top)

    parts = [_axis(top)]
    for start, end, phase in _runs(samples):
        points = [(LEFT + at * step, y(samples[at].nbytes)) for at in range(start, min(end + 1, len(samples)))]
        outline = " ".join(f"{a:.1f},{b:.1f}" for a, b in [(points[0][0], y(0)), *points, (points[-1][0], y(0))])
        colour = PHASES.get(phase, "#868e96")
        parts.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity=".75">{_title(phase)}</polygon>')
    blocks = [(at, s.block) for at, s in enumerate(samples) if s.block is not None]
    starts = [
        (at, block) for (at, block), (_, before) in zip(blocks, [(0, None), *blocks], strict=False) if block != before
    ]
    for at, block in starts[:: max(1, len(starts) // 14)]:
        x = LEFT + at * step
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y(0):.0f}" y2="{y(0) + 5:.0f}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{y(0) + 19:.0f}" text-anchor="middle">{block}</text>')
    highest = max(range(len(samples)), key=lambda at: samples[at].nbytes)
    where = samples[highest]
    parts.append(f'<circle cx="{LEFT + highest * step:.1f}" cy="{y(most):.1f}" r="4" fill="var(--ink)"/>')
    parts.append(
        f'<line class="limit" x1="{LEFT}" x2="{WIDTH}" y1="{y(room):.1f}" y2="{y(room):.1f}" stroke-width="2"/>'
    )
    at_work = "" if where.block is None else f", block {where.block}"
    note = (
        f'<p class="soft">Bytes in tensors on the device; numbers: blocks; dashed: what the budget leaves for tensors. '
        f"Peak {html.escape(format_size(most))} in {html.escape(where.phase)}{at_work}.</p>"
    )
    chart = _svg("timeline", "Device memory during one training step", HEIGHT, "".join(parts))
    return chart + _keys(PHASES.items()) + note


def _frontier(plan: Plan) -> str:
    """Every policy that no other beats in both, the chosen one marked."""
    points = [*plan.frontier]
    if not points:
        return "<p>No other policy was weighed.</p>"
    budget = plan.budget["device_bytes"]
    right = max([budget, *(p.process_peak_bytes for p in points)]) * 1.03
    if right > 3 * budget:  # far beyond the budget nobody looks
        points = [p for p in points if p.process_peak_bytes <= 3 * budget] or points[:1]
        right = max([budget, *(p.process_peak_bytes for p in points)]) * 1.03
    left = min(p.process_peak_bytes for p in points) * 0.97
    top = max([plan.predicted.tokens_per_second, *(p.tokens_per_second for p in points)]) * 1.08

    def place(size: float, speed: float) -> tuple[float, float]:
        return (
            LEFT + (size - left) / ((right - left) or 1) * (WIDTH - LEFT - 10),
            (HEIGHT - BOTTOM) * (1 - speed / top),
        )

    parts = [_axis(top, bytes_=False)]
    for share in (0.0, 0.5, 1.0):
        x = LEFT + share * (WIDTH - LEFT - 10)
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        size = html.escape(format_size(left + share * (right - left)))
        parts.append(f'<text class="soft" x="{x:.0f}" y="{HEIGHT - 10:.0f}" text-anchor="{anchor}">{size}</text>')
    for candidate in points:
        x, y = place(candidate.process_peak_bytes, candidate.tokens_per_second)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#4c6ef5">{_title(_price(candidate))}</circle>')
    x, y = place(plan.predicted.process_peak_bytes, plan.predicted.tokens_per_second)
    chosen = _title(f"chosen: {plan.policy.describe()}")
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="#fd7e14" stroke="var(--ink)">{chosen}</circle>')
    limit = place(budget, 0)[0]
    parts.append(
        f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{HEIGHT - BOTTOM:.0f}" stroke-width="2"/>'
    )
    chart = _svg("frontier", "Tokens per second against peak memory", HEIGHT, "".join(parts))
    keys = _keys((("best of their size", "#4c6ef5"), ("chosen", "#fd7e14")))
    note = '<p class="soft">Dashed: the budget. Up: tokens per second; across: peak of the process.</p>'
    rows = [
        (
            html.escape(format_size(c.process_peak_bytes)),
            f"{c.tokens_per_second:,.0f}",
            html.escape(c.policy.describe()),
        )
        for c in plan.alternatives
    ]
    table = "<h2>Safer alternatives</h2>" + _table(("peak", "tokens/s", "policy"), rows) if rows else ""
    return chart + keys + note + table


def _changes(plan: Plan) -> str:
    rows = [
        (html.escape(format_size(c.process_peak_bytes)), f"{c.tokens_per_second:,.0f}",
         f"<code>{html.escape(f'{c.key}={c.value}')}</code>")
        for c in plan.changes
    ]  # fmt: skip
    return "<h2>What would make it fit</h2>" + _table(("peak", "tokens/s", "change"), rows)


def _commands(plan: Plan) -> str:
    """A config file with what differs from the defaults, and the commands that use it."""
    config = plan.run_config.model_dump(mode="json", exclude_defaults=True)
    config.setdefault("data", {}).setdefault("train", "train.jsonl")
    config.setdefault("budget", {})["memory"] = plan.budget["device_bytes"]
    text = yaml.safe_dump(config, sort_keys=False)
    model = shlex.quote(plan.config["model"])
    lines = f"# run.yaml\n{text}\nlowmem-ft train run.yaml\nlowmem-ft plan {model} --html plan.html"
    overrides = [
        shlex.quote(f"{key}={_inline(value)}") for key, value in _flat(config) if key not in ("model", "data.train")
    ]
    return f"<pre>{html.escape(' '.join([lines, *overrides]))}</pre>"


def _flat(config: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Keys of sections by themselves, as overrides name them; names in a mapping may have dots of their own."""
    for name, section in config.items():
        if isinstance(section, dict):
            yield from ((f"{name}.{key}", value) for key, value in section.items())
        else:
            yield name, section


def _inline(value: Any) -> str:
    """A value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _runs(samples: Sequence[Sample]) -> Iterable[tuple[int, int, str]]:
    """(first, past the last, phase) of neighbouring samples of one phase."""
    start = 0
    for at in range(1, len(samples) + 1):
        if at == len(samples) or samples[at].phase != samples[start].phase:
            yield start, at, samples[start].phase
            start = at


def _axis(top: float, *, bytes_: bool = True) -> str:
    """Lines and labels of a quarter each, up to `top`."""
    parts = []
    for quarter in range(5):
        y = (HEIGHT - BOTTOM) * (1 - quarter / 4)
        label = format_size(top * quarter / 4) if bytes_ else f"{top * quarter / 4:,.0f}"
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{html.escape(label)}</text>')
    return "".join(parts)


def _svg(name: str, what: str, height: float, inner: str) -> str:
    what = html.escape(what)
    return (
        f'<svg id="{name}" role="img" aria-label="{what}" viewBox="0 0 {WIDTH:.0f} {height:.0f}">'
        f"<title>{what}</title>{inner}</svg>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; all but the first and last column hold numbers."""
    lines = [("th", header), *(("td", row) for row in rows)]
    cells = "".join(
        "<tr>" + "".join(f"<{tag}{_numeric(cell)}>{cell}</{tag}>" for cell in line) + "</tr>" for tag, line in lines
    )
    return f'<div class="wide"><table>{cells}</table></div>'


def _numeric(cell: str) -> str:
    return ' class="n"' if cell[:1].isdigit() else ""


def _keys(entries: Iterable[tuple[str, str]]) -> str:
    items = (
        f'<span class="key"><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in entries
    )
    return f"<p>{''.join(items)}</p>"


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _price(candidate: Candidate) -> str:
    size, speed = format_size(candidate.process_peak_bytes), f"{candidate.tokens_per_second:,.0f} tokens/s"
    return f"{size}, {speed}: {candidate.policy.describe()}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _tier(name: str) -> str:
    return name.removesuffix("_bytes")
