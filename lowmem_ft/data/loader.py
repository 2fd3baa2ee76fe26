"""Micro-batches for each optimizer step, in an order that can be resumed exactly."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from lowmem_ft.core.errors import DataError
from lowmem_ft.data.mixture import Mixture, lengths_of
from lowmem_ft.data.packing import Batch, Rows, collate, pack, permutation, round_up
from lowmem_ft.data.pairs import Mismatched, Preferences

Order = Literal["shuffled", "longest_first"]


class MicroBatches(Sequence[Batch]):
    """Rows of examples as micro-batches of about equal row lengths, read and collated when they are asked for.

    Args:
        examples: all that there are.
        rows: which of them share a row.
        lengths: (N,) tokens of each example.
        micro_batch_tokens: positions, padding included, that a micro-batch holds at most; it always has one row.
        pad_id: token id that fills up rows.
        packed: whether rows may hold several documents, of which a plan knows; also those that do not are treated so.
        width: length of every row; None pads each micro-batch to its longest row, a multiple of 8.
        most: that no row is padded beyond, as plans count so many; None: nothing.
        preferences: what the examples are, if they are no `Example`s.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        rows: Rows,
        lengths: NDArray[np.int32],
        *,
        micro_batch_tokens: int,
        pad_id: int,
        packed: bool,
        width: int | None,
        most: int | None = None,
        preferences: Preferences | None = None,
    ) -> None:
        self.examples, self.lengths, self.preferences = examples, lengths, preferences
        self.pad_id, self.packed, self.width, self.most = pad_id, packed, width, most
        self.micro_batch_tokens = micro_batch_tokens
        tokens = rows.tokens(lengths)
        largest_first = np.argsort(-tokens, kind="stable")  # what fits then fits later
        self.rows = rows.reordered(largest_first)
        lanes = 1 if preferences is None else preferences.lanes
        self.widest = lanes * self._padded(int(np.max(tokens)))  # the least that a micro-batch may hold
        self.starts: list[int] = []  # first row of each micro-batch
        self._widths: list[int] = []  # of its rows
        for row, filled in enumerate(tokens[largest_first].tolist()):
            if not self.starts or (row - self.starts[-1] + 1) * lanes * self._widths[-1] > micro_batch_tokens:
                self.starts.append(row)
                self._widths.append(self._padded(filled))

    def _padded(self, tokens: int) -> int:
        """The length of rows of which the longest has so many tokens."""
        rounded = round_up(tokens)
        return self.width or (rounded if self.most is None else max(tokens, min(rounded, self.most)))

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        rows = self.rows[slice(*[*self.starts, len(self.rows)][at : at + 2])]
        documents = [[self.examples[document] for document in row] for row in rows]
        make = collate if self.preferences is None else self.preferences.collate
        return replace(make(documents, pad_id=self.pad_id, length=self._widths[at]), packed=self.packed)

    @property
    def mismatched(self) -> Sequence[Batch]:
        """Of answers with verdicts each prompt with another's answer, in micro-batches of as many positions; which has
        whose does not depend on their size. Of all else nothing."""
        if self.preferences is None or self.preferences.lanes > 1:
            return ()
        mixed = Mismatched(self.examples, self.rows.documents, self.preferences.seq_len)
        lengths = mixed.lengths
        width = None
        if self.width is not None:  # rows of one length, as those of the step: each other one takes kernels of its own
            width = max(self.width, min(round_up(int(np.max(lengths))), mixed.seq_len))
        rows = Rows.single(np.arange(len(mixed))) if width is None else pack(lengths, capacity=width, seed=0)
        return MicroBatches(
            mixed,
            rows,
            lengths,
            micro_batch_tokens=self.micro_batch_tokens,
            pad_id=self.pad_id,
            packed=self.packed,
            width=width,
            most=mixed.seq_len,
            preferences=self.preferences,
        )

    def within(self, micro_batch_tokens: int) -> MicroBatches:
        """The same rows in micro-batches of at most so many positions, if that is less than these have."""
        if micro_batch_tokens >= self.micro_batch_tokens:
            return self
        return MicroBatches(
            self.examples,
            self.rows,
            self.lengths,
            micro_batch_tokens=micro_batch_tokens,
            pad_id=self.pad_id,
            packed=self.packed,
            width=self.width,
            most=self.most,
            preferences=self.preferences,
        )


class BatchLoader(Iterator[MicroBatches]):
    """Endless iterator over optimizer steps: each item is the sequence of micro-batches of one step.

    Every epoch deals all examples anew (of a `Mixture`, as often as its weights say), by `seed` and the epoch's number,
    and its last step may be short. Which examples make up a step does not depend on `micro_batch_tokens`, so a run may
    go on with smaller micro-batches. Memory holds lengths and indices; examples are read with their micro-batch.

    Args:
        seq_len: positions of a packed row, and the length that no example exceeds.
        packing: whether rows hold several examples. Otherwise a row is an example, and a step has so many that it
            holds `tokens_per_step` tokens on average.
        micro_batch_tokens: positions that a micro-batch holds at most; it always has one row.
        tokens_per_step: a step has `tokens_per_step // seq_len` packed rows, at least one.
        pad_id: token id that fills up rows.
        order: of the rows of each epoch. `longest_first` goes from the longest to the shortest, so that the first step
            takes the most memory of all; learning from a sorted order may end elsewhere.
        preferences: what the examples are, if they are no `Example`s. Two rows that hold pairs count as two.

    Attributes:
        steps: handed out since the start.
        steps_per_epoch: of the first epoch; others have as many, unless a `Mixture` draws other examples for them.

    Raises:
        DataError: no examples, or one longer than `seq_len`.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        seq_len: int,
        packing: bool,
        micro_batch_tokens: int,
        tokens_per_step: int,
        seed: int,
        pad_id: int,
        order: Order = "shuffled",
        preferences: Preferences | None = None,
    ) -> None:
        self.examples, self.lengths, self.preferences = examples, row_lengths(examples, preferences), preferences
        self.seq_len, self.packing, self.seed, self.pad_id, self.order = seq_len, packing, seed, pad_id, order
        self.micro_batch_tokens, self.tokens_per_step = micro_batch_tokens, tokens_per_step
        _check(self.lengths, seq_len)
        self.steps = 0
        self._varies = isinstance(examples, Mixture) and examples.varies
        self._draws = examples.epochs(seed) if isinstance(examples, Mixture) else iter(())
        self._drawn = 0  # epochs that were taken from it
        first = self._deal(0)
        lanes = 1 if preferences is None else preferences.lanes
        mean = lanes * (seq_len if packing else int(first.tokens(self.lengths).sum()) / len(first))
        self.rows_per_step = max(1, int(tokens_per_step // mean) if packing else round(tokens_per_step / mean))
        self._dealt = 0, first
        told = np.concatenate([first.documents, first.starts, [self.rows_per_step]])
        self._dealing = hashlib.sha256(told.astype(np.int64).tobytes()).hexdigest()[:16]
        self.steps_per_epoch = self._steps_for(first)
        self._starts = [0, self.steps_per_epoch]  # first step of each epoch, as far as they are known
        self.width = None if not packing else seq_len if self._varies else _packed_width(first, self.lengths, seq_len)

    @property
    def epoch(self) -> int:
        """Epochs whose steps have all been handed out."""
        while self._starts[-1] <= self.steps:
            rows = self._rows(len(self._starts) - 1) if self._varies else None
            self._starts.append(self._starts[-1] + (self._steps_for(rows) if rows else self.steps_per_epoch))
        return bisect_right(self._starts, self.steps) - 1

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatches:
        epoch = self.epoch
        dealt = self._rows(epoch)
        first = (self.steps - self._starts[epoch]) * self.rows_per_step
        rows = dealt.between(first, min(first + self.rows_per_step, len(dealt)))
        self.steps += 1
        return MicroBatches(
            self.examples,
            rows,
            self.lengths,
            micro_batch_tokens=self.micro_batch_tokens,
            pad_id=self.pad_id,
            packed=self.packing,
            width=self.width,
            most=self.seq_len,
            preferences=self.preferences,
        )

    def _rows(self, epoch: int) -> Rows:
        """The rows of an epoch, in its order; those asked for last are remembered."""
        if self._dealt[0] != epoch:
            self._dealt = epoch, self._deal(epoch)
        return self._dealt[1]

    def _deal(self, epoch: int) -> Rows:
        seed = self.seed + epoch
        rows = _deal(self.lengths, self._used(epoch), self.seq_len, seed, self.packing)
        if self.order == "longest_first":
            rows = rows.reordered(np.argsort(-rows.tokens(self.lengths), kind="stable"))
        return rows

    def _used(self, epoch: int) -> NDArray[np.int64] | None:
        """What an epoch draws, which follows from what all before it have drawn; None: every example once."""
        if not isinstance(self.examples, Mixture):
            return None
        if epoch < self._drawn:
            self._drawn, self._draws = 0, self.examples.epochs(self.seed)
        at, self._drawn = epoch - self._drawn, epoch + 1
        return next(islice(self._draws, at, None))

    def _steps_for(self, rows: Rows) -> int:
        return -(-len(rows) // self.rows_per_step)

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator stands, as JSON can hold it: a step counts as done once it has been handed out."""
        return {"steps": self.steps, "data": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the steps of `state`.

        Raises:
            DataError: the state was saved with other data, other settings of what a step holds, or by a version that
                deals them in another order.
        """
        now = self._identity()
        was = state["data"]
        changed = sorted(key for key in {*now, *was} if was.get(key) != now.get(key))
        if changed == ["dealt"]:  # after its steps other examples would come than when it was saved
            raise DataError(
                "The checkpoint is of another version, which deals the examples in another order, so the run cannot go "
                "on.",
                given=f"order {self._dealing} where it has {was['dealt']}",
                fix="go on with the version of lowmem-ft (and torch) that wrote it, or start over in another output "
                "folder",
            )
        if changed:
            changed = [key for key in changed if key != "dealt"]  # which follows from the others
            raise DataError(
                "The checkpoint was saved with other data, so the run cannot go on where it stopped.",
                given=", ".join(f"{key} {now.get(key)}" for key in changed),
                allowed=", ".join(f"{key} {was.get(key)}" for key in changed),
                fix="put the data and settings back, or start over in another output folder",
            )
        self.steps = int(state["steps"])

    def _identity(self) -> dict[str, Any]:
        """What decides which examples make up a step. Lengths stand for the examples: a chat template may write the
        day's date into them, and a run must still go on tomorrow."""
        lengths = hashlib.sha256(self.lengths.astype(np.int64).tobytes()).hexdigest()[:16]
        identity = {
            "examples": len(self.examples),
            "lengths": lengths,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "tokens_per_step": self.tokens_per_step,
            "seed": self.seed,
            "dealt": self._dealing,
            "order": self.order,
        }
        if isinstance(self.examples, Mixture) and any(weight != 1 for weight in self.examples.weights):
            identity["weights"] = list(self.examples.weights)
        return identity | (self.preferences.identity() if self.preferences is not None else {})


def eval_batches(
    examples: Sequence[Any],
    *,
    seq_len: int,
    packing: bool,
    micro_batch_tokens: int,
    pad_id: int,
    preferences: Preferences | None = None,
) -> MicroBatches:
    """Each of `examples` once, always in the same order. Arguments are those of `BatchLoader`.

    Raises:
        DataError: no examples, or one longer than `seq_len`.
    """
    lengths = row_lengths(examples, preferences)
    _check(lengths, seq_len)
    rows = _deal(lengths, None, seq_len, 0, packing)
    return MicroBatches(
        examples,
        rows,
        lengths,
        micro_batch_tokens=micro_batch_tokens,
        pad_id=pad_id,
        packed=packing,
        width=_packed_width(rows, lengths, seq_len) if packing else None,
        most=seq_len,
        preferences=preferences,
    )


def row_lengths(examples: Sequence[Any], preferences: Preferences | None) -> NDArray[np.int32]:
    """(N,) tokens of a row that each example takes."""
    return lengths_of(examples) if preferences is None else preferences.lengths(examples)


def _deal(lengths: NDArray[np.int32], used: NDArray[np.int64] | None, seq_len: int, seed: int, packing: bool) -> Rows:
    """The rows of an epoch, shuffled by `seed`, of the examples that are `used` (None: all, once)."""
    used = np.arange(len(lengths)) if used is None else used
    if not len(used):
        raise DataError("The weights of the sources leave no example.", given=0, allowed="at least one")
    if packing:
        rows = pack(lengths[used], capacity=seq_len, seed=seed)
        rows = Rows(used[rows.documents], rows.starts)
    else:
        rows = Rows.single(used)
    return rows.reordered(permutation(len(rows), seed))


def _packed_width(rows: Rows, lengths: NDArray[np.int32], seq_len: int) -> int:
    """One length for every row, so that every step takes the same memory; short where all data fits into little."""
    return min(seq_len, round_up(int(np.max(rows.tokens(lengths)))))


def _check(lengths: NDArray[np.int32], seq_len: int) -> None:
    if not len(lengths):
        raise DataError("There are no examples to iterate over.", given=0, allowed="at least one")
    if (longest := int(np.max(lengths))) > seq_len:
        raise DataError("An example is longer than a row.", given=f"{longest} tokens", allowed=f"{seq_len} (seq_len)")
