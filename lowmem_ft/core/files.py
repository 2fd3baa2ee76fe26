"""Writing files that nobody ever sees half."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import tempfile
import time
import zlib
from pathlib import Path

import psutil

from lowmem_ft.core.errors import ConfigError

SAVING = ".saving-"  # a folder whose files are moved to where they belong when they are complete; see `writing_prefix`
ABANDONED_SECONDS = 24 * 3600  # after which nobody is taken to be writing any more
CLOCK_SECONDS = 60  # by which clocks of processes and of file systems may differ


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit of file sizes leaves no more room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_refused(error: OSError) -> bool:
    """Whether the system does not let this user have a file or folder of this name."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


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
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder")
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # which refuses a name that is too long
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError("The file cannot be written.", given=f"{path} ({error})", allowed="a file in an existing folder")


def nearest_existing(path: Path) -> Path:
    """`path`, or what of it is there: a folder above, or a file in the place of one."""
    while not os.path.exists(path):  # unlike pathlib's it answers where nobody may look
        path = path.parent
    return path


def remove(path: Path) -> None:
    """Remove a file, or a folder and what is in it, as far as it may be removed and another process has not done it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def writing_prefix(prefix: str) -> str:
    """With what the names of folders begin that this process is writing: `prefix`, this host and the process's id."""
    return f"{prefix}{_host()}-{os.getpid()}-"


def remove_half_written(folder: Path) -> None:
    """Remove what processes that were killed were saving in `folder`: files `.NAME.<process id>.tmp`, and folders.

    It is for a process to which `folder` belongs and that has written nothing yet. So what has its number goes, too,
    and what another host was writing: a container often has the number of the one before, and another name.
    """
    remove_orphans(folder, SAVING, owned=True)
    for name in _names(folder):
        pid = name.split(".")[-2] if name.startswith(".") and name.endswith(".tmp") else ""
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            remove(folder / name)


def remove_orphans(parent: Path, prefix: str, *, owned: bool = False) -> None:
    """Remove folders in `parent` that processes which were killed have left half-written, see `writing_prefix`.

    Args:
        owned: see `remove_half_written`.
    """
    for name in _names(parent):
        if not name.startswith(prefix):
            continue
        host, _, rest = name.removeprefix(prefix).partition("-")
        number = rest.partition("-")[0]
        pid = int(number) if host == _host() and number.isdigit() else None
        if (owned and pid in (None, os.getpid())) or _is_abandoned(parent / name, pid):
            remove(parent / name)


def _is_abandoned(folder: Path, pid: int | None) -> bool:
    """Whether the process that made `folder` is gone; of another host (None) that is told by time alone."""
    try:
        made = folder.stat().st_mtime
        if pid is None:
            return time.time() - made > ABANDONED_SECONDS
        # in a container another process often has the number of the one before
        return psutil.Process(pid).create_time() > made + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
    except (OSError, psutil.Error):
        return False


def _host() -> str:
    """Short, and without a dash; containers are hosts, too, with processes of their own."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # there is none, or nobody may look inside: writing says why
        return []
