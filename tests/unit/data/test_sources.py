"""What a source may be: files, saved datasets, hub ids in the cache, with splits."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lowmem_ft.core.config import DataConfig
from lowmem_ft.core.errors import DataError
from lowmem_ft.core.sources import DataSource, Part
from lowmem_ft.data.sources import FileSet, find_source, list_sources, pick_split

RECORDS = [{"text": f"Line {i}."} for i in range(30)]


def records(found: FileSet) -> list[Any]:
    return [row.record for row in found.rows()]


def test_what_a_source_leaves_open_comes_from_data() -> None:
    data = DataConfig.model_validate({"format": "text", "columns": {"text": "body"}})
    own = {"path": "b.csv", "weight": 2, "format": "alpaca", "columns": {}}
    first, second = list_sources(["a.jsonl", DataSource.model_validate(own)], data)
    assert (first.path, first.weight, first.format, first.columns) == ("a.jsonl", 1, "text", {"text": "body"})
    assert (second.weight, second.format, second.columns) == (2, "alpaca", {})


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_held_out_records_and_the_others_are_all(share: float) -> None:
    for count in (1, 10, 1000):
        held_out, others = ([n for n in range(count) if Part(share, it).has(n)] for it in (True, False))
        assert sorted(held_out + others) == list(range(count))
        assert len(held_out) == int(count * share)
        gaps = {b - a for a, b in itertools.pairwise(held_out)}
        assert not gaps or max(gaps) - min(gaps) <= 1, "as far from each other as they can be"


def test_a_share_of_the_training_records_is_held_out(tmp_path: Path) -> None:
    """Of each source, over all of its files; of a dataset with splits those of the training split."""
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "one", num_shards=2)
    splits = {"train": Dataset.from_list(RECORDS[:20]), "validation": Dataset.from_list(RECORDS[20:])}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    sources = [str(tmp_path / "one"), {"path": str(tmp_path / "both"), "weight": 2}]
    data = DataConfig.model_validate({"train": sources, "eval": 0.1, "format": "text"})
    assert data.trained is not None
    assert data.held_out is not None
    trained, held_out = list_sources(data.trained, data), list_sources(data.held_out, data)
    assert [it.weight for it in trained] == [1, 2]
    assert [it.format for it in held_out] == ["text", "text"]
    assert [records(find_source(it, "eval")) for it in held_out] == [
        [RECORDS[i] for i in (9, 19, 29)],
        RECORDS[9:20:10],
    ]
    assert records(find_source(trained[1], "train")) == [it for i, it in enumerate(RECORDS[:20]) if i not in (9, 19)]
    assert find_source(held_out[0], "eval").name == f"{tmp_path / 'one'} (held out)"
    plain = DataConfig.model_validate({"train": "a.jsonl", "eval": "b.jsonl"})
    assert (plain.trained, plain.held_out) == ("a.jsonl", "b.jsonl")
    assert DataConfig.model_validate({"eval": 0.1}).held_out is None, "of no training records"


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(RECORDS[0]))
    assert find_source(DataSource(path=str(path)), "train") == FileSet(str(path), (path,))
    with pytest.raises(DataError, match=r"split concern[\s\S]*remove split"):
        find_source(DataSource(path=str(path), split="train"), "train")
    with pytest.raises(DataError, match="subset concern"):
        find_source(DataSource(path=str(path), subset="train"), "train")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)  # data/train is no hub id where data/ is a folder
    with pytest.raises(DataError, match="cannot be read"):
        list(find_source(DataSource(path="data/train"), "train").rows())
    absent = find_source(DataSource(path="absent.jsonl"), "train")
    with pytest.raises(DataError, match="cannot be read"):
        list(absent.rows())


def test_patterns_lists_and_folders_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl", "d.csv"):
        Path(name).write_text(json.dumps({"text": name}))
    Path("x.jsonl").mkdir()
    found = find_source(DataSource(path="*.jsonl"), "train")
    assert [record["text"] for record in records(found)] == ["a.jsonl", "b.jsonl", "c[1].jsonl"]
    assert records(find_source(DataSource(path="c[1].jsonl"), "train")) == [{"text": "c[1].jsonl"}]
    with pytest.raises(DataError, match="No file matches"):
        find_source(DataSource(path="*.tsv"), "train")
    with pytest.raises(DataError, match=r"no such file[\s\S]*give a list: \[a\.jsonl, b\.jsonl\]"):
        find_source(DataSource(path="a.jsonl, b.jsonl"), "train")
    with pytest.raises(DataError, match=r"give its files: .*\*\.csv or .*\*\.jsonl"):
        find_source(DataSource(path=str(tmp_path)), "train")


def test_saved_datasets(tmp_path: Path) -> None:
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "one", num_shards=2)
    found = find_source(DataSource(path=str(tmp_path / "one")), "train")
    assert len(found.files) == 2
    assert records(found) == RECORDS
    told: list[tuple[int, int]] = []
    list(found.rows(lambda *at: told.append(at)))
    assert told == sorted(told)
    assert told[-1][1] == sum(path.stat().st_size for path in found.files)

    splits = {"train": Dataset.from_list(RECORDS), "validation": Dataset.from_list(RECORDS[:3])}
    DatasetDict(splits).save_to_disk(tmp_path / "two")
    source = DataSource(path=str(tmp_path / "two"))
    assert records(find_source(source, "train")) == RECORDS
    assert records(find_source(source, "eval")) == RECORDS[:3]
    named = source.model_copy(update={"split": "validation"})
    assert records(find_source(named, "train")) == RECORDS[:3]
    with pytest.raises(DataError, match=r"no such split[\s\S]*did you mean 'train'"):
        find_source(source.model_copy(update={"split": "trian"}), "train")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"save_to_disk"):
        find_source(DataSource(path=str(tmp_path / "other")), "train")


@pytest.mark.parametrize(
    ("splits", "wanted", "use", "found"),
    [
        (["train", "test"], None, "train", "train"),
        (["train", "test"], None, "eval", "test"),
        (["train", "validation", "test"], None, "eval", "validation"),
        (["all"], None, "eval", "all"),
        (["a", "b"], None, "train", None),
        (["a", "b"], "b", "train", "b"),
        (["a", "b"], "c", "train", None),
    ],
)
def test_which_split_is_meant(splits: list[str], wanted: str | None, use: Any, found: str | None) -> None:
    assert pick_split(splits, wanted, use) == found


@pytest.mark.parametrize("path", ["x" * 300 + ".jsonl", "x" * 300 + "*.csv", "a.jsonl," * 60 + "a.jsonl"])
def test_what_the_system_will_not_look_for_is_told(path: str) -> None:
    """Too long a name stands for a folder that lets nobody look inside, which root may always."""
    with pytest.raises(DataError, match=r"cannot be read|No file matches"):
        records(find_source(DataSource(path=path), "train"))


def test_no_name_is_not_the_current_folder() -> None:
    with pytest.raises(DataError, match="No data file is named"):
        find_source(DataSource(path=" "), "train")


@pytest.mark.parametrize("path", ["https://host/data.jsonl", "hf://datasets/owner/name/*.parquet", "s3://a/b"])
def test_a_url_is_told_as_one(path: str) -> None:
    """It was looked for below the working folder, without one of its slashes."""
    with pytest.raises(DataError, match=rf"given: +{re.escape(path)}\n[\s\S]*download it"):
        find_source(DataSource(path=path), "train")


def prepared(path: Path) -> dict[str, Any]:
    """What the process that has datasets says of a source."""
    request = json.dumps({"source": {"path": str(path)}, "use": "train"})
    command = [sys.executable, "-m", "lowmem_ft.data.hub"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_reads_tables_is_there_when_a_plan_measures_the_process(tmp_path: Path) -> None:
    """And where there are none it is not, unless transformers imported it (by scikit-learn, and pandas before 3.1)."""
    (tmp_path / "a.parquet").touch()
    code = """
import os, sys
from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner import solver

def measured(*_):
    os._exit("pyarrow" in sys.modules)

print(int("pyarrow" in sys.modules), flush=True)
solver.find_device = measured
for train in sys.argv[1:]:
    if not os.fork():
        solver.make_plan(RunConfig.from_dict({"model": "m", "data": {"eval": "b.jsonl", "train": train}}))
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    given = ("a.jsonl", "a.parquet", ".", "an/id", f"{tmp_path}/*")
    command = [sys.executable, "-c", code, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    before, *found = done.stdout.split()
    assert found == [before, "1", "1", "1", "1"]


def test_the_first_read_of_a_table_takes_nothing_that_a_plan_has_not_measured(tmp_path: Path) -> None:
    """Training looks at a row before it plans: of the same file `lowmem-ft plan` said a budget that was 10 MiB less."""
    code = """
import sys
from pathlib import Path
from lowmem_ft.core.config import RunConfig
from lowmem_ft.data.records import read_rows
from lowmem_ft.planner import solver
from lowmem_ft.runtime.memory import process_bytes

def measured(*_):
    before = process_bytes()
    next(read_rows(Path(sys.argv[1])))
    sys.exit(10 + (process_bytes() - before > 5 << 20))

solver.find_device = measured
solver.make_plan(RunConfig.from_dict({"model": "m", "data": {"train": sys.argv[1]}}))
"""
    file = tmp_path / "a.parquet"
    Dataset.from_list([{"text": "one two"}]).to_parquet(file)
    done = subprocess.run([sys.executable, "-c", code, str(file)], check=False, timeout=300)
    assert done.returncode == 10


def test_hub_ids_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's cache holds is used; what it does not is a clear error, in this process and without datasets."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (file,) = prepared(tmp_path / "thing")["files"]
    assert Path(file).suffix == ".arrow"
    cache = tmp_path / "hub" / "datasets"
    (cache / "thing").rename(cache / "someone___thing")  # as if it had come from there
    for name in cache.glob("someone___thing/*/*/*/thing-train.arrow"):
        assert name.exists()
    shutil.rmtree(tmp_path / "thing")
    (tmp_path / "datasets.py").write_text("raise SystemExit('not what is meant')")
    monkeypatch.chdir(tmp_path)
    assert records(find_source(DataSource(path="someone/thing"), "train")) == RECORDS
    with pytest.raises(DataError, match=r"no such split"):
        find_source(DataSource(path="someone/thing", split="test"), "train")
    with pytest.raises(DataError, match=r"cannot be prepared[\s\S]*someone/nothing[\s\S]*save_to_disk"):
        find_source(DataSource(path="someone/nothing"), "train")


@pytest.mark.parametrize("name", ["text", "json"])
def test_a_reader_of_datasets_is_no_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under such a name datasets would read all files of the working folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "private.txt").write_text("Not meant.")
    (tmp_path / "private.json").write_text('{"text": "Not meant."}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        find_source(DataSource(path=name), "train")


def test_hub_datasets_of_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    assert prepared(tmp_path / "pictures")["error"]["what"] == "The dataset holds no tables or text."
