"""Writing files that nobody ever sees half."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from lowmem_ft.core.errors import ConfigError

SAVING = ".saving-"  # a folder whose files are moved to where they belong when they are complete; a process id follows


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit of file sizes leaves no more room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace_text(path: Path, text: str) -> None:
    """Write `text` to a temporary name, which `remove_half_written` knows, and rename it.

    Raises:
        OSError: the file cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # of a path that leads through a file
            temporary.unlink(missing_ok=True)
        raise


def open_to_others(path: Path) -> None:
    """Give a file or folder the permissions that any new one has: what safetensors writes, and what `tempfile` makes,
    is its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):  # a file system without permissions
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_text(path: Path, text: str) -> None:
    """The same for a file that a user has named.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise _unwritable(path, error) from None


def check_writable(path: Path) -> None:
    """Refuse at once what `write_text` would refuse after long work.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError("The file cannot be written.", given=f"{path} ({error})", allowed="a file in an existing folder")


def remove(path: Path) -> None:
    """Remove a file, or a folder and what is in it, as far as it may be removed and another process has not done it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_half_written(folder: Path) -> None:
    """Remove what processes that were killed were saving in `folder`: files `.NAME.<process id>.tmp`, and folders.

    What has this process's number goes, too: in a container a process often has that of the one before. So it is for
    a process that has written nothing yet.
    """
    try:
        names = os.listdir(folder)
    except OSError:  # there is none, or nobody may look inside: writing says why
        return
    for name in names:
        if name.startswith(SAVING):
            pid = name.removeprefix(SAVING).split("-")[0]
        elif name.startswith(".") and name.endswith(".tmp"):
            pid = name.split(".")[-2]
        else:
            continue
        if pid == str(os.getpid()) or _is_gone(pid):
            remove(folder / name)


def remove_orphans(parent: Path, prefix: str) -> None:
    """Remove folders `<prefix><process id>-...` in `parent` that processes which were killed have left half-written."""
    for folder in parent.glob(f"{prefix}*"):
        pid = folder.name.removeprefix(prefix).split("-")[0]
        if _is_gone(pid):
            shutil.rmtree(folder, ignore_errors=True)


def _is_gone(pid: str) -> bool:
    """Whether this is the number of a process that does not exist."""
    return pid.isdigit() and not psutil.pid_exists(int(pid))
