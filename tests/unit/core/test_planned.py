"""What is said after the first step: planned against measured, with a warning beyond three percent, or fifteen where a
CPU takes less than its plan, which is an estimate."""

from __future__ import annotations

import dataclasses

import pytest

from lowmem_ft.core.plan_words import planned_against_measured
from tests.unit.core.test_plan import PLAN

MIB = 2**20


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("measured", "words", "warns"),
    [
        (1000, "+0.0%", False),
        (1029, "+2.9%", False),
        (1031, "+3.1%", True),
        (950, "-5.0%", "on a card"),
        (840, "-16.0%", True),
    ],
)
def test_planned_against_measured(kind: str, measured: int, words: str, warns: bool | str) -> None:
    """On CUDA of what is reserved, which PyTorch can tell; on a CPU of the process."""
    right, wrong = 1000 * MIB, 1 * MIB
    sizes = {"process_peak_bytes": right, "reserved_peak_bytes": wrong}
    if kind == "cuda":
        sizes = {"process_peak_bytes": wrong, "reserved_peak_bytes": right}
    plan = dataclasses.replace(
        PLAN, device={"name": "d", "kind": kind}, predicted=dataclasses.replace(PLAN.predicted, **sizes)
    )
    said = planned_against_measured(plan, measured * MIB)
    warned = kind == "cuda" if warns == "on a card" else warns
    assert words in said
    assert ("Warning" in said) == warned
    assert ("less than planned" in said) == (warned and measured < 1000)
