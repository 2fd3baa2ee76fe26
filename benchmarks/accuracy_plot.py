"""A picture of how right plans for a card are: `plan_accuracy.py`'s JSON as points and distributions.

It needs matplotlib:

    cd benchmarks && python accuracy_plot.py results/plan_accuracy_cuda.json results/plan_accuracy_cuda.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
KINDS = {"dense models": "tab:blue", "virtual tokens": "tab:green", "mixtures of experts": "tab:orange"}
WHAT = {"allocated": "bytes in tensors", "reserved": "reserved by the pool", "process": "the process"}


def kind_of(one: dict[str, Any]) -> str:
    from tests.models import MOE_ARCHITECTURES

    if one["architecture"] in MOE_ARCHITECTURES:
        return "mixtures of experts"
    prompted = "num_virtual_tokens" in one["sections"]["adapter"].get("peft", {})
    return "virtual tokens" if prompted else "dense models"


def draw(found: list[dict[str, Any]], title: str, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    above, below = figure.subplots(2, 3)
    for name, points, shares in zip(WHAT, above, below, strict=True):
        points.set_title(WHAT[name])
        for kind, colour in KINDS.items():
            those = [one for one in found if kind_of(one) == kind]
            errors = [100 * one[f"{name}_error"] for one in those]
            sizes = [one[f"{name}_bytes"] / 2**20 for one in those]
            points.scatter(sizes, errors, s=8, color=colour, label=f"{kind} ({len(those)})")
            shares.ecdf(errors, color=colour)
        points.axhline(0, color="black", linewidth=0.8)
        points.set(xscale="log", xlabel="measured, MiB", ylabel="planned beyond that, %")
        shares.axvline(0, color="black", linewidth=0.8)
        shares.set(xlabel="planned beyond what was measured, %", ylabel="share of the steps")
    above[0].legend()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description="a picture of plan_accuracy.py's JSON of a card")
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path, help="PNG or SVG")
    options = parser.parse_args()
    result = json.loads(options.json.read_text(encoding="utf-8"))
    found = [one for one in result["configurations"] if "events" in one]
    device = result["machine"]["device"]["name"]
    draw(found, f"Plans beside {len(found)} steps on an {device}, {result['date'][:10]}", options.picture)


if __name__ == "__main__":
    main()
