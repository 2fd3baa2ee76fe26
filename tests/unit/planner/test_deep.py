"""Plans for models that are deeper than what is traced of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner.solver import make_plan
from tests.models import tiny_config
from tests.unit.planner.sampler import DENSE, sizes_of

BLOCKS = 6


@pytest.mark.parametrize("name", DENSE)
def test_on_a_card_what_is_said_to_be_the_least_is_enough(name: str, tmp_path: Path) -> None:
    """Where no block keeps, one stands at the end that was traced with another one behind it."""
    tiny_config(name, **sizes_of(name, (48, 80, BLOCKS, 131), 128)).save_pretrained(tmp_path)

    def planned(budget: int) -> tuple[bool, int]:
        sections = {"data": {"seq_len": 64, "packing": name != "bloom"}, "train": {"tokens_per_step": 128}}
        plan = make_plan(
            RunConfig.from_dict(
                {"model": str(tmp_path), "budget": {"device": "rtx-3090-24gb", "memory": budget}, **sections}
            )
        )
        policy = plan.policy
        assert policy.keep_blocks + policy.recompute_blocks + policy.offload_blocks == BLOCKS
        return plan.fits, plan.predicted.process_peak_bytes

    fits, least = planned(1)
    assert not fits
    assert planned(least) == (True, least)
