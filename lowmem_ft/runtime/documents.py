"""Packed documents as attention is told of them, and the pieces that attend apart from each other.

Letters in shapes: B rows, H query heads, T positions, E head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem_ft.data.isolation import visible


def tells_documents(mask: Tensor | None) -> bool:
    """Whether it is no mask, but `data.isolation.documents`."""
    return mask is not None and mask.dtype == torch.int32


def bounds_of(documents: Tensor, tokens: int) -> list[int]:
    """Where the documents of that many tokens begin, and where the last one ends."""
    bounds: list[int] = documents[0, 0, 0].tolist()
    assert bounds[-1] == tokens, "the model has cut what tells where documents begin"
    return bounds


def apart(q: Tensor, mask: Tensor | None, rows: int) -> Iterator[tuple[int, slice, Tensor | None]]:
    """(row, positions, what each of them sees, None for all up to itself) of what attends apart from the rest."""
    length = q.shape[2]
    if mask is None or not tells_documents(mask):
        for row in range(rows):
            yield row, slice(length), mask if mask is None or mask.shape[0] == 1 else mask[row : row + 1]
        return
    window = mask.shape[2]
    for first, last in itertools.pairwise(bounds_of(mask, q.shape[0] * length)):
        (row, start), own = divmod(first, length), last - first
        if row < rows:
            alone = torch.tensor([0, own], dtype=torch.int32).expand(1, 1, window, -1)
            yield row, slice(start, start + own), visible(alone, 1, own, q.device) if window < own else None


def output_like(q_BHTE: Tensor) -> Tensor:
    """Heads behind positions, as the output projection reads them."""
    batch, heads, length, size = q_BHTE.shape
    return q_BHTE.new_empty(batch, length, heads, size)
