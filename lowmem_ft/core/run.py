"""Run: what a finished or interrupted run says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.core.json_text import read_json
from lowmem_ft.core.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Run:
    """The outcome of training.

    Attributes:
        folder: the run folder (config.yaml, plan.json, metrics.jsonl, checkpoints/, adapter/).
        status: `finished`, or `interrupted` or `out_of_time` after a checkpoint from which `--resume` goes on.
        step: optimizer steps done.
        eval_loss: nats per loss token on the held-out data at the last evaluation; None without `data.eval`.
        measured: bytes measured during the run, under the names that `Plan.predicted` uses.
    """

    folder: Path
    plan: Plan = field(repr=False)
    status: Literal["finished", "interrupted", "out_of_time"]
    step: int
    eval_loss: float | None = None
    measured: dict[str, int] = field(default_factory=dict)

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format."""
        return self.folder / "adapter"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: training lines carry `loss`, evaluation lines `eval_loss`."""
        return list(self.read_metrics())

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The same, a line at a time: those of a long run take more memory together than a step does."""
        return _lines(self.folder / "metrics.jsonl")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation lines, of a run that went on with other held-out data those on the newest."""
        found: list[dict[str, Any]] = []
        for line in self.read_metrics():
            if line.get("held_out_changed"):
                found = []
            if line.get("eval_loss") is not None:  # None is what was not finite
                found.append(line)
        return found

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl (step, prompt, answer, reference), which `eval.samples` asks for."""
        return list(self.read_samples())

    def read_samples(self) -> Iterator[dict[str, Any]]:
        """The same, a line at a time."""
        return _lines(self.folder / "samples.jsonl")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    try:
        # bytes end lines only at line feeds: text may hold other characters that end one for `splitlines`
        with file.open("rb") as opened:
            for line in opened:
                if line.strip():
                    yield read_json(line)
    except (OSError, ValueError) as error:
        fix = "move it away: nothing else of the run depends on it"
        raise CheckpointError("What a run has logged cannot be read.", given=f"{file} ({error})", fix=fix) from error
