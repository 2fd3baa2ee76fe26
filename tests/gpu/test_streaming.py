"""Streamed blocks on a card: the same results as resident ones, also where a wait that is missing must show."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lowmem_ft.assemble import assemble
from lowmem_ft.planner.verify import FullBatches
from lowmem_ft.runtime import below as placing
from lowmem_ft.runtime.tiers import HostTier, StagedDiskTier
from lowmem_ft.step import eval_step, train_step
from tests.models import save_tiny
from tests.unit.runtime.test_streaming import ADAPTERS, DEPTH, QUANT, a_policy, same, settings

pytestmark = pytest.mark.gpu
CYCLES = 20_000_000  # that the copy's stream sleeps before each copy, about 10 ms: far longer than a tiny block works


class SlowHost(HostTier):
    """Its copies come late, so that work that does not wait for them reads what was there before."""

    def start(self, block: int, slot: Tensor) -> Any:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(CYCLES)
        return super().start(block, slot)


class SlowWork(HostTier):
    """Each block's work comes late, so that a copy that does not wait for it overwrites what it reads."""

    def wait(self, copy: torch.cuda.Event) -> None:
        super().wait(copy)
        torch.cuda._sleep(CYCLES)


@contextmanager
def host_tier(kind: type[HostTier]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "HostTier", kind)
        yield


def trained(
    model: Path,
    sections: dict[str, Any],
    *,
    streamed: int,
    activations: str,
    tier: Literal["host", "disk"] = "host",
    embeddings: Literal["none", "input"] = "none",
) -> tuple[list[float], dict[str, Tensor]]:
    config = settings(model, sections)
    chosen = a_policy(config, streamed=streamed, activations=activations)
    chosen = replace(chosen, stream_from=tier, stream_embeddings=embeddings)
    torch.manual_seed(0)
    ready = assemble(config, chosen, torch.device("cuda"))
    batches = FullBatches(config, chosen, vocabulary=100)
    result = train_step(ready, batches, lr=1e-2)
    held_out = eval_step(ready, batches[0])[0]
    return [result.loss, result.grad_norm, held_out], {n: p.detach().cpu() for n, p in ready.trainable.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("streaming") / "llama", num_hidden_layers=DEPTH)


@pytest.mark.parametrize("activations", ["keep", "some", "recompute", "offload", "some but attention"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quant", QUANT)
def test_results_are_those_of_a_resident_run(model: Path, quant: str, adapter: str, activations: str) -> None:
    sections = {"quant": QUANT[quant], "adapter": ADAPTERS[adapter]}
    expected = trained(model, sections, streamed=0, activations="keep")
    for kind in (HostTier, SlowHost, SlowWork):
        with host_tier(kind):
            assert same(trained(model, sections, streamed=DEPTH, activations=activations), expected), kind
    disk = trained(model, sections, streamed=DEPTH - 1, activations=activations, tier="disk")
    assert same(disk, expected)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_rows_of_every_block_are_looked_up_below(name: str, tier: Literal["host", "disk"], tmp_path: Path) -> None:
    layers: dict[str, Any] = {"layer_types": (["sliding_attention", "full_attention"] * DEPTH)[:DEPTH]}
    if name == "gemma3n":
        layers["activation_sparsity_pattern"] = [0.95, *[0.0] * (DEPTH - 1)]
    model = save_tiny(name, tmp_path / name, num_hidden_layers=DEPTH, **layers)
    sections = {"adapter": {"rank": 4}}
    expected = trained(model, sections, streamed=0, activations="keep")
    below = trained(model, sections, streamed=2, activations="recompute", tier=tier, embeddings="input")
    assert same(below, expected)


def test_a_file_through_pinned_buffers(tmp_path: Path) -> None:
    sizes = [4096, 8192, 4096]
    tier = StagedDiskTier(tmp_path, sizes, torch.device("cuda"))
    data = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    for block, content in enumerate(data):
        tier.write(block, 0, content)
    slots = [torch.empty(8192, dtype=torch.uint8, device="cuda") for _ in sizes]
    copies = [tier.start(block, slot) for block, slot in enumerate(slots)]
    for copy, slot, content in zip(copies, slots, data, strict=True):
        tier.wait(copy)
        assert torch.equal(slot[: len(content)].cpu(), content)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_state_has_all_weights(model: Path, tier: Literal["host", "disk"]) -> None:
    """Also when the model is gone, and with it the pinned memory."""
    config, states = settings(model, {"adapter": {"rank": 4}}), []
    for streamed, embeddings in ((0, "none"), (DEPTH, "both")):
        chosen = a_policy(config, streamed=streamed, activations="recompute")
        torch.manual_seed(0)
        ready = assemble(
            config,
            replace(chosen, stream_from=tier, stream_embeddings=embeddings),
            torch.device("cuda"),
            optimizer=False,
        )
        states.append(ready.model.state_dict())
        del ready
        gc.collect()
    resident, below = states
    assert resident.keys() == below.keys()
    assert all(torch.equal(below[key].cpu(), it.cpu()) for key, it in resident.items())
