"""What the sections of a config, and other files that users write, have in common."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from lowmem_ft.core.config_words import allowed_words
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.yaml_text import QUOTE


def path_text(value: Any) -> Any:
    """A path as text; `~` stands for the home folder also where no shell has replaced it."""
    if isinstance(value, str) and "\0" in value:
        raise ConfigError("A path cannot have a NUL in it.", given=repr(value), fix="write the path without it")
    home = isinstance(value, str) and value.startswith("~")
    try:
        return str(Path(value).expanduser()) if home or isinstance(value, Path) else value
    except RuntimeError:
        raise ConfigError("A home folder is not known.", given=value, fix="write the path without `~`") from None


PathText = Annotated[str, BeforeValidator(path_text)]


def _takes_bool(annotation: Any) -> bool:
    if annotation is bool or annotation is Any or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return True  # a section looks at its own keys
    return any(_takes_bool(part) for part in typing.get_args(annotation))


class Section(BaseModel):
    """A frozen group of keys that refuses unknown keys, and booleans where numbers are meant."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def changed(self) -> set[str]:
        """Keys with other values than their defaults: a run's resolved config sets all of them."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    @model_validator(mode="before")
    @classmethod
    def _no_bool_for_number(cls, data: Any) -> Any:
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if any(isinstance(it, bool) for it in parts) and field is not None and not _takes_bool(field.annotation):
                allowed = allowed_words(field.annotation)
                fix = QUOTE if "text" in allowed.split(" | ") else None
                raise ConfigError(f"'{key}' takes no boolean.", given=value, allowed=allowed, fix=fix)
        return data
