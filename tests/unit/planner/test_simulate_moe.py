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
from tests.models import MOE_ARCHITECTURES, tiny_model
from tests.unit.planner.sampler import policy_of

LENGTH, ROWS = 192, 3  # 1152 pairs: tiles of 512 rows and, where all go to the same two experts, one of 64 after each
ROUTERS = ("gate.weight", "router.weight")

ROUTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda weight: weight,
    "all to the same": torch.zeros_like,  # equal scores for every token, so what decides is the same for all of them
}


@pytest.mark.parametrize(("routing", "activations"), [("as drawn", "keep"), ("all to the same", "recompute")])
@pytest.mark.parametrize("name", sorted(MOE_ARCHITECTURES))
def test_peak_is_never_under_and_close(name: str, activations: str, routing: str, tmp_path: Path) -> None:
    model = tiny_model(name, max_position_embeddings=256)
    routers = [weight for key, weight in model.named_parameters() if key.endswith(ROUTERS)]
    assert routers
    for weight in routers:
        weight.data.copy_(ROUTINGS[routing](weight.data))
    model.save_pretrained(tmp_path)
    config = RunConfig.from_dict(
        {
            "model": str(tmp_path),
            "adapter": {"rank": 4, "targets": "all-linear"},
            "data": {"seq_len": LENGTH},
            "train": {"tokens_per_step": LENGTH * ROWS},
            "policy": {
                "activations": activations,
                "micro_batch_tokens": LENGTH * ROWS,
                "loss_chunk_tokens": 64,
            },
        }
    )
    policy = policy_of(config, model.config.num_hidden_layers)
    batches = FullBatches(config, policy, vocabulary=100)
    simulated = simulate(config, policy, kind="cpu", loss_tokens=batches[0].loss_tokens).train_peak
    measured = measured_train_peak(config, policy, batches)
    assert 0 <= simulated / measured - 1 <= 0.02, (simulated, measured)
