"""Runs over several sources, or a part of one: what they train on, that they resume exactly, what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowmem_ft.core.config import Objective, RunConfig
from lowmem_ft.core.errors import ConfigError, DataError
from lowmem_ft.data import mixture
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer import loop
from tests.assets import ASSETS
from tests.unit.trainer.runs import QUIET, config, exact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same 40 questions as JSONL, CSV and Parquet, and 8 others."""
    lines = (ASSETS / "whatis-train.jsonl").read_text().splitlines()
    records = [json.loads(line)["messages"] for line in lines[:48]]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:40]))
    (tmp_path / "eval.jsonl").write_text("\n".join(lines[40:48]))
    rows = [{"question": asked["content"], "answer": told["content"]} for asked, told in records[:40]]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist([{"messages": it} for it in records[:40]]), tmp_path / "train.parquet")
    return tmp_path


def test_weights_that_ask_for_more_than_a_host_can_list(folder: Path) -> None:
    given = over(folder, "run", [{"path": str(folder / "train.jsonl"), "weight": 1e9}])
    with pytest.raises(ConfigError, match=r"too many examples[\s\S]*40,000,000,000 by the weights[\s\S]*134,217,728"):
        loop.train(given, reporter=QUIET)


COLUMNS = {"instruction": "question", "output": "answer"}


def over(folder: Path, output: str, train: Any, **keys: Any) -> RunConfig:
    return config(folder, output, data={"train": train, **keys}, train={"steps": 4, "save_every": 2, "eval_every": 2})


def test_the_kind_of_file_changes_nothing(folder: Path) -> None:
    """Nor does whether its tokens are in the cache."""
    sources: list[Any] = [
        str(folder / "train.jsonl"),
        {"path": str(folder / "train.csv"), "columns": COLUMNS},
        [{"path": str(folder / "train.parquet")}],
    ]
    found = [
        exact(loop.train(over(folder, f"run{i}", source, cache=cache), reporter=QUIET))
        for i, (source, cache) in enumerate([*((it, str(folder / "cache")) for it in sources), (sources[0], None)])
    ]
    assert all(run == found[0] for run in found)
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    assert len(before) == 4  # three for training, one for evaluation
    again = loop.train(over(folder, "again", sources[0], cache=str(folder / "cache")), reporter=QUIET)
    assert exact(again) == found[0]
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()} == before


def test_a_mixture_resumes_exactly(folder: Path) -> None:
    sources = [
        {"path": str(folder / "train.csv"), "columns": COLUMNS, "weight": 0.3},
        {"path": str(folder / "train.jsonl"), "weight": 1.5},
    ]
    whole = loop.train(over(folder, "whole", sources), reporter=QUIET)
    stopped = over(folder, "stopped", sources)
    soon = stopped.model_copy(update={"train": stopped.train.model_copy(update={"max_time": 1e-9})})
    part = loop.train(soon, reporter=QUIET)
    assert part.status == "out_of_time"
    again = loop.train(stopped, resume=True, reporter=QUIET)
    assert exact(again) == exact(whole)
    assert RunConfig.load(again.folder / "config.yaml") == stopped
    (again.folder / "result.json").unlink()
    other = over(folder, "stopped", [sources[0], str(folder / "train.jsonl")])
    with pytest.raises(DataError, match=r"other data[\s\S]*weights"):
        loop.train(other, resume=True, reporter=QUIET)


def test_longest_first_begins_with_the_longest(folder: Path) -> None:
    run = loop.train(
        over(folder, "run", str(folder / "train.jsonl"), packing=False, order="longest_first"), reporter=QUIET
    )
    tokens = [line["tokens"] for line in run.metrics if "loss" in line]
    assert tokens[0] == max(tokens)
    assert tokens == sorted(tokens, reverse=True)


def test_preferences_are_refused_before_anything_is_written(folder: Path) -> None:
    path = folder / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": " b c", "rejected": " d"}) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: the record is a preference[\s\S]*data\.format: chosen"):
        loop.train(over(folder, "run", str(path)), reporter=QUIET)
    assert not (folder / "run").exists()
    run = loop.train(over(folder, "run", {"path": str(path), "format": "chosen"}), reporter=QUIET)
    assert run.status == "finished"


class Listening:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: object) -> None:
        self.said.append(str(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(QUIET, name)


def test_skipped_records_are_told(folder: Path) -> None:
    path, reporter = folder / "train.jsonl", Listening()
    path.write_text(path.read_text() + '\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:41: 'text' is not a string"):
        loop.load_examples(over(folder, "run", str(path)), QUIET)
    train, _ = loop.load_examples(over(folder, "run", str(path), invalid="skip"), reporter)  # type: ignore[arg-type]
    assert len(train) == 40
    assert "1 of 41 records skipped" in reporter.said[0]


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_what_is_held_out_and_trained_on_is_told(
    folder: Path, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is written: the fourth record is another one, and the last one occurs twice."""
    monkeypatch.setattr(mixture, "COMPARED", 7)
    pairs = [
        {"prompt": it["question"], "chosen": f" {it['answer']}", "rejected": f" Not {it['answer']}"}
        for it in csv.DictReader((folder / "train.csv").open())
    ]
    held_out = [*pairs[20:23], {**pairs[3], "chosen": " No.", "rejected": " Yes."}, pairs[39], pairs[39]]
    settings = over(
        folder, "run", [str(folder / "half.jsonl"), str(folder / "rest.jsonl")], eval=str(folder / "held.jsonl")
    )
    format = "chosen" if objective == "sft" else "auto"
    settings = settings.model_copy(
        update={
            "train": settings.train.model_copy(update={"objective": objective}),
            "data": settings.data.model_copy(update={"format": format}),
        }
    )
    for name, records in (("half", pairs[:25]), ("rest", pairs[25:]), ("held", held_out)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    reporter = Listening()
    _, held = loop.load_examples(settings, reporter)  # type: ignore[arg-type]
    assert len(held) == (12 if objective == "kto" else 6)
    (told,) = (it for it in reporter.said if it.startswith("Warning: "))
    assert f"{5 if objective == 'sft' else 10} held-out documents are also trained on" in told
    (folder / "held.jsonl").write_text(json.dumps(held_out[3]))
    reporter.said.clear()
    loop.load_examples(settings, reporter)  # type: ignore[arg-type]
    assert not any("trained on" in it for it in reporter.said)


def test_a_share_of_the_training_records_is_held_out(data: Path) -> None:
    """None of them is trained on, and each part is cached by itself."""
    cache = str(data / "tokens")
    Path(cache).mkdir()
    settings = config(data, data={"eval": 0.25, "cache": cache})
    whole = loop.read_split(settings, str(data / "train.jsonl"), QUIET)
    for _ in range(2):  # written, and then found
        trained, held_out = loop.load_examples(settings, QUIET)
        assert len(held_out) == len(whole) // 4 > 0
        found = [tuple(it.input_ids) for it in (*trained, *held_out)]
        assert sorted(found) == sorted(tuple(it.input_ids) for it in whole)
        assert [tuple(it.input_ids) for it in held_out] == [tuple(it.input_ids) for it in whole][3::4]
    assert len(list(Path(cache).glob("*.tokens"))) == 3
    run = loop.train(settings, reporter=QUIET)
    assert run.eval_loss is not None
    assert RunConfig.load(Path(run.folder) / "config.yaml").data.eval == 0.25
    with pytest.raises(DataError, match=r"No record is held out[\s\S]*1e-06 of .*train\.jsonl"):
        loop.train(config(data, "other", data={"eval": 1e-6}), reporter=QUIET)


def test_of_a_source_with_too_few_records_none_is_held_out(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, every = data / "few.jsonl", (data / "train.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(every[:3]))
    settings = config(
        data, data={"train": [str(data / "train.jsonl"), {"path": str(few), "weight": 2.0}], "eval": 0.25}
    )
    trained, held_out = loop.load_examples(settings, Reporter())
    assert len(held_out) == len(every) // 4
    assert len(trained) == len(every) - len(every) // 4 + 3
    assert "few.jsonl: no record of it is held out, it has too few for data.eval: 0.25" in capsys.readouterr().err
    alone = config(data, data={"train": str(few), "eval": 0.25})
    with pytest.raises(DataError, match="No record is held out"):
        loop.load_examples(alone, QUIET)
    few.write_text("")
    with pytest.raises(DataError, match=r"few\.jsonl") as found:
        loop.load_examples(alone, QUIET)
    assert "held out" not in str(found.value), "it has none at all"
