"""`lowmem-ft data`: the figures of a file, and what it prints."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from lowmem_ft.cli import main
from lowmem_ft.cli.data import _marked, _show
from lowmem_ft.core.errors import DataError
from lowmem_ft.data.examples import read_examples
from lowmem_ft.data.preview import Preview

ASSETS = Path(str(files("lowmem_ft") / "assets"))
Run = Callable[..., tuple[int, str, str]]
PAIR = {"prompt": "a b c", "completion": " d e"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowmem-ft", "data", *map(str, arguments)])
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return call


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    return write


def test_shipped_data(run: Run) -> None:
    code, out, _ = run(ASSETS / "whatis-eval.jsonl", "--json", "--seq-len", "24")
    found = json.loads(out)
    assert code == 0
    assert (found["records"], found["complete"], found["formats"]) == (300, True, {"messages": 300})
    assert found["columns"] == {"messages": ["list of objects (role, content)"]}
    assert sum(it["examples"] for it in found["histogram"]) == found["examples"] == 300
    assert found["histogram"][0]["from"] == found["length"]["min"]
    assert found["length"]["max"] == 48
    assert found["truncated"] == round(found["truncated_share"] * 300) > 0
    assert found["loss_share"] == found["loss_tokens"] / found["tokens"]
    assert found["endings"] == {"<|eos|>": 300}
    assert 0.9 < found["packed_share"] <= 1
    parts = found["samples"][0]["parts"]
    assert [part["loss"] for part in parts] == [False, True]
    assert parts[0]["text"].startswith("<|bos|><|user|>")


def test_the_figures_are_those_of_training(run: Run, tmp_path: Path) -> None:
    path = ASSETS / "whatis-eval.jsonl"
    for overlong in ("truncate", "drop"):
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / "doclm-7m")
        _, report = read_examples(path, tokenizer, seq_len=20, overlong=overlong)  # type: ignore[arg-type]
        found = json.loads(run(path, "--json", "--seq-len", "20", f"data.overlong={overlong}")[1])
        assert (found["used"], found["tokens"]) == (report.examples, report.tokens)
        assert found["loss_tokens"] == report.loss_tokens
        assert found["truncated"] == report.truncated + report.dropped
        assert found["masked"] == report.masked


def test_the_figures_of_pairs_are_those_of_training(run: Run) -> None:
    from transformers import AutoTokenizer

    from lowmem_ft.core.config import DataConfig
    from lowmem_ft.data.reading import read_preferences
    from lowmem_ft.data.tally import DataReport

    from ..data.test_store import silent

    path = ASSETS / "whatis-pairs-eval.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "doclm-7m")
    for overlong, objective in (("truncate", "dpo"), ("drop", "dpo"), ("truncate", "kto"), ("drop", "kto")):
        data = DataConfig(seq_len=28, cache=None, overlong=overlong)  # type: ignore[arg-type]
        wanted: Any = "pairs" if objective == "dpo" else "verdicts"
        mixture, _ = read_preferences(str(path), data, tokenizer, use="train", task=silent, wanted=wanted)
        report: DataReport = mixture.sources[0].stored.report  # type: ignore[attr-defined]
        found = json.loads(
            run(path, "--json", "--seq-len", "28", f"data.overlong={overlong}", f"train.objective={objective}")[1]
        )
        assert found["used"] == report.examples * (2 if wanted == "pairs" else 1)
        assert (found["tokens"], found["loss_tokens"]) == (report.tokens, report.loss_tokens)
        assert report.truncated + report.dropped > 0
        assert (report.unit, found["unit"], found["pairs"]) == (wanted.replace("verdicts", "answers"), "answers", 80)
        each = 2 if objective == "dpo" and overlong == "drop" else 1
        if (overlong, objective) != ("truncate", "dpo"):  # there one of a pair may be
            assert found["truncated"] == each * (report.truncated + report.dropped)
        assert found["examples"] == report.encoded * (2 if wanted == "pairs" else 1) == 160


def test_keys_that_decide_what_training_sees(run: Run, write: Callable[..., Path]) -> None:
    path = write(PAIR)
    code, _, err = run(path, f"model={path.parent / 'absent'}")
    assert (code, "absent" in err) == (2, True)
    code, _, err = run(path, f"data.train={ASSETS / 'whatis-eval.jsonl'}")
    assert (code, "named twice" in err, "remove data.train" in err) == (2, True, True)
    assert run(path, "data.train.weight=2")[0] == 0
    for objective in ("dpo", "kto"):
        code, _, err = run(path, f"train.objective={objective}", "data.invalid=skip")
        assert (code, "data.jsonl:1: the record is no preference" in err) == (2, True)
    verdicts = write(*({**PAIR, "label": label} for label in (0, 1)))
    found = json.loads(run(verdicts, "train.objective=kto", "--json")[1])
    assert (found["formats"], [it["what"].split()[-1] for it in found["samples"]]) == (
        {"kto": 2},
        ["rejected", "chosen"],
    )
    code, _, err = run(verdicts, "train.objective=dpo")
    assert (code, "set train.objective: kto" in err) == (2, True)
    pairs = write({"prompt": "a", "chosen": " b", "rejected": " c"})
    assert run(pairs, "train.objective=dpo")[0] == 0
    code, _, err = run(pairs, "train.objective=sft")
    assert (code, "data.jsonl:1: the record is a preference" in err) == (2, True)
    code, _, err = run(pairs, "data.columns.system=rules")
    assert (code, "no record has the column" in err) == (2, True)


def test_piped(run: Run, write: Callable[..., Path]) -> None:
    code, out, _ = run(write(PAIR, {"text": "all of it"}))
    assert code == 0
    assert "prompt_completion (1), text (1)" in out
    assert "[a b c] d e<|eos|>" in out
    assert "[[/INST] a b c] d e<|eos|>" in run(write({**PAIR, "prompt": "[/INST] a b c"}))[1]
    assert "data.jsonl:1 (what is not in the loss: in [brackets])" in out
    assert "\x1b" not in out


def test_on_a_terminal_masked_tokens_are_dimmed() -> None:
    console = Console(force_terminal=True, width=80, color_system="standard", highlight=False, markup=False)
    with console.capture() as capture:
        console.print(_marked([("asked ", False), ("said", True)], plain=False))
    assert capture.get() == "\x1b[2masked \x1b[0msaid\n"
    with console.capture() as capture:
        _show(Preview(name="[/x]", seq_len=8, overlong="drop"), console)
    assert "none known" in capture.get()


def test_long_examples_are_cut() -> None:
    assert str(_marked([("a" * 1990, True), ("b" * 50, False), ("c", True)], plain=True)).endswith("[bbbbbbbbbb...]")


def test_wrong_rows(run: Run, write: Callable[..., Path]) -> None:
    path = write(PAIR, '{"prompt"', {"x": 1}, PAIR)
    code, out, err = run(path)
    assert code == 2
    assert f"{path}:2: not valid JSON" in out
    assert f"{path}:3: the record lacks the keys" in out
    assert "2 of 4 records cannot be used" in err
    assert "Traceback" not in err
    code, out, _ = run(path, "data.invalid=skip", "--json")
    found = json.loads(out)
    assert (code, found["unusable"], found["examples"], len(found["wrong"])) == (0, 2, 2, 2)
    code, _, err = run(write(""))
    assert (code, "has no records" in err) == (2, True)
    code, _, err = run("absent.jsonl")
    assert (code, "cannot be read" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "error"}, "2 of 2 examples are longer than data.seq_len"),
        ({"overlong": "drop"}, "Nothing is left to train on"),
        ({"format": "messages", "invalid": "skip"}, "Nothing is left to train on"),
        ({}, "Nothing is left to train on"),
    ],
)
def test_what_training_refuses_is_refused(
    run: Run, write: Callable[..., Path], options: dict[str, Any], message: str
) -> None:
    """It was shown as data of which nothing is used, with exit code 0; of the first of more records nobody can tell."""
    path = write(*[{"prompt": "a " * 99, "completion": "b"}] * 2)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "doclm-7m")
    with pytest.raises(DataError):
        read_examples(path, tokenizer, seq_len=16, **options)
    code, out, err = run(path, "--seq-len", "16", *(f"data.{key}={value}" for key, value in options.items()))
    assert (code, "records" in out, message in err) == (2, True, True)
    rest = write({"prompt": "a " * 99, "completion": "b"}, {"text": "all of it"})
    assert run(rest, "--seq-len", "16", "--rows", "1")[0] == 0


def test_options(run: Run, write: Callable[..., Path]) -> None:
    path = write(*[{"question": f"q{i}", "answer": " a"} for i in range(20)])
    columns = ("data.columns.prompt=question", "data.columns.completion=answer")
    found = json.loads(run(path, *columns, "--rows", "5", "--examples", "1", "--json")[1])
    assert (found["records"], found["complete"], len(found["samples"])) == (5, False, 1)
    assert "the first of more" in run(path, *columns, "--rows", "5")[1]
    found = json.loads(run(path, *columns, "data.assistant_only=false", "--rows", "0", "--json")[1])
    assert (found["records"], found["complete"]) == (20, True)
    assert found["loss_tokens"] == found["tokens"] - 20
    assert run(path, *columns, "--model", ASSETS / "doclm-7m")[0] == 0
    shutil.copy(ASSETS / "doclm-7m" / "config.json", path.parent)
    code, _, err = run(path, "--model", path.parent)
    assert (code, "holds no tokenizer" in err) == (2, True)
    code, _, err = run(path, "data.fromat=text")
    assert (code, "did you mean 'data.format'" in err) == (2, True)


def test_preferences(run: Run, write: Callable[..., Path]) -> None:
    path = write({"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "completion": "b", "label": False})
    found = json.loads(run(path, "--json")[1])
    assert found["formats"] == {"preference": 1, "kto": 1}
    assert [it["what"].split()[-1] for it in found["samples"]] == ["chosen", "rejected", "rejected"]
    found = json.loads(run(write({"prompt": "a", "chosen": " b", "rejected": " c"}), "data.format=chosen", "--json")[1])
    assert [len(it["parts"]) for it in found["samples"]] == [2]
    asked = {"prompt": "a" * 200, "chosen": " b", "rejected": " c"}
    found = json.loads(run(write(asked), "--seq-len", "16", "--json")[1])
    assert (found["unusable"], found["used"]) == (1, 0)
    assert "the prompt leaves no room for the answer" in found["wrong"][0], "as training says it"
