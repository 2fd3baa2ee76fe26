"""Adapters in peft's own files, written so that peft reads them and read as peft writes them.

`adapter_config.json` is made by `peft.LoraConfig`; `adapter_model.safetensors` holds the tensors under the names that
peft gives them in a plain transformers model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowmem_ft.adapters.inject import adapter_at, eject_lora, inject_resolved, injection_of, is_injected
from lowmem_ft.adapters.lora import LoraLinear, module_device
from lowmem_ft.adapters.peft_config import (
    PUT_BACK,
    is_variant,
    rank_and_alpha,
    read_lora_config,
    to_lora_config,
    with_tied,
)
from lowmem_ft.adapters.peft_methods import check_base_unchanged, check_conv1d, is_prompt_learning
from lowmem_ft.adapters.targets import adaptable
from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.core.files import SAVING, open_to_others, remove_orphans, writing_prefix
from lowmem_ft.core.json_text import read_json_file
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.quant.checkpoint import Checkpoint, read_header
from lowmem_ft.quant.checksum import CHECKSUM, content_checksum
from lowmem_ft.quant.shards import PYTORCH, write_file
from lowmem_ft.quant.swap import is_linear

_PREFIX = "base_model.model."
_PEFT_COPIES = re.compile(r"\.(original_module|modules_to_save)\.")
_SHOWN = 4  # keys that a message names
_LETTERS = 400  # of what peft says


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str) -> None:
    """Write the adapter in `model` as peft does. Each file appears complete or not at all.

    Args:
        model: after `inject_lora`, or what `inject_peft` returned.
        folder: made if missing; an adapter in it is replaced.
        base_model: path or hub id of the base model, for `adapter_config.json`.

    Raises:
        ConfigError: the model has no adapter.
        CheckpointError: the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_orphans(folder, SAVING)
        with tempfile.TemporaryDirectory(dir=folder, prefix=writing_prefix(SAVING)) as scratch:
            _write(model, Path(scratch), base_model)
            for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == CONFIG_NAME):  # it comes last
                open_to_others(file)
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError("the adapter cannot be written", given=f"{folder} ({error})") from error


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Put the adapter saved in `folder` into `model`, trainable.

    Args:
        model: plain or quantized; or with the same adapters injected, whose values are then overwritten.
        settings: what `read_adapter_config` gives of `folder`, if it is known.
        dropout, dtype: of adapters that have to be injected first, as for `inject_lora`.

    Returns:
        `model`; a `peft.PeftModel` around it where the folder holds another method, or a variant of LoRA that only
        peft has. Prompt methods go on with the virtual tokens themselves: what produced them is not in the file.

    Raises:
        CheckpointError: missing, damaged, or not made for this model; the model is then as it was.
        UnsupportedError: LoRA that starts from changed base weights (PiSSA, OLoRA, LoftQ, CorDA).
        ConfigError: a method that peft does not have on the plain model's layers.
    """
    folder = Path(folder)
    settings = settings or read_adapter_config(folder)
    fresh = not is_injected(model)
    if _is_peft_only(settings) or (fresh and not is_native(model, folder, settings)):
        return load_through_peft(model, folder, settings)
    _check_base_unchanged(settings, folder)
    _check_content(folder / SAFETENSORS_WEIGHTS_NAME)
    config = read_lora_config(settings, folder)
    if fresh:
        _inject(model, config, folder, dropout=dropout, dtype=dtype)
    try:
        _check_same(model, config, folder)
        _fill(model, folder, tied=bool(config.ensure_weight_tying), other=_other_base(model, settings))
    except BaseException:
        if fresh:
            eject_lora(model)
        raise
    return model


def is_native(model: nn.Module, folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `load_adapter` puts this package's own layers into `model`, which has no adapters, and not peft's.

    Args:
        settings: what `read_adapter_config` gives of `folder`.

    Raises:
        CheckpointError: settings that cannot be right, and weights that cannot be read.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if _is_peft_only(settings) or _unties(model, read_lora_config(settings, folder), file):
        return False
    return not _adapts_others(model, file)


def _is_peft_only(settings: Mapping[str, Any]) -> bool:
    return settings["peft_type"] != "LORA" or is_variant(settings)


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """`adapter_config.json` of a folder that holds an adapter in safetensors.

    Raises:
        CheckpointError: a file is missing or unreadable, or the weights exist as a pickle only.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    try:
        settings = read_json_file(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the adapter's config cannot be read",
            given=f"{path} ({error})",
            allowed=f"a folder with {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}",
        ) from error
    known = [kind.value for kind in peft.PeftType]
    if not isinstance(settings, dict) or settings.get("peft_type") not in known:
        given = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise CheckpointError(f"{path} names no peft method", given=given, allowed=", ".join(known))
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickled = (folder / WEIGHTS_NAME).is_file()
        raise CheckpointError(
            "the adapter's weights are missing" + (" but for a pickle, which could run code" if pickled else ""),
            given=folder / (WEIGHTS_NAME if pickled else SAFETENSORS_WEIGHTS_NAME),
            allowed=SAFETENSORS_WEIGHTS_NAME,
            fix="save it with peft's save_pretrained, which writes safetensors",
        )
    return settings


def adapter_folder(folder: str | Path) -> Path:
    """Where the adapter is that this folder, its own or that of a run, holds."""
    folder = Path(folder).expanduser()
    inside = folder / "adapter"
    # unlike pathlib's these answer where nobody may look
    return inside if os.path.isfile(inside / CONFIG_NAME) and not os.path.exists(folder / CONFIG_NAME) else folder


def adapter_digest(folder: str | Path) -> str:
    """SHA-256 (16 hex digits) over the files of the adapter in `folder`, wherever that lies: settings and weights."""
    total = hashlib.sha256()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        with (Path(folder) / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def warn_of_other_base(settings: Mapping[str, Any], folder: str | Path, base_model: str) -> None:
    """Warn if the adapter says that it was trained on another base, which of the same shape loads without a word.

    Args:
        settings: of the adapter in `folder`, see `read_adapter_config`.
        base_model: path or hub id; of both only names count, as folders move.
    """
    named = settings.get("base_model_name_or_path")
    # what cannot be shown is no name, and of a NUL the system would not even ask
    if isinstance(named, str) and named and named.isprintable() and not _names(named) & _names(base_model):
        warnings.warn(
            f"the adapter in {folder} says that it was trained on {named}, and this is {base_model}: on another model "
            "it computes something else",
            stacklevel=4,
        )


def _names(base: str) -> set[str]:
    """The last part of a path or hub id, of where links lead, and of the id that a folder in the hub's cache is of."""
    path = Path(base)
    cached = {part.rpartition("--")[2] for part in path.parts if part.startswith("models--")}
    return {name.lower() for name in (path.name, path.resolve().name, *cached)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every trained tensor (not a copy) under the key that it has in peft's file.

    peft wraps a module once for each of its targeted expert stacks, the last stack outermost.
    """
    injection = injection_of(model)
    tensors: dict[str, Tensor] = {}
    depth: Counter[str] = Counter()
    for path in reversed(injection.paths):
        adapter = adapter_at(model, path)
        prefix = f"{_PREFIX}{path}"
        if not isinstance(adapter, LoraLinear):
            parent = path.rpartition(".")[0]
            prefix = _PREFIX + parent + ".base_layer" * depth[parent]
            depth[parent] += 1
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = adapter.lora_A, adapter.lora_B
        if isinstance(adapter, LoraLinear) and adapter.magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = adapter.magnitude
    trained: dict[str, Tensor] = {}
    for path in with_tied(model, injection.trained_modules):
        state = model.get_submodule(path).state_dict(keep_vars=True)
        trained |= {f"{path}.{name}": tensor for name, tensor in state.items()}
    for name, parameter in model.named_parameters():
        if injection.bias != "none" and parameter.requires_grad and name.endswith(".bias") and name not in trained:
            parent = next((p for p in depth if name.startswith(f"{p}.")), "")
            tensors[_PREFIX + parent + ".base_layer" * depth[parent] + name.removeprefix(parent)] = parameter
    return tensors | {_PREFIX + name: tensor for name, tensor in trained.items()}


def _write(model: nn.Module, folder: Path, base_model: str) -> None:
    if isinstance(model, peft.PeftModel):
        model.peft_config[model.active_adapter].base_model_name_or_path = base_model
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    settings = to_lora_config(model, base_model=base_model).to_dict()
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    (folder / CONFIG_NAME).write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = adapter_tensors(model)
    write_file(folder / SAFETENSORS_WEIGHTS_NAME, tensors, {**PYTORCH, CHECKSUM: content_checksum(tensors)})


def _check_base_unchanged(settings: Mapping[str, Any], folder: Path) -> None:
    conversion = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    check_base_unchanged(settings, folder / CONFIG_NAME, fix=f"convert it with peft: {conversion}")


def _check_content(file: Path) -> None:
    """Refuse a file that is not as `save_adapter` wrote it; one that peft wrote has no checksum."""
    tensors, metadata = read_header(file)
    if CHECKSUM in metadata and metadata[CHECKSUM] != content_checksum(tensors):
        raise CheckpointError(
            "the adapter's weights are damaged: they are not what was saved",
            given=file,
            fix="copy it again; of a run, delete its result.json, and `lowmem-ft train ... --resume` writes it anew",
        )


def _other_base(model: nn.Module, settings: Mapping[str, Any]) -> str | None:
    """What to do where the adapter was made for another model; None where that is not known."""
    base, here = settings.get("base_model_name_or_path"), getattr(model.config, "_name_or_path", None)
    if not base or not here or base == here:
        return None
    return f"it was trained on {base}, and this is {here}: load it into the model that it was trained on"


def load_through_peft(model: nn.Module, folder: Path, settings: Mapping[str, Any]) -> nn.Module:
    """`load_adapter` of what is not native, whatever `model` has become since that was found out.

    Raises:
        CheckpointError, UnsupportedError, ConfigError: as `load_adapter`.
    """
    _check_base_unchanged(settings, folder)
    file, device = folder / SAFETENSORS_WEIGHTS_NAME, module_device(model)
    _check_content(file)
    try:
        wrapped: nn.Module = peft.PeftModel.from_pretrained(
            model,
            folder,
            is_trainable=not is_prompt_learning(settings),  # peft refuses it for these, and trains them all the same
            torch_device="cpu" if device.type == "meta" else str(device),  # where it reads the file to
        )
        with safe_open(file, framework="pt") as saved:
            keys = set(saved.keys())
    except Exception as error:  # of any kind: peft trusts what the config says
        if is_out_of_memory(error):
            raise
        fix, why = _other_base(model, settings) or PUT_BACK, " ".join(str(error).split())
        why = why if len(why) <= _LETTERS else f"{why[:_LETTERS]} ..."  # of shapes, each has a line
        raise CheckpointError("peft cannot load the adapter", given=f"{folder} ({why})", fix=fix) from error
    check_conv1d(model, wrapped, settings["peft_type"])
    # of embeddings that are adapted peft writes the base's own matrix, too
    expected, allowed = (set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=it)) for it in (False, True))
    if wrong := (expected - keys) | (keys - allowed):  # peft only warns
        raise CheckpointError(
            "the adapter's tensors are not those that its config calls for",
            given=f"{', '.join(sorted(wrong)[:_SHOWN])}: either missing or unexpected in {file}",
            fix=_other_base(model, settings) or PUT_BACK,
        )
    return wrapped


def _inject(model: nn.Module, config: Any, folder: Path, *, dropout: float, dtype: torch.dtype) -> None:
    found = {path: rank_and_alpha(config, path, linear=is_linear(target)) for path, target in adaptable(model).items()}
    chosen = {path: values for path, values in found.items() if values is not None}
    if not chosen:
        raise CheckpointError(
            "the adapter was made for another model: none of its targets is in this one",
            given=f"{config.target_modules or config.target_parameters} in {folder / CONFIG_NAME}",
            fix=_other_base(model, config.to_dict()) or PUT_BACK,
        )
    inject_resolved(
        model,
        ranks={path: rank for path, (rank, _) in chosen.items()},
        alphas={path: alpha for path, (_, alpha) in chosen.items()},
        trained_modules=_trained_modules(model, config),
        dropout=dropout,
        rslora=config.use_rslora,
        dora=config.use_dora,
        init="default",
        bias=config.bias,
        dtype=dtype,
    )


def _trained_modules(model: nn.Module, config: Any) -> list[str]:
    """Paths of the modules of which the file holds trained copies."""
    saved = config.modules_to_save or []
    return [name for name, _ in model.named_modules() if any(name.endswith(end) for end in saved)]


def _unties(model: nn.Module, config: Any, file: Path) -> bool:
    """Whether the file has a trained copy of one of two tied modules, or two that differ: peft keeps copies apart."""
    trained = _trained_modules(model, config)
    if config.ensure_weight_tying or not trained:
        return False
    if set(with_tied(model, trained)) != set(trained):
        return True
    stored = Checkpoint(file.parent, str(file.parent), model.config, read_header(file)[0], (file,))
    pairs = [[_PREFIX + name for name in pair] for pair in getattr(model, "all_tied_weights_keys", {}).items()]
    return any(set(pair) <= stored.tensors.keys() and not stored.same_content(*pair) for pair in pairs)


def _adapts_others(model: nn.Module, file: Path) -> bool:
    """Whether the file has LoRA for modules of the model on which this package puts none: embeddings, the head."""
    own = adaptable(model)
    known = set(own) | {path.rpartition(".")[0] for path, target in own.items() if not is_linear(target)}
    others = {path for path, _ in model.named_modules() if path not in known}
    try:
        with safe_open(file, framework="pt") as saved:
            keys = list(saved.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError("the adapter's weights cannot be read", given=f"{file} ({error})") from error
    return any(key.removeprefix(_PREFIX).partition(".lora_")[0] in others for key in keys)


def _check_same(model: nn.Module, config: Any, folder: Path) -> None:
    """Refuse a file whose numbers would mean something else in the adapters that the model has."""
    injection = injection_of(model)
    for path in injection.paths:
        adapter = adapter_at(model, path)
        there = (adapter.rank, adapter.alpha, adapter.rslora, injection.dora)
        saved = rank_and_alpha(config, path, linear=isinstance(adapter, LoraLinear))
        here = None if saved is None else (*saved, config.use_rslora, config.use_dora)
        if here != there:
            raise CheckpointError(
                f"the adapter does not fit the one in the model at {path}",
                given="no adapter there" if here is None else "rank {}, alpha {}, rslora {}, dora {}".format(*here),
                allowed="rank {}, alpha {}, rslora {}, dora {}".format(*there),
                fix=f"set the adapter's options as in {folder / CONFIG_NAME}, or load into a model without adapters",
            )


def _fill(model: nn.Module, folder: Path, *, tied: bool, other: str | None) -> None:
    """Copy the file's tensors into the model, once all of them are known to be right. `other` as of `_other_base`."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    expected = adapter_tensors(model)
    try:
        with safe_open(file, framework="pt") as saved:
            # with `bias: all` peft writes the biases of its fully trained modules twice more, under its own names
            keys = [key for key in saved.keys() if not _PEFT_COPIES.search(key)]  # noqa: SIM118  (not a dict)
            _check_keys(keys, expected, file, tied=tied, other=other)
            values: dict[int, tuple[str, Tensor]] = {}
            for key in keys:
                value = saved.get_tensor(key)
                _check_value(key, value, expected[key], file, other)
                first, same = values.setdefault(id(expected[key]), (key, value))
                if not torch.equal(same, value):
                    raise CheckpointError(
                        "the adapter holds two values for what is one tied tensor of this model",
                        given=f"{first} and {key} in {file}",
                        fix="use the model with tie_word_embeddings: false",
                    )
            with torch.no_grad():
                for key in keys:
                    expected[key].copy_(values[id(expected[key])][1])
    except (OSError, SafetensorError) as error:
        raise CheckpointError("the adapter's weights cannot be read", given=f"{file} ({error})") from error


def _check_keys(keys: list[str], expected: Mapping[str, Tensor], file: Path, *, tied: bool, other: str | None) -> None:
    unexpected = sorted(set(keys) - set(expected))
    if unexpected:
        raise CheckpointError(
            f"the adapter has {len(unexpected)} tensors for which this model has no place",
            given=f"{', '.join(unexpected[:_SHOWN])} in {file}",
            fix=other or f"load it into the base model that it was trained on; {PUT_BACK}",
        )
    there = {id(expected[key]) for key in keys}
    missing = [key for key in expected if key not in keys and not (tied and id(expected[key]) in there)]
    if missing:
        raise CheckpointError(
            f"the adapter lacks {len(missing)} tensors that its config calls for",
            given=f"no {', '.join(missing[:_SHOWN])} in {file}",
            fix=other or f"save it again; {PUT_BACK}",
        )


def _check_value(key: str, value: Tensor, expected: Tensor, file: Path, other: str | None) -> None:
    if value.shape != expected.shape and _is_of_other_rank(key, value, expected):
        raise CheckpointError(
            f"the adapter's config gives {key.rpartition('.lora_')[0].removeprefix(_PREFIX)} another rank than its "
            "tensors have",
            given=f"{key} {tuple(value.shape)} in {file}",
            allowed=tuple(expected.shape),
            fix=f"put r and rank_pattern in {CONFIG_NAME} back: they say what was trained, and change nothing of it",
        )
    if value.shape != expected.shape:
        raise CheckpointError(
            "a tensor of the adapter has another shape than this model and the config give it",
            given=f"{key} {tuple(value.shape)} in {file}",
            allowed=tuple(expected.shape),
            fix=other or f"load it into the base model that it was trained on; {PUT_BACK}",
        )
    if not value.isfinite().all():
        raise CheckpointError("the adapter holds NaN or Inf", given=f"{key} in {file}", fix="use an earlier checkpoint")


def _is_of_other_rank(key: str, value: Tensor, expected: Tensor) -> bool:
    """Whether a factor of LoRA has the expected shape but for the rank: rows of A, columns of B."""
    rank = 0 if key.endswith(".lora_A.weight") else 1 if key.endswith(".lora_B.weight") else None
    return rank is not None and value.ndim == expected.ndim == 2 and value.shape[1 - rank] == expected.shape[1 - rank]
