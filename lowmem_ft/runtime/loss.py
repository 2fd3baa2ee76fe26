"""Output head and cross-entropy in one, chunk by chunk: the logits of all tokens never exist at once.

The idea of computing the gradient with the loss, while a chunk's logits are there, is from Liger Kernel (Hsu et al.
2024, arXiv:2410.10989). The head is taken in tiles of its rows, and the softmax is summed up over them (Milakov and
Gimelshein 2018, arXiv:1805.02867), so that a head can come in tiles from below the device: it does once for the loss
and in reverse for the gradients, and logits of one tile exist at a time. Where it lies on the device a chunk's logits
are kept between the two passes. Both ways give the same bits.

Letters in names: N tokens, D hidden size, V vocabulary, K tokens in the loss, C a chunk of them, R a few rows of a
chunk, T rows of the head in a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowmem_ft.quant.products import mm
from lowmem_ft.runtime.head import Head
from lowmem_ft.runtime.traced import KNOWN, LEARN

# fp32 logits are made for this many elements at a time (8 MiB). On the CPU that stays in the cache: measured on one
# Zen 4 core at V = 32000, 25% faster than a chunk at once. On a card, where a call takes 20 to 30 us and so much passes
# in 5 (H200), in a quarter of a chunk, that is half of what its 16-bit logits take, or so many elements.
_SLAB, _SLAB_ON_CARD = 1 << 21, 1 << 24
# Rows of a chunk are filled up to this multiple, so that steps with other numbers of loss tokens multiply matrices of
# the same few sizes: oneDNN compiles a kernel for each new one and keeps it (1 MB more after each step otherwise).
_ROWS = 128
_T = TypeVar("_T", Tensor, Tensor | None)


def scratch_bytes(head: Head, chunk_tokens: int) -> int:
    """What the loss takes, at most, beside the gradients that it returns: logits, hidden states and their products
    for one chunk, and fp32 slabs."""
    vocabulary, hidden = head.weight.shape
    tiles, size = head.tiles, head.weight.element_size()
    width: int = tiles[0].stop
    slab = 4 * min(max(_slab(head, chunk_tokens), width), chunk_tokens * width)
    summed = 4 * hidden if len(tiles) > 1 else 0
    per_token: int = ((vocabulary if head.keeps else width) + 2 * hidden) * size + summed
    return chunk_tokens * per_token + slab * (1 if head.softcap is None else 2)


def _slab(head: Head, chunk: int) -> int:
    """Elements of fp32 logits at a time."""
    wanted = min(_SLAB_ON_CARD, chunk * head.tiles[0].stop // 4) if head.on_card else 0
    return max(_SLAB, wanted)


@torch.no_grad()
def cross_entropy_and_gradients(
    hidden_ND: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    chunk_tokens: int,
    grad_scale: float = 1.0,
    ignore_index: int = -100,
    kept: int | None = None,
    hidden_grad: bool = True,
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
    weights_N: Tensor | None = None,
    losses_N: Tensor | None = None,
    correct_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross-entropies of all tokens whose label is not `ignore_index`, and its gradients, in one go.

    Args:
        hidden_ND: what the head reads, in any floating dtype; it is computed in the dtype of `head.weight`.
        labels_N: int64, the target of each row, already shifted.
        chunk_tokens: so many rows of logits exist at once. Only rows in the loss are computed.
        grad_scale: factor on all gradients, applied in fp32 before they are rounded.
        kept: how many labels are not `ignore_index`, if the caller knows; else they are counted, which waits for the
            device and cannot work on fake tensors.
        hidden_grad: whether the gradient of `hidden_ND` is wanted.
        weight_grad: fp32 (V, D), to which the gradient of the head's weight is *added*: given the buffer in which a
            step accumulates, a trained head needs no gradient tensor beside it.
        bias_grad: fp32 (V,), likewise.
        weights_N: fp32, what the gradient of each row's cross-entropy is multiplied by, beside `grad_scale`; rows that
            are not in the loss are not read.
        losses_N: fp32, to which the cross-entropy of each row in the loss is written.
        correct_N: bool, to which is written whether the label of each such row is its likeliest token; of equally
            likely ones the first.

    Returns:
        The loss, without `weights_N`, an fp32 scalar, and the gradient (N, D) in the dtype of `hidden_ND` or None.
    """
    assert weight_grad is None or head.table is None, "a head that is trained lies on the device"
    in_loss_N = labels_N != ignore_index
    if kept is None:
        kept = int(in_loss_N.sum())
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    grad_ND = torch.zeros_like(hidden_ND) if hidden_grad else None
    differentiate = hidden_grad or weight_grad is not None or bias_grad is not None
    rows_K = torch.nonzero_static(in_loss_N, size=kept).squeeze(1)
    chunk = min(chunk_tokens, -(-kept // _ROWS) * _ROWS)
    work = _Chunk.empty(chunk, head, ranks=correct_N is not None)
    for start in range(0, kept, max(chunk, 1)):
        rows_C = rows_K[start : start + chunk]
        work.take(hidden_ND.index_select(0, rows_C), labels_N.index_select(0, rows_C))
        loss_C = _once(work, f"loss {differentiate} {correct_N is None}", lambda: work.loss(returns=differentiate))
        loss += loss_C.sum()
        if losses_N is not None:
            losses_N.index_copy_(0, rows_C, loss_C)
        if correct_N is not None:
            correct_N.index_copy_(0, rows_C, work.correct())
        if not differentiate:
            continue
        work.weights_C1 = None if weights_N is None else weights_N.index_select(0, rows_C).unsqueeze(1)
        grad_CD = _once(
            work,
            f"gradient {hidden_grad} {bias_grad is None} {weights_N is None}",
            lambda: work.differentiate(grad_scale, hidden_grad=hidden_grad, bias_grad=bias_grad),
        )
        if grad_ND is not None and grad_CD is not None:
            grad_ND.index_copy_(0, rows_C, grad_CD[: len(rows_C)].to(grad_ND.dtype))
        if weight_grad is not None:
            work.add_weight_grad(weight_grad)
    return loss, grad_ND


@dataclass(slots=True)
class _Chunk:
    """The work on one chunk after another, in the same memory.

    Attributes:
        logits: of all tiles, or of one; (C, T) of each tile lie together.
        hidden_CD: in the dtype of the head.
        slab, slope: fp32 room for a few rows of a tile: logits, and the slope of their soft cap.
        labels_C1, count: of the rows in use.
        largest_C1, sum_C1, target_C1: fp32, of the softmax: the largest logit, the sum of exp(logit - largest), and the
            logit of the label.
        best_C1: int64, the token with the largest logit, if that is wanted.
        weights_C1: fp32, of the rows in use: a factor on their gradients, or None.
    """

    head: Head
    logits: Tensor
    hidden_CD: Tensor
    slab: Tensor
    slope: Tensor | None
    count: int
    labels_C1: Tensor
    largest_C1: Tensor
    sum_C1: Tensor
    target_C1: Tensor
    best_C1: Tensor | None
    weights_C1: Tensor | None = None

    @classmethod
    def empty(cls, chunk: int, head: Head, *, ranks: bool) -> _Chunk:
        vocabulary, hidden = head.weight.shape
        width = head.tiles[0].stop
        rows = min(chunk, max(1, _slab(head, chunk) // width))
        slab = head.weight.new_empty(rows * width, dtype=torch.float32)
        largest, summed, target = (head.weight.new_empty(chunk, 1, dtype=torch.float32) for _ in range(3))
        return cls(
            head,
            head.weight.new_empty(chunk * (vocabulary if head.keeps else width)),
            head.weight.new_empty(chunk, hidden),
            slab,
            None if head.softcap is None else torch.empty_like(slab),
            0,
            largest,  # until there are labels
            largest,
            summed,
            target,
            head.weight.new_zeros(chunk, 1, dtype=torch.int64) if ranks else None,
        )

    def take(self, hidden_CD: Tensor, labels_C: Tensor) -> None:
        """Begin with these rows."""
        self.count = len(labels_C)
        self.hidden_CD[: self.count] = hidden_CD
        self.hidden_CD[self.count :] = 0.0
        self.labels_C1 = labels_C.unsqueeze(1)
        self.largest_C1.fill_(float("-inf"))
        self.sum_C1.zero_()
        self.target_C1.zero_()

    def loss(self, *, returns: bool) -> Tensor:
        """Of each row in use, fp32. The logits of the last tile are there then, or of all."""
        for at in range(len(self.head.tiles)):
            self._multiply(at, self.head.tile(at, returns=returns))
            for rows in self._slabs(at):
                z_RT, _ = self._scaled(at, rows)
                largest_R1, sum_R1 = self.largest_C1[rows], self.sum_C1[rows]
                inside_R1, label_R1 = self._labels(at, rows)
                target_R1 = z_RT.gather(1, label_R1)
                self.target_C1[rows] = torch.where(inside_R1, target_R1, self.target_C1[rows])
                before_R1 = largest_R1.clone()
                torch.maximum(before_R1, self._highest(at, rows, z_RT), out=largest_R1)
                more_R1 = z_RT.sub_(largest_R1).exp_().sum(1, keepdim=True)
                sum_R1.mul_(before_R1.sub_(largest_R1).exp_()).add_(more_R1)
        used = slice(self.count)
        return (self.sum_C1[used].log() + self.largest_C1[used] - self.target_C1[used]).squeeze(1)

    def correct(self) -> Tensor:
        """(C,) whether the label of each row in use is its likeliest token."""
        assert self.best_C1 is not None
        return (self.best_C1[: self.count] == self.labels_C1).squeeze(1)

    def _highest(self, at: int, rows: slice, z_RT: Tensor) -> Tensor:
        """(R, 1) the largest logit of each row in a tile; where it is larger than those before, it is the best."""
        if self.best_C1 is None:
            return z_RT.amax(1, keepdim=True)
        high_R1, place_R1 = z_RT.max(1, keepdim=True)
        better_R1 = high_R1 > self.largest_C1[rows]
        self.best_C1[rows] = torch.where(better_R1, place_R1.add_(self.head.tiles[at].start), self.best_C1[rows])
        return high_R1

    def differentiate(self, grad_scale: float, *, hidden_grad: bool, bias_grad: Tensor | None) -> Tensor | None:
        """The logits become d(loss)/d(logits) * grad_scale, where they are kept.

        Returns:
            the gradient of the hidden states, (C, D), if it is wanted; in fp32 where it is a sum over tiles.
        """
        grad_CD: Tensor | None = None
        last = len(self.head.tiles) - 1
        for at in range(last, -1, -1):  # in reverse: the last tiles are still on the device
            weight_TD = self.head.tile(at, returns=True) if hidden_grad or not self.head.keeps else None
            if not self.head.keeps and at != last and weight_TD is not None:
                self._multiply(at, weight_TD)
            for rows in self._slabs(at):
                self._to_gradient(at, rows, grad_scale * self.head.scale)
            logits_CT = self._logits(at)
            logits_CT[self.count :] = 0.0
            if hidden_grad and weight_TD is not None:
                part_CD = mm(logits_CT, weight_TD)
                grad_CD = part_CD if grad_CD is None else grad_CD.float().add_(part_CD)
            if bias_grad is not None:
                bias_grad[self.head.tiles[at]].add_(logits_CT.sum(0, dtype=torch.float32))
        return grad_CD

    def add_weight_grad(self, weight_grad: Tensor) -> None:
        """Add the gradient of the head's weight, in pieces: the product comes in the compute dtype before it is added
        in fp32."""
        height = max(1, _SLAB // weight_grad.shape[1])
        for at, tile in enumerate(self.head.tiles):
            logits_CT = self._logits(at)
            for begin in range(0, tile.stop - tile.start, height):
                part = slice(begin, begin + height)
                weight_grad[tile][part].add_(mm(logits_CT[:, part].t(), self.hidden_CD))

    def _logits(self, at: int) -> Tensor:
        """(C, T) of a tile."""
        tile, chunk = self.head.tiles[at], len(self.hidden_CD)
        begin = chunk * tile.start if self.head.keeps else 0
        width = tile.stop - tile.start
        return self.logits[begin : begin + chunk * width].view(chunk, width)

    def _multiply(self, at: int, weight_TD: Tensor) -> None:
        bias_T = None if self.head.bias is None else self.head.bias[self.head.tiles[at]]
        mm(self.hidden_CD, weight_TD.t(), bias=bias_T, out=self._logits(at))

    def _slabs(self, at: int) -> list[slice]:
        """A few rows at a time."""
        height = max(1, len(self.slab) // self._logits(at).shape[1])
        return [slice(begin, min(begin + height, self.count)) for begin in range(0, self.count, height)]

    def _labels(self, at: int, rows: slice) -> tuple[Tensor, Tensor]:
        """(whether each label is in a tile, its place there), (R, 1)."""
        tile = self.head.tiles[at]
        label_R1 = self.labels_C1[rows] - tile.start
        width = tile.stop - tile.start
        return (label_R1 >= 0) & (label_R1 < width), label_R1.clamp_(0, width - 1)

    def _scaled(self, at: int, rows: slice) -> tuple[Tensor, Tensor | None]:
        """A few rows of a tile's logits in fp32, scaled and capped, and the cap's slope."""
        logits_RT, head = self._logits(at)[rows], self.head
        z_RT, slope_RT = (
            None if it is None else it[: logits_RT.numel()].view_as(logits_RT) for it in (self.slab, self.slope)
        )
        assert z_RT is not None
        z_RT.copy_(logits_RT)
        if head.scale != 1.0:
            z_RT.mul_(head.scale)
        if head.softcap is not None and slope_RT is not None:
            z_RT.div_(head.softcap).tanh_()
            torch.mul(z_RT, z_RT, out=slope_RT).neg_().add_(1.0)
            z_RT.mul_(head.softcap)
        return z_RT, slope_RT

    def _to_gradient(self, at: int, rows: slice, factor: float) -> None:
        """A few rows of a tile's logits become d(loss)/d(logits) * factor / scale."""
        z_RT, slope_RT = self._scaled(at, rows)
        inside_R1, label_R1 = self._labels(at, rows)
        own: Any = factor if self.weights_C1 is None else self.weights_C1[rows] * factor
        z_RT.sub_(self.largest_C1[rows]).exp_().mul_(own / self.sum_C1[rows])
        z_RT.scatter_add_(1, label_R1, inside_R1.to(torch.float32).mul_(-own))
        if slope_RT is not None:
            z_RT.mul_(slope_RT)
        self._logits(at)[rows].copy_(z_RT)


def _once(work: _Chunk, what: str, do: Callable[[], _T]) -> _T:
    """What `do` returns; without data it is done once for chunks of one size, as it asks for nothing else."""
    head: Head = work.head
    hidden_CD: Tensor = work.hidden_CD
    if not hidden_CD.is_meta or head.table is not None:
        return do()
    sizes = work.count, *hidden_CD.shape, head.weight.shape[0], hidden_CD.dtype
    name = f"{what} {sizes} {head.bias is None} {head.softcap is None} {head.scale == 1.0} {head.keeps}"
    for known in KNOWN(hidden_CD, name):
        return known  # type: ignore[no-any-return]
    result = do()
    if result is not None:
        LEARN(hidden_CD, name, result)
    return result
