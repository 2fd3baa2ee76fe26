"""What a run may take, and how crossing it is seen. The caps themselves are tested on a card (tests/gpu)."""

from pathlib import Path

import pytest
import torch

from lowmem_ft.runtime import budget
from lowmem_ft.runtime.budget import OverBudgetError, Watch, allowed_share, capped_allocator, fill_pool
from lowmem_ft.runtime.memory import process_bytes, process_peak_bytes, reset_process_peak
from tests.models import tiny_model

MIB = 1 << 20


def test_the_pool_gets_what_the_budget_leaves_and_what_is_free() -> None:
    assert allowed_share(1000, 600, beside=100, free=900) == 0.5
    assert allowed_share(1000, 600, beside=100, free=300) == 0.3
    assert allowed_share(1000, 50, beside=100, free=900) == 0.0
    assert allowed_share(1000, 5000, beside=100, free=1200) == 1.0


def test_on_a_cpu_nothing_is_capped() -> None:
    with capped_allocator(torch.device("cpu"), 1, beside=0):
        assert torch.empty(MIB, dtype=torch.uint8).numel() == MIB


def test_the_pool_is_filled_up_by_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int | str] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 60 * MIB)
    monkeypatch.setattr(torch, "empty", lambda nbytes, **_: taken.append(nbytes))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: taken.append("not counted"))
    for size in (0, 60 * MIB, 100 * MIB):
        fill_pool(torch.device("cuda"), size)
    fill_pool(torch.device("cpu"), 100 * MIB)
    assert taken == [40 * MIB, "not counted"]


def test_a_peak_counts_from_its_reset() -> None:
    before = process_bytes()
    held = torch.ones(256 * MIB, dtype=torch.uint8)
    assert process_peak_bytes() > before + 200 * MIB
    del held
    assert process_peak_bytes() > before + 200 * MIB
    assert reset_process_peak()
    assert process_peak_bytes() < before + 100 * MIB


@pytest.mark.parametrize("resets", [True, False])
def test_blocks_look_before_they_work_and_after_gradients(resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resets:  # then what is taken at that moment counts
        monkeypatch.setattr(budget, "reset_process_peak", lambda: False)
    model = tiny_model("llama")
    ids = torch.arange(3, 11).unsqueeze(0)
    watch = Watch(model, process_bytes() + 4096 * MIB)
    loss = model(input_ids=ids, labels=ids).loss
    watch.budget = process_bytes() - MIB
    with pytest.raises(OverBudgetError, match="the process took"):
        loss.backward()
    with pytest.raises(OverBudgetError):
        model(input_ids=ids)
    assert watch.peak > watch.budget
    watch.remove()
    model(input_ids=ids)


def test_holes_of_the_heap_are_given_back_near_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nowhere else, as their pages are asked for again."""
    given_back: list[int] = []
    monkeypatch.setattr(budget, "release_freed_memory", lambda: given_back.append(1))
    model = tiny_model("llama")
    watch = Watch(model, process_bytes() + 4096 * MIB)
    model(input_ids=torch.arange(3, 11).unsqueeze(0))
    assert not given_back
    watch.budget = process_bytes() + 64 * MIB
    model(input_ids=torch.arange(3, 11).unsqueeze(0))
    assert len(given_back) == model.config.num_hidden_layers, "before each block"


def test_without_a_proc_file_system_no_peak_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert not reset_process_peak()
