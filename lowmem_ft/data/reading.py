"""Sources as a config names them -> examples on disk, tokenized now or before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.config import DataConfig, DataSource, Sources
from lowmem_ft.data.examples import RecordEncoder, encode_rows
from lowmem_ft.data.mixture import Mixture
from lowmem_ft.data.records import Progress
from lowmem_ft.data.sources import Use, find_source, list_sources
from lowmem_ft.data.store import StoredExamples, cache_folder, content_key, open_stored, whole, write_stored
from lowmem_ft.data.tally import Tally

Task = Callable[[str], AbstractContextManager[Progress]]  # a name -> what is told of the bytes done


def read_sources(
    sources: Sources, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, use: Use, task: Task
) -> tuple[Mixture, list[str]]:
    """The examples of `sources`, in their order, and what a user must be told of them. Memory holds their lengths.

    Args:
        use: for evaluation every example counts once, whatever the weights are.
        task: opens a piece of work that is told of.

    Raises:
        DataError: as `examples.read_examples` raises it.
        ConfigError: the folder of `data.cache` cannot be written.
    """
    folder = cache_folder(data.cache)
    listed = list_sources(sources, data)
    stored = [_stored(source, data, tokenizer, use, folder, task) for source in listed]
    weights = tuple(source.weight if use == "train" else 1.0 for source in listed)
    return Mixture(tuple(stored), weights), [note for part in stored for note in part.report.notes()]


def _stored(
    source: DataSource,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    use: Use,
    folder: Path | None,
    task: Task,
) -> StoredExamples:
    found = find_source(source, use)
    short = Path(found.name).name
    key = ""
    if folder is not None:
        settings = {
            "what": "examples",
            "format": source.format,
            "columns": source.columns,
            "seq_len": data.seq_len,
            "assistant_only": data.assistant_only,
            "overlong": data.overlong,
            "invalid": data.invalid,
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
    )
    tally = Tally(found.name, seq_len=data.seq_len, overlong=data.overlong, invalid=data.invalid)
    with task(f"Reading {short}") as progress:
        entries = whole(encode_rows(found.rows(progress), encoder, tally))
        return write_stored(entries, tally.report, folder=folder, key=key)
