"""Tokenized data on disk: what is read is what was written, or it is made anew."""

import csv
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.config import DataConfig
from lowmem_ft.core.errors import ConfigError, DataError
from lowmem_ft.data.examples import Example, read_examples
from lowmem_ft.data.mixture import Mixture
from lowmem_ft.data.reading import check_sources, read_sources
from lowmem_ft.data.records import read_rows
from lowmem_ft.data.store import StoredExamples, cache_folder, open_stored

from .conftest import ASSETS

Write = Callable[..., Path]
FILE = ASSETS / "whatis-eval.jsonl"


@contextmanager
def silent(name: str) -> Any:
    yield lambda done, total: None


def read(
    path: Any, tokenizer: PreTrainedTokenizerBase, cache: Path | None, **settings: Any
) -> tuple[Mixture[Example], list[str]]:
    """The examples of `path`, through `cache`."""
    data = DataConfig.model_validate({"seq_len": 64, "cache": None if cache is None else str(cache), **settings})
    return read_sources(path, data, tokenizer, use="train", task=silent)


def only(mixture: Mixture[Example]) -> StoredExamples:
    (stored,) = mixture.sources
    assert isinstance(stored, StoredExamples)
    return stored


def test_a_weight_that_uses_no_example_is_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    sources = [{"path": str(FILE), "weight": weight} for weight in (0.001, 1, 0.01)]
    _, notes = read(DataConfig.model_validate({"train": sources}).train, tokenizer, tmp_path)
    (note,) = notes
    assert re.search(r"Warning: .*whatis-eval\.jsonl: no epoch uses an example, .*weight of 0\.001 .* of 300$", note)


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_read_is_what_was_written(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, cached: bool) -> None:
    examples, report = read_examples(FILE, tokenizer, seq_len=24)
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):  # made, and found
        stored = only(read(str(FILE), tokenizer, cache, seq_len=24)[0])
        assert list(stored) == examples
        assert stored[-1] == examples[-1]
        assert stored[3:5] == examples[3:5]
        assert stored.lengths.tolist() == [len(example) for example in examples]
        assert stored.report == report
        with pytest.raises(IndexError):
            stored[len(stored)]
    if cache is not None:
        (entry,) = cache.iterdir()
        assert entry.stat().st_size < 4 * report.tokens + 9 * len(examples) + 1000


def test_no_file_is_left_without_a_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mixture, _ = read(str(FILE), tokenizer, None)
    assert len(mixture) == 300
    assert list(tmp_path.iterdir()) == []


def test_found_again_under_another_name_but_not_after_a_change(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path = jsonl({"prompt": "a", "completion": " b"}, {"prompt": "c"}, {"prompt": "ls " * 90, "completion": " b"})
    (_, notes), entries = read(str(path), tokenizer, cache, invalid="skip"), 1
    other = path.with_name("other.jsonl")
    path.rename(other)
    _, again = read(str(other), tokenizer, cache, invalid="skip")
    assert again == [note.replace(str(path), str(other)) for note in notes]
    assert "other.jsonl:2: the record lacks" in again[0]
    assert len(list(cache.iterdir())) == entries

    def changes(**settings: Any) -> bool:
        nonlocal entries
        before, entries = entries, entries
        read(str(other), tokenizer, cache, **{"invalid": "skip", **settings})
        entries = len(list(cache.iterdir()))
        return entries > before

    assert not changes(packing=False, order="longest_first")  # concern what is done with examples
    assert changes(seq_len=32)
    assert changes(assistant_only=False)
    assert changes(overlong="drop")
    assert changes(format="prompt_completion")
    assert changes(columns={"prompt": "prompt"})
    other.write_text(other.read_text().replace(" b", " d"))
    assert changes()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert changes()
    tokenizer.split_special_tokens = True
    assert changes()
    tokenizer.split_special_tokens = False
    assert not changes()
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    assert changes()
    assert not changes()

    class Tomorrow:
        @staticmethod
        def today() -> Any:
            return time

        @staticmethod
        def isoformat() -> str:
            return "2100-01-01"

    monkeypatch.setattr("lowmem_ft.data.store.date", type("D", (), {"today": staticmethod(lambda: Tomorrow)}))
    assert changes()


@pytest.mark.parametrize("what", ["cut", "longer", "index", "head", "empty", "magic", "garbage"])
def test_damaged_files_are_made_anew(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, what: str) -> None:
    examples = list(only(read(str(FILE), tokenizer, tmp_path)[0]))
    (entry,) = tmp_path.iterdir()
    sound = entry.read_bytes()
    at = {"index": len(sound) - 2000, "head": len(sound) - 100, "magic": len(sound) - 1}.get(what, 0)
    damaged = {
        "cut": sound[:-500],
        "longer": sound[:100] + b"abcd" + sound[100:],
        "empty": b"",
        "garbage": b"x" * len(sound),
    }.get(what, sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    entry.write_bytes(damaged)
    assert list(only(read(str(FILE), tokenizer, tmp_path)[0])) == examples
    assert entry.read_bytes() == sound


def test_damaged_tokens_are_noticed_when_they_are_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    read(str(FILE), tokenizer, tmp_path)
    (entry,) = tmp_path.iterdir()
    sound = entry.read_bytes()
    entry.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    stored = only(read(str(FILE), tokenizer, tmp_path)[0])
    with pytest.raises(DataError, match="was damaged, and has been removed"):
        stored[0]
    assert not entry.exists()
    assert len(read(str(FILE), tokenizer, tmp_path)[0]) == 300


def test_a_file_that_cannot_be_opened_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be sound, and another user's."""
    entry = tmp_path / "key.tokens"
    entry.touch()

    def denied(path: Path, flags: int) -> int:  # root may read everything
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("lowmem_ft.data.store.os.open", denied)
        assert open_stored(tmp_path, "key", "name") is None
    assert entry.exists()
    assert open_stored(tmp_path, "key", "name") is None
    assert not entry.exists(), "of what can be read it is known to be damaged"


def test_errors_leave_nothing_behind(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, jsonl: Write) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=":2: "):
        read(str(jsonl({"text": "a b c d"}, {"txt": "a"})), tokenizer, cache)
    with pytest.raises(DataError, match="cannot be read"):
        read(str(tmp_path / "absent.jsonl"), tokenizer, cache)
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """But not what else lies in a folder that the user has named."""
    key = "0123456789abcdef0123456789abcdef01234567"
    old, new, others = tmp_path / f".{key}.old", tmp_path / f".{key}.new", tmp_path / ".pre-commit-config.yaml"
    for path in (old, new, others):
        path.touch()
    for path in (old, others):
        os.utime(path, (time.time() - 90_000,) * 2)
    read(str(FILE), tokenizer, tmp_path)
    assert not old.exists()
    assert new.exists()
    assert others.exists()


def test_pipes_are_read_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(FILE.read_bytes()))
    writer.start()
    assert len(read(str(pipe), tokenizer, tmp_path / "cache")[0]) == 300
    writer.join()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="a device that never ends")
def test_devices_are_refused_at_once() -> None:
    data = DataConfig(train="/dev/zero")
    with pytest.raises(DataError, match="neither a file nor a pipe"):
        check_sources("/dev/zero", data, use="train")
    with pytest.raises(DataError, match="neither a file nor a pipe"):
        next(read_rows(Path("/dev/zero")))


def test_a_file_that_grows_while_it_is_read_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, jsonl: Write
) -> None:
    """Else its first part would be found in the cache under the name of the whole."""
    path, cache = jsonl(*[{"text": f"a {i}"} for i in range(20)]), tmp_path / "cache"

    @contextmanager
    def growing(name: str) -> Any:
        def told(done: int, total: int) -> None:
            if name.startswith("Reading"):
                with path.open("a") as file:
                    file.write('{"text": "more"}\n' if path.stat().st_size < 2000 else "")

        yield told

    data = DataConfig(seq_len=64, cache=str(cache))
    with pytest.raises(DataError, match="changed while it was read"):
        read_sources(str(path), data, tokenizer, use="train", task=growing)
    assert list(cache.iterdir()) == []


def test_other_code_finds_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: Any) -> None:
    read(str(FILE), tokenizer, tmp_path)
    monkeypatch.setattr("lowmem_ft.data.store.MAKERS", ("chat.py",))
    read(str(FILE), tokenizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_room(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowmem_ft.data.store.os.fsync", full)
    with pytest.raises(DataError, match=r"no room for tokenized data[\s\S]*data\.cache"):
        read(str(FILE), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def nobody() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_where_the_cache_is(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("auto") == tmp_path / "xdg" / "lowmem-ft" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("auto") == tmp_path / "home" / ".cache" / "lowmem-ft" / "data"
    assert cache_folder("~/mine") == tmp_path / "home" / "mine"
    assert cache_folder(None) is None
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache cannot be written"):
        cache_folder(str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder("auto") is None
    mixture, notes = read_sources(str(FILE), DataConfig(seq_len=64), tokenizer, use="train", task=silent)
    assert len(mixture) == 300
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder("auto") is None
    assert cache_folder(str(tmp_path / "own")) == tmp_path / "own"
    assert "tokens are not kept" in notes[-1]


def test_two_processes_write_the_same_at_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Both begin when both are ready, and each sees a whole file."""
    code = (
        "import sys, time, pathlib\n"
        "from transformers import AutoTokenizer\n"
        "from tests.unit.data.test_store import read, FILE, ASSETS\n"
        "tokenizer = AutoTokenizer.from_pretrained(ASSETS / 'doclm-7m')\n"
        "me, other, cache = map(pathlib.Path, sys.argv[1:])\n"
        "me.touch()\n"
        "while not other.exists(): time.sleep(0.001)\n"
        "examples = list(read(str(FILE), tokenizer, cache)[0])\n"
        "print(sum(sum(example.input_ids) for example in examples))\n"
    )
    a, b, cache = str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "cache")
    root = Path(__file__).parents[3]
    started = [
        subprocess.Popen([sys.executable, "-c", code, *them, cache], stdout=subprocess.PIPE, text=True, cwd=root)
        for them in ((a, b), (b, a))
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0] == said[1]
    assert [path.suffix for path in Path(cache).iterdir()] == [".tokens"]


RSS = """
import json, sys
from contextlib import contextmanager
import psutil
from transformers import AutoTokenizer
from lowmem_ft.core.config import DataConfig
from lowmem_ft.data.reading import check_sources, read_sources
from lowmem_ft.data.records import read_rows
from lowmem_ft.data.loader import BatchLoader
from lowmem_ft.data.records import read_rows

@contextmanager
def silent(name):
    yield lambda done, total: peak()

def peak():
    global most
    most = max(most, me.memory_info().rss)

me, most = psutil.Process(), 0
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
data = DataConfig(seq_len=512, cache=sys.argv[3])
tokenizer("warm")
if sys.argv[4] == "tables":
    import pyarrow.parquet
before = me.memory_info().rss
mixture, _ = read_sources(sys.argv[2], data, tokenizer, use="train", task=silent)
peak()
sizes = {"seq_len": 512, "micro_batch_tokens": 2048, "tokens_per_step": 8192}
loader = BatchLoader(mixture, packing=True, seed=0, pad_id=0, **sizes)
for _ in range(5):
    for batch in next(loader):
        peak()
print(json.dumps({"grown": most - before, "examples": len(mixture), "tokens": int(mixture.sources[0].lengths.sum())}))
"""


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    """A file of 150 MB, most of it a column that nobody asked for. Tables are read by the row group (here of 5 MB).
    Growth measured here (2026-11-25): JSONL, JSON and CSV 11 MB, Arrow 24 MB, Parquet 39 MB. Tokens go one way, from
    whatever they were read: JSONL alone has 2 million of them, which as lists of numbers would take 80 MB.
    """
    limit = 60_000_000
    path = big_file(tmp_path, kind, sentences=20 if kind == "jsonl" else 1)
    assert path.stat().st_size > 2.5 * limit
    done = subprocess.run(
        [sys.executable, "-c", RSS, str(ASSETS / "doclm-7m"), str(path), str(tmp_path / "cache"),
         "tables" if kind in ("parquet", "arrow") else "lines"],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["grown"] < limit, found


def big_file(folder: Path, kind: str, *, sentences: int) -> Path:
    """150 MB of records, of which so many sentences of each are learned."""
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    draw, path = random.Random(0), folder / f"big.{kind}"
    words = [json.loads(line)["messages"][1]["content"] for line in FILE.read_text().splitlines()]
    count, beside = 8000, 19_000

    def record(number: int) -> dict[str, str]:
        text = " ".join(draw.choices(words, k=sentences))
        return {"prompt": f"{number}: {text[:100]}", "completion": text, "meta": draw.randbytes(beside // 2).hex()}

    if kind in ("jsonl", "json", "csv"):
        with path.open("w") as file:
            file.write({"json": "[", "csv": "prompt,completion,meta\n"}.get(kind, ""))
            for number in range(count):
                row = record(number)
                comma = "," if number + 1 < count else "]"
                if kind == "csv":
                    csv.writer(file).writerow(row.values())
                else:
                    file.write(json.dumps(row) + (comma if kind == "json" else "") + "\n")
        return path
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "completion", "meta")])
    writer: Any = (
        pq.ParquetWriter(path, schema, compression="none", use_dictionary=False)
        if kind == "parquet"
        else pa.ipc.new_stream(str(path), schema)
    )
    with writer:
        for start in range(0, count, 250):
            writer.write_table(pa.Table.from_pylist([record(start + i) for i in range(250)], schema))
    return path
