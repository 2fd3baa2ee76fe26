"""What tests of runs share: a small share of the embedded data, and what is compared."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.run import Run
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer import recovery
from tests.assets import ASSETS
from tests.killing import exact_metrics

QUIET = Reporter(quiet=True)


def config(folder: Path, output: str = "run", **sections: Any) -> RunConfig:
    keys: dict[str, Any] = {
        "model": str(ASSETS / "doclm-7m"),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "seq_len": 64},
        "train": {"tokens_per_step": 256, "steps": 6, "lr": 1e-3, "eval_every": 3, "save_every": 2},
        "adapter": {"rank": 4, "dropout": 0.1},
        # decided here, because planning these takes longer than the runs
        "policy": {"micro_batch_tokens": 128, "loss_chunk_tokens": 64, "activations": "keep"},
        "output": str(folder / output),
    }
    for name, value in sections.items():
        keys[name] = {**keys[name], **value} if isinstance(value, dict) and name in keys else value
    return RunConfig.from_dict(keys)


def exact(run: Run) -> list[dict[str, Any]]:
    return exact_metrics(run.folder)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Call `action` when training step `number` begins."""
    original, calls = recovery.sum_gradients, itertools.count(1)

    def gradients(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(recovery, "sum_gradients", gradients)
