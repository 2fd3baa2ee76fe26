"""Which (token, expert) pairs a mixture-of-experts layer works on at a time.

A tile is some rows of one expert; or of several, whose products are then made at once. Those have the same number of
rows each, filled up with repetitions that weigh nothing. Experts with about as many pairs go together, so that few are.

Letters in shapes: T tokens, K experts per token, P = T * K pairs, D hidden size, G experts of a tile, R rows of each, S
experts of all tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_ft.quant.products import ROWS

_UNEVEN = 1.125  # room in a tile of several experts: so many times the rows that they have if all have the same
_UNIT = 16  # rows of each of several are a multiple of it


class Tile(NamedTuple):
    """Rows of one expert, or of several.

    Attributes:
        experts: which; none twice.
        counts: how many pairs each has.
        height: R; of one expert its pairs.
        start: of its pairs among those of all tiles.
        at: of its experts among those of all tiles.
    """

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    height: int
    start: int
    at: int

    @property
    def pairs(self) -> slice:
        return slice(self.start, self.start + sum(self.counts))


class Routing(NamedTuple):
    """Which expert works on which pairs.

    Attributes:
        order_P: the pairs, tile by tile; without those of no expert.
        tiles: all of them.
        told_3S: where tiles may have several experts: the number of each, its pairs, and where these end in its tile.
    """

    order_P: Tensor
    tiles: list[Tile]
    told_3S: Tensor | None


def route(index_TK: Tensor, *, experts: int, hidden: int, together: int) -> Routing:
    """The tiles of a layer of so many `experts`, with at most `together` in each. The device is waited for once.

    Without data the routing is unknown, and one with tiles as large as they get is assumed.
    """
    tokens, pairs = index_TK.shape[0], index_TK.numel()
    expert_P, order_P = index_TK.reshape(-1).sort(stable=True)
    # a token goes to each expert once at most, so that no expert has more rows than there are tokens
    most = min(tokens, tile_rows(pairs, experts, hidden))
    together, counts = min(together, experts, pairs), _counts(expert_P, experts)
    if together <= 1:
        tiles = list(_tiles_of_one(counts or [most] * (pairs // most) + [pairs % most], most))
        return Routing(order_P[: sum(tile.height for tile in tiles)], tiles, None)
    height = _round_up(max(min(tokens, int(_UNEVEN * pairs / experts) + 1), -(-most // together)))
    if counts is None:
        tiles, pieces = _assumed(pairs, together, height), [order_P]
    else:
        parts = sorted(_tiles_of_one(counts, most), key=lambda part: -part.height)
        tiles = list(_tiles_of_several(parts, together, together * height))
        pieces = [order_P[part.pairs] for part in parts]
    told = [(e, n, end) for it in tiles for e, n, end in zip(it.experts, it.counts, accumulate(it.counts), strict=True)]
    # told here, where the device was waited for anyway
    told_3S = torch.tensor(told, dtype=torch.int64).t().contiguous().to(index_TK.device)
    return Routing(torch.cat(pieces) if pieces else order_P[:0], tiles, told_3S)


class Rows:
    """The rows of a tile: (R, ...) of one expert, (G, R, ...) of several, each with its last pair again in the end.

    Attributes:
        experts: as products take them.
        shape: (R,) or (G, R).
    """

    def __init__(self, routing: Routing, tile: Tile) -> None:
        self._tile, self._many = tile, len(tile.experts) > 1
        self.experts = tile.experts if self._many else tile.experts[0]
        self.shape = (len(tile.experts), tile.height) if self._many else (tile.height,)
        if self._many:
            assert routing.told_3S is not None
            self._index_G, counts_G, ends_G = routing.told_3S[:, tile.at : tile.at + len(tile.experts)]
            rows_GR = torch.arange(tile.height, device=counts_G.device) - counts_G.unsqueeze(1)  # from its end
            self._fills_GR = rows_GR >= 0
            self._pair_N = rows_GR.clamp_(max=-1).add_(ends_G.unsqueeze(1)).view(-1)

    def take(self, values_P: Tensor) -> Tensor:
        """(P, ...) -> the rows' values."""
        own = values_P[self._tile.pairs]
        return own.index_select(0, self._pair_N).view(*self.shape, *own.shape[1:]) if self._many else own

    def weights(self, weights_P: Tensor) -> Tensor:
        """What the rows weigh; repetitions nothing."""
        taken = self.take(weights_P)
        return taken.masked_fill_(self._fills_GR, 0.0) if self._many else taken

    def of_tokens(self, values_TD: Tensor, token_P: Tensor) -> Tensor:
        """(T, D) -> the rows' values."""
        return values_TD.index_select(0, self.take(token_P).view(-1)).view(*self.shape, values_TD.shape[1])

    def pairs_of(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rows' values -> those of the tile's pairs."""
        if not self._many:
            return values
        kept_N = (~self._fills_GR).view(-1).nonzero_static(size=sum(self._tile.counts)).squeeze(1)
        return torch.index_select(values.view(-1, *values.shape[2:]), 0, kept_N, out=out)

    def add_to_tokens(self, sum_TD: Tensor, token_P: Tensor, values: Tensor) -> None:
        """Add rows' values to those of their tokens: expert by expert, of which each has a token once, so that the sum
        does not depend on the order of CUDA's threads."""
        token_own = token_P[self._tile.pairs]
        for at, (count, end) in enumerate(zip(self._tile.counts, accumulate(self._tile.counts), strict=True)):
            sum_TD.index_add_(0, token_own[end - count : end], values[at, :count] if self._many else values)

    def add_to_experts(self, sum_E: Tensor, values: Tensor) -> None:
        """Add one value, or (G, ...), to those of the experts, (E, ...)."""
        if self._many:
            sum_E.index_add_(0, self._index_G, values)
        else:
            sum_E[self._tile.experts[0]].add_(values)


def tile_rows(pairs: int, experts: int, hidden: int) -> int:
    """The most rows of one expert that are worked on at once.

    About as many as each expert has when all have the same, and 1/128 of all pairs, so that the few rows more that most
    routings give to some experts need no second tile, and still some expert fills one, or nearly. At least D / 4, with
    which a tile takes about the memory of the slice that is dequantized for it: in training (2 D + 6 I) numbers a row,
    and 2 * D * I of the slice, for I of 0.3 to 3.5 D as published models have.
    """
    rows = max(-(-pairs // experts) + pairs // 128, hidden // 4)
    unit = ROWS if rows > 4 * ROWS else ROWS // 4  # a CPU multiplies many rows in multiples of it
    return unit * -(-rows // unit)


def _counts(expert_P: Tensor, experts: int) -> list[int] | None:
    """Pairs of each expert, from the pairs' experts in order; the one time that the device is waited for. None without
    data."""
    if expert_P.is_meta:
        return None
    starts = torch.searchsorted(expert_P, torch.arange(experts + 1, device=expert_P.device)).tolist()
    return [end - start for start, end in pairwise(starts)]


def _tiles_of_one(counts: Sequence[int], most: int) -> Iterator[Tile]:
    """Expert by expert, with up to `most` rows each."""
    begins = 0
    for expert, count in enumerate(counts):
        for start in range(0, count, most):
            rows = min(most, count - start)
            yield Tile((expert,), (rows,), rows, begins + start, expert)
        begins += count


def _tiles_of_several(parts: Sequence[Tile], together: int, rows: int) -> Iterator[Tile]:
    """Of up to `together` experts with up to so many `rows` in all, from such of one, the highest first."""
    first = start = 0
    for at in range(1, len(parts) + 1):
        group = parts[first:at]
        full = at == len(parts) or len(group) == together or (len(group) + 1) * _round_up(group[0].height) > rows
        if full or parts[at].experts[0] in {it.experts[0] for it in group}:
            height = _round_up(group[0].height) if len(group) > 1 else group[0].height
            yield Tile(tuple(it.experts[0] for it in group), tuple(it.height for it in group), height, start, first)
            first, start = at, start + sum(it.height for it in group)


def _assumed(pairs: int, together: int, height: int) -> list[Tile]:
    """As few tiles of `together` experts as can be, and all pairs shared out evenly among them."""
    counts = _even(pairs, -(-pairs // (together * height)))
    starts = [0, *accumulate(counts)]
    return [
        Tile(tuple(range(together)), tuple(_even(count, together)), height, starts[at], at * together)
        for at, count in enumerate(counts)
    ]


def _even(total: int, parts: int) -> list[int]:
    """The largest first."""
    return [total // parts + (at < total % parts) for at in range(parts)]


def _round_up(rows: int) -> int:
    return _UNIT * -(-rows // _UNIT)
