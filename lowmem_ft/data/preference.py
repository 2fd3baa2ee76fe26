"""Preferences: a prompt with a better and a worse answer, or with one answer and a verdict on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from lowmem_ft.core.errors import DataError
from lowmem_ft.data.examples import Example, RecordEncoder
from lowmem_ft.data.formats import PREFERENCES, Completion, Conversation, keys_of
from lowmem_ft.data.records import Row, at
from lowmem_ft.data.store import BAD, CHOSEN, GOOD, REJECTED, StoredExamples
from lowmem_ft.data.tally import Tally, WrongDataError


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A pair, or one answer with a verdict (KTO).

    Attributes:
        chosen: prompt and better answer; only the answer is in the loss. None where the answer is a bad one.
        rejected: prompt and worse answer. None where the answer is a good one. One of both is always there.
    """

    chosen: Example | None
    rejected: Example | None

    @property
    def label(self) -> bool | None:
        """Of one answer whether it is good; None for a pair."""
        return self.chosen is not None if self.chosen is None or self.rejected is None else None

    @property
    def documents(self) -> list[Example]:
        """Those that are there, of a pair the better answer's first."""
        return [it for it in (self.chosen, self.rejected) if it is not None]


@dataclass(frozen=True, slots=True, eq=False)
class StoredPreferences(Sequence[PreferenceExample]):
    """The preferences of a file on disk, read as they are asked for.

    Attributes:
        firsts: (N,) where each begins in `stored`.
    """

    stored: StoredExamples
    firsts: NDArray[np.int64]

    @classmethod
    def of(cls, stored: StoredExamples) -> StoredPreferences:
        """Those of a file that `preference_entries` filled."""
        return cls(stored, np.flatnonzero(stored.parts != REJECTED))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(N,) tokens of each, both answers of a pair together."""
        together: NDArray[np.int32] = np.add.reduceat(self.stored.lengths, self.firsts)
        return together

    def __len__(self) -> int:
        return len(self.firsts)

    @overload
    def __getitem__(self, index: int) -> PreferenceExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferenceExample]: ...
    def __getitem__(self, index: int | slice) -> PreferenceExample | list[PreferenceExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = int(self.firsts[range(len(self))[index]])
        part = self.stored.parts[first]
        if part == CHOSEN:
            return PreferenceExample(self.stored[first], self.stored[first + 1])
        answer = self.stored[first]
        return PreferenceExample(answer, None) if part == GOOD else PreferenceExample(None, answer)


def encode_preference(encoder: RecordEncoder, record: Mapping[str, Any]) -> tuple[str, PreferenceExample]:
    """The kind of a record (`preference` or `kto`), and its answers as tokens. Each is told from the prompt.

    Raises:
        DataError: missing keys, wrong types, what the chat template refuses; WrongDataError: no preference.
    """
    content = encoder.reader.read(record, judged=True)
    if content.kind not in PREFERENCES:
        # of a file of preferences, some of which lack their verdict
        if any(value is None for value in record.values()):
            raise DataError(
                "the record is no preference: a value is missing.",
                given=keys_of(record),
                allowed="chosen and rejected, or prompt, completion and label (true or false)",
            )
        raise WrongDataError(
            "the record is no preference.",
            given=f"{content.kind}: {', '.join(record)}",
            allowed="chosen and rejected (with prompt, or beginning alike), or prompt, completion and label",
            fix="name the columns in data.columns, or set data.format",
        )
    return content.kind, PreferenceExample(_one(encoder, content.good), _one(encoder, content.bad))


def _one(encoder: RecordEncoder, answer: Conversation | Completion | None) -> Example | None:
    if answer is None:
        return None
    examples = encoder.examples(answer)
    if len(examples) != 1:
        raise DataError(
            "the answer is not one text: the chat template shows its turns differently once the conversation goes on.",
            given=f"{len(examples)} turns of the assistant",
            allowed="one turn of the assistant behind the prompt",
        )
    return examples[0]


def preference_entries(
    rows: Iterable[Row], encoder: RecordEncoder, tally: Tally, *, apart: bool = False
) -> Iterator[tuple[Example, int]]:
    """What `store.write_stored` takes: of a pair the chosen answer and then the rejected one.

    Args:
        apart: `tally` counts both answers of a pair, which are still dropped together; otherwise the pair.

    Raises:
        DataError: as `examples.read_examples` raises it; a prompt that leaves no room for an answer, and answers that
            are the same once they are cut.
    """
    for row in rows:
        found = tally.attempt(row, partial(_cut, encoder, tally))
        if found is None:
            continue
        lengths = found.lengths if apart else [max(found.lengths)]
        if not tally.fits(row, *lengths):
            continue
        label = found.example.label
        parts = (CHOSEN, REJECTED) if label is None else (GOOD if label else BAD,)
        tally.counts["examples"] += len(lengths)
        for example, part in zip(found.example.documents, parts, strict=True):
            tally.counts.update(tokens=len(example), loss_tokens=example.loss_tokens)
            yield example, part
    tally.counts["unshown"] = encoder.chat.unshown
    encoder.reader.check_columns()


def pair_entries(rows: Iterable[Row], encoder: RecordEncoder, tally: Tally) -> Iterator[tuple[Example, int]]:
    """The same of pairs alone.

    Raises:
        DataError: likewise, and for answers with a verdict.
    """
    tally.unit = "pairs"
    for example, part in preference_entries(rows, encoder, tally):
        if part in (GOOD, BAD):
            raise at(tally.path, no_pair())
        yield example, part


def verdict_entries(rows: Iterable[Row], encoder: RecordEncoder, tally: Tally) -> Iterator[tuple[Example, int]]:
    """The same, each answer of a pair by itself: the better one is good, the other one bad."""
    tally.unit = "answers"
    for example, part in preference_entries(rows, encoder, tally, apart=True):
        yield example, {CHOSEN: GOOD, REJECTED: BAD}.get(part, part)


def no_pair() -> WrongDataError:
    """What to say of an answer with a verdict where pairs are learned from."""
    return WrongDataError(
        "a record has one answer with a verdict, and pairs are learned from.",
        given="prompt, completion, label",
        allowed="chosen and rejected (with prompt, or beginning alike)",
        fix="set train.objective: kto",
    )


class _Cut(NamedTuple):
    """A preference whose answers are cut to a row, and their tokens before."""

    example: PreferenceExample
    lengths: Sequence[int]


def _cut(encoder: RecordEncoder, tally: Tally, record: Mapping[str, Any]) -> tuple[str, _Cut]:
    kind, whole = encode_preference(encoder, record)
    lengths = [len(it) for it in whole.documents]
    if max(lengths) > tally.seq_len and tally.overlong != "truncate":
        return kind, _Cut(whole, lengths)  # what becomes of it is not asked here
    return kind, _Cut(cut_preference(whole, tally.seq_len), lengths)


def cut_preference(whole: PreferenceExample, seq_len: int) -> PreferenceExample:
    """The first `seq_len` tokens of each answer's document.

    Raises:
        DataError: nothing is left of an answer, or both are the same then.
    """
    answers = whole.documents
    longest, cut = max(len(it) for it in answers), [it.cut(seq_len) for it in answers]
    if not all(it.loss_tokens for it in answers):
        raise DataError("an answer has no tokens.", allowed="answers with text")
    if not all(it.loss_tokens for it in cut):
        raise DataError(
            "the prompt leaves no room for the answer.",
            given=f"{longest} tokens with the answer",
            allowed=f"{seq_len} (data.seq_len)",
            fix="raise data.seq_len, or leave such records out with data.overlong: drop or data.invalid: skip",
        )
    if len(cut) == 2 and list(cut[0].input_ids) == list(cut[1].input_ids):
        where = f"in their first {seq_len}" if longest > seq_len else "as"
        raise DataError(
            f"'chosen' and 'rejected' are the same {where} tokens.",
            allowed="two answers that differ",
            fix="raise data.seq_len, or leave such records out with data.invalid: skip",
        )
    return PreferenceExample(None if whole.chosen is None else cut[0], None if whole.rejected is None else cut[-1])
