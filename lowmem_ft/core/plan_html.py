"""A plan in a notebook: one HTML fragment that brings its own styles and takes its colours from the page around it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from lowmem_ft.core.plan_words import Listing, fit_words, host_words, listings, model_words, speed_words

if TYPE_CHECKING:
    from lowmem_ft.core.plan import Plan

GOOD, BAD, PART = "#2b8a3e", "#c92a2a", "#4c6ef5"  # dark enough for white text on them, and seen on black
GREY = "rgba(128,128,128,.3)"
# notebooks style every table: what is said here wins over that
TABLE = "border-collapse:collapse;table-layout:auto;width:auto;margin:0;font-size:inherit;color:inherit"
PILL = "color:#fff;border-radius:.3em;padding:0 .5em"
CELL = "padding:.1em 1.2em .1em 0;border:0;background:none;vertical-align:top"
LINE = f"border-top:1px solid {GREY};background:none"


def plan_html(plan: Plan) -> str:
    """The fragment; everything that comes from outside is escaped."""
    budget, peak = plan.budget["device_bytes"], plan.predicted.process_peak_bytes
    answer, colour = ("fits", GOOD) if plan.fits else ("does not fit", BAD)
    full = max(budget, peak)
    on = html.escape(f"{plan.device['name']}: peak {fit_words(plan)}, {peak / budget:.0%}{host_words(plan)}")
    sentences = (plan.policy.describe(), plan.reason, speed_words(plan))
    parts = [
        f'<div><b style="font-size:1.15em">{html.escape(model_words(plan))}</b></div>',
        f'<div><span style="background:{colour};{PILL}">{answer}</span> {on}</div>',
        f'<div style="max-width:40em">{_bar(peak / full, colour, mark=budget / full)}</div>',
        *(f"<div>{html.escape(sentence)}</div>" for sentence in sentences if sentence),
        '<div style="display:flex;flex-wrap:wrap;gap:0 3em">',
        *(_table(listing) for listing in listings(plan)),
        "</div>",
    ]
    return f'<div style="font:14px/1.6 system-ui,sans-serif;color:inherit">{"".join(parts)}</div>'


def _table(listing: Listing) -> str:
    right = [any(_is_number(cell) for cell in column) for column in zip(*listing.rows, strict=True)]
    lines = [("td", row) for row in listing.rows]
    lines = [("th", listing.header), *lines] if listing.header else lines
    rows = (
        f'<tr style="{LINE}">'
        + "".join(_cell(tag, cell, number) for cell, number in zip(line, right, strict=True))
        + "</tr>"
        for tag, line in lines
    )
    title = f'<div style="margin-top:.8em"><b>{html.escape(listing.title)}</b></div>'
    return f'<div style="overflow-x:auto">{title}<table style="{TABLE}">{"".join(rows)}</table></div>'


def _cell(tag: str, cell: str | float, number: bool) -> str:
    style = "text-align:right;white-space:nowrap" if number else "text-align:left"
    if isinstance(cell, float):
        return f'<{tag} style="{CELL};width:12em">{_bar(cell, PART)}</{tag}>'
    style += ";font-weight:normal;opacity:.7" if tag == "th" else ""
    return f'<{tag} style="{CELL};{style}">{html.escape(cell)}</{tag}>'


def _is_number(cell: str | float) -> bool:
    return isinstance(cell, str) and cell.lstrip("+-")[:1].isdigit()


def _bar(share: float, colour: str, *, mark: float | None = None) -> str:
    """A bar of which `share` is filled, and a line at `mark`."""
    line = f'<div style="position:absolute;left:{mark:.1%};top:0;bottom:0;border-left:2px solid"></div>' if mark else ""
    return (
        f'<div style="position:relative;background:{GREY};height:.9em;margin:.35em 0">'
        f'<div style="background:{colour};width:{share:.1%};height:100%"></div>{line}</div>'
    )
