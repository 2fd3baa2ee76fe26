"""Rows of several documents: which documents share a row, and the tensors that keep them apart.

Shapes: B rows, T positions of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem_ft.data.examples import IGNORE_INDEX, Example

ROW_MULTIPLE = 8  # matrix units want row lengths of a multiple of 8


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
        packed: whether a row may hold several documents. Like both counts it is known here without looking at tensors,
            which may lie on a device or be fake.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    tokens: int
    loss_tokens: int
    packed: bool = True

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        names = ("input_ids", "labels", "position_ids", "segment_ids")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def pack(lengths: Sequence[int], *, capacity: int, seed: int) -> list[list[int]]:
    """Documents (by index) that share a row, by best fit in order of decreasing length.

    Documents of the same length trade places with `seed`. How many rows there are, and how full each is, depends on
    the lengths only, so that every epoch has as many steps.

    Reference: D. S. Johnson et al., Worst-case performance bounds for simple one-dimensional packing algorithms, 1974.
    """
    assert all(0 < length <= capacity for length in lengths), "documents are cut to the row before they are packed"
    order = sorted(permutation(len(lengths), seed), key=lambda index: -lengths[index])  # stable
    rows: list[list[int]] = []
    free_rows: list[tuple[int, int]] = []  # (free positions, row), sorted
    for index in order:
        fit = bisect_left(free_rows, (lengths[index], -1))
        free, row = free_rows.pop(fit) if fit < len(free_rows) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if free > lengths[index]:
            insort(free_rows, (free - lengths[index], row))
    return rows


def permutation(count: int, seed: int) -> list[int]:
    """0 .. count-1 in an order that depends on `seed` only."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def round_up(length: int) -> int:
    """The next multiple of `ROW_MULTIPLE`."""
    return -(-length // ROW_MULTIPLE) * ROW_MULTIPLE


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
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            end = start + len(example)
            input_ids[b, start:end] = torch.tensor(example.input_ids, dtype=torch.int64)
            labels[b, start : end - 1] = torch.tensor(example.labels[1:], dtype=torch.int64)
            position_ids[b, start:end] = torch.arange(end - start)
            segment_ids[b, start:end] = segment
            start = end
        position_ids[b, start:] = torch.arange(width - start)
    return Batch(
        *(input_ids, labels, position_ids, segment_ids),
        tokens=sum(len(example) for row in rows for example in row),
        loss_tokens=int((labels != IGNORE_INDEX).sum()),
        packed=any(len(row) > 1 for row in rows),
    )
