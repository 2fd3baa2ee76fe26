"""Micro-batches that differ in length reserve no more of a card than is planned for the longest."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Plan
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.planner.verify import FullBatches
from lowmem_ft.runtime.budget import fill_pool
from lowmem_ft.step import train_step
from tests.gpu import run_alone
from tests.models import save_tiny

pytestmark = pytest.mark.gpu
TOKENS, LENGTH = 4096, 128


@pytest.mark.parametrize("expandable", [False, True], ids=["native", "expandable"])
def test_micro_batches_of_all_lengths_stay_inside_the_plan(expandable: bool) -> None:
    run_alone("tests.gpu.test_lengths", expandable=expandable)


def planned_and_stepped(folder: Path) -> Plan:
    """A plan for a micro-batch of `TOKENS`, after steps of fewer."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    model = save_tiny("llama", folder, vocab_size=2000, max_position_embeddings=LENGTH, **sizes)
    sections = {"data": {"seq_len": LENGTH, "packing": False}, "train": {"tokens_per_step": TOKENS}}
    pins = {"micro_batch_tokens": TOKENS, "loss_chunk_tokens": 256, "keep_blocks": 4}
    config = RunConfig.from_dict({"model": str(model), "policy": pins, **sections})
    plan = make_plan(config, device=find_device("cuda"))
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    ready = assemble(config, plan.policy, device)
    fill_pool(device, plan.predicted.pool_bytes)
    for rows in (1, 2, 4, 6, 8, 12, 16, 24, 32):
        shorter = replace(plan.policy, micro_batch_tokens=rows * LENGTH)
        train_step(ready, FullBatches(config, shorter, vocabulary=100), lr=1e-4)
    return plan


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        predicted = planned_and_stepped(Path(name)).predicted
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    print(f"{predicted}; reserved {reserved}, allocated {allocated}")
    assert allocated <= predicted.allocated_peak_bytes
    assert reserved <= predicted.reserved_peak_bytes
