"""The simulated peak against PyTorch's own allocator events of a real step: never under, and close.

The sampler draws tiny models; `SEED` decides which.
"""

from __future__ import annotations

import random
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.examples import Example
from lowmem_ft.data.packing import Batch, collate
from lowmem_ft.planner.simulate import simulate
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.planner.verify import measured_train_peak
from tests.models import save_tiny
from tests.unit.planner.test_solver import DEVICE

SEED = 0
COUNT = 24
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "opt"]


def draw(generator: random.Random) -> tuple[str, dict[str, Any]]:
    """An architecture and the sections of a config."""
    name = generator.choice(DENSE)
    seq_len, rows = generator.choice([128, 200, 256]), generator.choice([2, 3, 4])
    adapter: dict[str, Any] = {"rank": generator.choice([2, 8, 16]), "dropout": generator.choice([0.0, 0.0, 0.1])}
    adapter |= generator.choice([{}, {}, {"rslora": True}, {"dora": True}])
    if name in ("llama", "qwen2", "mistral") and generator.random() < 0.3:
        adapter["targets"] = ["q_proj", "v_proj"]
    return name, {
        "quant": {"bits": 4, "double_quant": generator.choice([True, False])},
        "adapter": adapter,
        "data": {"seq_len": seq_len, "packing": generator.choice([True, False])},
        "train": {"tokens_per_step": seq_len * rows, "optimizer": generator.choice(["adamw", "adamw8bit"])},
        "policy": {
            "activations": generator.choice(["keep", "recompute"]),
            "micro_batch_tokens": seq_len * rows,
            "loss_chunk_tokens": generator.choice([16, 64, 256]),
        },
    }


def full_batch(policy: Policy, seq_len: int, *, packed: bool) -> Batch:
    """Rows without padding, of two documents if they are packed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (policy.micro_batch_tokens // seq_len, seq_len), generator=generator).tolist()
    half = seq_len // 2
    cut = [[row[:half], row[half:]] if packed else [row] for row in ids]
    return collate([[Example(part, part) for part in parts] for parts in cut], pad_id=0)


def errors(count: int, seed: int, folder: Path) -> list[tuple[float, str]]:
    """(simulated / measured - 1, what was drawn) of `count` configurations."""
    generator, found = random.Random(seed), []
    for _ in range(count):
        name, sections = draw(generator)
        if not (folder / name).exists():
            save_tiny(name, folder / name, max_position_embeddings=512, n_positions=512)
        config = RunConfig.from_dict({"model": str(folder / name), **sections})
        policy = make_plan(config, device=DEVICE).policy
        batch = full_batch(policy, config.data.seq_len, packed=config.data.packing)
        simulated = simulate(config, policy, kind="cpu", loss_tokens=batch.loss_tokens).train_peak
        measured = measured_train_peak(config, policy, [batch])
        found.append((simulated / measured - 1, f"{name} {sections} {simulated} {measured}"))
    return found


@pytest.mark.filterwarnings("ignore")
def test_peak_is_never_under_and_close(tmp_path: Path) -> None:
    found = errors(COUNT, SEED, tmp_path)
    table = "\n".join(f"{error:+.3%}  {what}" for error, what in sorted(found))
    assert min(found)[0] >= 0, table
    assert statistics.median(error for error, _ in found) <= 0.005, table
    assert max(found)[0] <= 0.02, table


def test_only_a_config_is_needed(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = RunConfig.from_dict({"model": str(folder), "data": {"seq_len": 64}, "train": {"tokens_per_step": 64}})
    policy = make_plan(config, device=DEVICE).policy
    with_weights = simulate(config, policy, kind="cpu")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    alone = simulate(config, make_plan(config, device=DEVICE).policy, kind="cpu")
    assert (alone.held, alone.train_peak, alone.eval_peak) == (
        with_weights.held, with_weights.train_peak, with_weights.eval_peak,
    )  # fmt: skip


def test_what_holds_the_peak(tmp_path: Path) -> None:
    config = RunConfig.from_dict(
        {
            "model": str(save_tiny("llama", tmp_path)),
            "data": {"seq_len": 256},
            "train": {"tokens_per_step": 1024},
            "policy": {"activations": "keep", "micro_batch_tokens": 1024},
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = simulate(config, make_plan(config, device=DEVICE).policy, kind="cpu")
    holders = found.holders()
    assert sum(holders.values()) + found.held == found.train_peak
    assert holders["activations"] > found.held
    blocks = {event.block for event in found.trace.events if event.phase == "backward"}
    assert blocks == {None, 0, 1} or blocks == {0, 1}
    assert found.held < found.eval_peak < found.train_peak
