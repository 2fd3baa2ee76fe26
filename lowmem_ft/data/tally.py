"""Counts of what became of the records of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lowmem_ft.core.errors import DataError
from lowmem_ft.data.records import Row, at

Overlong = Literal["truncate", "drop", "error"]
Invalid = Literal["error", "skip"]
NOTE_LINES = 10  # line numbers that a note lists before it says "..."
KEPT_REASONS = 3  # of skipped records, that a note tells
COUNTS = (
    "records", "examples", "tokens", "loss_tokens", "truncated", "dropped", "skipped", "unended", "silent", "unshown",
)  # fmt: skip
T = TypeVar("T")


class WrongDataError(DataError):
    """Records that are sound, but not of the kind that a run wants: skipping them would leave none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a file. `truncated`, `dropped` and `masked` count examples; `masked_lines` numbers records.

    `unit` says what an example is: of preferences a pair, or an answer with a verdict, of which a pair gives two.
    `examples`, `tokens` and `loss_tokens` are those that are left to train on. `formats` counts records by their kind.
    `skipped` counts records that could not be used, `reasons` says why the first of them could not. `unended` counts
    examples that were not cut, and whose last token in the loss is no special one: nothing tells a model to stop.
    `silent` counts those with special tokens alone in the loss, as of an empty answer. `unshown` counts messages whose
    reasoning the chat template leaves out.
    """

    path: str
    records: int
    examples: int
    tokens: int
    loss_tokens: int
    truncated: int
    dropped: int
    masked_lines: tuple[int, ...]
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    unended: int = 0
    silent: int = 0
    unshown: int = 0
    formats: Mapping[str, int] = field(default_factory=dict)
    unit: str = "examples"

    @property
    def masked(self) -> int:
        """Examples left out because no token of theirs is in the loss."""
        return len(self.masked_lines)

    @property
    def encoded(self) -> int:
        """All examples that records gave, whatever became of them."""
        return self.examples + self.dropped + self.masked

    def notes(self) -> list[str]:
        """Sentences that a user must read before training; none where nothing was cut or left out."""
        notes = []
        if self.skipped:
            reasons = "".join(f"\n  {reason}" for reason in self.reasons)
            notes.append(
                f"{self.path}: {self.skipped} of {self.records} records skipped, they cannot be used:{reasons}"
            )
        if self.truncated:
            notes.append(f"{self.path}: {self.truncated} of {self.encoded} {self.unit} truncated to data.seq_len")
        if self.dropped:
            longer = "longer than data.seq_len" + (", or of a pair that is" if self.unit == "answers" else "")
            notes.append(f"{self.path}: {self.dropped} of {self.encoded} {self.unit} dropped, {longer}")
        if self.unended:
            notes.append(
                f"{self.path}: {self.unended} of {self.examples} examples end without a special token, so that the "
                "model does not learn when to stop; the chat template should end answers with one"
            )
        if self.silent:
            notes.append(
                f"{self.path}: {self.silent} of {self.examples} examples have no text in the loss, as of an empty "
                "answer: from them the model learns to say nothing"
            )
        if self.unshown:
            notes.append(
                f"{self.path}: the reasoning of {self.unshown} messages is not learnt, the chat template leaves it out"
            )
        if self.masked:
            numbers = list(dict.fromkeys(self.masked_lines))  # a record may give several examples
            lines = ", ".join(map(str, numbers[:NOTE_LINES])) + (", ..." if len(numbers) > NOTE_LINES else "")
            notes.append(
                f"{self.path}: {self.masked} examples left out, no token of theirs is in the loss: line {lines}"
            )
        return notes


@dataclass
class Tally:
    """Counts while a file is read. The arguments are those of `examples.read_examples`."""

    path: str
    seq_len: int
    overlong: Overlong = "truncate"
    invalid: Invalid = "error"
    unit: str = "examples"  # what is counted as one
    counts: Counter[str] = field(default_factory=Counter)  # by the names of COUNTS
    formats: Counter[str] = field(default_factory=Counter)
    masked_lines: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def attempt(self, row: Row, use: Callable[[Mapping[str, Any]], tuple[str, T]]) -> T | None:
        """What `use` makes of a record, beside its kind; None if it cannot be used, and may be skipped.

        Raises:
            DataError: with its place, for a record that cannot be used, if none may be skipped.
        """
        self.counts["records"] += 1
        try:
            if isinstance(row.record, DataError):
                raise row.record
            kind, found = use(row.record)
        except WrongDataError as error:
            raise at(row.place, error) from error
        except DataError as error:
            placed = at(row.place, error)
            if self.invalid == "error":
                fix = placed.fix or "correct it, or set data.invalid: skip"
                raise DataError(placed.what, given=placed.given, allowed=placed.allowed, fix=fix) from error
            self.counts["skipped"] += 1
            if len(self.reasons) < KEPT_REASONS:
                self.reasons.append(f"{placed.what} (given: {placed.given})" if placed.given else placed.what)
            return None
        self.formats[kind] += 1
        return found

    def fits(self, row: Row, *lengths: int) -> bool:
        """Whether examples of so many tokens, which are used together or not at all, are used, whole or cut.

        Raises:
            DataError: one is too long, and that is an error.
        """
        length = max(lengths)
        if length <= self.seq_len or self.overlong == "truncate":
            self.counts["truncated"] += sum(it > self.seq_len for it in lengths)
            return True
        if self.overlong == "error":
            fix = "raise data.seq_len, or set data.overlong to truncate or drop"
            error = DataError("the example is too long.", given=f"{length} tokens", allowed=self.seq_len, fix=fix)
            raise at(row.place, error)
        self.counts["dropped"] += len(lengths)
        return False

    def report(self) -> DataReport:
        """The counts. Raises DataError where nothing is left to train on."""
        report = DataReport(
            path=self.path,
            masked_lines=tuple(self.masked_lines),
            reasons=tuple(self.reasons),
            formats=dict(self.formats),
            unit=self.unit,
            **{name: self.counts[name] for name in COUNTS},
        )
        if not report.examples:
            raise _nothing_left(report, self.seq_len)
        return report


def _nothing_left(report: DataReport, seq_len: int) -> DataError:
    if not report.records:
        return DataError("The data file has no records.", given=report.path, allowed="one JSON object a line")
    if report.skipped == report.records:
        return DataError(f"{report.path}: no record can be used.", given="; ".join(report.reasons))
    if not report.masked:
        return DataError(
            f"{report.path}: every example is longer than data.seq_len, and was dropped.",
            given=f"{report.records} records",
            allowed=f"{seq_len} tokens",
            fix="raise data.seq_len, or set data.overlong: truncate",
        )
    return DataError(
        f"{report.path}: no token of any example is in the loss, so there is nothing to learn.",
        given="; ".join(report.notes()),
        allowed="examples with an answer inside their first data.seq_len tokens",
        fix="raise data.seq_len, or set data.assistant_only: false",
    )
