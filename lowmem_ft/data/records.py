"""Records of a file, one after the other, each with its place: memory does not grow with the file.

Nothing here unpickles. JSONL and CSV tell the line, other files the row, both from 1. CSV is read by Python's own
reader: it knows lines, holds one of them, and leaves text that looks like a number a text.
"""

from __future__ import annotations

import ast
import codecs
import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_ft.core.errors import DataError

Progress = Callable[[int, int], None]  # (bytes read, bytes in all)
TABLE_ROWS = 64  # of a table, decoded at once
TABLE_BUFFER = 1 << 18  # bytes
JSON_BYTES = 1 << 16  # of a JSON file, at a time at least
JSON_WORD = 32  # characters of what JSON does not put between quotes, such as a number or one escape, or fewer
_SPACES = re.compile(r"[ \t\n\r]*")
SUFFIXES = {
    ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
BOM = b"\xef\xbb\xbf"
_NAME_JSON = "name the file .json if it is an array of objects"  # which is read otherwise than lines
COMPRESSED = {  # first bytes -> how
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip",
}  # fmt: skip
TABLES = ("parquet", "arrow")
ARROW_MAGIC = b"ARROW1"  # of the file format; what lacks it is a stream, as datasets writes it


@dataclass(frozen=True, slots=True)
class Row:
    """One record, or what is wrong with it.

    Attributes:
        number: its line, or row, from 1.
        place: as an error names it: `FILE:LINE`, or `FILE: row N`.
    """

    number: int
    place: str
    record: dict[str, Any] | DataError


def at(place: str, error: DataError) -> DataError:
    """The same error, with its place in front."""
    return DataError(f"{place}: {error.what}", given=error.given, allowed=error.allowed, fix=error.fix)


def kind_of(path: Path) -> str:
    """A key of `_READERS`, by a file's name. What is not JSON, CSV, TSV, Parquet or Arrow is JSONL."""
    named = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return SUFFIXES.get(named.suffix.lower(), "jsonl")


def read_rows(path: Path, progress: Progress | None = None) -> Iterator[Row]:
    """The records of a file, in its order. Text may be compressed by gzip.

    Raises:
        DataError: the file cannot be read, or not from some place on.
    """
    kind = kind_of(path)
    try:
        found = path.stat()
        if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):  # which may never end, or never begin
            raise DataError("The data file is neither a file nor a pipe.", given=f"{path} (a device)")
        file, size = path.open("rb"), found.st_size
    except OSError as error:
        # a config may lie elsewhere, and is no place that its paths would begin at
        fix = None if path.is_absolute() else f"check the path, which begins at {Path.cwd()}, where this runs"
        raise DataError("The data file cannot be read.", given=f"{path} ({error.strerror})", fix=fix) from error
    with file, _telling(path):
        if not file.seekable():
            progress = None  # a pipe does not say how far it is
        done = 0
        for row in _READERS[kind](path, _unpacked(path, file, kind)):
            yield row
            if progress is not None and (now := file.tell()) > done:
                done = now
                progress(min(done, size), size)


def _unpacked(path: Path, file: io.BufferedReader, kind: str) -> io.BufferedReader:
    """What a file holds that may be compressed; its first bytes tell."""
    head = file.peek(8)
    how = next((how for magic, how in COMPRESSED.items() if head.startswith(magic)), None)
    if how is None:
        return file
    if how == "gzip" and kind not in TABLES:
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    allowed = "text that gzip compressed, or a file that is not compressed"
    sheet = path.suffix.lower() in (".xlsx", ".xlsm", ".ods")
    fix = "save the sheet as CSV, in UTF-8" if sheet else "unpack it"
    raise DataError(f"{path}: the file is compressed.", given=how, allowed=allowed, fix=fix)


def _jsonl(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    for number, raw in enumerate(file, start=1):
        try:
            record = _record(raw)
        except DataError as error:
            yield Row(number, f"{path}:{number}", error)
        else:
            if record is not None:
                yield Row(number, f"{path}:{number}", record)


def _record(raw: bytes) -> dict[str, Any] | None:
    """The object of a line, None for a blank one. A byte order mark is ignored."""
    try:
        line = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text.", given=f"{error.reason}", fix="write the file as UTF-8") from error
    if not line:
        return None
    shown = line if len(line) <= 80 else line[:77] + "..."
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}."
        fix = _NAME_JSON if line in ("[", "{", "[{") else None
        raise DataError(what, given=shown, allowed="one JSON object a line", fix=fix) from error
    except (RecursionError, ValueError) as error:
        raise DataError(
            "JSON that cannot be read: nested too deeply, or a number of too many digits.", given=shown
        ) from error
    if not isinstance(record, dict):
        fix = _NAME_JSON if isinstance(record, list) else None
        raise DataError("not a JSON object.", given=shown, allowed='an object, for example {"text": "..."}', fix=fix)
    return record


def _json(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    """The objects of an array, or of lines: many name them so."""
    if not _at_array(file):
        yield from _lines_of_json(path, file)
        return
    for number, record in enumerate(_items(path, file), start=1):
        place = f"{path}: row {number}"
        if isinstance(record, dict):
            yield Row(number, place, record)
        else:
            yield Row(number, place, DataError("not a JSON object.", given=str(record)[:80], allowed="an object"))


def _at_array(file: io.BufferedReader) -> bool:
    """Whether an array begins behind spaces and a byte order mark, which are passed then. Else nothing is."""
    start = file.tell()
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    while (head := file.peek(1)) and not head.lstrip():
        file.read(len(head))
    if head.lstrip().startswith(b"["):
        return True
    file.seek(start)
    return False


def _lines_of_json(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    """The objects of lines. Where the first line is none, the file is something else, such as one object over lines."""
    for at_line, row in enumerate(_jsonl(path, file)):
        if at_line == 0 and isinstance(row.record, DataError):
            raise DataError(
                f"{path}: neither an array nor lines of JSON objects.",
                given=row.record.given,
                allowed="[{...}, {...}], or {...} on each line",
                fix="write the records as an array",
            )
        yield row


def _items(path: Path, file: io.BufferedReader) -> Iterator[Any]:
    """The elements of a JSON array, read as those of lines are, one at a time."""
    text, number = _Text(file), 0
    try:
        text.skip("[")
        if text.next() == "]":
            text.skip("]")
        else:
            while True:
                number += 1
                yield text.value()
                if text.next() == "]":
                    text.skip("]")
                    break
                text.skip(",")
        if text.next():
            raise json.JSONDecodeError("Extra data behind the array", text.text, text.at)
    except (RecursionError, ValueError) as error:  # of text that is not UTF-8, and numbers of too many digits, too
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            there = text.text[error.pos : error.pos + 40]
            why = f"{error.msg}: {there!r}" if there else f"{error.msg}, and the file ends"
        given = f"{why} (row {number}, or behind it)" if number else why
        raise DataError(f"{path}: not valid JSON.", given=given, allowed="an array of objects") from None


class _Text:
    """The text of a JSON file that is too large to be read at once, from `at` on."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.text, self.at = file, "", 0
        self._decode, self._read = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        """Read on, so much more that a long element is not begun anew many times. False at the end of the file."""
        raw = self.file.read(max(JSON_BYTES, len(self.text) - self.at))
        read = self._decode(raw, final=not raw)
        if raw:
            self.text, self.at = self.text[self.at :] + read, 0
        return bool(raw)

    def next(self) -> str:
        """The character behind spaces; nothing at the end."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def skip(self, wanted: str) -> None:
        """Pass that character. Raises JSONDecodeError if it does not follow."""
        if self.next() != wanted:
            raise json.JSONDecodeError(f"Expecting {wanted!r}", self.text, self.at)
        self.at += 1

    def value(self) -> Any:
        """The value that follows. Raises as `json.loads`."""
        self.next()
        while True:
            try:
                found, end = self._read(self.text, self.at)
            except json.JSONDecodeError as error:  # of a value that is cut, it is of the end, or of its last string
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - JSON_WORD
                if not (cut and self._more()):
                    raise
            else:
                if end <= len(self.text) - JSON_WORD or not self._more():  # else a number may go on
                    self.at = end
                    return found


def _csv(path: Path, file: io.BufferedReader, delimiter: str = ",") -> Iterator[Row]:
    kind = "TSV" if delimiter == "\t" else "CSV"
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        place = f"{path}:{line}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: not UTF-8 text.", given=f"{error.reason}", fix="write the file as UTF-8"
            ) from None
        except csv.Error as error:
            fix = "close a field that begins with a quote by a quote, and double the quotes in it"
            if "field limit" in str(error):  # what follows a quote that nothing closes is one field, too
                fix += f"; fields of more than {csv.field_size_limit()} characters want JSONL or Parquet"
            raise DataError(f"{place}: not valid {kind}.", given=f"{error}", fix=fix) from None
        if not cells:
            continue
        if header is None:
            header = [name.strip() for name in cells]
            names = [name for name in header if name]  # pandas writes its index into a column without a name
            if len(set(names)) < len(names) or not names:
                given = delimiter.join(header)[:200]
                raise DataError(f"{place}: not a header.", given=given, allowed="one name for each column")
            if len(header) == 1 and (other := next((it for it in ";\t|," if it in header[0]), None)):
                fix = "write it with commas, as spreadsheets do in English, or with tabs as a .tsv file"
                what = f"{place}: the fields are not separated by {'tabs' if delimiter == chr(9) else 'commas'}."
                raise DataError(what, given=f"{header[0][:200]} (by {other!r}?)", fix=fix)
        elif len(cells) != len(header):
            wrong = DataError("not as many fields as columns.", given=len(cells), allowed=len(header))
            yield Row(line, place, wrong)
        else:
            record = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            yield Row(line, place, {**record, **_message_lists(record)})


def _message_lists(record: dict[str, str]) -> dict[str, Any]:
    """Cells that are lists of messages, as JSON or as pandas writes them, where several are: a prompt and its answer,
    or two answers. One alone may be a text that is to be learnt."""
    found = {name: turns for name, cell in record.items() if (turns := _messages_in(cell)) is not None}
    return found if len(found) > 1 else {}


def _messages_in(cell: str) -> list[Any] | None:
    turns = parsed(cell) if cell.lstrip().startswith("[{") else None
    if not isinstance(turns, list):
        return None
    known = all(isinstance(it, dict) and ({"role", "content"} <= {*it} or {"from", "value"} <= {*it}) for it in turns)
    return turns if known else None


def parsed(text: str) -> Any:
    """What a text holds as JSON, or of lists and objects also as Python and pandas write them; the text where it holds
    neither."""
    held = text.strip()
    for read in (json.loads, ast.literal_eval) if held.startswith(("[", "{")) else (json.loads,):
        try:
            return read(held)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _tsv(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    return _csv(path, file, "\t")


def _parquet(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, buffer_size=TABLE_BUFFER, pre_buffer=False)
    batches = (
        batch
        for group in range(table.num_row_groups)
        for batch in table.iter_batches(batch_size=TABLE_ROWS, row_groups=[group], use_threads=False)
    )
    return _of_batches(path, batches)


def _arrow(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    import pyarrow as pa

    # read, never mapped: mapped pages count into the process's memory
    if file.peek(len(ARROW_MAGIC)).startswith(ARROW_MAGIC):
        source = pa.ipc.open_file(file)
        batches = (source.get_batch(i) for i in range(source.num_record_batches))
    else:
        batches = iter(pa.ipc.open_stream(file))
    return _of_batches(path, batches)


def _of_batches(path: Path, batches: Iterator[Any]) -> Iterator[Row]:
    import pyarrow as pa

    number, texts = 0, None
    for batch in batches:
        # arrow's allocator keeps what it has: a Parquet file of 150 MB took 60 MB without this, 32 MB with it
        pa.default_memory_pool().release_unused()
        batch.validate(full=True)  # offsets of a damaged file would lead outside its memory
        for start in range(0, batch.num_rows, TABLE_ROWS):
            for values in batch.slice(start, TABLE_ROWS).to_pylist():
                number += 1
                record = _without_nulls(values)
                if texts is None:
                    texts = {field.name: read for field in batch.schema if (read := _json_reader(field.type))}
                yield Row(number, f"{path}: row {number}", {**record, **_read_texts(record, texts)})


def _json_reader(kind: Any) -> Callable[[Any], Any] | None:
    """Reads the JSON texts in a column's values: so datasets keeps objects of differing keys. None: it holds none."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return _but_null(json.loads)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _json_reader(kind.value_type)
        return None if inner is None else _but_null(lambda values: [inner(value) for value in values])
    if pa.types.is_struct(kind):
        readers = {field.name: read for field in kind if (read := _json_reader(field.type))}
        return _but_null(lambda value: {**value, **_read_texts(value, readers)}) if readers else None
    return None


def _but_null(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _read_texts(values: dict[str, Any], readers: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return {name: read(values[name]) for name, read in readers.items() if name in values}


def _without_nulls(value: Any) -> Any:
    """Tables give every object all keys that any has, absent ones as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """What reading a damaged table raises becomes a clear error."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zlib.error) as error:  # what pyarrow and gzip raise is of these
        raise DataError(
            f"{path}: the file cannot be read.", given=" ".join(str(error).split())[:200], fix="write it again"
        ) from error


_READERS: dict[str, Callable[[Path, io.BufferedReader], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "arrow": _arrow,
}
