"""Preferences: a prompt with a better and a worse answer, or with one answer and a verdict on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lowmem_ft.core.errors import DataError
from lowmem_ft.data.examples import IGNORE_INDEX, Example, RecordEncoder
from lowmem_ft.data.formats import PREFERENCES, Completion, Conversation
from lowmem_ft.data.records import Row
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
    def prompt_tokens(self) -> int:
        """Tokens at the beginning that are in no loss, and the same in both."""
        answers = [example for example in (self.chosen, self.rejected) if example is not None]
        columns = zip(*(zip(example.input_ids, example.labels, strict=True) for example in answers), strict=False)
        count = 0
        for count, column in enumerate(columns):
            if any(label != IGNORE_INDEX for _, label in column) or len({token for token, _ in column}) > 1:
                return count
        return count + 1


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
        return np.add.reduceat(self.stored.lengths, self.firsts)

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
    content = encoder.reader.read(record)
    if content.kind not in PREFERENCES:
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


def preference_entries(rows: Iterable[Row], encoder: RecordEncoder, tally: Tally) -> Iterator[tuple[Example, int]]:
    """What `store.write_stored` takes: of a pair the chosen answer and then the rejected one. `tally` counts pairs.

    Raises:
        DataError: as `examples.read_examples` raises it.
    """
    for row in rows:
        found = tally.attempt(row, lambda record: encode_preference(encoder, record))
        if found is None:
            continue
        pair = found.label is None
        answers = [(example, CHOSEN if pair else GOOD) for example in (found.chosen,) if example is not None]
        answers += [(example, REJECTED if pair else BAD) for example in (found.rejected,) if example is not None]
        if not tally.fits(row, max(len(example) for example, _ in answers)):
            continue
        answers = [(example.cut(tally.seq_len), part) for example, part in answers]
        if not all(example.loss_tokens for example, _ in answers):
            tally.masked_lines.append(row.number)
            continue
        tally.counts["examples"] += 1
        for example, part in answers:
            tally.counts.update(tokens=len(example), loss_tokens=example.loss_tokens)
            yield example, part
