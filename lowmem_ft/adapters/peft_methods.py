"""Methods of the peft library on our (quantized) models.

A quantized linear layer is an nn.Linear whose `weight` has the logical shape, which is all that most of peft's methods
ask of it; stacked experts are out of their reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from lowmem_ft.adapters.targets import adaptable, ends_with
from lowmem_ft.core.errors import ConfigError, LowMemError, UnsupportedError, nearest
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.swap import has_conv1d, is_linear

_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base weights

# Of peft 0.21.2, trained, saved, loaded, and merged where they can be: tests/unit/adapters/test_peft_methods.py
SERVED = frozenset({
    "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING",
    "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA",
    "P_TUNING", "RANDLORA", "ROAD", "SUPERTUNING", "TRAINABLE_TOKENS", "UNILORA", "VERA",
})  # fmt: skip
# those that adapt Conv1D as they adapt nn.Linear; the others refuse it, but OSF, whose factors are then other ones
ON_CONV1D = frozenset({
    "DEFT", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LORA", "PVERA", "RANDLORA", "UNILORA", "VERA",
})  # fmt: skip
_BY_VALUES = "it goes by the values of tensors, which a plan does not have"
_BY_TASKS = "it needs the task of each example"
_UNSERVED = {  # tried, too
    "ADALORA": "ranks are dealt out by calls between steps, which only a training loop of its own makes",
    "ADAMSS": _BY_VALUES,
    "ADAPTION_PROMPT": "it takes the place of whole attention layers",
    "CARTRIDGE": "it trains keys and values in a cache, which training here does without",
    "CPT": "its loss weighs the tokens of its prompt",
    "FROD": _BY_VALUES,
    "MULTITASK_PROMPT_TUNING": _BY_TASKS,
    "POLY": _BY_TASKS,
    "SHADOW": "it trains a second model beside",
    "SHIRA": _BY_VALUES,
    "TINYLORA": _BY_VALUES,
    "VBLORA": _BY_VALUES,
    "WAVEFT": _BY_VALUES,
    "XLORA": "it mixes adapters that are trained already",
}
_UNSERVED_OPTIONS = {
    "arrow_config": "it routes between adapters that are trained already",
    "kasa_config": "it cuts down the base weights, which are not trained here",
    "layer_replication": "the model would have other layers than its files",
    "monteclora_config": _BY_VALUES,
    "velora_config": "it keeps activations in a form of its own, which plans do not know",
}
_OF_CONV1D = "set adapter.method: lora, or another peft_type"


def inject_peft(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Put the adapter that a peft config describes into `model`, and freeze everything else.

    Args:
        model: a causal language model, changed in place.
        config: `peft_type` and the fields of that method's config class; `task_type` is CAUSAL_LM unless given.

    Returns:
        The `peft.PeftModel` around `model`, to be used in its place: prompt methods do their work in its forward.
        Its adapters are float32.

    Raises:
        ConfigError: no or an unknown `peft_type`, one that is not served, an unknown field, values that peft refuses,
            parameters that are out of its reach, or a method that peft does not have on this model's layers.
        UnsupportedError: LoRA that starts from changed base weights (PiSSA, OLoRA, LoftQ, CorDA).
    """
    config_class(config)  # there is such a method
    check_served(config)
    settings = peft_config(config)
    check_base_unchanged(
        settings.to_dict(), "adapter.peft", fix="leave init_lora_weights out: LoRA starts from nothing"
    )
    try:
        _check_parameters(model, settings)
        wrapped: nn.Module = peft.get_peft_model(model, settings)
    except LowMemError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, OSError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"peft cannot put {settings.peft_type.value} into this model",
            given=dict(config),
            allowed=str(error),
            fix=_OF_CONV1D if "Conv1D" in str(error) else None,
        ) from error
    check_conv1d(model, wrapped, settings.peft_type.value)
    return wrapped


def check_conv1d(model: nn.Module, wrapped: nn.Module, method: str) -> None:
    """Refuse a method that stands on quantized layers, which are nn.Linear, and that the plain model would not take, or
    not as the same.

    Args:
        model: a transformers model, which `wrapped` has adapters of peft's around.

    Raises:
        ConfigError: it does so.
    """
    if method in ON_CONV1D or not has_conv1d(model):
        return
    for name, module in wrapped.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), QuantLinear):
            raise ConfigError(
                f"peft could not load {method} on the plain model, whose layers are transformers' Conv1D",
                given=f"peft_type: {method} on {name.removeprefix('base_model.model.')}",
                allowed=", ".join(sorted(ON_CONV1D)),
                fix=_OF_CONV1D + (", or quant.bits: 16" if method == "OSF" else ""),
            )


def check_base_unchanged(settings: Mapping[str, Any], where: object, *, fix: str) -> None:
    """Raise UnsupportedError for LoRA that starts from changed base weights. `where` says where settings are from."""
    if settings["peft_type"] == "LORA" and settings.get("init_lora_weights", True) not in _HARMLESS_INITS:
        raise UnsupportedError(
            "the adapter starts from changed base weights, which a quantized model does not have",
            given=f"init_lora_weights: {settings['init_lora_weights']} in {where}",
            allowed=", ".join(str(init).lower() for init in _HARMLESS_INITS),
            fix=fix,
        )


def peft_config(config: Mapping[str, Any]) -> Any:
    """The `peft.PeftConfig` that a mapping describes.

    Raises:
        ConfigError: as `inject_peft`.
    """
    kind = config_class(config)
    fields = {field.name for field in dataclasses.fields(kind) if field.init} - {"peft_type"}
    for key in config:
        if key not in fields | {"peft_type"}:
            close = nearest(key, fields)
            raise ConfigError(
                f"{kind.__name__} has no such key",
                given=key,
                allowed=", ".join(sorted(fields)),
                fix=f"did you mean {close}?" if close else None,
            )
    values = {"task_type": "CAUSAL_LM"} | {key: value for key, value in config.items() if key != "peft_type"}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{kind.__name__} refuses its values", given=dict(config), allowed=str(error)) from error


def config_class(config: Mapping[str, Any]) -> type[Any]:
    """The config class of the method that `config` names.

    Raises:
        ConfigError: no or an unknown `peft_type`.
    """
    names = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    name = str(config.get("peft_type", "")).upper()
    if name not in names:
        close = nearest(name, names)
        raise ConfigError(
            "peft_type names no method of the peft library" if name else "a peft config needs peft_type",
            given=config.get("peft_type"),
            allowed=", ".join(names),
            fix=f"did you mean {close}?" if close else None,
        )
    kind: type[Any] = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    return kind


def is_prompt_learning(config: Mapping[str, Any]) -> bool:
    """Whether the method trains virtual tokens before each example (prompt, prefix, P-tuning), so that examples cannot
    be packed into one sequence.

    Raises:
        ConfigError: no or an unknown `peft_type`.
    """
    return issubclass(config_class(config), peft.PromptLearningConfig)


def check_served(config: Mapping[str, Any]) -> None:
    """Refuse a peft config whose method, or an option of it, cannot be trained here.

    Raises:
        ConfigError: why.
    """
    name = str(config["peft_type"]).upper()
    if name not in SERVED:
        raise ConfigError(
            f"peft's {name} cannot be trained here: {_UNSERVED.get(name, 'it was never tried')}",
            given=f"peft_type: {name}",
            allowed=", ".join(sorted(SERVED)),
        )
    for option, why in _UNSERVED_OPTIONS.items():
        if config.get(option):
            raise ConfigError(f"peft's {option} cannot be used here: {why}", given=option, fix="leave it out")


def _check_parameters(model: nn.Module, settings: Any) -> None:
    """Refuse what peft would leave out with no more than a warning, while the file's config goes on naming it.

    Raises:
        ConfigError: a target, as peft reads it, is a stack of experts, or a parameter that is none here (quantized).
    """
    read = deepcopy(settings)
    convert_peft_config_for_transformers(read, model=model, conversions=None)  # names of transformers 4's experts, too
    stacks = [path for path, target in adaptable(model).items() if not is_linear(target)]
    parameters = [name for name, _ in model.named_parameters()]
    for name in sorted(getattr(read, "target_parameters", None) or ()):
        stack = next((path for path in stacks if ends_with(path, name)), None)
        if stack is not None:
            raise ConfigError(
                "peft cannot adapt stacked experts here",
                given=f"{name}, which is {stack}",
                fix="use method: lora, which adapts experts; or targets without them",
            )
        if not any(ends_with(parameter, name) for parameter in parameters):
            raise ConfigError(
                "a name in target_parameters is no parameter that peft could adapt",
                given=name,
                fix="name linear layers in target_modules",
            )


def peft_remaps(leaf: str, model: nn.Module) -> bool:
    """Whether peft takes a target of this name for the experts of a transformers 4 checkpoint.

    It then looks for stacked experts instead of the layer (the shared expert's `gate_proj`). Such a layer is named in
    `target_parameters`, by its weight, which gives the same adapter under the same keys.
    """
    probe = peft.LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:  # only one half of what transformers 5 fuses
        return True
    return set(probe.target_modules) != {leaf}
