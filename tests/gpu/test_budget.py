"""The budget on a card: the allocator refuses what lies beyond, and a step that it refuses goes on in a safer way."""

import gc
from pathlib import Path

import pytest
import torch

from lowmem_ft.runtime.budget import capped_allocator
from lowmem_ft.trainer.recovery import is_out_of_memory
from tests.models import save_tiny
from tests.unit.planner.policies import policy
from tests.unit.trainer.test_recovery import Trained

pytestmark = pytest.mark.gpu
DEVICE, LENGTH = torch.device("cuda"), 1024


def test_nothing_is_taken_beyond_the_budget() -> None:
    torch.cuda.empty_cache()
    beside, mib = 600 << 20, 1 << 20
    with capped_allocator(DEVICE, torch.cuda.memory_reserved() + beside + 4096 * mib, beside=beside):
        held = torch.empty(64 * mib, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            torch.empty(4096 * mib, dtype=torch.uint8, device=DEVICE)
        assert is_out_of_memory(raised.value)
    del held
    assert torch.empty(4096 * mib, dtype=torch.uint8, device=DEVICE).numel() == 4096 * mib


def test_a_step_that_does_not_fit_recomputes_instead(tmp_path: Path) -> None:
    """The cap lies between what keeping and what recomputing take."""
    model = save_tiny(
        "llama", tmp_path / "llama", num_hidden_layers=4, intermediate_size=4096, max_position_embeddings=LENGTH
    )
    policies = [policy(rows=4, seq_len=LENGTH, depth=4, keep=keep) for keep in (4, 0)]
    peaks, results = [], []
    for one in policies:
        trained = Trained(model, one, length=LENGTH, device="cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results.append(trained.recovery.step(trained.batches, lr=1e-2))
        peaks.append(torch.cuda.max_memory_reserved())
        del trained
        gc.collect()
    assert peaks[1] < 0.8 * peaks[0]
    trained = Trained(model, policies[0], length=LENGTH, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with capped_allocator(DEVICE, sum(peaks) // 2, beside=0):
        assert trained.recovery.step(trained.batches, lr=1e-2) == results[0] == results[1]
    assert torch.cuda.max_memory_reserved() <= sum(peaks) // 2
    assert trained.recovery.policy.keep_blocks == 0
    assert trained.recovery.repeated == 2
