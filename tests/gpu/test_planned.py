"""What is planned for a step on CUDA against what the card takes: workspaces, peaks, and event by event.

Each setting of the allocator has a process of its own.
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.plan_accuracy import CUDA_LENGTHS, CUDA_SHAPES, CUDA_TOGETHERS
from lowmem_ft.data.packing import as_bounds
from lowmem_ft.planner.alloc_conf import expandable_segments
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.measure import measure as measure_profile
from lowmem_ft.planner.profile import write_profile
from lowmem_ft.planner.verify import FullBatches
from lowmem_ft.planner.workspaces import architecture_of, derived_workspaces, measured_workspaces
from tests.gpu import run_alone
from tests.unit.planner.on_cuda import judge, measure, predict
from tests.unit.planner.sampler import draw, prepared

pytestmark = pytest.mark.gpu
# The planner's promise for reserved bytes. Without segments that grow torch 2.11 chooses between free blocks by the
# addresses that the driver gave, of which no plan knows: 0.2% more was measured on an H200
UNDER, OVER, BY_ADDRESS = 0.0, 0.03, -0.01


def test_workspaces_are_those_of_the_architecture() -> None:
    measured = measured_workspaces(torch.device("cuda"))
    derived = derived_workspaces(architecture_of(torch.cuda.get_device_capability()))
    assert measured == {name: figure.value for name, figure in derived}
    assert measured_workspaces(torch.device("cuda")) == measured, "measured anew, whatever was there before"


def test_a_measured_profile_plans_as_the_card_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_ft.planner.measure.SECONDS", 0.01)
    card = find_device("cuda")
    write_profile(measure_profile(card), tmp_path / "own.yaml")
    known = find_device(str(tmp_path / "own.yaml"))
    for name in ("forward_workspace", "bias_workspace", "backward_workspace", "compute_capability", "sm_count"):
        assert getattr(known, name) == getattr(card, name)
    assert known.process_bytes >= card.process_bytes


@pytest.mark.parametrize("expandable", [False, True], ids=["native", "expandable"])
@pytest.mark.parametrize("seed", range(6))
def test_steps_take_what_was_planned(seed: int, expandable: bool) -> None:
    run_alone("tests.gpu.test_planned", seed, expandable=expandable)


def judged(seed: int) -> dict[str, Any]:
    drawn = draw(random.Random(seed), CUDA_SHAPES["small"], CUDA_LENGTHS, CUDA_TOGETHERS)
    card = find_device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        config, policy = prepared(drawn, Path(folder))
        batches = FullBatches(config, policy, vocabulary=100)
        if policy.compute_dtype == "float32":
            # documents attend one by one then, and each beside the longest has a call of its own, which no plan counts
            rows, length = batches[0].input_ids.shape
            bounds = as_bounds([row * length for row in range(rows + 1)])
            batches = [replace(batch, bounds=bounds) for batch in batches]
        predicted = predict(config, policy, card, loss_tokens=batches[0].loss_tokens)
        return {**drawn, **judge(predicted, *measure(config, policy, card, batches)[:2])}


if __name__ == "__main__":
    one = judged(int(sys.argv[1]))
    print(one)
    under = UNDER if expandable_segments() or not torch.__version__.startswith("2.11.") else BY_ADDRESS
    for kind in ("allocated", "reserved"):
        assert under <= one[f"{kind}_error"] <= OVER, (kind, one["first_difference"])
    # in another order, such as that of updates, the same bytes are missing and too many
    assert sum(missing - surplus for missing, surplus in one["by_op"].values()) <= 1 << 20, one["by_op"]
