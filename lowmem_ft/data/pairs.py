"""Micro-batches of preferences: a row of better answers, and beside it the row of the worse ones to the same prompts.

So both answers of a pair lie in the same micro-batch, at the same place of two rows, and each may be as long as a row.
Of answers with verdicts (KTO) each is a document by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.preference import lanes, learns_preferences, settings_of
from lowmem_ft.data.examples import IGNORE_INDEX, Example
from lowmem_ft.data.mixture import Mixture
from lowmem_ft.data.packing import Answers, Batch, collate
from lowmem_ft.data.preference import PreferenceExample, StoredPreferences
from lowmem_ft.data.store import BAD, GOOD


@dataclass(frozen=True, kw_only=True, slots=True)
class Preferences:
    """How preferences become micro-batches.

    Attributes:
        lanes: 2 for pairs, 1 for answers with a verdict.
        seq_len: tokens that no document exceeds.
        whole: the likelihood of prompts is learned, too, where better answers are made likelier.
    """

    lanes: int
    seq_len: int
    whole: bool = False

    def lengths(self, examples: Sequence[PreferenceExample]) -> NDArray[np.int32]:
        """(N,) positions of a row that each takes: the longer of its answers."""
        if isinstance(examples, Mismatched):
            return examples.lengths
        if isinstance(examples, Mixture):
            return np.concatenate([self.lengths(source) for source in examples.sources])
        if isinstance(examples, StoredPreferences):
            longer: NDArray[np.int32] = np.maximum.reduceat(examples.stored.lengths, examples.firsts)
            return longer.astype(np.int32)
        return np.fromiter((max(map(len, it.documents)) for it in examples), np.int32, len(examples))

    def collate(self, rows: Sequence[Sequence[PreferenceExample]], *, pad_id: int, length: int | None) -> Batch:
        """Tensors of `rows`, each of which becomes `lanes` rows; see `packing.collate`."""
        if self.lanes == 1:
            lined = [[(it.documents[0], it.chosen is not None) for it in row] for row in rows]
        else:
            lined = [[(it.documents[side], side == 0) for it in row] for row in rows for side in range(2)]
        batch = collate([[self._learned(*it) for it in row] for row in lined], pad_id=pad_id, length=length)
        return replace(batch, answers=_answers(lined, batch.input_ids.shape[1], whole=self.whole))

    def _learned(self, document: Example, good: bool) -> Example:
        if not (self.whole and good):
            return document
        begin = _begin(document)  # what is no answer behind it, such as further questions, stays out of its likelihood
        return Example(document.input_ids, [*document.input_ids[:begin], *document.labels[begin:]])

    def identity(self) -> dict[str, Any]:
        """What decides which examples make up a step, beside what decides it of supervised examples."""
        return {"preferences": "pairs" if self.lanes == 2 else "verdicts"}


class Mismatched(Sequence[PreferenceExample]):
    """Prompts, each with the answer of the example before, the first with that of the last: what KTO tells from how far
    the model has gone from its reference. Verdicts are those of the prompts, and mean nothing.

    Args:
        examples: with verdicts.
        order: (N,) indices of those that are used.
        seq_len: tokens that nothing exceeds.

    Attributes:
        lengths: (N,) int32.
    """

    def __init__(self, examples: Sequence[PreferenceExample], order: NDArray[np.int32], seq_len: int) -> None:
        self._examples, self._order, self.seq_len = examples, order, seq_len
        sizes = np.asarray([(_begin(it), len(it)) for it in (self._document(at) for at in range(len(order)))])
        prompts, answers = sizes[:, 0], sizes[:, 1] - sizes[:, 0]
        self.lengths: NDArray[np.int32] = np.minimum(prompts + np.roll(answers, 1), seq_len).astype(np.int32)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> PreferenceExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferenceExample]: ...
    def __getitem__(self, index: int | slice) -> PreferenceExample | list[PreferenceExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        own, other = self._document(at), self._document(at - 1)
        begin, answer = _begin(own), _begin(other)
        ids = [*own.input_ids[:begin], *other.input_ids[answer:]]
        labels = [*own.labels[:begin], *other.labels[answer:]]
        mixed = Example(ids, labels).cut(self.seq_len)
        good = self._examples[int(self._order[at])].chosen is not None
        return PreferenceExample(mixed if good else None, None if good else mixed)

    def _document(self, at: int) -> Example:
        return self._examples[int(self._order[at])].documents[0]


def balance_note(config: RunConfig, examples: Mixture[PreferenceExample]) -> str | None:
    """What to say where KTO has far more answers of one sort than its authors advise (their equation 8: the weights
    times the numbers of good and bad answers shall be between 1 : 1 and 4 : 3)."""
    if config.train.objective != "kto":
        return None
    good = bad = 0.0
    for source, weight in zip(examples.sources, examples.weights, strict=True):
        assert isinstance(source, StoredPreferences)
        good += weight * float(np.count_nonzero(source.stored.parts == GOOD))
        bad += weight * float(np.count_nonzero(source.stored.parts == BAD))
    settings = settings_of(config)
    desirable, undesirable = good * settings["desirable_weight"], bad * settings["undesirable_weight"]
    if undesirable <= desirable <= 4 / 3 * undesirable:
        return None
    counts = f"{good:.0f} answers are good and {bad:.0f} are bad"
    if not (good and bad):
        return f"Warning: {counts}; kto learns from both."
    advised = settings["undesirable_weight"] * bad / good
    between = f"between {advised:.3g} and {4 / 3 * advised:.3g}"
    return f"{counts}: for kto preference.desirable_weight is advised to be {between}."


def preferences_of(config: RunConfig) -> Preferences | None:
    """How the examples of a run become micro-batches; None where they are answers to learn."""
    if not learns_preferences(config):
        return None
    whole = config.train.objective == "orpo" and not config.data.assistant_only
    return Preferences(lanes=lanes(config), seq_len=config.data.seq_len, whole=whole)


def _begin(document: Example) -> int:
    """Where the answer begins: its first token in the loss."""
    return next(at for at, label in enumerate(document.labels) if label != IGNORE_INDEX and at > 0)


def _answers(rows: Sequence[Sequence[tuple[Example, bool]]], width: int, *, whole: bool) -> Answers:
    found: list[tuple[bool, tuple[int, int], tuple[int, int], int]] = []
    likely = 0
    for number, row in enumerate(rows):
        start = number * width
        for document, good in row:
            end = start + len(document) - 1  # the last position predicts nothing
            span = start + _begin(document) - 1, end
            found.append((good, span, (start, end), document.loss_tokens))
            if good:
                likely += document.loss_tokens + (_begin(document) - 1 if whole else 0)
            start = end + 1
    found.sort(key=lambda it: not it[0])  # stable: pairs keep their order
    return Answers(
        spans=tuple(it[1] for it in found),
        whole=tuple(it[2] for it in found),
        tokens=tuple(it[3] for it in found),
        good=sum(it[0] for it in found),
        likely=likely,
    )
