"""Mixtures of experts: the peak that is simulated without knowing the routing, against real steps of several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner.simulate import simulate
from lowmem_ft.planner.verify import FullBatches, measured_train_peak
from lowmem_ft.runtime import expert_tiles, experts
from tests.models import MOE_ARCHITECTURES, tiny_model
from tests.unit.planner.sampler import policy_of

LENGTH, ROWS = 192, 3  # 1152 pairs: tiles of 512 rows and, where all go to the same two experts, one of 64 after each
ROUTERS = ("gate.weight", "router.weight")

ROUTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda weight: weight,
    "all to the same": torch.zeros_like,  # equal scores for every token, so what decides is the same for all of them
}


def routed(name: str, routing: str, folder: Path) -> int:
    """Save a tiny model that routes so; the number of its blocks."""
    model = tiny_model(name, max_position_embeddings=256)
    routers = [weight for key, weight in model.named_parameters() if key.endswith(ROUTERS)]
    assert routers
    for weight in routers:
        weight.data.copy_(ROUTINGS[routing](weight.data))
    model.save_pretrained(folder)
    return int(model.config.num_hidden_layers)


def settings(folder: Path, activations: str, together: int) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": str(folder),
            "adapter": {"rank": 4, "targets": "all-linear"},
            "data": {"seq_len": LENGTH},
            "train": {"tokens_per_step": LENGTH * ROWS},
            "policy": {
                "activations": activations,
                "micro_batch_tokens": LENGTH * ROWS,
                "loss_chunk_tokens": 64,
                "experts_together": together,
            },
        }
    )


@pytest.mark.parametrize(("routing", "activations"), [("as drawn", "keep"), ("all to the same", "recompute")])
@pytest.mark.parametrize("name", sorted(MOE_ARCHITECTURES))
def test_peak_is_never_under_and_close(name: str, activations: str, routing: str, tmp_path: Path) -> None:
    depth = routed(name, routing, tmp_path)
    config = settings(tmp_path, activations, 1)
    policy = policy_of(config, depth)
    batches = FullBatches(config, policy, vocabulary=100)
    simulated = simulate(config, policy, kind="cpu", loss_tokens=batches[0].loss_tokens).train_peak
    measured = measured_train_peak(config, policy, batches)
    assert 0 <= simulated / measured - 1 <= 0.02, (simulated, measured)


@pytest.mark.parametrize(
    ("routing", "activations"), [("as drawn", "keep"), ("all to the same", "keep"), ("all to the same", "recompute")]
)
@pytest.mark.parametrize("name", sorted(MOE_ARCHITECTURES))
def test_several_experts_at_once(
    name: str, activations: str, routing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never under, whatever they are given; and close where the simulation is told what they are given."""
    depth = routed(name, routing, tmp_path)
    config = settings(tmp_path, activations, 3)
    policy = policy_of(config, depth)
    batches = FullBatches(config, policy, vocabulary=100)
    seen: list[list[int]] = []
    own = expert_tiles._counts

    def noted(expert_P: Tensor, experts: int) -> list[int] | None:
        seen.append(own(expert_P, experts) or [])
        return seen[-1]

    with monkeypatch.context() as patched:
        patched.setattr(expert_tiles, "_counts", noted)
        measured = measured_train_peak(config, policy, batches)
    simulated = simulate(config, policy, kind="cpu", loss_tokens=batches[0].loss_tokens).train_peak
    assert simulated >= measured
    if routing == "as drawn":  # another one in each layer; blocks of the same kind are traced once
        return
    told = {sum(counts): counts for counts in seen}  # by all pairs of the micro-batch
    monkeypatch.setattr(expert_tiles, "_counts", lambda expert_P, _: told.get(expert_P.numel()))
    monkeypatch.setattr(experts, "traced_tiles", lambda rows: [1] * len(rows))
    simulated = simulate(config, policy, kind="cpu", loss_tokens=batches[0].loss_tokens).train_peak
    assert 0 <= simulated / measured - 1 <= 0.02, (simulated, measured)
