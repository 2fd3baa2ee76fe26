"""Sources as a config names them -> examples on disk, tokenized now or before."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.config import DataConfig
from lowmem_ft.core.errors import DataError
from lowmem_ft.core.sources import DataSource, Sources
from lowmem_ft.data.examples import Example, RecordEncoder, encode_rows
from lowmem_ft.data.formats import RecordReader
from lowmem_ft.data.mixture import Mixture
from lowmem_ft.data.preference import (
    PreferenceExample,
    StoredPreferences,
    pair_entries,
    preference_entries,
    verdict_entries,
)
from lowmem_ft.data.records import Progress, Row, read_rows
from lowmem_ft.data.sources import FileSet, Use, find_source, is_on_hub, list_sources
from lowmem_ft.data.store import WHOLE, StoredExamples, cache_folder, content_key, open_stored, write_stored
from lowmem_ft.data.tally import DataReport, Tally

Wanted = Literal["any", "pairs", "verdicts"]
Task = Callable[[str], AbstractContextManager[Progress]]  # a name -> what is told of the bytes done


def read_sources(
    sources: Sources, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, use: Use, task: Task
) -> tuple[Mixture[Example], list[str]]:
    """The examples of `sources`, in their order, and what a user must be told of them. Memory holds their lengths.

    Args:
        use: for evaluation every example counts once, whatever the weights are.
        task: opens a piece of work that is told of.

    Raises:
        DataError: as `examples.read_examples` raises it.
        ConfigError: the folder of `data.cache` cannot be written.
    """
    stored, weights, notes = _stored(sources, data, tokenizer, use, task, _examples)
    mixture = Mixture(tuple(stored), weights)
    return mixture, notes + _weight_notes(mixture, stored)


def read_preferences(
    sources: Sources,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    use: Use,
    task: Task,
    wanted: Wanted = "any",
) -> tuple[Mixture[PreferenceExample], list[str]]:
    """The preferences of `sources`, likewise. Only answers are in the loss, whatever `data.assistant_only` says.

    A pair is cut, dropped or left out as a whole, by the longer of its answers.

    Args:
        wanted: pairs, of which no answer with a verdict may be one; or verdicts, of which a pair gives two.

    Raises:
        DataError: as `read_sources`, and for records that are no preferences, or not those that are wanted.
        ConfigError: the folder of `data.cache` cannot be written.
    """
    data = data.model_copy(update={"assistant_only": True})
    stored, weights, notes = _stored(sources, data, tokenizer, use, task, ENTRIES[wanted])
    mixture = Mixture(tuple(StoredPreferences.of(part) for part in stored), weights)
    return mixture, notes + _weight_notes(mixture, stored)


def check_sources(sources: Sources, data: DataConfig, *, use: Use) -> None:
    """Refuse at once what reading would refuse after long work: files that are not there, cannot be read, or whose
    first record is none. What the hub has, or a pipe, shows later.

    Raises:
        DataError: as reading raises it.
    """
    for source in list_sources(sources, data):
        for path in () if is_on_hub(source) else find_source(source, use).files:
            if os.path.exists(path) and path.is_fifo():
                continue
            tally = Tally(source.path, seq_len=data.seq_len, overlong=data.overlong, invalid=data.invalid)
            reader = RecordReader(format=source.format or data.format, columns=source.columns or {})
            for row in itertools.islice(read_rows(path), 1):
                tally.attempt(row, partial(_kind_of, reader))


def _kind_of(reader: RecordReader, record: Mapping[str, Any]) -> tuple[str, None]:
    return reader.read(record).kind, None


def _examples(rows: Iterable[Row], encoder: RecordEncoder, tally: Tally) -> Iterator[tuple[Example, int]]:
    return ((example, WHOLE) for example in encode_rows(rows, encoder, tally))


Encode = Callable[[Iterable[Row], RecordEncoder, Tally], Iterator[tuple[Example, int]]]
ENTRIES: Mapping[Wanted, Encode] = {"any": preference_entries, "pairs": pair_entries, "verdicts": verdict_entries}


def _stored(
    sources: Sources, data: DataConfig, tokenizer: PreTrainedTokenizerBase, use: Use, task: Task, encode: Encode
) -> tuple[list[StoredExamples], tuple[float, ...], list[str]]:
    """Each of `sources` on disk, their weights, and what is to be told of them."""
    folder = cache_folder(data.cache)
    stored: list[StoredExamples] = []
    weights: list[float] = []
    notes: list[str] = []
    none: _NoneHeldOutError | None = None
    for source in list_sources(sources, data):
        try:
            one = _one(source, data, tokenizer, use, task, folder, encode)
        except _NoneHeldOutError as error:
            none = error
            notes.append(f"{source.path}: no record of it is held out, it has too few for data.eval: {data.eval}")
            continue
        stored.append(one)
        weights.append(source.weight if use == "train" else 1.0)
        notes += one.report.notes()
    if none is not None and not stored:
        raise none
    if data.cache is not None and folder is None:
        notes.append("The user's cache folder cannot be written: tokens are not kept for another run (data.cache).")
    return stored, tuple(weights), notes


class _NoneHeldOutError(DataError):
    """A source has too few records for the share."""


def _weight_notes(mixture: Mixture[Any], stored: Sequence[StoredExamples]) -> list[str]:
    return [
        f"Warning: {stored[number].report.path}: no epoch uses an example, "
        f"for a weight of {mixture.weights[number]:g} is less than half of one of {len(mixture.sources[number])}"
        for number in mixture.unused
    ]


def _one(
    source: DataSource,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    use: Use,
    task: Task,
    folder: Path | None,
    encode: Encode,
) -> StoredExamples:
    """One source, found in `folder` or tokenized."""
    found = find_source(source, use)
    short, key = Path(found.name).name, ""
    if not all(map(os.path.isfile, found.files)):  # what is no file (a pipe) can be read only once
        folder = None
    before = _state(found) if folder is not None else None
    if folder is not None:
        settings = {
            "as": encode.__name__,
            "format": source.format,
            "columns": source.columns,
            "seq_len": data.seq_len,
            "assistant_only": data.assistant_only,
            "overlong": data.overlong,
            "invalid": data.invalid,
            **({} if found.part is None else {"part": found.part}),
        }
        with task(f"Looking for {short} in the cache") as progress:
            key = content_key(found, tokenizer, settings, progress)
        if (known := open_stored(folder, key, found.name)) is not None:
            return known
    encoder = RecordEncoder(
        tokenizer,
        format=source.format or data.format,
        columns=source.columns,
        assistant_only=data.assistant_only,
        seq_len=data.seq_len,
    )
    tally = Tally(found.name, seq_len=data.seq_len, overlong=data.overlong, invalid=data.invalid)

    def report() -> DataReport:
        if before is not None and _state(found) != before:
            fix = "wait until it is written, and run again"
            raise DataError("The data file changed while it was read.", given=found.name, fix=fix)
        if found.part is not None and found.part.held_out and not tally.counts["records"]:
            allowed = "a share of which a source has a record at least"
            fix = "give data.eval a larger share, or a file of its own"
            raise _NoneHeldOutError(
                "No record is held out.", given=f"{found.part.share} of {source.path}", allowed=allowed, fix=fix
            )
        return tally.report()

    with task(f"Reading {short}") as progress:
        return write_stored(encode(found.rows(progress), encoder, tally), report, folder=folder, key=key)


def _state(found: FileSet) -> list[tuple[int, int]]:
    """What tells that a file is not what it was."""
    return [((stat := path.stat()).st_size, stat.st_mtime_ns) for path in found.files]
