"""Plans beside every policy of a space that the solver does not draw up: any number of blocks keep, recompute and
offload, in any micro-batch and loss chunk, with any of the vocabulary below, each weighed exactly."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.planner.alloc_conf import VARIABLES
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.search import Search
from tests.models import save_tiny

LAYERS = 3
SLACK = 1 << 17  # bytes: with some inputs on a CPU's disk instead of all, a step takes a few KiB less


def every_policy(search: Search) -> Iterator[Policy]:
    for rows, chunk, level in itertools.product(search.rows, (32, 128, 512), search.choices.levels):
        sized = replace(search.sized(rows), loss_chunk_tokens=min(chunk, rows * search.config.data.seq_len))
        for keep, kept, streamed in itertools.product(range(LAYERS + 1), (False, True), search.choices.streams):
            for offload in range(LAYERS - keep + 1):
                below = replace(sized, stream_embeddings=level, keep_attention=kept)
                yield search.choices.blocks(below, keep, streamed=streamed, offload=offload)


@pytest.mark.parametrize(("device", "hidden", "worst"), [("cpu-bf16", 128, 1.03), ("rtx-3060-12gb", 1024, 1.05)])
def test_no_policy_that_fits_is_much_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, hidden: int, worst: float
) -> None:
    """At any budget from the least on; and none fits in less than the least."""
    monkeypatch.setenv(VARIABLES[1], "expandable_segments:True")  # as the command line sets it
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": LAYERS, "vocab_size": 2000}
    model = save_tiny("llama", tmp_path, max_position_embeddings=256, **sizes)
    pins = {"optimizer_on": "device"}
    config = RunConfig.from_dict(
        {"model": str(model), "data": {"seq_len": 256}, "train": {"tokens_per_step": 512}, "policy": pins}
    )
    search = Search(config, find_device(device), 4)
    exact = []
    for policy in set(every_policy(search)):
        answer = search.answer(search.scales.weigh(policy), (), 1 << 60)
        exact.append((answer.process, answer.weighed.seconds))
    least, most = min(exact)[0], max(exact)[0]
    for part in (0.0, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0):
        budget = int(least + SLACK + part * (most - least))
        plan = search.best(budget)
        assert plan.fits
        assert plan.process <= budget
        assert plan.weighed.seconds <= worst * min(seconds for size, seconds in exact if size <= budget)
    refused = search.best(least - 1)
    assert not refused.fits
    assert refused.process <= least + SLACK
