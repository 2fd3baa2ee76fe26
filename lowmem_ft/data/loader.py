"""Micro-batches for each optimizer step, in an order that can be resumed exactly."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, overload

from lowmem_ft.core.errors import DataError
from lowmem_ft.data.examples import Example
from lowmem_ft.data.packing import Batch, collate, pack, permutation, round_up

Rows = Sequence[Sequence[Example]]


class MicroBatches(Sequence[Batch]):
    """`rows` (the documents of each) as micro-batches of about equal row lengths, collated when they are asked for.

    Args:
        micro_batch_tokens: positions, padding included, that a micro-batch holds at most; it always has one row.
        pad_id: token id that fills up rows.
        width: length of every row; None pads each micro-batch to its longest row, a multiple of 8.
    """

    def __init__(self, rows: Rows, *, micro_batch_tokens: int, pad_id: int, width: int | None) -> None:
        self.pad_id, self.width, self.micro_batch_tokens = pad_id, width, micro_batch_tokens
        self.groups: list[list[Sequence[Example]]] = []
        widest = 0
        for row in sorted(rows, key=_row_tokens, reverse=True):  # the largest first: what fits then fits later
            if not self.groups or (len(self.groups[-1]) + 1) * widest > micro_batch_tokens:
                self.groups.append([])
                widest = width or round_up(_row_tokens(row))
            self.groups[-1].append(row)

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return collate(self.groups[index], pad_id=self.pad_id, length=self.width)

    @property
    def widest(self) -> int:
        """Positions of the longest row: the least that a micro-batch may hold."""
        return self.width or round_up(max(_row_tokens(row) for group in self.groups for row in group))

    def within(self, micro_batch_tokens: int) -> MicroBatches:
        """The same rows in micro-batches of at most so many positions, if that is less than these have."""
        if micro_batch_tokens >= self.micro_batch_tokens:
            return self
        rows = [row for group in self.groups for row in group]
        return MicroBatches(rows, micro_batch_tokens=micro_batch_tokens, pad_id=self.pad_id, width=self.width)


class BatchLoader(Iterator[MicroBatches]):
    """Endless iterator over optimizer steps: each item is the sequence of micro-batches of one step.

    Every epoch deals all examples anew, by `seed` and the epoch's number, and its last step may be short. Which
    examples make up a step does not depend on `micro_batch_tokens`, so a run may go on with smaller micro-batches.

    Args:
        seq_len: positions of a packed row, and the length that no example exceeds.
        packing: whether rows hold several examples. Otherwise a row is an example, and a step has so many that it
            holds `tokens_per_step` tokens on average.
        micro_batch_tokens: positions that a micro-batch holds at most; it always has one row.
        tokens_per_step: a step has `tokens_per_step // seq_len` packed rows, at least one.
        pad_id: token id that fills up rows.

    Raises:
        DataError: no examples, or one longer than `seq_len`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        seq_len: int,
        packing: bool,
        micro_batch_tokens: int,
        tokens_per_step: int,
        seed: int,
        pad_id: int,
    ) -> None:
        _check(examples, seq_len)
        self.examples, self.seq_len, self.packing, self.seed, self.pad_id = examples, seq_len, packing, seed, pad_id
        self.micro_batch_tokens, self.tokens_per_step = micro_batch_tokens, tokens_per_step
        self.steps = 0  # handed out since the start
        tokens = sum(map(len, examples))
        mean = seq_len if packing else tokens / len(examples)
        self.rows_per_step = max(1, tokens_per_step // seq_len if packing else round(tokens_per_step / mean))
        self._rows_of_epoch = self._deal(0), 0
        self.steps_per_epoch = -(-len(self._rows_of_epoch[0]) // self.rows_per_step)
        self.width = _packed_width(self._rows_of_epoch[0], seq_len) if packing else None

    @property
    def epoch(self) -> int:
        """Epochs whose steps have all been handed out."""
        return self.steps // self.steps_per_epoch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatches:
        if self._rows_of_epoch[1] != self.epoch:
            self._rows_of_epoch = self._deal(self.epoch), self.epoch
        first = self.steps % self.steps_per_epoch * self.rows_per_step
        rows = self._rows_of_epoch[0][first : first + self.rows_per_step]
        self.steps += 1
        return MicroBatches(rows, micro_batch_tokens=self.micro_batch_tokens, pad_id=self.pad_id, width=self.width)

    def _deal(self, epoch: int) -> Rows:
        """The rows of an epoch, in its order."""
        seed = self.seed + epoch
        return _packed_rows(self.examples, self.seq_len, seed) if self.packing else _single_rows(self.examples, seed)

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator stands, as JSON can hold it: a step counts as done once it has been handed out."""
        return {"steps": self.steps, "data": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the steps of `state`.

        Raises:
            DataError: the state was saved with other data, or other settings of what a step holds.
        """
        now = self._identity()
        if state["data"] != now:
            changed = sorted(key for key in now if state["data"].get(key) != now[key])
            raise DataError(
                "The checkpoint was saved with other data, so the run cannot go on where it stopped.",
                given=", ".join(f"{key} {now[key]}" for key in changed),
                allowed=", ".join(f"{key} {state['data'].get(key)}" for key in changed),
                fix="put the data and settings back, or start over in another output folder",
            )
        self.steps = state["steps"]

    def _identity(self) -> dict[str, Any]:
        """What decides which examples make up a step. Lengths stand for the examples: a chat template may write the
        day's date into them, and a run must still go on tomorrow."""
        lengths = hashlib.sha256(array("q", map(len, self.examples)).tobytes()).hexdigest()[:16]
        return {
            "examples": len(self.examples),
            "lengths": lengths,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "tokens_per_step": self.tokens_per_step,
            "seed": self.seed,
        }


def eval_batches(
    examples: Sequence[Example], *, seq_len: int, packing: bool, micro_batch_tokens: int, pad_id: int
) -> MicroBatches:
    """Each of `examples` once, always in the same order. Arguments are those of `BatchLoader`.

    Raises:
        DataError: no examples, or one longer than `seq_len`.
    """
    _check(examples, seq_len)
    rows = _packed_rows(examples, seq_len, seed=0) if packing else _single_rows(examples, seed=0)
    width = _packed_width(rows, seq_len) if packing else None
    return MicroBatches(rows, micro_batch_tokens=micro_batch_tokens, pad_id=pad_id, width=width)


def _packed_rows(examples: Sequence[Example], seq_len: int, seed: int) -> Rows:
    rows = pack([len(example) for example in examples], capacity=seq_len, seed=seed)
    return [[examples[index] for index in rows[row]] for row in permutation(len(rows), seed)]


def _single_rows(examples: Sequence[Example], seed: int) -> Rows:
    return [[examples[index]] for index in permutation(len(examples), seed)]


def _packed_width(rows: Rows, seq_len: int) -> int:
    """One length for every row, so that every step takes the same memory; short where all data fits into little."""
    return min(seq_len, round_up(max(map(_row_tokens, rows))))


def _row_tokens(row: Sequence[Example]) -> int:
    return sum(map(len, row))


def _check(examples: Sequence[Example], seq_len: int) -> None:
    if not examples:
        raise DataError("There are no examples to iterate over.", given=0, allowed="at least one")
    if (longest := max(map(len, examples))) > seq_len:
        raise DataError("An example is longer than a row.", given=f"{longest} tokens", allowed=f"{seq_len} (seq_len)")
