"""Where plans have MLPs run their activation function again, and what that buys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Plan
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.planner.verify import FullBatches, measured_train_peak
from tests.models import save_tiny

CARD = "rtx-3090-24gb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 1024}
    return save_tiny("llama", tmp_path_factory.mktemp("models"), max_position_embeddings=4096, **sizes)


def planned(folder: Path, memory: int | None, device: str = CARD, **policy: Any) -> Plan:
    sections = {"data": {"seq_len": 2048}, "train": {"tokens_per_step": 8192}, "policy": policy}
    config = RunConfig.from_dict({"model": str(folder), "budget": {"memory": memory}, **sections})
    return make_plan(config, device=find_device(device))


def test_where_memory_is_short_more_blocks_keep(folder: Path) -> None:
    whole = planned(folder, None)
    assert (whole.policy.keep_blocks, whole.policy.recompute_mlp_act) == (6, False), "there is room for all of it"
    context = find_device(CARD).process_bytes
    some = faster = 0
    for share in (0.5, 0.7, 0.8, 0.9):
        budget = round(context + share * (whole.predicted.process_peak_bytes - context))
        plan, plain = planned(folder, budget), planned(folder, budget, recompute_mlp_act=False)
        assert plan.fits
        assert not plain.policy.recompute_mlp_act
        # what was weighed exactly, in turn of what estimates say: of two plans as fast either may be found
        assert plan.predicted.step_seconds <= 1.01 * plain.predicted.step_seconds
        some += plan.policy.recompute_mlp_act and plan.policy.keep_blocks > plain.policy.keep_blocks
        faster += plan.predicted.step_seconds < 0.99 * plain.predicted.step_seconds
    assert some >= 3
    assert faster >= 3


def test_it_is_pinned(folder: Path) -> None:
    plan = planned(folder, None, recompute_mlp_act=True)
    assert plan.policy.recompute_mlp_act
    assert "6 keep but activation functions" in plan.policy.describe()
    assert plan.predicted.allocated_peak_bytes < planned(folder, None).predicted.allocated_peak_bytes
    assert not planned(folder, None, "cpu", recompute_mlp_act=False).policy.recompute_mlp_act


def test_on_a_cpu_it_is_always_so(folder: Path) -> None:
    """Pages of fresh memory cost as much as what is computed again; and the step takes what was planned."""
    plan = planned(folder, None, "cpu", loss_chunk_tokens=256, micro_batch_tokens=2048)
    assert (plan.policy.keep_blocks, plan.policy.recompute_mlp_act) == (6, True)
    config = plan.run_config
    measured = measured_train_peak(config, plan.policy, FullBatches(config, plan.policy, vocabulary=1024))
    assert measured <= plan.predicted.allocated_peak_bytes <= 1.02 * measured


def test_a_model_without_plain_mlps_is_told(tmp_path: Path) -> None:
    mixture = save_tiny("mixtral", tmp_path)
    config = RunConfig.from_dict(
        {"model": str(mixture), "policy": {"recompute_mlp_act": True}, "data": {"seq_len": 64}}
    )
    with pytest.warns(UserWarning, match="recompute_mlp_act has no effect"):
        plan = make_plan(config, device=find_device(CARD))
    assert not plan.policy.recompute_mlp_act
