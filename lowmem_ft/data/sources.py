"""Where records come from: files, a folder that datasets saved, or a hub id; each becomes a list of files."""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lowmem_ft.core.config import DataConfig
from lowmem_ft.core.errors import DataError, nearest
from lowmem_ft.core.json_text import read_json_file
from lowmem_ft.core.sources import DataSource, Part, Sources, listed
from lowmem_ft.data.records import SUFFIXES, TABLES, Progress, Row, kind_of, read_rows

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
STATE, SPLITS = "state.json", "dataset_dict.json"  # as save_to_disk names them
Use = Literal["train", "eval"]
# which split is meant where none is named
PREFERRED: dict[Use, tuple[str, ...]] = {"train": ("train",), "eval": ("validation", "test")}


@dataclass(frozen=True, slots=True)
class FileSet:
    """A source that was found.

    Attributes:
        name: what the user called it.
        files: read one after the other.
        part: which of their records are meant; None: all.
    """

    name: str
    files: tuple[Path, ...]
    part: Part | None = None

    def rows(self, progress: Progress | None = None) -> Iterator[Row]:
        """The records of all files, or the part that is meant. Raises as `read_rows`."""
        part = self.part
        return (row for number, row in enumerate(self._all(progress)) if part is None or part.has(number))

    def _all(self, progress: Progress | None) -> Iterator[Row]:
        total, before = sum(_size(path) for path in self.files), 0
        for path in self.files:
            start = before

            def told(done: int, _size: int, start: int = start) -> None:
                assert progress is not None
                progress(start + done, total)

            yield from read_rows(path, told if progress is not None else None)
            before += _size(path)


def list_sources(sources: Sources, data: DataConfig) -> list[DataSource]:
    """`sources` as a list, with what they leave open filled in from `data`."""
    return [
        source.model_copy(
            update={
                "format": source.format or data.format,
                "columns": data.columns if source.columns is None else source.columns,
            }
        )
        for source in listed(sources)
    ]


def find_source(source: DataSource, use: Use) -> FileSet:
    """The files of `source`. A hub id is downloaded, or with HF_HUB_OFFLINE=1 taken from the hub's cache.

    Raises:
        DataError: there is no such thing, no such split, or a key that it does not take.
    """
    if source.part is None:
        return _find(source, use)
    name = f"{source.path} (held out)" if source.part.held_out else source.path
    return replace(_find(source, "train"), name=name, part=source.part)


def _find(source: DataSource, use: Use) -> FileSet:
    if not source.path.strip():  # which pathlib takes for the current folder
        raise DataError("No data file is named.", given=repr(source.path), allowed="a file, a folder, or a hub id")
    path = Path(source.path).expanduser()
    if is_on_hub(source):
        return FileSet(source.path, tuple(_from_hub(source, use)))
    _refuse_unread(source, ("subset", "revision"), "concern hub ids")
    if os.path.isdir(path):
        return FileSet(source.path, tuple(_saved(path, source, use)))
    _refuse_unread(source, ("split",), "concern saved datasets and hub ids")
    if "://" in source.path and not os.path.exists(path):  # of which pathlib leaves one slash
        fix = "download it and name the file; of a dataset on the hub give OWNER/NAME"
        raise DataError("A URL is no data file.", given=source.path, allowed="a file, a folder, or a hub id", fix=fix)
    parts = [part.strip() for part in source.path.split(",")]
    if not os.path.exists(path) and len(parts) > 1 and all(os.path.exists(os.path.expanduser(it)) for it in parts):
        fix = f"give a list: [{', '.join(parts)}]"
        raise DataError("There is no such file.", given=source.path, allowed="one file, or a list of them", fix=fix)
    if not (files := _files(path)):
        raise DataError("No file matches.", given=source.path, allowed="a pattern of files, such as data/*.jsonl")
    return FileSet(source.path, tuple(files))


def is_on_hub(source: DataSource) -> bool:
    """Whether a hub id is meant: nothing of this name is here."""
    here = os.path.exists(Path(source.path).expanduser())  # unlike pathlib's it answers where nobody may look
    return not here and _may_be_hub_id(source.path)


def load_readers(data: DataConfig) -> None:
    """Import what reads the files of `data` and let it begin, so that a process that is measured for a plan has it
    already.

    Of tables it is pyarrow: 29 MB in the process, and 10 more once a Parquet file has been read (Linux, pyarrow 26).
    What is wrong with a file is told where it is read.
    """
    for source in (
        it for given in (data.train, data.held_out) if given is not None for it in list_sources(given, data)
    ):
        path = Path(source.path).expanduser()
        saved = is_on_hub(source) or os.path.isdir(path)
        tables = [] if saved else [it for it in _files(path) if kind_of(it) in TABLES]
        if saved or tables:
            import pyarrow.parquet  # noqa: F401
        for table in filter(os.path.isfile, tables[:1]):
            with suppress(DataError):
                next(read_rows(table), None)


def pick_split(splits: Sequence[str], wanted: str | None, use: Use) -> str | None:
    """The split that is wanted, or meant where none is named: that of this use, or the only one. None: neither."""
    if wanted is not None:
        return wanted if wanted in splits else None
    meant = [name for name in PREFERRED[use] if name in splits]
    return meant[0] if meant else splits[0] if len(splits) == 1 else None


def unknown_split(name: str, splits: Sequence[str], wanted: str | None) -> DataError:
    """What to say where `pick_split` finds none."""
    near = nearest(wanted, splits) if wanted else None
    return DataError(
        "The dataset has no such split." if wanted else "The dataset has several splits.",
        given=f"{name}, split {wanted}" if wanted else name,
        allowed=", ".join(splits),
        fix=f"did you mean '{near}'?" if near else f"name one: {{path: {name}, split: {splits[0]}}}",
    )


def _files(path: Path) -> list[Path]:
    """A path, or the files that it stands for as a pattern, by their names: they are read in this order."""
    if os.path.exists(path) or not glob.has_magic(str(path)):
        return [path]
    return sorted(found for it in glob.glob(str(path), recursive=True) if os.path.isfile(found := Path(it)))


def _may_be_hub_id(path: str) -> bool:
    """Whether a path that does not exist looks like `owner/name`, or like `name` without a data file's suffix.

    Of a folder that exists a file is meant: the hub is not asked for what was misspelt.
    """
    known = Path(path).suffix.lower() in (*SUFFIXES, ".jsonl", ".txt", ".gz")
    misspelt = "/" in path and os.path.isdir(Path(path).parent)
    return HUB_ID.fullmatch(path) is not None and not known and not misspelt


def _refuse_unread(source: DataSource, keys: Sequence[str], why: str) -> None:
    if given := [key for key in keys if getattr(source, key) is not None]:
        raise DataError(f"{' and '.join(given)} {why}.", given=source.path, fix=f"remove {' and '.join(given)}")


def _saved(folder: Path, source: DataSource, use: Use) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote."""
    try:
        if os.path.exists(folder / SPLITS):
            splits = read_json_file(folder / SPLITS)["splits"]
            split = pick_split(splits, source.split, use)
            if split is None:
                raise unknown_split(source.path, splits, source.split)
            folder = folder / split
        else:
            _refuse_unread(source, ("split",), "concerns folders of several splits")
        state = read_json_file(folder / STATE)
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        endings = sorted({path.suffix for path in folder.glob("*.*") if path.suffix in (*SUFFIXES, ".jsonl", ".gz")})
        raise DataError(
            "The data file cannot be read.",
            given=f"{folder} (a folder without a readable {STATE})",
            allowed="a file, a folder that datasets' save_to_disk wrote, or a hub id",
            fix=f"give its files: {' or '.join(str(folder / f'*{it}') for it in endings)}" if endings else None,
        ) from error


def _from_hub(source: DataSource, use: Use) -> list[Path]:
    """The Arrow files of a hub dataset, prepared in another process: what datasets takes in memory goes with it."""
    request = {"source": source.model_dump(), "use": use}
    # what this process imports, and not what lies in the working folder: a datasets.py, say
    path = os.pathsep.join(it or os.getcwd() for it in sys.path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lowmem_ft.data.hub"],
        env={**os.environ, "PYTHONPATH": path},
        input=json.dumps(request),
        stdout=subprocess.PIPE,  # its bars of progress pass through stderr
        text=True,
        check=False,
    )
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise DataError(
            "The dataset cannot be prepared.", given=f"{source.path} (exit code {done.returncode})"
        ) from None
    if "error" in answer:
        raise DataError(**answer["error"])
    return [Path(file) for file in answer["files"]]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it says why
