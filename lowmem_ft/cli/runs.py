"""What several commands do with their argument: a run folder, or a config file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.json_text import read_json_file

if TYPE_CHECKING:
    from lowmem_ft.assemble import Assembled
    from lowmem_ft.core.plan import Plan
    from lowmem_ft.report.progress import Reporter

DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. Default: the run's.")]


def on_device(device: str | None) -> list[str]:
    """What overrides a run's device by that of `--device`."""
    return [] if device is None else [f"budget.device={device}"]


# What decides how a model is trained says nothing of one that is. Where it learns preferences, it is told so
_OF_TRAINING = ("adapter", "train", "data.train", "data.order", "output")
_OF_DATA = "train.objective"


def open_run(
    target: Path, overrides: list[str], adapter: str | None, *, need_adapter: bool = False
) -> tuple[RunConfig, Plan, bool | Path]:
    """Config, plan and adapter of a run folder (its own plan, so that sums are the same) or of a config file.

    Args:
        need_adapter: the base model alone is not what is asked for.

    Raises:
        ConfigError: no such run, one that is not finished, an override without effect, a plan that cannot be read, or
            no adapter where one is needed.
        BudgetError: nothing fits the budget that overrides ask for.
    """
    from lowmem_ft.adapters.peft_format import adapter_folder, read_adapter_config
    from lowmem_ft.planner.solver import make_plan, require_fit
    from lowmem_ft.quant.checkpoint import Checkpoint
    from lowmem_ft.trainer.folder import RunFolder

    for override in overrides:
        _refuse_without_effect(override)
    if not os.path.exists(target):
        raise ConfigError(
            "There is no such run.", given=target, allowed="a run folder, or a config file", fix="check the path"
        )
    run = os.path.isdir(target)
    if run and not os.path.isfile(target / "config.yaml"):
        _refuse_folder(target)
    config = RunConfig.load(target / "config.yaml" if run else target, overrides)
    chosen: bool | Path = target / "adapter" if run else False
    if adapter is not None:
        chosen = False if adapter == "none" else adapter_folder(adapter)
        if isinstance(chosen, Path):
            read_adapter_config(chosen)  # what is wrong with it is told before anything is planned or loaded
    elif run and not os.path.exists(target / "adapter" / "adapter_config.json"):
        raise ConfigError(
            "The run has no adapter yet.",
            given=str(target),
            allowed="a finished run, or --adapter",
            fix=f"finish it with `lowmem-ft train {target / 'config.yaml'} --resume`, or name another adapter: "
            "--adapter FOLDER, or none for the base model",
        )
    trained = config.output if os.path.isdir(Path(config.output) / "adapter") else "its folder"
    fix = f"for what a run has trained give {trained}, or --adapter"
    if need_adapter and chosen is False:
        raise ConfigError(
            "There is no adapter to export.",
            given=f"{target} --adapter none" if adapter else target,
            allowed="the folder of a finished run, or --adapter FOLDER",
            fix="leave --adapter none out" if run else fix,
        )
    if not run:
        if adapter is None:
            warnings.warn(f"this is the base model: {fix}", stacklevel=2)
        return config, require_fit(make_plan(config)), chosen
    config = config.model_copy(update={"output": str(target)})
    if adapter is None:
        base = Checkpoint.open(config.model, trust_remote_code=config.trust_remote_code)
        RunFolder(target).warn_of_other_base(base.sample())
    plan_file = target / "plan.json"
    before = _read_plan(plan_file) if os.path.exists(plan_file) else None
    if before is None:
        return config, require_fit(make_plan(config)), chosen
    saved = RunConfig.load(target / "config.yaml") if overrides else config
    return config, require_fit(_plan_for(config, saved, before)), chosen


def _refuse_folder(folder: Path) -> None:
    """Say what a folder is that is no run."""
    fix = "name the run's folder, which has a config.yaml"
    if os.path.isfile(folder / "adapter_config.json"):
        fix = f"it is an adapter: write a config with `model: ITS BASE`, and give that with --adapter {folder}"
    elif os.path.isfile(folder / "config.json"):
        fix = f"it is a model: write a config with `model: {folder}`, and give that with --adapter none"
    raise ConfigError("The folder is no run.", given=str(folder), allowed="a run folder, or a config file", fix=fix)


def _refuse_without_effect(override: str) -> None:
    key = override.partition("=")[0]
    if key != _OF_DATA and any(f"{key}.".startswith(f"{name}.") for name in _OF_TRAINING):
        raise ConfigError(
            f"'{key}' has no effect on a model that is trained.",
            given=override,
            allowed=f"model, cache, {_OF_DATA}, and keys of quant, budget, policy, eval, preference, data",
            fix="leave it out",
        )


def _plan_for(config: RunConfig, saved: RunConfig, before: Plan) -> Plan:
    """The plan of a run, or another one where overrides touch what it follows from."""
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.trainer.replan import plan_again

    if _decisive(config) == _decisive(saved):
        return before
    return plan_again(config, before) if config.model == saved.model and before.config else make_plan(config)


def _decisive(config: RunConfig) -> tuple[Any, ...]:
    data = config.data
    return config.model, config.quant, config.budget, config.policy, config.train.objective, data.seq_len, data.packing


def _read_plan(file: Path) -> Plan:
    from lowmem_ft.core.plan import Plan

    try:
        return Plan.from_dict(read_json_file(file))
    except (OSError, ValueError) as error:
        fix = "delete it: what the run's config gives is planned anew then"
        why = str(error).partition("\n")[0]
        raise ConfigError("The plan cannot be read.", given=f"{file} ({why})", fix=fix) from None


def assemble_run(config: RunConfig, made: Plan, adapter: bool | Path, reporter: Reporter) -> Assembled:
    """The model of a run as `open_run` found it, for evaluation."""
    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.device import find_device

    device = find_device(config.budget.device).torch_device
    with reporter.task("Loading weights", unit="B") as update:
        ready = assemble(config, made.policy, device, adapter=adapter, optimizer=False, progress=update)
    ready.model.eval()
    return ready
