"""What a benchmark leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def leave(result: Mapping[str, Any], out: Path | None) -> None:
    """Print `result` as JSON, and write it to `out` if that is given."""
    from lowmem_ft.core.files import write_text

    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text + "\n")
