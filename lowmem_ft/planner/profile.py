"""Device profiles: the facts of one device in a YAML file, so that a plan can be made for a card that is not there.

Every figure says how it was found, where and when. The shipped ones lie in `profiles/` at the top of the repository,
which an installed package holds as `lowmem_ft/profiles/`.
"""

from __future__ import annotations

import datetime
import os
import re
import typing
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from lowmem_ft.core.config_words import first_problem
from lowmem_ft.core.errors import ConfigError, nearest
from lowmem_ft.core.files import write_text
from lowmem_ft.core.section import Section
from lowmem_ft.core.sizes import parse_size
from lowmem_ft.core.yaml_text import read_yaml

Dtype = Literal["bfloat16", "float16", "float32"]
Text = Annotated[str, Field(pattern=r"\S")]
SUFFIXES = (".yaml", ".yml")  # by which the name of a file is told from that of a shipped profile
BF16_CAPABILITY = (8, 0)  # Ampere: the first tensor cores that multiply bfloat16


def _size_or_zero(value: Any) -> int:
    return 0 if str(value).strip() == "0" else parse_size(value)


class Figure(Section):
    """Where a number comes from: a maker's document, a measurement on such a device, an estimate with its ground, or
    the source code that decides it."""

    how: Literal["datasheet", "measured", "estimated", "derived"]
    source: Text
    date: datetime.date


class Bytes(Figure):
    """A size in bytes; files may write it as `11.6GiB`."""

    value: Annotated[int, BeforeValidator(_size_or_zero)]


class Rate(Figure):
    """Operations or bytes per second."""

    value: Annotated[float, Field(gt=0)]


class Measured(Section):
    """What the device reaches in the operations of a training step, by `lowmem-ft profiles measure`.

    Attributes:
        attention_forward, attention_backward: floating-point operations per second of the attention kernel.
        elementwise: bytes per second of a product of two tensors, which reads both and writes a new one.
        exponentials: values per second of exp; None where memory is slower.
        packing: values per second of a bf16 product's second operand, which a CPU with units for it rearranges before
            it multiplies; None for others.
        dequantize_4bit, dequantize_8bit: values per second.
        updates: elements per second that 8-bit AdamW updates.
        draws: random values per second, as dropout draws them.
        calls: operations per second of a training step on so few tokens that only calls count.
        update_calls: tensors per second that 8-bit AdamW updates, however small they are; None counts them as calls.
        loops: floating-point operations per second of PyTorch's own bf16 products, where the processor has no bf16
            units; None where it has.
    """

    attention_forward: Rate
    attention_backward: Rate
    elementwise: Rate
    dequantize_4bit: Rate
    dequantize_8bit: Rate
    updates: Rate
    draws: Rate
    calls: Rate
    update_calls: Rate | None = None
    loops: Rate | None = None
    exponentials: Rate | None = None
    packing: Rate | None = None


class Workspaces(Section):
    """What cuBLAS holds of PyTorch's pool from its first products on, as long as the process lives.

    Attributes:
        forward: taken by the thread that runs forward and update.
        bias: taken in addition where a product adds a bias.
        backward: taken by autograd's own thread.
    """

    forward: Bytes
    bias: Bytes
    backward: Bytes


class Profile(Section):
    """Facts of one device. Each figure's number is its `.value`.

    Attributes:
        compute_capability: such as "8.6"; None where there is no CUDA.
        sm_count: streaming multiprocessors; None where there is no CUDA.
        memory_bytes: what the driver lets programs have in all (`torch.cuda.mem_get_info`), a little below the label.
        display_bytes: what a desktop typically takes of it.
        context_bytes: what a process takes before its first tensor: the CUDA context with kernels loaded; on CPU the
            libraries.
        flops: dense matrix products with fp32 accumulation, by dtype: the peak where `how` is `datasheet`, else what
            large ones reach for minutes. No bfloat16 where the hardware has none.
        memory_bandwidth: bytes per second between the device's memory and its processor.
        link_to_device, link_to_host: bytes per second of pinned copies, one direction at a time.
        disk_read: bytes per second, sequential, not from the page cache.
        workspaces: None: by the architecture, see `planner.workspaces`; not on a CPU.
        measured: then `flops`, too, are what was reached, not a datasheet's; None for a device that nobody measured.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: Text
    kind: Literal["cuda", "cpu"]
    architecture: Literal["volta", "turing", "ampere", "ada", "hopper", "blackwell", "cpu"]
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")] | None = None
    sm_count: Annotated[int, Field(gt=0)] | None = None
    memory_bytes: Bytes
    display_bytes: Bytes
    context_bytes: Bytes
    flops: dict[Dtype, Rate]
    memory_bandwidth: Rate
    link_to_device: Rate
    link_to_host: Rate
    disk_read: Rate
    workspaces: Workspaces | None = None
    measured: Measured | None = None

    @model_validator(mode="after")
    def _facts_agree(self) -> Self:
        if self.memory_bytes.value <= self.display_bytes.value + self.context_bytes.value:
            raise ConfigError(
                "Display and context leave no memory.",
                given=f"memory_bytes {self.memory_bytes.value}, display_bytes {self.display_bytes.value}, "
                f"context_bytes {self.context_bytes.value}",
                allowed="memory_bytes above the sum of the other two",
            )
        cuda = (self.compute_capability is not None, self.sm_count is not None, self.architecture != "cpu")
        if set(cuda) != {self.kind == "cuda"}:
            raise ConfigError(
                "kind, architecture, compute_capability and sm_count do not agree.",
                given=f"{self.kind}, {self.architecture}, {self.compute_capability}, {self.sm_count}",
                allowed="kind cuda with all of them, or kind cpu with architecture cpu and the other two null",
            )
        if self.workspaces is not None and self.kind == "cpu":
            raise ConfigError("workspaces concern CUDA.", given="kind cpu", fix="remove the section")
        wanted = {"float16", "float32"} | ({"bfloat16"} if self._has_bf16 else set())
        if set(self.flops) != wanted:
            raise ConfigError(
                "flops does not hold the dtypes that this device multiplies.",
                given=", ".join(self.flops),
                allowed=", ".join(sorted(wanted)),
                fix="bfloat16 needs compute capability 8.0, and is needed from there on and on CPU",
            )
        return self

    @property
    def _has_bf16(self) -> bool:
        if self.compute_capability is None:
            return True
        major, minor = self.compute_capability.split(".")
        return (int(major), int(minor)) >= BF16_CAPABILITY

    @property
    def fastest_dtype(self) -> Literal["bfloat16", "float16"]:
        """The 16-bit dtype to compute in: bfloat16 where the hardware has it, and on CPU."""
        return "bfloat16" if "bfloat16" in self.flops else "float16"

    def figures(self) -> dict[str, Bytes | Rate]:
        """Every figure by its dotted key, in the order of the file."""
        found: dict[str, Bytes | Rate] = {}
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, (Bytes, Rate)):
                found[key] = value
            elif isinstance(value, dict):
                found |= {f"{key}.{name}": figure for name, figure in value.items()}
            elif isinstance(value, (Measured, Workspaces)):
                found |= {f"{key}.{name}": figure for name, figure in value if figure is not None}
        return found


def profile_names() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def near_profile(name: str) -> str | None:
    """The shipped profile that a name such as `RTX 4090` seems to mean."""
    word = re.sub(r"[\W_]+", "-", name.lower())
    parts = [it for it in profile_names() if len(word) > 1 and word.replace("-", "") in it.replace("-", "")]
    return parts[0] if parts else nearest(word, profile_names())


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by its name, or a profile from a file (a Path, or text with a slash or ending in .yaml).

    Raises:
        ConfigError: an unknown name, an unreadable file, a wrong or missing key, a value that is not allowed.
    """
    given = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in given or os.sep in given or given.endswith(SUFFIXES):
        file: Traversable = Path(name_or_path)
    elif given in profile_names():
        file = _folder() / f"{given}.yaml"
    else:
        close = near_profile(given)
        raise ConfigError(
            "No such device profile.",
            given=given,
            allowed=f"{', '.join(profile_names())}, or a YAML file",
            fix=f"did you mean '{close}'?" if close else "see `lowmem-ft profiles list`",
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The profile cannot be read.", given=f"{file} ({error})") from None
    data = read_yaml(text, str(file), what="The profile is not YAML.")
    if not isinstance(data, dict):
        raise ConfigError("The profile holds no keys.", given=str(file), allowed=f"keys {', '.join(_keys(Profile))}")
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise _explain(error, given) from None


def write_profile(profile: Profile, path: str | Path) -> None:
    """Write `profile` as YAML that `load_profile` reads back equal. A reader never sees half a file.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True, width=110)
    write_text(Path(path), text)


def _folder() -> Traversable:
    package = resources.files("lowmem_ft")
    shipped = package / "profiles"
    if shipped.is_dir():
        return shipped
    return Path(str(package)).parent / "profiles"  # an editable install runs in the repository


def _keys(annotation: Any) -> list[str]:
    """The keys below a section or a mapping of dtypes; none below a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.model_fields)
    if typing.get_origin(annotation) is dict:
        return list(typing.get_args(typing.get_args(annotation)[0]))
    return []


def _below(annotation: Any, key: str) -> Any:
    """The annotation of `key` in a section or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields[key].annotation
    return typing.get_args(annotation)[1]


def _explain(error: ValidationError, where: str) -> ConfigError:
    """The first problem of a pydantic error, in this project's form."""
    first = first_problem(error)
    path = [str(part) for part in first["loc"]]
    unknown = first["type"] in ("extra_forbidden", "invalid_key") or path[-1:] == ["[key]"]
    if path[-1:] == ["[key]"]:  # pydantic's place of a mapping's key that is no dtype
        path.pop()
    key = ".".join(path)
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        what = f"{where}: {key}: {inner.what}" if key else f"{where}: {inner.what}"
        return ConfigError(what, given=inner.given, allowed=inner.allowed, fix=inner.fix)
    section: Any = Profile
    for part in path[:-1]:
        section = _below(section, part)
    siblings = _keys(section)
    if unknown:
        close = nearest(path[-1], siblings)
        return ConfigError(
            f"{where}: Unknown key '{key}'.",
            given=path[-1],
            allowed=", ".join(siblings),
            fix=f"did you mean '{close}'?" if close else "remove it",
        )
    below = _keys(_below(section, path[-1]))
    if first["type"] == "missing":
        return ConfigError(
            f"{where}: '{key}' is missing.",
            allowed=f"a mapping with {', '.join(below)}" if below else None,
            fix=f"add `{path[-1]}: ...`",
        )
    return ConfigError(
        f"{where}: '{key}' has a value that is not allowed.",
        given=repr(first["input"]),
        allowed=f"a mapping with {', '.join(below)}" if below else first["msg"].removeprefix("Input should be "),
        fix='put it in quotes, such as "8.6"' if path == ["compute_capability"] else None,
    )
