"""Where data comes from, as a config names it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError

from lowmem_ft.core.config_words import explain
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.section import PathText, Section, path_text

DataFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "chosen", "kto"
]
DataRole = Literal[
    "messages", "prompt", "completion", "text", "instruction", "input", "output", "chosen", "rejected", "label",
    "system", "tools",
]  # fmt: skip


class Part(NamedTuple):
    """Some records of a source: those that are held out, or the others.

    Attributes:
        share: of the records that are held out, each as far from the next as they can be.
    """

    share: float
    held_out: bool

    def has(self, number: int) -> bool:
        """Whether the record of this number, from 0, is one of them."""
        return (int((number + 1) * self.share) > int(number * self.share)) == self.held_out


class DataSource(Section):
    """Where records come from. What is None is taken from the keys of the same name in `data`.

    `path`: a file (JSONL, JSON, CSV, TSV, Parquet, Arrow), a pattern of files (`data/*.jsonl`), a folder that datasets'
    `save_to_disk` wrote, or a hub id.
    `weight`: how often an epoch uses each of its examples; of 2.5, every example twice, and half of them, another half
    in the next epoch, once more. `split` and `subset` concern saved datasets and hub ids; `revision` hub ids.
    """

    path: PathText
    weight: Annotated[float, Field(gt=0)] = 1.0
    format: DataFormat | None = None
    columns: dict[DataRole, str] | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    _part: Part | None = PrivateAttr(default=None)

    @property
    def part(self) -> Part | None:
        """Which of its records are meant; None: all."""
        return self._part

    def parted(self, part: Part) -> DataSource:
        """The same source, of which this part is meant."""
        copied = self.model_copy()
        copied._part = part
        return copied


def _in_memory(value: Any) -> ConfigError:
    """For what is no name of anything, and of which pydantic would take a table for the list of its columns."""
    return ConfigError(
        "Data is read from files.",
        given=f"a {type(value).__name__}: {' '.join(str(value).split()):.60}",
        allowed="a path or a hub id, a mapping with `path:`, or a list of these",
        fix="write a file: records with json.dumps, one a line; a Dataset by to_json(path); a DataFrame by "
        'to_json(path, orient="records", lines=True)',
    )


def _parse_sources(value: Any) -> Any:
    """Mappings as sources here, so that their errors name the source and not the members of a union."""
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError("A list of sources is empty.", allowed="a path, or a mapping with `path:`")
        return [_parse_sources(item) for item in value]
    if value is None or isinstance(value, str | Path | int | float | DataSource):
        return path_text(value)
    if not isinstance(value, Mapping) or not value.keys() & DataSource.model_fields.keys():
        raise _in_memory(value)
    try:
        return DataSource.model_validate(dict(value))
    except ValidationError as error:
        raise explain(error, DataSource) from None


def _parse_held_out(value: Any) -> Any:
    if isinstance(value, str) and not Path(value).exists():  # a share in quotes, or from a command line
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, int | float):
        return _parse_sources(value)
    if not 0 < value < 1:
        allowed = "a share of the training records: 0 < share < 1; or a path, or a list of them"
        raise ConfigError("This is no share of the training records.", given=value, allowed=allowed)
    return value


Sources = Annotated[str | DataSource | list[str | DataSource], BeforeValidator(_parse_sources)]
HeldOut = Annotated[float | str | DataSource | list[str | DataSource], BeforeValidator(_parse_held_out)]


def listed(sources: Sources) -> list[DataSource]:
    """Each source, with nothing filled in."""
    given = sources if isinstance(sources, list) else [sources]
    return [DataSource(path=it) if isinstance(it, str) else it for it in given]
