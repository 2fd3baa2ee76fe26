"""What oneDNN takes inside a product of 16-bit floats, where the CPU multiplies them.

It copies and pads operands into rooms whose size follows from the processor, the threads, shapes and strides by rules
of its own. Nothing tells it beforehand, so the product is made once and PyTorch's allocator events are read: with the
profiler that `torch.autograd.profiler_legacy` has, since each use of the newer one leaves 0.3 MB in the process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig

from lowmem_ft.data.packing import ROW_MULTIPLE
from lowmem_ft.quant.products import ROWS as ROW_TILE
from lowmem_ft.quant.products import few_numbers_of_rows, is_one_of_few, pieces

_autograd: Any = torch.autograd  # whose stubs lack what `profiler_legacy` imports from it

# Multiplications of a product that takes too long to try. Of 13 shapes with more, among them 2048 x 32000 x 2048, each
# took at most 1.72 MB a thread (torch 2.13, AVX512 with bf16, one thread and two)
LARGE = 1 << 32
# Bytes of the operands of one that is not tried either, since a run plans inside its own budget: thin factors (rank 16)
# of a million rows made a process of 1.9 GB
HELD = 1 << 27
MOST = 7 << 18  # bytes a thread
# It works on so many rows at a time, or on some number below that divides them. With that it takes the most: for
# matrices of 96 x 48 to 2048 x 768 never more at 1 to 1024 rows, and less at 320, 384 and 640 (36 numbers tried)
ROWS = 256
# Of a product for one number of rows it keeps the kernel that it compiles: 0.53 to 0.69 MB were measured with matrices
# of 16 x 96 to 2048 x 768 and 64 to 1024 rows, multiplied, added to others or summed over, with one thread and with two
# (torch 2.13, AVX512 with bf16, 2026-11-27); in runs of two BLOOMs, which compiled 275 and 371, 0.58 and 0.60 MB
KERNEL = 19 << 15
# Of its latest kernels it keeps so many (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`). Of as many again that it gives up, part of
# the memory stays: from the 1025th to the 2048th attention took 0.31 MiB each (962 MiB in all, lengths up to 3840) and
# products of 1 to 3000 rows 0.43, later ones next to nothing. With room for 64 both grew up to the 1088th (480 MiB)
CACHED = 1024
GIVEN_UP = 3 << 17  # bytes


class Products:
    """The products of one plan that go to oneDNN, which compiles kernels for each of them."""

    def __init__(self) -> None:
        self._tokens = self._length = 0
        self._rows: dict[_Kind, int] = {}  # the most of each in the last step
        self._attended: dict[Hashable, tuple[int, int]] = {}  # queries and keys, by the size of a head

    def begin(self, tokens: int, length: int) -> None:
        """A step with so many tokens follows, in rows of this length."""
        self._tokens, self._length = tokens, length
        self._rows.clear()
        self._attended.clear()

    def meet(self, a: Tensor, b: Tensor, *, adds: bool = False, as_is: bool = False) -> None:
        """A product of these comes in the step, which `adds` to what is there; `as_is`, where no `quant.products` sees
        to it that numbers of rows are few."""
        several: _Several = None
        if a.ndim > 2:
            several = "of the length" if self._length in (*a.shape[-2:], b.shape[-1]) else "of the rows"
        sums = a.stride(-1) != 1
        factors, rows = ((a.shape[:-1], b.shape[-1]), a.shape[-1]) if sums else (_Like.of(b), a.shape[-2])
        kind = _Kind(factors, adds, sums, as_is, several)
        self._rows[kind] = max(rows, self._rows.get(kind, 0))

    def attend(self, q: Tensor, k: Tensor) -> None:
        """PyTorch's own attention to (B, H, S, E) keys has a backward in the step."""
        self._attended[q.shape[3], q.dtype] = q.shape[2], k.shape[2]

    def kernel_bytes(
        self, *, sizes: Collection[int], most: int | None, lengths: int, routed: bool, samples: int = 0, prompt: int = 0
    ) -> int:
        """What the kernels take of a process that plans and runs steps like the last one, about.

        Args:
            sizes: tokens of the micro-batches that are planned or run.
            most: tokens of any micro-batch, where they differ; None where they do not.
            lengths: that its rows can have.
            routed: there are experts, to which any number of rows comes, up to that of the last step.
            samples: answers of an evaluation.
            prompt: tokens that theirs may have.
        """
        # also what a plan tries for fewer rows, see `ROWS`, and what the check of isolation asks for
        tried = {ROW_TILE, *(ROWS for size in sizes if size > ROWS and size % ROWS)}
        few = set() if most is None else {ROW_TILE, *few_numbers_of_rows(most)}
        asked = {ROW_TILE, *few_numbers_of_rows(prompt)} if samples else set()
        kernels = 0
        for queries, keys in self._attended.values():  # keys of a learnt prefix stay as many
            ways = range(ROW_MULTIPLE, queries + 1, ROW_MULTIPLE) if most is not None else [queries]
            kernels += 3 * len({tile for length in ways for tile in attention_tiles(length, length + keys - queries)})
        for kind, rows in self._rows.items():
            part = rows != self._tokens  # a tile, a chunk of the loss, or of an expert
            if kind.as_is:
                kernels += len(sizes) if most is None else self._as_they_come(kind, most, lengths)
                kernels += samples + 1 if samples else 0  # of each prompt, and of one token after the other
            elif part and (most is not None or routed):
                # those of experts are the more, the larger the micro-batch that is tried
                parts = (pieces(rows * size // self._tokens) for size in sizes) if routed and not kind.sums else ()
                kernels += max(1, len({*few_numbers_of_rows(rows)}.union(*parts)))
            else:  # a part as all tokens, too: policies with and without tiles are held against each other
                own = {*sizes, rows} if part else {*sizes}
                sums = {size for size in own if is_one_of_few(size)}
                kernels += len(few | (sums if kind.sums else tried.union(asked, *map(pieces, own))))
        return KERNEL * min(kernels, CACHED) + GIVEN_UP * min(max(kernels - CACHED, 0), CACHED)

    def _as_they_come(self, kind: _Kind, most: int, lengths: int) -> int:
        """Kernels of a product for each length, or number of rows, that micro-batches of up to `most` tokens have."""
        if kind.several == "of the rows":  # shorter ones are more than full ones
            return 1 + max(1, most // self._length)
        # a full micro-batch has as many rows as their length allows, the last one of a step fewer
        return lengths + (min(lengths, most // (2 * ROW_MULTIPLE)) if kind.several else 0)

    def scratch(self, op: Callable[..., Any], args: Sequence[Any], a: Tensor, b: Tensor) -> list[int]:
        """The most bytes that `op` takes beside what it returns.

        Args:
            args: of `op`, whose first tensor it may write into; shapes, strides and dtypes are looked at alone.
            a, b: (..., N, K) and (..., K, M), the largest that are multiplied.
        """
        threads = torch.get_num_threads()
        likes = tuple(_Like.of(it) if isinstance(it, Tensor) else it for it in args)
        held = sum(it.nbytes for it in args if isinstance(it, Tensor))
        # of profilers there is one at a time
        if a.numel() * b.shape[-1] > LARGE or held > HELD or _autograd._profiler_enabled():
            return [MOST * threads]
        return [_taken(op, likes, threads)]


def attention_blocks(queries: int, keys: int) -> tuple[int, int]:
    """Queries and keys at a time in PyTorch's aten/native/cpu/FlashAttentionKernel.cpp."""
    return min(256 if queries >= 768 else 64 if queries >= 192 else 32, queries), min(512, keys)


def attention_tiles(queries: int, keys: int) -> set[tuple[int, int]]:
    """Queries and keys of each, at the ends fewer. Backward asks oneDNN for three products of each such tile: 402 were
    compiled for 134 of them in 60 steps with 10 keys of a learnt prefix, at lengths up to 1024."""
    high, wide = attention_blocks(queries, keys)
    return {(row, column) for row in (high, queries % high) for column in (wide, keys % wide) if row and column}


# Matrices that are multiplied at once, those of each row and head: whether they are larger where rows are longer
_Several: TypeAlias = Literal["of the length", "of the rows"] | None


class _Kind(NamedTuple):
    """What kernels are compiled for, one for each number of rows."""

    factors: Hashable
    adds: bool
    sums: bool
    as_is: bool
    several: _Several


class _Like(tuple[tuple[int, ...], tuple[int, ...], torch.dtype]):
    """Shape, strides and dtype of a tensor."""

    __slots__ = ()

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls((tuple(tensor.shape), tensor.stride(), tensor.dtype))

    def made(self) -> Tensor:
        shape, strides, dtype = self
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu").zero_()


@cache
def _taken(op: Callable[..., Any], args: tuple[Any, ...], threads: int) -> int:
    made = [it.made() if isinstance(it, _Like) else it for it in args]
    op(*made)  # what is made once for a process must not count
    state = _autograd.ProfilerState.CPU
    _autograd._enable_profiler_legacy(
        _autograd.ProfilerConfig(state, False, True, False, False, False, _ExperimentalConfig())
    )
    try:
        kept = op(*made)
    finally:
        recorded = _autograd._disable_profiler_legacy()
    events = [event for thread in recorded for event in thread if event.kind() == "memory_alloc"]
    levels: list[int] = [0, *accumulate(event.cpu_memory_usage() for event in events)]
    del kept
    return max(levels) - levels[-1]
