"""Plans for a card against what it took, an H200 (2026-11-26 and -28), as benchmarks/plan_accuracy.py wrote it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plan_accuracy import judged_cuda, recorded_lines

RECORDED = Path(__file__).parents[3] / "benchmarks" / "results" / "recorded_h200.jsonl.gz"
# Of every precision and compute dtype, packed and not, of each way below and of models that attend in their own ways;
# the last three took a segment more than plans once said, which did not know what an operator takes before its result
INDICES = (1, 2, 3, 4, 5, 7, 12, 22, 33, 34, 43, 58, 59, 68, 113, 117, 134, 162, 297)


@pytest.mark.parametrize("index", INDICES)
def test_what_a_card_took_was_planned(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)  # judging sets them as they were recorded
    (line,) = [it for it in recorded_lines(RECORDED) if json.loads(it)["index"] == index]
    one = judged_cuda(line)
    assert 0.0 <= one["allocated_error"] <= 0.001
    for kind in ("reserved", "process"):
        assert 0.0 <= one[f"{kind}_error"] <= 0.03
    assert one["events"]["equal"] > one["events"]["differing"]
