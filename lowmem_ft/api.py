"""The Python form of `lowmem-ft plan`, `load` and `train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.plan import Plan
from lowmem_ft.core.run import Run
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.solver import make_plan, require_fit
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer import loop


def plan(
    model: str | Path,
    budget: str | int | None = None,
    device: str = "auto",
    seq_len: int | None = None,
    tokens_per_step: int | None = None,
    host_budget: str | int | None = None,
    **keys: Any,
) -> Plan:
    """The fastest policy under a budget, with the bytes it will take. Reads no weights.

    Args:
        model: a local folder or a hub id.
        budget: bytes that the process may take of the device, such as `8GiB`; None for what is free.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, or the name of a profile (`lowmem-ft profiles list`).
        seq_len: tokens of a sequence; also `data={"seq_len": ...}`.
        tokens_per_step: tokens of an optimizer update; also `train={"tokens_per_step": ...}`.
        host_budget: bytes that the process may take of RAM when the device is a GPU; None for what is free, if the GPU
            is here. On a CPU it is the same as `budget`, and the smaller of the two counts.
        keys: sections of the config by name, such as `adapter={"rank": 8}` or `quant={"bits": 8}`.

    Raises:
        ConfigError: an argument and a section say different things.
        LowMemError: a wrong key or value, a model that cannot be read or served. A plan that does not fit is returned,
            with `fits` False.
    """
    memory = {"device": device, "memory": budget, "host": host_budget}
    data = {"model": str(model), "budget": {key: value for key, value in memory.items() if value is not None}, **keys}
    overrides = []
    for key, value in (("data.seq_len", seq_len), ("train.tokens_per_step", tokens_per_step)):
        if value is None:
            continue
        section, _, name = key.partition(".")
        stated = keys.get(section)
        if isinstance(stated, Mapping) and stated.get(name, value) != value:
            raise ConfigError(
                f"{key} is given twice, and not the same.",
                given=f"{name}={value} and {section}={dict(stated)}",
                fix="leave one of them out",
            )
        overrides.append(f"{key}={value}")
    return make_plan(RunConfig.from_dict(data, overrides))


def load(
    model: str | Path, plan: Plan, adapter: bool | str | Path = True
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The model under the plan's policy, and its tokenizer (None where the folder holds none).

    Args:
        model: a local folder or a hub id; must be the one that `plan` was made for.
        adapter: True for a fresh one as the plan's config describes it, False for none, or the folder of a saved one.

    Returns:
        a transformers model (blocks recompute their activations as planned; only the adapter is trainable) that
        `generate`, `transformers.Trainer` and TRL accept.

    Raises:
        ConfigError: the plan is for another model.
        BudgetError: the plan does not fit.
        LowMemError: as loading finds it.
    """
    config = require_fit(plan).run_config
    if str(model) != config.model:
        raise ConfigError("The plan was made for another model.", given=str(model), allowed=config.model)
    device = find_device(config.budget.device).torch_device
    with Reporter().task("Loading weights", unit="B") as update:
        ready = assemble(config, plan.policy, device, adapter=adapter, optimizer=False, progress=update)
    return ready.model, ready.tokenizer


def train(config: RunConfig | Mapping[str, Any] | str | Path, *, resume: bool = False) -> Run:
    """Fine-tune as a config (a RunConfig, nested keys, or a YAML file) says. See `lowmem_ft.trainer.loop.train`."""
    if isinstance(config, (str, Path)):
        config = RunConfig.load(config)
    elif not isinstance(config, RunConfig):
        config = RunConfig.from_dict(config)
    return loop.train(config, resume=resume)
