"""A picture of a streamed step: when the card computes and when it copies, from `gpu.py`'s JSON.

It needs matplotlib:

    cd benchmarks && python timeline_plot.py results/gpu_h200.json results/streaming_h200.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = {"compute": "tab:blue", "copy": "tab:orange"}


def lanes(busy: list[list[Any]]) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """(what, stream) -> begin and length of each busy time, in milliseconds after the first."""
    first = min(begin for _, _, begin, _ in busy)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for what, stream, begin, end in busy:
        found.setdefault((what, stream), []).append(((begin - first) / 1e3, (end - begin) / 1e3))
    return found


def share_covered(busy: list[list[Any]]) -> float:
    """How much of the time in which something is copied the card computes as well."""
    computing = sorted((begin, end) for what, _, begin, end in busy if what == "compute")
    copying = [(begin, end) for what, _, begin, end in busy if what == "copy"]
    covered, until = 0.0, float("-inf")
    apart = []  # busy times of several streams, none of which overlap
    for begin, end in computing:
        if end > until:
            apart.append((max(begin, until), end))
            until = end
    for begin, end in copying:
        covered += sum(max(0.0, min(end, other_end) - max(begin, other)) for other, other_end in apart)
    return covered / sum(end - begin for begin, end in copying)


def draw(busy: list[list[Any]], title: str, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    axes = figure.subplots()
    rows = sorted(lanes(busy).items(), reverse=True)
    for at, ((what, _), times) in enumerate(rows):
        axes.broken_barh(times, (at - 0.4, 0.8), color=COLOURS[what])
    axes.set_yticks(range(len(rows)), [f"{what}, stream {stream}" for (what, stream), _ in rows])
    axes.set(xlabel="milliseconds", title=f"{title}; {share_covered(busy):.0%} of the copying beside computing")
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description="a picture of when a card computes and when it copies")
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path, help="PNG or SVG")
    options = parser.parse_args()
    result = json.loads(options.json.read_text(encoding="utf-8"))
    one = next(one for one in result["streaming"] if one.get("timeline"))
    title = f"A step of {one['tokens']} tokens, every block streamed, on an {result['card']}, {result['date'][:10]}"
    draw(one["timeline"], title, options.picture)


if __name__ == "__main__":
    main()
