"""The Python form: `plan`, `load`, `save` and `train`."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import peft
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from lowmem_ft.adapters.inject import is_injected, trainable_parameters
from lowmem_ft.adapters.peft_format import adapter_folder, read_adapter_config, save_adapter
from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import Init, RunConfig
from lowmem_ft.core.errors import CheckpointError, ConfigError, UnsupportedError
from lowmem_ft.core.mode import neutral_torch
from lowmem_ft.core.plan import Plan
from lowmem_ft.core.run import Run
from lowmem_ft.core.token_ids import known_ids
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.solver import make_plan, require_fit
from lowmem_ft.quant.shards import PYTORCH, write_file
from lowmem_ft.report.progress import Reporter
from lowmem_ft.runtime.below import call_one_at_a_time
from lowmem_ft.runtime.blocks import causal_model
from lowmem_ft.trainer import loop


@neutral_torch()
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
        ConfigError: an argument and a section say different things, or `model` is no name of one.
        LowMemError: a wrong key or value, a model that cannot be read or served. A plan that does not fit is returned,
            with `fits` False.
    """
    _check_name(model)
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


@neutral_torch()
def load(
    model: str | Path, plan: Plan, adapter: bool | str | Path = True
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The model under the plan's policy, and its tokenizer (None where the folder holds none).

    Args:
        model: a local folder or a hub id; must be the one that `plan` was made for.
        adapter: True for a fresh one as the plan's config describes it, False for none, or the folder of a saved one or
            of a run.

    Returns:
        a transformers model (blocks recompute their activations as planned; only the adapter is trainable) that
        `generate`, `transformers.Trainer` and TRL accept. Its `save_pretrained` writes the adapter as `save`, and
        once more for Trainer to resume from.

    Raises:
        ConfigError: `plan` is none, or one for another model; `adapter` is nothing of these.
        BudgetError: the plan does not fit.
        LowMemError: as loading finds it.
    """
    if not isinstance(plan, Plan):
        raise ConfigError(
            "That is no plan.",
            given=f"plan={type(plan).__name__}",
            allowed="what lowmem_ft.plan(...) returns; of JSON, Plan.from_dict(...)",
        )
    _check_name(model)
    config = require_fit(plan).run_config
    if _place(model) != _place(config.model):
        raise ConfigError("The plan was made for another model.", given=str(model), allowed=config.model)
    if not isinstance(adapter, (bool, str, Path)):
        raise ConfigError(
            "That is no adapter.", given=f"adapter={adapter!r}", allowed="True (a fresh one), False (none), or a folder"
        )
    if not isinstance(adapter, bool) and str(adapter) not in get_args(Init):
        read_adapter_config(adapter_folder(adapter))  # before the weights are read, which can take minutes
    device = find_device(config.budget.device).torch_device
    with Reporter().task("Loading weights", unit="B") as update:
        ready = assemble(config, plan.policy, device, adapter=adapter, optimizer=False, progress=update)
    if plan.policy.streams:
        call_one_at_a_time(ready.model)
    if isinstance(ready.model, peft.PeftModel):  # which saves itself, and must know of what it is an adapter
        ready.model.peft_config[ready.model.active_adapter].base_model_name_or_path = config.model
    else:
        ready.model.save_pretrained = functools.partial(_save_pretrained, ready.model)  # a method could not be pickled
    causal = causal_model(ready.model)
    causal.resize_token_embeddings = functools.partial(_resize_token_embeddings, causal)
    return ready.model, ready.tokenizer


def save(model: Any, folder: str | Path) -> None:
    """Write the adapter of a model from `load` in PEFT's format, whoever trained it.

    `load`, the command line's `--adapter` and peft's `PeftModel.from_pretrained` take the folder.

    Args:
        folder: made if missing; an adapter in it is replaced. `~` stands for the home folder.

    Raises:
        ConfigError: the model has no adapter.
        CheckpointError: the folder cannot be written to.
    """
    if not (is_injected(model) or isinstance(model, peft.PeftModel)):
        raise ConfigError(
            "The model has no adapter, and its quantized base is not saved.",
            fix="load(model, plan) puts a fresh adapter into it; `lowmem-ft merge RUN` writes a whole model",
        )
    save_adapter(model, Path(folder).expanduser(), base_model=str(causal_model(model).config._name_or_path))


def _save_pretrained(
    model: Any, save_directory: str | Path, *, is_main_process: bool = True, push_to_hub: bool = False, **_: Any
) -> None:
    """Takes the place of transformers' own, which would write the quantized base under names that nothing reads. What
    else it is told is about files of whole models.

    What is trained is written twice: of classes that are not peft's Trainer resumes from `model.safetensors` alone.
    """
    if push_to_hub:
        raise ConfigError("The adapter is written to a folder alone.", given="push_to_hub", fix="`lowmem-ft push`")
    if not is_main_process:
        return
    save(model, save_directory)
    try:
        write_file(Path(save_directory).expanduser() / SAFE_WEIGHTS_NAME, dict(trainable_parameters(model)), PYTORCH)
    except OSError as error:
        raise CheckpointError("The adapter cannot be written.", given=f"{save_directory} ({error})") from error


def _resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> Any:
    """Takes the place of transformers' own, whose new rows would be in no adapter: they would be lost with `save`."""
    rows = known_ids(model.config)
    wanted = rows if new_num_tokens is None else new_num_tokens
    wanted += -wanted % (pad_to_multiple_of or 1)
    if wanted == rows:
        return model.get_input_embeddings()
    raise UnsupportedError(
        "A model that is loaded keeps its rows of tokens: an adapter would be saved without the new ones.",
        given=f"{wanted} tokens of a model that has {rows}",
        fix="first, with transformers: resize_token_embeddings and save_pretrained, the tokenizer into the same "
        'folder; plan and load that one, with adapter={"train_modules": ["embed_tokens", "lm_head"]} to train the rows',
    )


def _check_name(model: object) -> None:
    if not isinstance(model, str | Path):
        raise ConfigError(
            "That is no name of a model.",
            given=f"a {type(model).__name__}",
            allowed="a local folder or a hub id: weights are read, and quantized, from files",
            fix="give what the model was loaded from; one that exists in memory alone: model.save_pretrained(FOLDER)",
        )


def _place(model: str | Path) -> str | Path:
    """The folder that this names here; a hub id as it is."""
    folder = Path(model).expanduser()
    return folder.resolve() if os.path.isdir(folder) else str(model)


@neutral_torch()
def train(config: RunConfig | Mapping[str, Any] | str | Path | Plan, *, resume: bool = False) -> Run:
    """Fine-tune as a config (a RunConfig, nested keys, or a YAML file) says, or as a plan does, whose config is what
    `plan` was given: `data={"train": ...}`, `output=...`. See `lowmem_ft.trainer.loop.train`.
    """
    if not isinstance(resume, bool):
        raise ConfigError(
            "Whether to resume is a yes or no.",
            given=f"resume={resume!r}",
            allowed="True or False",
            fix="name the folder of the run to go on with in the config: output",
        )
    if isinstance(config, Plan):
        return loop.train(config.run_config, resume=resume, plan=None if resume else config)  # a run keeps its own
    if isinstance(config, (str, Path)):
        config = RunConfig.load(config)
    elif not isinstance(config, RunConfig):
        config = RunConfig.from_dict(config)
    return loop.train(config, resume=resume)
