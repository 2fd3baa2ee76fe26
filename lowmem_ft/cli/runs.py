"""What several commands do with their argument: a run folder, or a config file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError

if TYPE_CHECKING:
    from lowmem_ft.assemble import Assembled
    from lowmem_ft.core.plan import Plan
    from lowmem_ft.report.progress import Reporter


def open_run(target: Path, overrides: list[str], adapter: str | None) -> tuple[RunConfig, Plan, bool | Path]:
    """Config, plan and adapter of a run folder (its own plan, so that sums are the same) or of a config file."""
    from lowmem_ft.planner.solver import make_plan, require_fit

    if target.is_dir():
        config = RunConfig.load(target / "config.yaml", overrides)
        plan_file = target / "plan.json"
        made = _read_plan(plan_file) if plan_file.exists() else make_plan(config)
        chosen: bool | Path = target / "adapter"
    else:
        config = RunConfig.load(target, overrides)
        made, chosen = require_fit(make_plan(config)), False
    if adapter is not None:
        chosen = False if adapter == "none" else Path(adapter)
    return config, made, chosen


def _read_plan(file: Path) -> Plan:
    from lowmem_ft.core.plan import Plan

    try:
        return Plan.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fix = "delete it: what the run's config gives is planned anew then"
        raise ConfigError("The plan cannot be read.", given=f"{file} ({error})", fix=fix) from None


def assemble_run(config: RunConfig, made: Plan, adapter: bool | Path, reporter: Reporter) -> Assembled:
    """The model of a run as `open_run` found it, for evaluation."""
    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.device import find_device

    device = find_device(config.budget.device).torch_device
    with reporter.task("Loading weights", unit="B") as update:
        ready = assemble(config, made.policy, device, adapter=adapter, optimizer=False, progress=update)
    ready.model.eval()
    return ready
