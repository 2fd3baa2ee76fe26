"""Between the adapters in a model and `peft.LoraConfig`, so that peft puts the same ones into the plain model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from lowmem_ft.adapters.inject import Bias, adapter_at, injection_of
from lowmem_ft.adapters.lora import LoraLinear
from lowmem_ft.adapters.peft_methods import peft_remaps
from lowmem_ft.adapters.targets import ends_with, match_pattern
from lowmem_ft.core.config import Rank
from lowmem_ft.core.config_words import allowed_words
from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.quant.swap import has_conv1d

_Alpha: TypeAlias = Annotated[float, Field(gt=0, lt=1e9)]  # far beyond any that is used: infinity makes NaN of zeros
_Names: Any = str | list[str] | None
_READ: Mapping[
    str, Any
] = {  # what a saved LoraConfig may set for us to load it; of what is null peft takes its default
    **{"r": Rank, "lora_alpha": _Alpha, "rank_pattern": dict[str, Rank] | None},
    **{"alpha_pattern": dict[str, _Alpha] | None, "bias": Bias | None},
    **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), bool | None),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _Names),
    **dict.fromkeys(("target_parameters", "modules_to_save"), list[str] | None),
    "layers_to_transform": int | list[int] | None,
}
PUT_BACK = f"put {CONFIG_NAME} back as it was saved, if it was edited"
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "runtime_config"),
}


def to_lora_config(model: nn.Module, *, base_model: str) -> Any:
    """The `peft.LoraConfig` that makes peft put the same adapters into the plain transformers model."""
    injection = injection_of(model)
    leaves = {path.rpartition(".")[2] for path in injection.paths}
    remapped = {leaf for leaf in leaves if peft_remaps(leaf, model)}
    modules, parameters, ranks, alphas = [], [], {}, {}
    for path in injection.paths:
        adapter = adapter_at(model, path)
        key = path
        if not isinstance(adapter, LoraLinear):
            parameters.append(path)
        elif path.rpartition(".")[2] in remapped:
            key = f"{path}.weight"
            parameters.append(key)
        else:
            modules.append(path)
        ranks[key], alphas[key] = adapter.rank, adapter.alpha
    names, trained = _plain_names(model), with_tied(model, injection.trained_modules)
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        inference_mode=True,
        r=rank,
        rank_pattern=rank_pattern,
        lora_alpha=alpha,
        alpha_pattern=alpha_pattern,
        lora_dropout=0.0 if parameters else injection.dropout,  # peft has none on parameters, and refuses to load it
        use_rslora=injection.rslora,
        use_dora=injection.dora,
        init_lora_weights="gaussian" if injection.init == "gaussian" else True,
        bias=injection.bias,
        fan_in_fan_out=has_conv1d(model),
        target_modules=_shortened(modules, names, ends_with, parts=1),
        target_parameters=_shortened(parameters, names, ends_with, parts=2) or None,
        modules_to_save=_shortened(trained, names, str.endswith, parts=1) or None,
        ensure_weight_tying=len(trained) > len(injection.trained_modules),
    )


def _plain_names(model: nn.Module) -> list[str]:
    """Paths of all modules and parameters of the model as they are without adapters and quantization (or more)."""
    inside = tuple(f"{path}." for path in injection_of(model).paths)
    modules = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    parameters = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    return [*modules, *(f"{name}.weight" for name in modules), *parameters]


def _shortened(paths: list[str], names: Iterable[str], matches: Callable[[str, str], bool], *, parts: int) -> list[str]:
    """`paths` by their last `parts` parts wherever these match no other name of the model."""
    chosen, names = set(paths), list(names)
    short: dict[str, None] = {}
    for path in paths:
        end = ".".join(path.split(".")[-parts:])
        if end not in short:
            clear = all(name in chosen for name in names if matches(name, end))
            short[end if clear else path] = None
    return list(short)


def _patterns(values: Mapping[str, float]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and pattern -> value for the paths with another: by last part where that is enough."""
    default = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[float]] = {}
    for path, value in values.items():
        by_leaf.setdefault(path.rpartition(".")[2], set()).add(value)
    pattern = {}
    for path, value in values.items():
        leaf = path.rpartition(".")[2]
        if len(by_leaf[leaf]) == 1 and value != default:
            pattern[re.escape(leaf)] = value
        elif value != default:
            pattern[re.escape(path)] = value
    return default, pattern


def with_tied(model: nn.Module, paths: list[str]) -> list[str]:
    """`paths` and the modules whose parameters are tied to theirs, which peft would leave untrained."""
    held = {id(parameter) for path in paths for parameter in model.get_submodule(path).parameters()}
    tied = [
        name
        for name, module in model.named_modules()
        if any(id(p) in held for p in module.parameters(recurse=False))
        and not any(name == path or name.startswith(f"{path}.") for path in paths)
    ]
    return paths + tied


def is_variant(settings: Mapping[str, Any]) -> bool:
    """Whether a LoRA config asks for something that only peft itself does."""
    defaults = peft.LoraConfig().to_dict()
    unread = settings.keys() - _READ.keys() - _WITHOUT_EFFECT
    return any(settings[key] not in (None, False, {}, []) and settings[key] != defaults.get(key) for key in unread)


def read_lora_config(settings: Mapping[str, Any], folder: Path) -> Any:
    """The saved settings as a `peft.LoraConfig`.

    Raises:
        CheckpointError: values that cannot be right.
    """
    file, what = folder / CONFIG_NAME, "the adapter's config is not valid"
    for key in sorted(settings.keys() & _READ.keys()):
        try:
            TypeAdapter(_READ[key]).validate_python(settings[key], strict=True)
        except ValidationError:
            found = f"{key}: {json.dumps(settings[key])} in {file}"
            raise CheckpointError(what, given=found, allowed=allowed_words(_READ[key]), fix=PUT_BACK) from None
    given = {key: deepcopy(value) for key, value in settings.items() if key in _READ and value is not None}
    try:
        config = peft.LoraConfig(**given)
        patterns = [*config.rank_pattern, *config.alpha_pattern]
        for pattern in patterns + ([config.target_modules] if isinstance(config.target_modules, str) else []):
            re.compile(pattern)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(what, given=f"{file} ({error})", fix=PUT_BACK) from error
    return config


def rank_and_alpha(config: Any, path: str, *, linear: bool) -> tuple[int, float] | None:
    """What peft would give the layer or expert stack at `path`, or None where it would leave it alone."""
    key = f"{path}.weight" if linear else path
    if not any(ends_with(key, name) for name in config.target_parameters or ()):
        targeted = config.target_modules == "all-linear" or check_target_module_exists(config, path)
        if not linear or config.target_modules is None or not targeted:
            return None
        key = path
    rank, alpha = match_pattern(config.rank_pattern, key), match_pattern(config.alpha_pattern, key)
    return (
        config.r if rank is None else config.rank_pattern[rank],
        config.lora_alpha if alpha is None else config.alpha_pattern[alpha],
    )
