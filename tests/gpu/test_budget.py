"""The budget on a card: the allocator refuses what lies beyond, and a step that it refuses goes on in a safer way."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.runtime.budget import capped_allocator
from lowmem_ft.runtime.memory import cuda_process_bytes
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


class Exhausted(TorchDispatchMode):
    """From the N-th operation on the card gives no more memory, until it is told to.

    What the pool holds free is returned before, so that one of the next allocations fails in CUDA's own way.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left == 0:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(held)
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        """Operations so far, beyond the given number."""
        return -self._left


def test_memory_that_runs_out_anywhere_in_a_step_changes_nothing(tmp_path: Path) -> None:
    """At ten points of forward, loss, backward and update. Attention sums its gradients in any order: so two steps that
    nothing befell differ by as much (4e-5 of the norm on an H200)."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1376, "max_position_embeddings": LENGTH}
    model = save_tiny("llama", tmp_path / "llama", **sizes)
    of = policy(rows=2, seq_len=LENGTH, depth=2, keep=1, accumulation=2, loss_chunk_tokens=256)

    def stepped(number: int) -> tuple[Any, dict[str, Any], int, int]:
        gc.collect()
        torch.cuda.empty_cache()
        trained = Trained(model, of, length=LENGTH, device="cuda")
        torch.cuda.manual_seed(0)
        say = trained.recovery._say
        trained.recovery._say = lambda text: (torch.cuda.set_per_process_memory_fraction(1.0), say(text))[1]
        try:
            with Exhausted(number) as operations:
                result = trained.recovery.step(trained.batches, lr=1e-2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        state = {name: it.detach().cpu() for name, it in trained.ready.trainable.items()}
        return result, state, trained.recovery.repeated, operations.count

    expected, weights, _, operations = stepped(0)
    failed = 0
    for point in range(10):
        result, state, repeated, _ = stepped(1 + point * operations // 10)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5), point
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3), point
        for name, weight in weights.items():
            assert (state[name].float() - weight.float()).norm() <= 5e-2 * weight.float().norm() + 1e-6, (point, name)
        failed += repeated
    assert failed == 10


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
    beside = (cuda_process_bytes(0) or torch.cuda.memory_reserved()) - torch.cuda.memory_reserved()
    with capped_allocator(DEVICE, sum(peaks) // 2 + beside, beside=beside):
        result = trained.recovery.step(trained.batches, lr=1e-2)
    for one in results:
        assert result.loss == pytest.approx(one.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
    assert torch.cuda.max_memory_reserved() <= sum(peaks) // 2
    assert trained.recovery.policy.keep_blocks == 0
    assert trained.recovery.repeated == 2
