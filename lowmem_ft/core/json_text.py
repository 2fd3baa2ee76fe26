"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowmem_ft.core.errors import CheckpointError


def read_json(text: str | bytes) -> Any:
    """What `text` says.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python reads, for which `json` has a RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_file(path: Path) -> Any:
    """The same of a file in UTF-8. Raises OSError, too."""
    return read_json(path.read_text(encoding="utf-8"))


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a small JSON file of a model folder; an empty one where there is no such file.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        found = read_json_file(path) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read", given=f"{path}: {error}") from error
    return found
