"""Writing files that nobody ever sees half."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

import psutil

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


def remove_orphans(parent: Path, prefix: str) -> None:
    """Remove folders `<prefix><process id>-...` in `parent` that processes which were killed have left half-written."""
    for folder in parent.glob(f"{prefix}*"):
        pid = folder.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
