"""What lies below a card: the optimizer's state, and inputs of blocks, as a plan says."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.planner.verify import FullBatches
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.step import sum_gradients, update
from tests.gpu import run_alone
from tests.models import save_tiny
from tests.unit.planner.on_cuda import judge, measure, predict
from tests.unit.runtime.test_optim import SETTINGS, gradients, parameters

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "max_position_embeddings": 1024}
PINS: dict[str, dict[str, Any]] = {
    "offload": {"activations": "offload"},
    "offload and stream": {"activations": "offload", "resident_blocks": 2, "keep_blocks": 1},
    "optimizer": {"activations": "recompute", "optimizer_on": "host"},
}


def config(folder: Path, policy: dict[str, Any]) -> RunConfig:
    keys = {"data": {"seq_len": 512}, "train": {"tokens_per_step": 2048}, "adapter": {"rank": 64}}
    pins = {"micro_batch_tokens": 1024, "loss_chunk_tokens": 128, **policy}
    model = save_tiny("llama", folder / "model", **SIZES)
    return RunConfig.from_dict({"model": str(model), "output": str(folder / "run"), "policy": pins, **keys})


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_host_updates_as_it_updates_its_own(bits: Any, dtype: torch.dtype) -> None:
    own = parameters(dtype)
    on_card = [nn.Parameter(it.detach().cuda()) for it in own]
    before = torch.cuda.memory_allocated()
    there, here = AdamW(on_card, bits=bits, on_host=True, **SETTINGS), AdamW(own, bits=bits, **SETTINGS)
    assert torch.cuda.memory_allocated() == before
    for step in range(10):
        given = gradients(step)
        here.step(gradient=dict(zip(own, given, strict=True)).__getitem__)
        there.step(gradient={it: one.cuda() for it, one in zip(on_card, given, strict=True)}.__getitem__)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(own, on_card, strict=True))


def test_a_step_with_the_optimizer_on_the_host(tmp_path: Path) -> None:
    settings = config(tmp_path, {"activations": "recompute"})
    # in 32 bits: a card's kernel lets small second moments of 8 bits become 0, see `runtime.moments`
    chosen = replace(make_plan(settings, device=find_device("cuda")).policy, optimizer="adamw")
    batches, both, losses = FullBatches(settings, chosen, vocabulary=100), [], []
    for place in ("device", "host"):
        torch.manual_seed(0)
        both.append(assemble(settings, replace(chosen, optimizer_on=place), torch.device("cuda")))
    for _ in range(3):
        losses.append([sum_gradients(ready, batches).loss for ready in both])
        # attention's backward adds in any order, and a first update is as large for a gradient that is noise: so both
        # update by the same gradients
        given, taken = (
            [cast(Tensor, ready.accumulator.gradient(it)) for it in ready.trainable.values()] for ready in both
        )
        for source, target in zip(given, taken, strict=True):
            target.copy_(source)
        for ready in both:
            update(ready, lr=1e-3)
    assert losses[0][0] == losses[0][1], "before any update"
    # the kernels of card and host round differently
    assert [one for one, _ in losses] == pytest.approx([other for _, other in losses], rel=1e-3)
    for a, b in zip(*(ready.trainable.values() for ready in both), strict=True):
        assert (a - b).detach().float().norm() <= 1e-2 * a.detach().float().norm()


@pytest.mark.parametrize("name", PINS)
def test_it_takes_what_was_planned(name: str) -> None:
    run_alone("tests.gpu.test_below", name, expandable=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        settings, card = config(Path(folder), PINS[sys.argv[1]]), find_device("cuda")
        plan = make_plan(settings, device=card)
        batches = FullBatches(settings, plan.policy, vocabulary=100)
        predicted = predict(settings, plan.policy, card, loss_tokens=batches[0].loss_tokens)
        one = judge(predicted, *measure(settings, plan.policy, card, batches)[:2])
        print(one)
        assert plan.predicted.allocated_peak_bytes >= one["allocated_bytes"]
        assert plan.predicted.reserved_peak_bytes >= one["reserved_bytes"]
        for kind in ("allocated", "reserved"):
            assert 0.0 <= one[f"{kind}_error"] <= 0.03, (kind, one["first_difference"])
