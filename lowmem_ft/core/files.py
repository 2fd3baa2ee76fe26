"""Writing files that nobody ever sees half."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from lowmem_ft.core.errors import ConfigError


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit of file sizes leaves no more room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary name and rename it.

    Raises:
        ConfigError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ConfigError(
            "The file cannot be written.", given=f"{path} ({error})", allowed="a file in an existing folder"
        ) from None
