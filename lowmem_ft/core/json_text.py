"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
