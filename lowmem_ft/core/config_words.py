"""A schema's keys and values in a user's words, and what pydantic finds wrong with them in this project's form."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails

from lowmem_ft.core.errors import ConfigError, nearest
from lowmem_ft.core.sizes import parse_duration, parse_size
from lowmem_ft.core.yaml_text import QUOTE

# What other trainers call a key that has another name here
_ELSEWHERE = {
    key: ours
    for ours, others in {
        "model": "base_model model_name model_name_or_path model_id",
        "output": "output_dir output_path save_dir",
        "quant.bits": "load_in_4bit load_in_8bit",
        "adapter.rank": "r lora_r lora_rank",
        "adapter.targets": "target_modules lora_target lora_target_modules",
        "adapter.train_modules": "modules_to_save",
        "budget.memory": "vram gpu_memory max_memory",
        "data.train": "dataset datasets dataset_name train_file",
        "data.eval": "validation eval_dataset eval_file validation_file",
        "data.seq_len": "max_seq_length max_length sequence_len cutoff_len block_size",
        "train.tokens_per_step": "batch_size per_device_train_batch_size micro_batch_size gradient_accumulation_steps",
        "train.lr": "learning_rate",
        "train.epochs": "num_train_epochs num_epochs",
        "train.steps": "max_steps",
        "train.schedule": "lr_scheduler lr_scheduler_type",
        "train.grad_clip": "max_grad_norm",
        "train.eval_every": "eval_steps",
        "train.save_every": "save_steps",
        "train.track": "report_to",
        "train.objective": "loss_type",
        "policy.compute_dtype": "bf16 fp16 dtype torch_dtype mixed_precision",
        "policy.activations": "gradient_checkpointing",
    }.items()
    for key in others.split()
}


_READ: dict[Any, str] = {  # functions that read a text
    parse_size: "a size such as 8GiB, or bytes",
    parse_duration: "a time such as 3h or 90m, or seconds",
}


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key below `section`, parents included."""
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys_of(field.annotation, f"{prefix}{name}.")
    return found


def allowed_words(annotation: Any) -> str:
    """An annotation in a user's words: `4 | 8 | 16 | auto`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        read = next((it.func for it in parts[1:] if isinstance(it, BeforeValidator)), None)
        if read in _READ:
            return _READ[read]
        return _bounded(allowed_words(parts[0]), parts[1:])  # of Field(gt=...)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if part is type(None) else allowed_words(part) for part in parts)
    if origin is list:
        return f"a list of {allowed_words(parts[0])}"
    if origin is dict:
        return f"a mapping of {allowed_words(parts[0])} to {allowed_words(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"keys {', '.join(annotation.model_fields)}"
    return {"int": "a whole number", "float": "a number", "str": "text", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), str(annotation).replace("typing.", "")
    )


def _bounded(words: str, constraints: Iterable[Any]) -> str:
    limits = " and ".join(f"{sign} {limit}" for it in constraints for sign, limit in _bounds(it))
    return f"{words} {limits}" if limits else words


def _bounds(constraint: Any) -> Iterable[tuple[str, Any]]:
    for item in getattr(constraint, "metadata", [constraint]):
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if getattr(item, name, None) is not None:
                yield sign, getattr(item, name)


def first_problem(error: ValidationError) -> ErrorDetails:
    """What to tell of `error`: of a key that is misspelt that nobody knows it, and not that another one is missing."""
    problems = error.errors(include_url=False)
    return next((it for it in problems if it["type"] == "extra_forbidden"), problems[0])


def explain(error: ValidationError, schema: type[BaseModel]) -> ConfigError:
    """The first problem of a pydantic error of `schema`, in this project's form."""
    first = first_problem(error)
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        where = ".".join(str(part) for part in first["loc"])
        return ConfigError(
            f"{where}: {inner.what}" if where else inner.what, given=inner.given, allowed=inner.allowed, fix=inner.fix
        )
    # a union's location ends with the names of its members, which are no keys
    known = keys_of(schema)
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        close = _meant(path, known)
        siblings = [
            name for name in known if name.count(".") == len(path) - 1 and name.startswith(key[: -len(path[-1])])
        ]
        return ConfigError(
            f"Unknown key '{key}'.",
            given=first["input"],
            allowed=", ".join(siblings),
            fix=f"did you mean '{close}'?" if close else "remove it",
        )
    while len(path) > 1 and ".".join(path) not in known:
        path.pop()
    key = ".".join(path)
    if first["type"] == "missing":
        return ConfigError(f"'{key}' is missing.", allowed=allowed_words(str), fix=f"add `{key}: ...`")
    section: Any = schema
    field = section.model_fields[path[0]]
    for part in path[1:]:
        field = typing.cast(type[BaseModel], field.annotation).model_fields[part]
    allowed, fix = _bounded(allowed_words(field.annotation), field.metadata), None
    if first["type"] == "finite_number":
        allowed = f"{allowed}, and finite"
    elif first["type"] == "string_type" and isinstance(first["input"], int | float):
        fix = QUOTE
    elif first["type"] == "model_type":  # whose message names a class
        fix = f"write keys below `{key}:`"
    return ConfigError(
        f"'{key}' has a value that is not allowed.",
        given=repr(first["input"]),
        allowed=allowed,
        fix=fix,
    )


def _meant(path: list[str], known: list[str]) -> str | None:
    """The known key that an unknown one seems to mean, which may be in another section."""
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}  # of two the first
    if path[-1] in leaves:
        return leaves[path[-1]]
    if (ours := _ELSEWHERE.get(path[-1])) in known:
        return ours
    section = "".join(f"{part}." for part in path[:-1])
    # by what differs: beside the section's own name any two keys of it look alike
    beside = {name.removeprefix(section): name for name in known if name.startswith(section)}
    for names in ({leaf: name for leaf, name in beside.items() if "." not in leaf}, leaves):
        if near := nearest(path[-1], names):
            return names[near]
    return None
