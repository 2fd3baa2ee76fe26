"""Rows of several documents: which documents share a row, and the tensors that keep them apart.

Shapes: B rows, T positions of a row.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_ft.core.token_ids import moved
from lowmem_ft.data.examples import IGNORE_INDEX, Example

ROW_MULTIPLE = 8  # matrix units want row lengths of a multiple of 8


@dataclass(frozen=True, slots=True)
class Answers:
    """Where the answers of a micro-batch of preferences lie among its flattened positions.

    Attributes:
        spans: (first position that predicts a token of the answer, behind the last one) of each, the better or good
            answers first. Of pairs the worse ones follow in the same order.
        whole: the same from the beginning of the answer's document on.
        tokens: of each answer, in the loss.
        good: how many are better or good ones.
        likely: positions of these documents in the loss.
    """

    spans: tuple[tuple[int, int], ...]
    whole: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    good: int
    likely: int

    def __len__(self) -> int:
        return len(self.spans)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One micro-batch, ready for the model.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, already shifted: `labels[b, t]` is the token to predict at position t, or -100 for no
            loss. The last position of each document has none, so no document predicts its neighbour.
        position_ids: (B, T) int64, from 0 in each document and in the padding.
        segment_ids: (B, T) int32: 1, 2, ... for the documents of a row, 0 for padding.
        tokens: positions that are not padding.
        loss_tokens: positions whose prediction is in the loss.
        bounds: (N+1,) int32 on the host: where each document begins in the rows, one behind the other, and the end. A
            row's padding counts as a document.
        packed: whether a row may hold several documents. Like both counts it is known here without looking at tensors,
            which may lie on a device or be fake.
        answers: of preferences.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    tokens: int
    loss_tokens: int
    bounds: Tensor
    packed: bool = True
    answers: Answers | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`, but for `bounds`."""
        names = ("labels", "position_ids", "segment_ids")
        others = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, input_ids=moved(self.input_ids, device), **others)


class Rows(Sequence[list[int]]):
    """Which documents (by index) share a row, in 4 bytes a document and 8 a row.

    Args:
        documents: (N,) those of the first row first.
        starts: (R + 1,) where each row begins in `documents`, and the end.
    """

    def __init__(self, documents: NDArray[np.integer[Any]], starts: NDArray[np.int64]) -> None:
        assert len(documents) < 2**31
        self.documents: NDArray[np.int32] = documents.astype(np.int32)
        self.starts = starts

    @classmethod
    def single(cls, documents: NDArray[np.int64]) -> Rows:
        """Each document in a row of its own."""
        return cls(documents, np.arange(len(documents) + 1))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        found: list[int] = self.documents[self.starts[at] : self.starts[at + 1]].tolist()
        return found

    def tokens(self, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """(R,) positions that each row fills, of documents of `lengths`."""
        ends = np.concatenate([[0], np.cumsum(lengths[self.documents], dtype=np.int64)])
        filled: NDArray[np.int64] = ends[self.starts[1:]] - ends[self.starts[:-1]]
        return filled

    def between(self, first: int, last: int) -> Rows:
        """Rows `first` to `last - 1`."""
        starts = self.starts[first : last + 1]
        return Rows(self.documents[starts[0] : starts[-1]], starts - starts[0])

    def reordered(self, order: NDArray[np.int64]) -> Rows:
        """The same rows in another order."""
        counts = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(counts)])
        # position within the new order -> position in the old one
        at = np.arange(starts[-1]) - np.repeat(starts[:-1] - self.starts[order], counts)
        return Rows(self.documents[at], starts)


def pack(lengths: Sequence[int] | NDArray[np.int32], *, capacity: int, seed: int) -> Rows:
    """Documents (by index) that share a row: the longest one left, and of the others those that fill the row best.

    Documents of the same length trade places with `seed`. How many rows there are, and how full each is, depends on
    the lengths only, so that every epoch has as many steps.

    Reference: J. N. D. Gupta and J. C. Ho, A new heuristic algorithm for the one-dimensional bin-packing problem, 1999
    (minimum bin slack), here for all rows at once that can be filled alike.
    """
    of_document = np.asarray(lengths, np.int32)
    assert ((of_document > 0) & (of_document <= capacity)).all(), "documents are cut to the row before they are packed"
    shuffled = permutation(len(of_document), seed)
    order = shuffled[np.argsort(of_document[shuffled], kind="stable")]
    counts = np.bincount(of_document, minlength=1)
    free = np.cumsum(counts) - counts  # of each length the next place in `order`
    documents, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for filling, times in _fillings(counts, capacity):
        parts = []
        for length, each in filling.items():
            parts.append(order[free[length] : free[length] + each * times].reshape(times, each))
            free[length] += each * times
        rows = np.concatenate(parts, axis=1)
        documents.append(rows.reshape(-1))
        sizes.append(np.full(times, rows.shape[1]))
    return Rows(np.concatenate(documents), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))


def _fillings(counts: NDArray[np.int64], capacity: int) -> Iterator[tuple[dict[int, int], int]]:
    """(length -> documents of it in a row, how many rows are filled so), until none of `counts` are left."""
    lengths = np.flatnonzero(counts).tolist()
    left = {length: int(counts[length]) for length in lengths}
    while lengths:
        longest = lengths[-1]
        left[longest] -= 1
        filling = _fullest(lengths, left, capacity - longest)
        left[longest] += 1
        filling[longest] = filling.get(longest, 0) + 1
        times = min(left[length] // each for length, each in filling.items())
        yield filling, times
        for length, each in filling.items():
            left[length] -= each * times
            if not left[length]:
                del lengths[bisect_left(lengths, length)]


def _fullest(lengths: Sequence[int], left: Mapping[int, int], room: int) -> dict[int, int]:
    """Of documents that are `left`, those that fill `room` best; of long ones more, as short ones fit in later.

    Args:
        lengths: ascending.
    """
    reach, full = 1, 1 << room  # a bit for each sum that some of those seen so far have
    seen: list[tuple[int, int, int]] = []  # length, documents, and what was reached without them
    for length in reversed(lengths[: bisect_right(lengths, room)]):
        still, take = min(left[length], room // length), 1
        while still:  # so many that any number is a sum of some of them
            take = min(take, still)
            seen.append((length, take, reach))
            reach |= reach << length * take & (full << 1) - 1
            still, take = still - take, 2 * take
        if reach & full:
            break
    best, found = reach.bit_length() - 1, dict[int, int]()
    for length, take, before in reversed(seen):
        if not before >> best & 1:
            best -= length * take
            found[length] = found.get(length, 0) + take
    return found


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """0 .. count-1 in an order that depends on `seed` only."""
    order: NDArray[np.int64] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return order


def round_up(length: int) -> int:
    """The next multiple of `ROW_MULTIPLE`."""
    return -(-length // ROW_MULTIPLE) * ROW_MULTIPLE


def as_bounds(begins: Sequence[int]) -> Tensor:
    """`Batch.bounds` of documents that begin there, the end behind them.

    It lies in memory for as many documents as there are positions: what a step takes shall not depend on its data.
    """
    bounds = torch.empty(begins[-1] + 1, dtype=torch.int32)[: len(begins)]
    return bounds.copy_(torch.tensor(begins, dtype=torch.int32))


def collate(rows: Sequence[Sequence[Example]], *, pad_id: int, length: int | None = None) -> Batch:
    """Tensors of `rows` (the documents of each), all padded to `length`, or to the longest row where that is None.

    Padding is told by segment 0, never by its id, so a tokenizer whose pad token is its EOS loses no label.
    """
    longest = max(sum(len(example) for example in row) for row in rows)
    width = round_up(longest) if length is None else length
    assert longest <= width
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), width), dtype=torch.int64)
    segment_ids = torch.zeros((len(rows), width), dtype=torch.int32)
    bounds = [0]
    # the same memory, which NumPy fills ten times as fast piece by piece
    ids, wanted, positions, segments = (it.numpy() for it in (input_ids, labels, position_ids, segment_ids))
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            end = start + len(example)
            ids[b, start:end] = example.input_ids
            wanted[b, start : end - 1] = example.labels[1:]
            positions[b, start:end] = np.arange(end - start)
            segments[b, start:end] = segment
            start = end
            bounds.append(b * width + end)
        positions[b, start:] = np.arange(width - start)
        if start < width:
            bounds.append((b + 1) * width)
    return Batch(
        *(input_ids, labels, position_ids, segment_ids),
        tokens=sum(len(example) for row in rows for example in row),
        loss_tokens=int((labels != IGNORE_INDEX).sum()),
        bounds=as_bounds(bounds),
        packed=any(len(row) > 1 for row in rows),
    )
