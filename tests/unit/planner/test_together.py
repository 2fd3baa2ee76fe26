"""How many experts of a mixture work at once: on a card as many as make a step faster and fit, on a CPU one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Plan
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.reserve import process_peak
from lowmem_ft.planner.search import Search
from lowmem_ft.planner.solver import make_plan
from tests.models import tiny_config
from tests.unit.planner.test_least import CPU

CARD = find_device("rtx-4090-24gb")
SIZES = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4,
    "num_hidden_layers": 4, "vocab_size": 20000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    large = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 1}
    shapes: dict[str, tuple[str, dict[str, int]]] = {
        "mixture": ("qwen3_moe", SIZES), "large": ("mixtral", large), "dense": ("llama", {}),
    }  # fmt: skip
    for name, (architecture, sizes) in shapes.items():
        tiny_config(architecture, **sizes).save_pretrained(folder / name)  # a plan reads no weights
    return {name: folder / name for name in shapes}


def config(model: Path, **sections: Any) -> RunConfig:
    data = {"data": {"seq_len": 2048}, "train": {"tokens_per_step": 4096}}
    return RunConfig.from_dict({"model": str(model), **data, **sections})


def test_on_a_card_calls_are_fewer(models: dict[str, Path]) -> None:
    plan = make_plan(config(models["mixture"]), device=CARD)
    alone = make_plan(config(models["mixture"], policy={"experts_together": 1}), device=CARD)
    assert plan.policy.experts_together == 16
    assert alone.policy.experts_together == 1
    assert plan.predicted.step_seconds < 0.4 * alone.predicted.step_seconds
    assert "16 experts together" in plan.policy.describe()
    assert Plan.from_dict(plan.to_dict()).policy == plan.policy


def test_what_fits_one_by_one_is_not_refused(models: dict[str, Path]) -> None:
    """And of what fits the fastest is found, between the smallest of all and the fastest of all."""
    search = Search(config(models["mixture"]), CARD, 4)
    exact = []
    for together in search.choices.togethers(CARD.memory_bytes):
        for rows in (1, 2):
            sized = replace(search.least, micro_batch_tokens=2048 * rows, accumulation=2 // rows)
            for keep in (0, 2, 4):
                base = replace(sized, experts_together=together)
                weighed = search.scales.weigh(search.choices.blocks(base, keep, streamed=0))
                exact.append((process_peak(CARD, search.scales, weighed).process, weighed.seconds))
    sizes = sorted(size for size, _ in exact)
    for budget in (sizes[0], sizes[len(sizes) // 2], sizes[-1] + 2**20):
        answer = search.best(budget)
        assert answer.fits
        assert answer.weighed.seconds <= 1.05 * min(seconds for size, seconds in exact if size <= budget)
    refused = search.best(int(0.8 * sizes[0]))
    assert not refused.fits
    assert refused.weighed.policy.experts_together == 1
    smallest = Search(config(models["mixture"], policy={"objective": "memory"}), CARD, 4).best(2**34)
    assert smallest.weighed.policy.experts_together == 1


def test_large_experts_keep_a_card_busy_alone(models: dict[str, Path]) -> None:
    search = Search(config(models["large"]), CARD, 4)
    assert search.choices.togethers(2**34) == (1, 4), "four slices of 8 million values"
    assert search.choices.togethers(2**31) == (1,)


def test_pinned_or_without_effect(models: dict[str, Path]) -> None:
    assert make_plan(config(models["mixture"]), device=CPU).policy.experts_together == 1
    for pinned, expected in ((3, 3), (100, 32)):
        asked = config(models["mixture"], policy={"experts_together": pinned})
        assert make_plan(asked, device=CPU).policy.experts_together == expected
        assert make_plan(asked, device=CARD).policy.experts_together == expected
    with pytest.warns(UserWarning, match="experts_together has no effect on a model without experts"):
        plan = make_plan(config(models["dense"], policy={"experts_together": 4}), device=CARD)
    assert plan.policy.experts_together == 1
