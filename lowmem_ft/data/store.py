"""Tokenized examples on disk: written once for the same content, tokenizer and settings, read as they are asked for.

A file holds, little-endian: the tokens of all examples (int32; one that is not in the loss is written as its
complement `~id`), then the index (of each example its length, int32, the CRC-32 of its tokens, uint32, and its part,
uint8), then a JSON object (the report, and how long the index is), the object's length (uint64), the SHA-256 of index
and object, and `MAGIC`. It is read with pread, not mapped: mapped pages count into the process's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any, overload

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import ConfigError, DataError
from lowmem_ft.core.files import ABANDONED_SECONDS, is_full
from lowmem_ft.core.json_text import read_json
from lowmem_ft.data.examples import IGNORE_INDEX, Example
from lowmem_ft.data.records import Progress, kind_of
from lowmem_ft.data.sources import FileSet
from lowmem_ft.data.tally import DataReport

FORMAT = 1  # raise it when what is written changes
# what turns records into tokens: another version of it finds nothing that this one wrote
MAKERS = ("chat.py", "examples.py", "formats.py", "preference.py", "records.py", "tally.py", "template.py")
MAGIC = b"LMFTDAT1"
TAIL = 8 + 32 + len(MAGIC)
INDEX_BYTES = 4 + 4 + 1  # of an example
WRITE_BYTES = 1 << 20
KEY_DIGITS = 40
WHOLE, CHOSEN, REJECTED, GOOD, BAD = range(5)  # parts: an example of its own; of a pair; with a verdict
Entries = Iterable[tuple[Example, int]]  # each with its part


class StoredExamples(Sequence[Example]):
    """Examples of a file on disk. In memory are 17 bytes for each.

    Args:
        descriptor: of the open file; it is closed with this object.
        path: for messages, and for removal where the content is damaged.

    Attributes:
        lengths: (N,) int32, tokens of each example.
        parts: (N,) uint8.
        checksums: (N,) uint32, of the tokens of each, and of which of them are in the loss.
        content: a name for all tokens, and for which of them are in the loss.

    Raises:
        ValueError: the file is not as it was written.
    """

    def __init__(self, descriptor: int, path: Path | None) -> None:
        self._close = weakref.finalize(self, os.close, descriptor)
        self.descriptor, self.path = descriptor, path
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, TAIL, max(size - TAIL, 0))
        if len(tail) < TAIL or tail[-len(MAGIC) :] != MAGIC:
            raise ValueError("its end is missing")
        described = int.from_bytes(tail[:8], "little")
        raw_head = os.pread(descriptor, described, max(size - TAIL - described, 0))
        head = read_json(raw_head)
        count, tokens = int(head["examples"]), int(head["tokens"])
        if size != 4 * tokens + INDEX_BYTES * count + described + TAIL:
            raise ValueError("its size is not that of its content")
        index = _pread(descriptor, INDEX_BYTES * count, 4 * tokens)
        if hashlib.sha256(index + raw_head).digest() != tail[8:40]:
            raise ValueError("its index is damaged")
        self.lengths: NDArray[np.int32] = np.frombuffer(index, "<i4", count)
        self.parts: NDArray[np.uint8] = np.frombuffer(index, "u1", count, 8 * count)
        self.checksums: NDArray[np.uint32] = np.frombuffer(index, "<u4", count, 4 * count)
        self.content = hashlib.sha256(index).hexdigest()[:16]
        self._starts = np.zeros(count + 1, np.int64)
        np.cumsum(self.lengths, out=self._starts[1:])
        if self._starts[-1] != tokens:
            raise ValueError("its index is damaged")
        self.report = _report(head["report"])

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprints(self, at: slice) -> NDArray[np.uint64]:
        """What the same tokens have in common, of some examples: lengths and checksums."""
        found: NDArray[np.uint64] = self.lengths[at].astype(np.uint64) << np.uint64(32) | self.checksums[at]
        return found

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        raw = _pread(self.descriptor, 4 * int(self.lengths[at]), 4 * int(self._starts[at]))
        if zlib.crc32(raw) != self.checksums[at]:
            if self.path is not None:
                _remove(self.path)
            raise DataError(
                "The cache of tokenized data was damaged, and has been removed.",
                given=f"example {at + 1} in {self.path}",
                fix="run again (a run under way goes on with --resume); it is made anew",
            )
        written = np.frombuffer(raw, "<i4")
        ids, labels = array("i"), array("i")
        ids.frombytes(np.where(written < 0, ~written, written).astype(np.int32).tobytes())
        labels.frombytes(np.where(written < 0, IGNORE_INDEX, written).astype(np.int32).tobytes())
        return Example(ids, labels)


def cache_folder(setting: str | None) -> Path | None:
    """The folder that `data.cache` names, made if it is missing; None for no cache.

    `auto` is `lowmem-ft/data` in XDG_CACHE_HOME (or ~/.cache), and no cache where there is no such place to write to.

    Raises:
        ConfigError: the folder is named by the user and cannot be written.
    """
    if setting is None:
        return None
    folder = cache_path(setting)
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if setting == "auto":
            return None
        raise ConfigError(
            "The folder of data.cache cannot be written.",
            given=f"{folder} ({error.strerror})",
            allowed="a folder, or null",
        ) from None
    return folder


def cache_path(setting: str) -> Path | None:
    """The folder that `data.cache` names, which may not be there yet; None for `auto` of a user without a home."""
    if setting != "auto":
        return Path(setting).expanduser()
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return None
    return Path(home) / "lowmem-ft" / "data"


def content_key(
    found: FileSet, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any], progress: Progress | None = None
) -> str:
    """A name for what `found` becomes: SHA-256 over the content of its files, the tokenizer and `settings`.

    Raises:
        DataError: a file cannot be read.
    """
    total, done = hashlib.sha256(), 0
    size = sum(path.stat().st_size for path in found.files if path.exists())
    for path in found.files:
        content = hashlib.sha256(kind_of(path).encode())
        try:
            with path.open("rb") as file:
                while block := file.read(WRITE_BYTES):
                    content.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, size)
        except OSError as error:
            raise DataError("The data file cannot be read.", given=f"{path} ({error.strerror})") from error
        total.update(content.digest())
    for name in MAKERS:
        total.update((files("lowmem_ft.data") / name).read_bytes())
    facts = {
        "format": FORMAT,
        "versions": [transformers.__version__, tokenizers.__version__],
        "tokenizer": type(tokenizer).__name__,
        "template": str(tokenizer.chat_template),
        "split": tokenizer.split_special_tokens,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "day": date.today().isoformat() if writes_date(tokenizer) else None,
        "settings": dict(settings),
    }
    total.update(json.dumps(facts, sort_keys=True).encode())
    if tokenizer.is_fast:
        total.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        total.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return total.hexdigest()[:KEY_DIGITS]


def writes_date(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the chat template writes the day's date, so that the same records have other tokens tomorrow."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def open_stored(folder: Path, key: str, name: str) -> StoredExamples | None:
    """What `folder` holds under `key`; None where there is nothing, or a damaged file, which is removed."""
    path = folder / f"{key}.tokens"
    try:
        stored = StoredExamples(os.open(path, os.O_RDONLY), path)
    except OSError:  # there is none, or it is not for this user: what is written now takes its place, if it may
        return None
    except (ValueError, KeyError, TypeError):
        _remove(path)
        return None
    was = stored.report
    moved = tuple(name + it.removeprefix(was.path) if it.startswith(was.path) else it for it in was.reasons)
    stored.report = replace(was, path=name, reasons=moved)
    return stored


def write_stored(
    entries: Entries, report: Callable[[], DataReport], *, folder: Path | None, key: str
) -> StoredExamples:
    """Write `entries`, and then what `report` says of them, under `key`; without a folder to a file without a name.

    The file gets its name when it is complete, so another process that writes the same sees it whole or not at all.

    Raises:
        DataError: no room; whatever `entries` or `report` raise. Nothing is left then.
    """
    try:
        with contextlib.ExitStack() as stack:
            if folder is None:
                descriptor, path = _nameless(), None
            else:
                _forget_abandoned(folder)
                descriptor, temporary = tempfile.mkstemp(prefix=f".{key}.", dir=folder)
                path = folder / f"{key}.tokens"
                stack.callback(_remove, temporary)
            stack.callback(os.close, descriptor)
            _write(descriptor, entries, report)
            if path is not None:
                os.replace(temporary, path)
            return StoredExamples(os.dup(descriptor), path)
    except OSError as error:
        place = folder or tempfile.gettempdir()
        what = "There is no room for tokenized data." if is_full(error) else "Tokenized data cannot be written."
        fix = "set data.cache to another folder"
        raise DataError(what, given=f"{place} ({error.strerror})", allowed="a folder with room", fix=fix) from error


def _write(descriptor: int, entries: Entries, report: Callable[[], DataReport]) -> None:
    lengths, checksums, parts, total = array("i"), array("I"), array("B"), 0
    with os.fdopen(os.dup(descriptor), "wb", buffering=WRITE_BYTES) as file:
        for example, part in entries:
            ids = np.asarray(example.input_ids, "<i4")
            raw = np.where(np.asarray(example.labels) == IGNORE_INDEX, ~ids, ids).tobytes()
            file.write(raw)
            lengths.append(len(ids))
            checksums.append(zlib.crc32(raw))
            parts.append(part)
            total += len(ids)
        index = np.asarray(lengths, "<i4").tobytes() + np.asarray(checksums, "<u4").tobytes() + parts.tobytes()
        head = json.dumps({"examples": len(lengths), "tokens": total, "report": asdict(report())}).encode()
        file.write(index + head + len(head).to_bytes(8, "little") + hashlib.sha256(index + head).digest() + MAGIC)
        file.flush()
        os.fsync(descriptor)


def _report(written: dict[str, Any]) -> DataReport:
    """A report as JSON holds it, with tuples for its lists."""
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in written.items()}
    return DataReport(**fields)


def _nameless() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _forget_abandoned(folder: Path) -> None:
    """Remove what killed processes were writing; one that lives writes all the time."""
    for path in folder.glob(f".{'[0-9a-f]' * KEY_DIGITS}.*"):  # else lies there what the user has in this folder
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def _remove(path: str | Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _pread(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes at `offset`; a single call returns at most 2 GiB."""
    parts: list[bytes] = []
    while count > 0 and (part := os.pread(descriptor, count, offset)):
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
