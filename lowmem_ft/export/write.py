"""Folders that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowmem_ft.core.errors import CheckpointError, ConfigError
from lowmem_ft.core.files import is_full, open_to_others, remove_orphans, writing_prefix
from lowmem_ft.core.sizes import format_size
from lowmem_ft.quant.checkpoint import SMALL_FILES

# what an exported model takes over from its base; templates beside the default one (for tools) lie in a folder
COPIED = (*SMALL_FILES, "additional_chat_templates/*.jinja")
_OF_WEIGHTS = ("config.json", "generation_config.json", "adapter_config.json", "quantize_config.json")


@contextmanager
def new_folder(out: Path, *, nbytes: int) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to it if the block ends well, else removed.

    What a process that was killed has left of an earlier attempt is removed first.

    Args:
        nbytes: that will be written.

    Raises:
        ConfigError: as `refuse_filled`.
        CheckpointError: no space, or nothing can be written there.
    """
    refuse_filled(out)
    out = Path(os.path.realpath(out))  # a folder is not renamed onto a link
    with _explained(out, nbytes):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(out.parent, _prefix(out))
        if shutil.disk_usage(out.parent).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        folder = Path(tempfile.mkdtemp(prefix=writing_prefix(_prefix(out)), dir=out.parent))
    try:
        with _explained(out, nbytes):
            yield folder
            paths = [*folder.rglob("*")]
            for file in filter(Path.is_file, paths):
                with open(file, "r+b") as stream:
                    os.fsync(stream.fileno())
            for path in (*paths, folder):
                open_to_others(path)
            folder.rename(out)  # onto an empty folder, too
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_filled(out: Path) -> None:
    """Raise ConfigError if `out` is a file, a folder that holds something, or one in whose place no other can come."""
    try:
        filled = os.path.exists(out) and bool(os.listdir(out))
    except OSError:  # a file, or a folder that nobody may look into
        filled = True
    if filled:
        raise ConfigError(
            "The output exists already.",
            given=out,
            allowed="a new or an empty folder",
            fix="name another one with --out, or delete this one",
        )
    if os.path.realpath(out) == os.path.realpath(os.curdir) or os.path.ismount(out):
        raise ConfigError(
            "The output cannot take the place of a folder that is in use: the current one, or a mounted one.",
            given=out,
            fix=f"name a folder in it: --out {out / 'NAME'}",
        )


def small_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template and the like of a model folder: all but weights and their configuration."""
    found = {file for pattern in COPIED for file in folder.glob(pattern) if file.is_file()}
    return sorted(it for it in found if it.name not in _OF_WEIGHTS and not it.name.endswith(".index.json"))


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy `small_files`. Links, as the hub's cache has them, are followed."""
    for file in small_files(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


@contextmanager
def _explained(out: Path, nbytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = is_full(error)
        raise CheckpointError(
            "There is no space left for what is exported." if full else "The export cannot be written.",
            given=f"{out}: {error.strerror or error}",
            allowed=f"{format_size(nbytes)} of free space" if full else None,
            fix=("free some space, or name a folder on another disk" if full else "name another folder")
            + " with --out",
        ) from error


def _prefix(out: Path) -> str:
    return f".{out.name}.writing-"
