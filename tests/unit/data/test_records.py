"""The same records from every kind of file, and errors that say where."""

import contextlib
import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value

from lowmem_ft.core.errors import DataError
from lowmem_ft.data import records
from lowmem_ft.data.records import read_rows

RECORDS: list[dict[str, Any]] = [
    {"prompt": f'Question {i}, with "quotes"\nand lines?', "completion": str(i)} for i in range(150)
]


def write(folder: Path, kind: str) -> Path:
    """RECORDS as a file of `kind`."""
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    elif kind == "json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(RECORDS[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(RECORDS)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=40)
    elif kind == "feather":
        feather.write_feather(pa.Table.from_pylist(RECORDS), path, compression="uncompressed")
    else:  # a stream, as datasets writes it
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(RECORDS).schema) as out:
            out.write_table(pa.Table.from_pylist(RECORDS), max_chunksize=70)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "feather", "arrow"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    """A completion of digits stays a text, also in CSV."""
    path = write(tmp_path, kind)
    told: list[tuple[int, int]] = []
    rows = list(read_rows(path, lambda *at: told.append(at)))
    assert [row.record for row in rows] == RECORDS
    assert told == sorted(told)
    assert all(done <= size == path.stat().st_size for done, size in told)
    # 1 header, and two lines for each record before
    line = {"csv": 2 * 100 + 2, "tsv": 2 * 100 + 2}.get(kind, 101)
    assert rows[100].number == line
    assert rows[100].place == (f"{path}:{line}" if kind in ("jsonl", "csv", "tsv") else f"{path}: row 101")


@pytest.mark.parametrize("header", [",prompt,completion", "prompt,,completion", "prompt,completion, "])
def test_columns_without_a_name_are_left_out(tmp_path: Path, header: str) -> None:
    """As pandas writes its index, and spreadsheets what lies beside a table."""
    path = tmp_path / "data.csv"
    path.write_text(
        f"{header}\n" + ",".join({"prompt": "a", "completion": "b"}.get(it, "0") for it in header.split(","))
    )
    assert [row.record for row in read_rows(path)] == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize("write_list", [json.dumps, str], ids=["json", "pandas"])
def test_lists_of_messages_in_cells(tmp_path: Path, write_list: Any) -> None:
    """Else their brackets would be learnt. One alone stays a text: what a model shall write may look so."""
    turns = [[{"role": "user", "content": 'It\'s "a"?\nNo.'}], [{"role": "assistant", "content": "b"}]]
    shares = [{"from": "gpt", "value": "b"}]
    path = tmp_path / "data.csv"
    for cells, lists in (
        ((*turns, "c"), {0, 1}),
        ((turns[0], shares, "c"), {0, 1}),
        (("a", turns[1], "c"), set()),
        ((turns[0], [{"name": "b"}], "c"), set()),
        ((turns[0], "[{'role': b", "c"), set()),
        ((turns[0], "[{" * 9999, "c"), set()),
    ):
        texts = [it if isinstance(it, str) else write_list(it) for it in cells]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["chosen", "rejected", "source"], texts])
        (row,) = read_rows(path)
        expected = [cells[i] if i in lists else texts[i] for i in range(3)]
        assert row.record == dict(zip(("chosen", "rejected", "source"), expected, strict=True))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_numbers_are_those_of_json(tmp_path: Path, name: str) -> None:
    record = {"id": 2**64 - 1, "hash": -(10**30), "share": 0.1, "whole": 1.0, "text": "\N{GRINNING FACE}"}
    path = tmp_path / name
    path.write_text(json.dumps([record] if name.endswith(".json") else record))
    (row,) = read_rows(path)
    assert row.record == record
    assert isinstance(row.record, dict)
    assert [type(value) for value in row.record.values()] == [int, int, float, float, str]


def test_a_line_with_a_number_that_python_refuses_is_one_wrong_record(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "n": ' + "1" * 5000 + '}\n{"text": "b"}\n')
    first, second = read_rows(path)
    assert isinstance(first.record, DataError)
    assert second.record == {"text": "b"}


def test_nothing_in_a_list_of_objects_with_json_texts(tmp_path: Path) -> None:
    texts = pa.array(['{"a": 1}', None], type=pa.json_())
    objects = pa.StructArray.from_arrays([texts], ["json"], mask=pa.array([False, True]))
    pq.write_table(pa.table({"calls": pa.ListArray.from_arrays([0, 2], objects)}), tmp_path / "data.parquet")
    (row,) = read_rows(tmp_path / "data.parquet")
    assert row.record == {"calls": [{"json": {"a": 1}}, None]}


def test_json_of_lines_and_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_text('\ufeff {"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert [row.record for row in read_rows(path)] == [{"text": "a"}, {"text": "b"}]
    path.write_text("")
    assert list(read_rows(path)) == []
    path.write_text(" \n []")
    assert list(read_rows(path)) == []


@pytest.mark.parametrize("before", ["\ufeff", "\ufeff \n", " \n" * 5000])
def test_what_stands_before_an_array(tmp_path: Path, before: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(before + '[{"text": "a"}, {"text": "b"}]', encoding="utf-8")
    assert [row.record for row in read_rows(path)] == [{"text": "a"}, {"text": "b"}]
    path.write_text(before + '{"text": "a"}\n{"text": 3', encoding="utf-8")
    first, second = read_rows(path)
    assert first.record == {"text": "a"}
    assert isinstance(second.record, DataError)
    assert second.number == before.count("\n") + 2


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_text_that_gzip_compressed(tmp_path: Path, kind: str) -> None:
    plain = write(tmp_path, kind)
    packed = plain.with_name(f"{plain.name}.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    told: list[tuple[int, int]] = []
    assert [row.record for row in read_rows(packed, lambda *at: told.append(at))] == RECORDS
    assert told[-1][0] <= told[-1][1] == packed.stat().st_size
    packed.rename(plain)  # a name that does not tell
    assert [row.record for row in read_rows(plain)] == RECORDS
    for broken in (gzip.compress(b"a" * 5000)[:-12], b"\x1f\x8b and so on"):
        packed.write_bytes(broken)
        with pytest.raises(DataError, match=r"data\.\w+\.gz: the file cannot be read"):
            list(read_rows(packed))


def test_numbers_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1, "b": 0.5, "c": 1e3, "d": null, "e": true}]')
    assert [row.record for row in read_rows(path)] == [{"a": 1, "b": 0.5, "c": 1000.0, "d": None, "e": True}]


def test_nulls_of_tables_are_absent_keys(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    turns = [[{"role": "user", "content": "a"}], [{"role": "tool", "content": "b", "name": "ls"}]]
    pq.write_table(pa.Table.from_pylist([{"messages": it} for it in turns]), path)
    assert [row.record for row in read_rows(path)] == [{"messages": it} for it in turns]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_objects_that_datasets_keeps_as_json(tmp_path: Path, kind: str) -> None:
    """Schemas of tools and arguments of calls have other keys in each row; a null among them is one."""
    calls = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": it}}]}
        for it in ({"a": 1}, {"b": None})
    ]
    records = [{"messages": [call], "tools": [{"name": "f"}], "id": i} for i, call in enumerate(calls)]
    features = Features({"messages": List(Json()), "tools": Json(), "id": Value("int64")})
    data, path = Dataset.from_list(records, features=features), tmp_path / f"data.{kind}"
    if kind == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(tmp_path / "saved")
        (path,) = (tmp_path / "saved").glob("*.arrow")
    assert [row.record for row in read_rows(path)] == records


WRONG = {
    "json": ("data.json", b'[{"text": "a"}, 3, {"text": "b"}]', "row 2: not a JSON object"),
    "fields": ("data.csv", b"text,label\na,1\nb\nc,2\n", ":3: not as many fields"),
    "quoted fields": ("data.csv", b'text,label\n"a\nb",1\n\nc\nd,1\n', ":5: not as many fields"),
}


@pytest.mark.parametrize(("name", "content", "place"), WRONG.values(), ids=WRONG.keys())
def test_wrong_rows_are_told_and_passed(tmp_path: Path, name: str, content: bytes, place: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    rows = list(read_rows(path))
    assert [isinstance(row.record, DataError) for row in rows] == [False, True, False]
    assert isinstance(rows[1].record, DataError)
    assert place in f"{rows[1].place}: {rows[1].record.what}"


BROKEN = {
    "json cut": ("data.json", b'[{"text": "a"}, {"te', r"data\.json: not valid JSON"),
    "json comma": ("data.json", b'[{"text": "a"} {"text": "b"}]', r"data\.json: not valid JSON"),
    "json latin": ("data.json", '[{"text": "é"}]'.encode("latin-1"), r"data\.json: not valid JSON"),
    "json key": ("data.json", b'[{"a": 1}, {"b" 2}]', r"Expecting ':' delimiter: '2\}\]' \(row 2, or behind it\)"),
    "json open": ("data.json", b'[{"a": "b}]', r"Unterminated string starting at: '\"b\}\]' \(row 1"),
    "json end": ("data.json", b'[{"a": 1}', r"Expecting ',', and the file ends"),
    "json more": ("data.json", b'[{"a": 1}] [', r"Extra data behind the array: '\['"),
    "json digits": ("data.json", b'[{"a": ' + b"1" * 5000, r"not valid JSON[\s\S]*5000 digits"),
    "json depth": ("data.json", b"[" * 100_000, r"data\.json: not valid JSON[\s\S]*nested too deeply"),
    "csv latin": ("data.csv", "text\né\n".encode("latin-1"), r"data\.csv:1: not UTF-8"),
    "csv names": ("data.csv", b",\na,b\n", r"data\.csv:1: not a header"),
    "csv header": ("data.csv", b"text,text\na,b\n", r"data\.csv:1: not a header"),
    "json object": ("data.json", b'{\n  "data": [\n', r"data\.json: neither an array nor lines[\s\S]*fix: +write the"),
    "csv semicolons": ("data.csv", b"a;b\n1;2\n", r"data\.csv:1: the fields are not separated by commas[\s\S]*';'"),
    "tsv commas": ("data.tsv", b"a,b\n1,2\n", r"data\.tsv:1: the fields are not separated by tabs[\s\S]*','"),
    "sheet": ("data.xlsx", b"PK\x03\x04", r"the file is compressed[\s\S]*save the sheet as CSV"),
    "csv field": ("data.csv", b"text\n" + b"a" * 200_000, r"data\.csv:2: not valid CSV[\s\S]*JSONL or Parquet"),
    "csv quote": ("data.csv", b'text\n"a" b\n', r"data\.csv:2: not valid CSV[\s\S]*double the quotes in it$"),
    "tsv quote": ("data.tsv", b'text\n"a\n', r"data\.tsv:2: not valid TSV[\s\S]*double the quotes in it$"),
    "zstd": (
        "data.jsonl.zst",
        b"\x28\xb5\x2f\xfd....",
        r"data\.jsonl\.zst: the file is compressed[\s\S]*zstd[\s\S]*unpack",
    ),
    "packed table": ("data.parquet.gz", gzip.compress(b"PAR1"), r"the file is compressed[\s\S]*gzip[\s\S]*unpack it"),
    "parquet": ("data.parquet", b"PAR1 and so on", r"data\.parquet: the file cannot be read"),
    "arrow": ("data.arrow", b"nothing of the kind", r"data\.arrow: the file cannot be read"),
    "empty arrow": ("data.arrow", b"", r"data\.arrow: the file cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


@pytest.mark.parametrize("content", ['[{"text": "a"}]\n', '[\n{"text": "a"}\n]\n', '{\n"text": "a"\n}\n'])
def test_an_array_in_a_file_of_lines_is_recognized(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    first = next(read_rows(tmp_path / "data.jsonl")).record
    assert isinstance(first, DataError)
    assert "name the file .json" in str(first.fix)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "feather", "arrow"])
def test_damaged_files_give_records_or_a_clear_error(tmp_path: Path, kind: str) -> None:
    """Never another error, nor a process that dies: offsets of a damaged Arrow file may lead anywhere."""
    path = write(tmp_path, kind)
    sound, draw = path.read_bytes(), random.Random(0)
    for _ in range(30):
        damaged = bytearray(sound)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            list(read_rows(path))


@pytest.mark.parametrize("size", [1, 7, 40, records.JSON_BYTES])
def test_an_array_is_read_as_lines_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Wherever what is read at once ends; also what JSON can write and Unicode has not, which tokenizing refuses."""
    monkeypatch.setattr(records, "JSON_BYTES", size)
    elements = [
        {"text": "half \ud83d of a pair, and \ude00 the other, \U0001f600 both, é and \\ud83d none"},
        {"ke\ud800y": [-12345678901234567890, 1.25e-30, True, None, {}, [[]], "\u2028\n\\"]},
        *[-1.5e-7, "a\ud83d", None, 12, False, []],
        {"text": "x" * 200},
    ]
    for ascii_only in (True, False):
        text = json.dumps(elements, ensure_ascii=ascii_only)
        array, lines = tmp_path / "data.json", tmp_path / "data.jsonl"
        array.write_text(text, encoding="utf-8", errors="replace")
        rewritten = [json.dumps(it, ensure_ascii=ascii_only) + "\n" for it in elements]
        lines.write_text("".join(rewritten), encoding="utf-8", errors="replace")
        told = [
            [None if isinstance(row.record, DataError) else row.record for row in read_rows(path)]
            for path in (array, lines)
        ]
        assert told[0] == told[1]
        assert not ascii_only or told[0] == [it if isinstance(it, dict) else None for it in elements]


def test_nested_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    records = [{"a": [1, {"b": None}, []]}, {}, {"a": {"b": {"c": []}}}, {"a": [[], [[2]]]}]
    path.write_text(json.dumps(records))
    assert [row.record for row in read_rows(path)] == records


def test_cut_tables(tmp_path: Path) -> None:
    for kind in ("parquet", "feather", "arrow"):
        path = write(tmp_path, kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match="cannot be read"):
            list(read_rows(path))


def test_where_a_relative_path_begins_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"begins at {tmp_path}"):
        list(read_rows(Path("data.jsonl")))
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / "data.jsonl"))
    assert caught.value.fix is None
