"""Preferences as tokens: the prompt is the same in both answers, and only answers are in the loss."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.config import DataConfig, RunConfig
from lowmem_ft.core.errors import DataError
from lowmem_ft.data.examples import IGNORE_INDEX, Example
from lowmem_ft.data.mixture import Mixture
from lowmem_ft.data.pairs import balance_note
from lowmem_ft.data.preference import PreferenceExample, StoredPreferences
from lowmem_ft.data.reading import read_preferences

from .test_store import silent

Write = Callable[..., Path]
ASKED, GOOD = {"role": "user", "content": "What is ls?"}, {"role": "assistant", "content": "List files."}
BAD = {"role": "assistant", "content": "No idea, sorry."}
PAIRS = [
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": "What is ls?", "chosen": " List files.", "rejected": " No idea, sorry."},
]
VERDICTS = [
    {"prompt": [ASKED], "completion": [GOOD], "label": True},
    {"prompt": "a", "completion": " b", "label": False},
]


def read(path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, **settings: Any) -> Mixture[PreferenceExample]:
    data = DataConfig.model_validate({"seq_len": 64, "cache": str(cache), **settings})
    mixture, _ = read_preferences(str(path), data, tokenizer, use="train", task=silent)
    return mixture


def answer(tokenizer: PreTrainedTokenizerBase, example: Example | None) -> str:
    assert example is not None
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def test_pairs_and_verdicts(tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path) -> None:
    for _ in range(2):  # made, and found
        found = read(jsonl(*PAIRS, *VERDICTS), tokenizer, tmp_path / "cache")
        assert [preference.label for preference in found] == [None, None, None, True, False]
        for preference in found[:3]:
            assert answer(tokenizer, preference.chosen).strip() == "List files.<|eos|>"
            assert answer(tokenizer, preference.rejected).strip() == "No idea, sorry.<|eos|>"
            assert preference.chosen is not None
            assert preference.rejected is not None
            labels = list(preference.chosen.labels)
            shared = next(at for at, label in enumerate(labels) if label != IGNORE_INDEX)
            assert preference.chosen.input_ids[:shared] == preference.rejected.input_ids[:shared]
            assert set(preference.rejected.labels[:shared]) == {IGNORE_INDEX}
        assert found[3].rejected is None
        assert answer(tokenizer, found[3].chosen) == "List files.<|eos|>"
        assert found[4].chosen is None
        assert answer(tokenizer, found[4].rejected) == " b<|eos|>"
        (source,) = found.sources
        assert isinstance(source, StoredPreferences)
        assert source.lengths.tolist() == [
            sum(len(example) for example in (it.chosen, it.rejected) if example is not None) for it in found
        ]
        assert source.stored.report.examples == 5
        assert source.stored.report.formats == {"preference": 3, "kto": 2}
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_pairs_are_cut_and_dropped_as_a_whole(tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path) -> None:
    short, long = ({"prompt": "a", "chosen": " b", "rejected": " c" * count} for count in (1, 40))
    (pair,) = read(jsonl(long), tokenizer, tmp_path, seq_len=16)
    assert pair.rejected is not None
    assert len(pair.rejected) == 16
    assert len(read(jsonl(long, short), tokenizer, tmp_path, seq_len=16, overlong="drop")) == 1
    asked = {"prompt": "a" * 200, "chosen": " b", "rejected": " c"}
    with pytest.raises(DataError, match=":1: the prompt leaves no room for the answer"):
        read(jsonl(asked, short), tokenizer, tmp_path, seq_len=16)
    assert len(read(jsonl(asked, short), tokenizer, tmp_path, seq_len=16, invalid="skip")) == 1
    alike = {"prompt": "a", "chosen": " b" * 40, "rejected": " b" * 40 + " c"}
    with pytest.raises(DataError, match=":1: 'chosen' and 'rejected' are the same in their first 16 tokens"):
        read(jsonl(alike, short), tokenizer, tmp_path, seq_len=16)
    with pytest.raises(DataError, match=":1: the example is too long"):
        read(jsonl(long), tokenizer, tmp_path, seq_len=16, overlong="error")


def test_pairs_alone_and_verdicts_alone(tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path) -> None:
    data = DataConfig.model_validate({"seq_len": 64, "cache": str(tmp_path)})
    path = str(jsonl(*PAIRS, *VERDICTS))
    with pytest.raises(DataError, match="one answer with a verdict") as error:
        read_preferences(path, data, tokenizer, use="train", task=silent, wanted="pairs")
    assert error.value.fix == "set train.objective: kto"
    found, _ = read_preferences(path, data, tokenizer, use="train", task=silent, wanted="verdicts")
    assert [it.label for it in found] == [True, False] * 3 + [True, False]
    report = found.sources[0].stored.report  # type: ignore[attr-defined]
    assert (report.examples, report.unit) == (8, "answers")


def test_kto_counts_answers_and_the_others_pairs(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path
) -> None:
    short, long = ({"prompt": "a", "chosen": " b", "rejected": " c" * count} for count in (1, 40))
    records, verdict = [long, short, short], {"prompt": "a", "completion": " d", "label": True}
    for wanted, overlong, given, said in (
        ("pairs", "truncate", records, "1 of 3 pairs truncated"),
        ("verdicts", "truncate", records, "1 of 6 answers truncated"),
        ("pairs", "drop", records, "1 of 3 pairs dropped, longer than data.seq_len"),
        ("verdicts", "drop", records, "2 of 6 answers dropped, longer than data.seq_len, or of a pair that is"),
        ("verdicts", "drop", [long, verdict], "2 of 3 answers dropped"),
    ):
        data = DataConfig.model_validate({"seq_len": 16, "cache": None, "overlong": overlong})
        wants: Any = wanted
        _, notes = read_preferences(str(jsonl(*given)), data, tokenizer, use="train", task=silent, wanted=wants)
        assert len(notes) == 1
        assert said in notes[0]


@pytest.mark.parametrize(
    ("labels", "weights", "said"),
    [
        ([True, False], {}, None),
        ([True] * 4 + [False] * 3, {}, None),
        ([True] * 4 + [False], {}, "4 answers are good and 1 are bad: .* between 0.25 and 0.333"),
        ([True] * 4 + [False], {"undesirable_weight": 4}, None),
        ([False] * 3, {}, "Warning: 0 answers are good and 3 are bad; kto learns from both"),
    ],
)
def test_what_kto_lacks_is_said(
    labels: list[bool],
    weights: dict[str, float],
    said: str | None,
    tokenizer: PreTrainedTokenizerBase,
    jsonl: Write,
    tmp_path: Path,
) -> None:
    records = [{"prompt": f"a{at}", "completion": " b", "label": label} for at, label in enumerate(labels)]
    keys: dict[str, Any] = {"model": "m", "train": {"objective": "kto"}, "preference": weights}
    config = RunConfig.from_dict(keys)
    note = balance_note(config, read(jsonl(*records), tokenizer, tmp_path))
    assert note is None if said is None else re.search(said, note or "")


def test_verdicts_as_numbers(tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path) -> None:
    records = [{**VERDICTS[1], "label": label} for label in (0, 1)]
    assert [it.label for it in read(jsonl(*records), tokenizer, tmp_path)] == [False, True]
    with pytest.raises(DataError, match=r"'label' is no verdict[\s\S]*3[\s\S]*1 or 0"):
        read(jsonl({**VERDICTS[1], "label": 3}), tokenizer, tmp_path)
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="no record has the column"):
        read(jsonl({"a": "Yes.", "b": "No."}), tokenizer, tmp_path, columns=columns)


def test_what_is_no_preference_is_refused(tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path) -> None:
    for invalid in ("error", "skip"):
        with pytest.raises(DataError, match=":2: the record is no preference"):
            read(jsonl(PAIRS[0], {"text": "ls"}), tokenizer, tmp_path, invalid=invalid)
    assert len(read(jsonl(PAIRS[0], {"chosen": 1, "rejected": 2}), tokenizer, tmp_path, invalid="skip")) == 1


def test_several_answers_of_a_template_that_shows_them_differently(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}!{% endif %}{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    several = {"prompt": [ASKED], "chosen": [GOOD, ASKED, GOOD], "rejected": [BAD]}
    with pytest.raises(DataError, match="the answer is not one text"):
        read(jsonl(several), tokenizer, tmp_path)
    assert len(read(jsonl(PAIRS[0]), tokenizer, tmp_path)) == 1


@pytest.mark.parametrize(
    "lacking", [{"prompt": "a", "completion": " b", "label": None}, {**PAIRS[0], "rejected": None}]
)
def test_a_verdict_that_is_null_is_skipped_on_request(
    lacking: Any, tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path
) -> None:
    path = jsonl(*VERDICTS, lacking)
    found = read(path, tokenizer, tmp_path / "cache", invalid="skip")
    assert len(found) == 2
    with pytest.raises(DataError, match="null"):
        read(path, tokenizer, tmp_path / "cache")
