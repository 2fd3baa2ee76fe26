"""Attention whose scores are capped (Gemma 2: softcap * tanh(scores / softcap)), which no kernel of PyTorch knows.

Tiles of queries meet all keys that they see, so that scores of one tile exist at a time; backward computes them again
from their log-sum-exp. On a card products are in 16 bits, and what lies between them in fp32. On a CPU all is in fp32:
oneDNN would compile products of 16-bit floats for every number of keys.

Letters in shapes: B rows, H query heads, G key-value heads, T positions, E head size; of a tile Q queries, K keys, and
N queries of all heads that share a key-value head, head after head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_ft.quant.products import mm
from lowmem_ft.runtime.attention_cpu import traced_rows
from lowmem_ft.runtime.documents import bounds_of, output_like, tells_documents
from lowmem_ft.runtime.traced import standing_for

_TILE_BYTES, _TILE_BYTES_ON_CARDS = 4 << 20, 64 << 20  # of a tile's scores in fp32
_FEWEST = 16  # queries of a tile
_LEAST = torch.finfo(torch.float32).min  # a query that sees nothing, which is padding, sees all alike with it


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    *,
    on_card: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, T, H, E), and of each query the log-sum-exp of its scores, (B, H, T) in fp32.

    Args:
        on_card: whether it is done as on a card; by default where the tensors are.
    """
    on_card = q.is_cuda if on_card is None else on_card
    dtype = q.dtype if on_card else torch.float32
    out, lse = output_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    heads, groups = q.shape[1], k.shape[1]

    def attend(row: int, queries: slice, keys: slice, hidden: Tensor) -> None:
        k_GKE, v_GKE = (it[row, :, keys].to(dtype) for it in (k, v))
        q_GNE = (q[row, :, queries].to(dtype) * (scale / softcap)).reshape(groups, -1, q.shape[3])
        scores_GNK = mm(q_GNE, k_GKE.transpose(1, 2)).float().tanh_().mul_(softcap)
        scores_GNK.view(heads, -1, scores_GNK.shape[2]).masked_fill_(hidden, _LEAST)
        most_GN1 = scores_GNK.amax(2, keepdim=True)
        sums_GN1 = scores_GNK.sub_(most_GN1).exp_().sum(2, keepdim=True)
        # divided before: in fp16 sums over thousands of keys would overflow
        out_GNE = mm(scores_GNK.div_(sums_GN1).to(dtype), v_GKE)
        out[row, queries] = out_GNE.view(heads, -1, q.shape[3]).transpose(0, 1)
        lse[row, :, queries] = sums_GN1.log_().add_(most_GN1).view(heads, -1)

    for row in range(traced_rows(q)):
        for tile in _tiles(q, mask, row, on_card=on_card):
            attend(row, *tile)  # a call, so that nothing of a tile is held while the next one is made
            del tile
    return out, lse


def capped_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    *,
    on_card: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    on_card = q.is_cuda if on_card is None else on_card
    dtype = q.dtype if on_card else torch.float32
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    heads, groups = q.shape[1], k.shape[1]

    def differentiate(row: int, queries: slice, keys: slice, hidden: Tensor, dk_GTE: Tensor, dv_GTE: Tensor) -> None:
        k_GKE, v_GKE = (it[row, :, keys].to(dtype) for it in (k, v))
        q_GNE = (q[row, :, queries].to(dtype) * (scale / softcap)).reshape(groups, -1, q.shape[3])
        dout_GNE = dout[row, queries].transpose(0, 1).to(dtype).reshape(groups, -1, q.shape[3])
        capped_GNK = mm(q_GNE, k_GKE.transpose(1, 2)).float().tanh_()
        shares_GNK = capped_GNK.mul(softcap).sub_(lse[row, :, queries].reshape(groups, -1, 1)).exp_()
        shares_GNK.view(heads, -1, shares_GNK.shape[2]).masked_fill_(hidden, 0.0)
        dv_GTE[:, keys] += mm(shares_GNK.to(dtype).transpose(1, 2), dout_GNE)
        expected_HQ = (dout[row, queries].float() * out[row, queries]).sum(2).t()  # of a query's dshares
        dshares_GNK = mm(dout_GNE, v_GKE.transpose(1, 2)).float()
        shares_GNK.mul_(dshares_GNK.sub_(expected_HQ.reshape(groups, -1, 1)))
        del dshares_GNK
        # but for `softcap`, with which 16 bits might overflow
        dscores_GNK = shares_GNK.mul_(capped_GNK.square_().neg_().add_(1.0)).to(dtype)
        dk_GTE[:, keys] += mm(dscores_GNK.transpose(1, 2), q_GNE)
        dq[row, :, queries] = mm(dscores_GNK, k_GKE).mul_(scale).view(heads, -1, q.shape[3])

    for row in range(traced_rows(q)):
        sums = [torch.zeros_like(it[row], dtype=torch.float32) for it in (k, v)]
        for tile in _tiles(q, mask, row, on_card=on_card):
            differentiate(row, *tile, *sums)
            del tile
        dk[row], dv[row] = sums[0].mul_(softcap), sums[1]
        del sums
    return dq, dk, dv


class _Tile(NamedTuple):
    """Queries and keys that meet at once, and how far a query looks back; None: a mask says what it sees."""

    queries: slice
    keys: slice
    window: int | None

    @property
    def pairs(self) -> int:
        return int((self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start))

    def hidden(self, mask: Tensor | None, row: int, device: torch.device) -> Tensor:
        """Which keys a query does not see: (1 or H, Q, K)."""
        if self.window is None:
            assert mask is not None
            return ~mask[min(row, mask.shape[0] - 1), :, self.queries]
        query_Q1 = torch.arange(self.queries.start, self.queries.stop, device=device).unsqueeze(1)
        key_K = torch.arange(self.keys.start, self.keys.stop, device=device)
        hidden = key_K > query_Q1
        if self.keys.stop - self.keys.start > self.window:
            hidden |= key_K <= query_Q1 - self.window
        return hidden.unsqueeze(0)


def _tiles(q: Tensor, mask: Tensor | None, row: int, *, on_card: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, keys, and which of these they do not see, of each tile of a row; without data two stand for all: the
    largest, and one with which it has as many pairs in the mean."""
    tiles = _cut(q, mask, row, on_card=on_card)
    if not q.is_meta or len(tiles) < 3:
        for tile in tiles:
            yield tile.queries, tile.keys, tile.hidden(mask, row, q.device)
        return
    largest = max(tiles, key=lambda it: it.pairs)
    other = 2 * sum(it.pairs for it in tiles) / len(tiles) - largest.pairs
    second = min(tiles, key=lambda it: abs(it.pairs - other))
    for tile, each in ((largest, len(tiles) // 2), (second, len(tiles) - len(tiles) // 2)):
        with standing_for(q, each):
            yield tile.queries, tile.keys, tile.hidden(mask, row, q.device)


def _cut(q: Tensor, mask: Tensor | None, row: int, *, on_card: bool) -> list[_Tile]:
    """The tiles of a row, those of a document from its end, where they are largest: all others find room there."""
    rows, heads, length, _ = q.shape
    most = (_TILE_BYTES_ON_CARDS if on_card else _TILE_BYTES) // (4 * heads)  # pairs of a query and a key

    def slices(first: int, last: int, window: int) -> Iterator[slice]:
        height = max(_FEWEST, most // (last - first))
        if window < last - first:  # with so many queries and as many keys beside those of the window
            height = max(height, (math.isqrt(window**2 + 4 * most) - window) // 2)
        for start in reversed(range(first, last, height)):
            yield slice(start, min(start + height, last))

    if mask is not None and not tells_documents(mask):
        return [_Tile(queries, slice(0, length), None) for queries in slices(0, length, length)]
    window = length if mask is None else mask.shape[2]
    bounds = [0, length] if mask is None else [it - row * length for it in bounds_of(mask, rows * length)]
    return [
        _Tile(queries, slice(max(first, queries.start - window + 1), queries.stop), window)
        for first, last in itertools.pairwise(bounds)
        if 0 <= first < length
        for queries in slices(first, last, window)
    ]
