"""`lowmem-ft eval TARGET --harness TASK`: tasks of the lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from lowmem_ft.cli.runs import assemble_run
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.core.plan import Plan
from lowmem_ft.report.progress import Reporter


def run_harness(
    config: RunConfig,
    made: Plan,
    adapter: bool | Path,
    tasks: Sequence[str],
    *,
    include: Path | None,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
    as_json: bool,
) -> None:
    """Load the model, run the tasks and print their table, or JSON."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError("lm-eval is not installed.", given="--harness", fix="pip install 'lowmem-ft[lm-eval]'")
    from lowmem_ft.trainer import harness
    from lowmem_ft.trainer.recovery import Recovery

    reporter = Reporter(quiet=as_json)
    manager, names = harness.find_tasks(tasks, include)  # before a model is loaded for them
    ready = assemble_run(config, made, adapter, reporter)
    recovery = Recovery(ready, made.policy, host_budget=made.budget["host_bytes"], say=reporter.say)
    model = harness.HarnessModel(recovery, config.data.seq_len, reporter)
    found = harness.run_tasks(model, manager, names, fewshot=fewshot, limit=limit, chat=chat)
    if model.shortened:
        reporter.say(
            f"Warning: {model.shortened} requests are longer than data.seq_len, {model.length}: their beginning was "
            "left out."
        )
    print(json.dumps(harness.summary(found), default=str) if as_json else harness.table(found))
