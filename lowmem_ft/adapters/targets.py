"""Which modules of a model the options of an adapter mean."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_ft.core.errors import ConfigError, UnsupportedError, nearest
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.swap import is_expert_stack, is_linear

# Mixers whose kernels on a card take the matrix of `out_proj` itself; of the first five peft refuses adapters on it
_FUSED = frozenset(
    {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"}
)

Number = TypeVar("Number", int, float)


def adaptable(model: nn.Module) -> dict[str, nn.Module | Tensor]:
    """Path -> linear layer, QuantStack, or 3-D expert parameter, for all of the model but its output head."""
    found: dict[str, nn.Module | Tensor] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_expert_stack(module, parameter):
                found[f"{path}.{name}"] = parameter
        if is_linear(module) or isinstance(module, QuantStack):
            found[path] = module
    head = _head(model)
    return {path: target for path, target in found.items() if head is None or target is not head}


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is the end of `path` at a dot: how peft matches names."""
    return path == name or path.endswith(f".{name}")


def match_pattern(patterns: Collection[str], path: str) -> str | None:
    """The first of `patterns` that matches the end of `path` at a dot: how peft finds the rank and alpha of a layer."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def _head(model: nn.Module) -> nn.Module | None:
    get: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def select_targets(
    model: nn.Module, candidates: Mapping[str, nn.Module | Tensor], targets: str | Sequence[str]
) -> list[str]:
    """The candidates that `targets` means."""
    if not candidates:
        raise UnsupportedError("the model has no linear layer to adapt", given=type(model).__name__)
    leaves = {path.rpartition(".")[2] for path in candidates}
    if targets == "all-linear":
        towers = _towers(model)
        return [path for path in candidates if not (_is_read_past(model, path) or is_inside(path, towers))]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigError("targets is not a regular expression", given=targets, allowed=str(error)) from error
        chosen = [path for path in candidates if pattern.fullmatch(path)]
        if not chosen:
            raise ConfigError(
                "the targets pattern matches no layer",
                given=targets,
                allowed=f"an expression for whole paths such as {next(iter(candidates))}",
                fix=f"for layers by name write a list: [{nearest(targets, leaves) or min(leaves)}]",
            )
        return _with_a_say(model, chosen)
    if not targets:
        raise ConfigError("targets is an empty list", allowed="names, an expression, or all-linear")
    for name in targets:
        if not any(ends_with(path, name) for path in candidates):
            raise ConfigError(
                "a target matches no layer" + _why_not(model, name),
                given=name,
                allowed=", ".join(sorted(leaves)),
                fix=_did_you_mean(name, leaves),
            )
    return _with_a_say(model, [path for path in candidates if any(ends_with(path, name) for name in targets)])


def _with_a_say(model: nn.Module, chosen: list[str]) -> list[str]:
    past = [path for path in chosen if _is_read_past(model, path)]
    if past:
        raise ConfigError(
            "an adapter on a target would have no say: the model reads the layer's matrix without calling the layer",
            given=past[0],
            fix=f"leave {past[0].rpartition('.')[2]} out of the targets",
        )
    return chosen


def _is_read_past(model: nn.Module, path: str) -> bool:
    """Whether the layer's matrix is read where the layer is not called, so that an adapter on it has no say."""
    parent, _, name = path.rpartition(".")
    if name == "dt_proj":
        return hasattr(model.get_submodule(parent), "A_log")
    return name == "out_proj" and getattr(getattr(model, "config", None), "model_type", None) in _FUSED


def _towers(model: nn.Module) -> list[str]:
    """Paths of the parts that read something else than text, such as those of Phi 4 for pictures and sound: the largest
    that hold a whole transformers model and not the embeddings of tokens."""
    if not isinstance(model, PreTrainedModel):
        return []
    tokens, modules, found = model.get_input_embeddings(), dict(model.named_modules()), set()
    text = {path for path, module in modules.items() if any(it is tokens for it in module.modules())}
    for path, module in modules.items():
        if isinstance(module, PreTrainedModel) and path not in text:
            while path.rpartition(".")[0] not in text:
                path = path.rpartition(".")[0]
            found.add(path)
    return sorted(found)


def _why_not(model: nn.Module, name: str) -> str:
    head = _head(model)
    for path, module in model.named_modules():
        if ends_with(path, name):
            if module is head:
                return ": the output head is not adapted; `train_modules` trains it whole"
            return f": {path} is a {type(module).__name__}, which LoRA does not adapt"
    return ""


def _did_you_mean(name: str, allowed: Collection[str]) -> str | None:
    close = nearest(name, allowed)
    return f"did you mean {close}?" if close else None


def find_trained_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules to train whole; warns of what is trained with them because it is tied."""
    owners = [path for path, module in model.named_modules() if path and _holds_weights(module)]
    trained: list[str] = []
    for name in names:
        matches = [path for path in owners if ends_with(path, name)]
        if not matches:
            leaves = {path.rpartition(".")[2] for path in owners}
            raise ConfigError(
                "a train_modules name matches no module with parameters",
                given=name,
                allowed=", ".join(sorted(leaf for leaf in leaves if not leaf.isdigit())),
                fix=_did_you_mean(name, leaves),
            )
        trained += [path for path in matches if path not in trained]
    for path in trained:
        if any(_is_quantized(module) for module in model.get_submodule(path).modules()):
            raise ConfigError(
                "a quantized module cannot be trained whole",
                given=f"train_modules: {path}",
                fix="adapt it as a target, or load the model with bits: 16",
            )
    held = {id(parameter) for path in trained for parameter in model.get_submodule(path).parameters()}
    for path, module in model.named_modules():
        tied = [name for name, parameter in module.named_parameters(recurse=False) if id(parameter) in held]
        if tied and not is_inside(path, trained):
            warnings.warn(f"{path}.{tied[0]} is tied to a module in train_modules: it is trained too", stacklevel=3)
    return [path for path in owners if path in trained]


def _holds_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(_is_quantized(child) for child in module.modules())


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear | QuantStack)


def is_inside(path: str, modules: Collection[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def in_layers(paths: list[str], layers: Collection[int] | None) -> list[str]:
    if layers is None:
        return paths
    indices = {path: _layer_index(path) for path in paths}
    allowed = {index for index in indices.values() if index is not None}
    unknown = sorted(set(layers) - allowed)
    if unknown or not layers:
        raise ConfigError(
            "layers names a decoder layer without targets" if unknown else "layers is empty",
            given=sorted(layers),
            allowed=f"{min(allowed)}..{max(allowed)}" if allowed else "no target is in a numbered layer",
        )
    return [path for path in paths if indices[path] in layers]


def _layer_index(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def by_pattern(paths: list[str], patterns: Mapping[str, Number], default: Number, name: str) -> dict[str, Number]:
    """Path -> value."""
    for key, value in patterns.items():
        if value <= 0:
            raise ConfigError(f"{name} needs positive values", given=f"{key}: {value}", allowed="> 0")
        try:
            used = any(match_pattern([key], path) for path in paths)
        except re.error as error:
            raise ConfigError(
                f"{name} has a key that is not a regular expression", given=key, allowed=str(error)
            ) from error
        if not used:
            leaves = {path.rpartition(".")[2] for path in paths}
            raise ConfigError(
                f"a {name} key matches no adapted layer",
                given=key,
                allowed=", ".join(sorted(leaves)),
                fix=_did_you_mean(key, leaves),
            )
    keys = {path: match_pattern(patterns.keys(), path) for path in paths}
    return {path: default if key is None else patterns[key] for path, key in keys.items()}
