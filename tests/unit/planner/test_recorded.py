"""Plans for a card against what that card took, as benchmarks/plan_accuracy.py recorded it on an H200 (2026-11-26).

Since then parameters share memory and packed documents need no mask, which no card has recorded yet. So what was packed
is left out, and bytes may differ a little both ways.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plan_accuracy import judged_cuda, recorded_lines

RECORDED = Path(__file__).parents[3] / "benchmarks" / "results" / "recorded_h200.jsonl.gz"
INDICES = (4, 5, 7)  # qwen2 with a learned prompt; bloom; qwen3


@pytest.mark.parametrize("index", INDICES)
def test_what_a_card_took_was_planned(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as it was recorded
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    (line,) = [it for it in recorded_lines(RECORDED) if json.loads(it)["index"] == index]
    one = judged_cuda(line)
    assert -0.0001 <= one["allocated_error"] <= 0.001
    for kind in ("reserved", "process"):
        assert 0.0 <= one[f"{kind}_error"] <= 0.03
    assert one["events"]["equal"] > one["events"]["differing"]
