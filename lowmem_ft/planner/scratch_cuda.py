"""What operators take inside on a CUDA card, by the card's architecture: from the sources of PyTorch 2.13.

Of memory-efficient attention the headers of 2.11.0 and 2.12.1 say the same.

Held event by event against what an H200 recorded with PyTorch 2.11 (`planner.calibrate`, benchmarks/plan_accuracy.py).
Not listed, because they take nothing: pointwise operators, copies of what is summed in another dtype (the CPU makes
them), bitsandbytes' kernels (backends/cuda/ops.py of 0.50.2) and products, whose workspace is kept
(`planner.workspaces`); and because it takes little: sorting by `topk`.
Letters in shapes: B rows, H query heads, T positions, E head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_ft.planner.device import Device
from lowmem_ft.planner.trace import RESULT, Scratch, Whole, overloads
from lowmem_ft.runtime import attention_cuda, norms


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What decides which kernels run.

    Attributes:
        capability: compute capability, such as (8, 6).
        processors: streaming multiprocessors.
    """

    capability: tuple[int, int] = (8, 0)
    processors: int = 108

    @property
    def threads(self) -> int:
        """That a processor holds at most: CUDA C++ programming guide, technical specifications."""
        if self.capability == (7, 5):
            return 1024
        return 1536 if self.capability in ((8, 6), (8, 7), (8, 9)) or self.capability[0] >= 12 else 2048

    @property
    def large_blocks(self) -> bool:
        """Whether a block may have more shared memory than the largest backward kernel of attention wants: 163 KiB on
        A100, 227 KiB on Hopper and on Blackwell for servers, where others have 64 to 99 KiB (the same guide)."""
        return self.capability == (8, 0) or self.capability[0] in (9, 10)

    @classmethod
    def of(cls, device: Device) -> Card:
        """The card of a CUDA device; of a CPU one that is never asked."""
        if device.compute_capability is None:
            return cls()
        major, minor = device.compute_capability.split(".")
        return cls(capability=(int(major), int(minor)), processors=device.sm_count)


@dataclass(frozen=True, slots=True)
class _Tile:
    """A backward kernel of memory-efficient attention: queries and keys that a block works on."""

    queries: int
    keys: int


# aten/native/transformers/cuda/mem_eff_attention/kernels/cutlassB.h: the largest head size -> kernels for it. The first
# whose shared memory the card has is taken. Which one that is is known of cards with large blocks (measured on an
# H200); on others the larger scratch counts. The largest tile is for 16-bit floats.
_HALF = _Tile(128, 128)
_EFFICIENT: Mapping[int, tuple[_Tile, ...]] = {
    64: (_Tile(64, 64),),
    128: (_HALF, _Tile(128, 64), _Tile(64, 64)),
    1 << 16: (_Tile(128, 64), _Tile(64, 64)),
}


_SUMS = ("sum.dim_IntList", "sum.default", "mean.dim", "mean.default")


def scratch_on(card: Card) -> Mapping[Any, Scratch]:
    """Operator -> the pieces that it takes on `card`, in bytes, from its arguments."""
    aten, tiled = torch.ops.aten, norms_in_tiles("cuda")
    forward, backward = torch.ops.lowmem_ft.rms_norm.default, torch.ops.lowmem_ft.rms_norm_backward.default
    weight = torch.ops.lowmem_ft.rms_norm_weight_backward.default
    return {
        aten._scaled_dot_product_flash_attention.default: functools.partial(_flash, card),
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._flash_attention_forward.default: _documents,
        aten._flash_attention_backward.default: _documents_backward,
        aten._scaled_dot_product_efficient_attention.default: _efficient,
        aten._scaled_dot_product_efficient_attention_backward.default: functools.partial(_efficient_backward, card),
        aten.embedding_dense_backward.default: _embedding_backward,
        aten.nonzero_static.default: functools.partial(_nonzero, card),
        **dict.fromkeys(overloads("sort.stable", "sort.default"), _sort),
        **tiled,
        weight: functools.partial(_rms_norm_weight, tiled[weight], card),
        forward: functools.partial(_rms_norm, tiled[forward]),
        backward: functools.partial(_rms_norm_backward, tiled[backward]),
        **dict.fromkeys(overloads(*_SUMS), functools.partial(_sum, card)),
        aten.linalg_vector_norm.default: functools.partial(_norm, card),
        aten.cumsum.default: _cumsum,
        aten._softmax_backward_data.default: _softmax_backward,
        torch.ops.lowmem_ft.dequantize_int8.default: _dequantize_int8,
        torch.ops.lowmem_ft.product.default: _product,
    }


def whole_on(card: Card) -> Mapping[Any, Whole]:
    """Our own operators that are traced as their implementation for `card`, with all that it allocates."""

    def on_card(implementation: Callable[..., Any]) -> Whole:
        return functools.partial(implementation, capability=card.capability), lambda *_: 1.0

    return {
        torch.ops.lowmem_ft.attention.default: on_card(attention_cuda.attention_cuda),
        torch.ops.lowmem_ft.attention_backward.default: on_card(attention_cuda.attention_backward_cuda),
    }


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _flash(card: Card, q_BHTE: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, *_: Any, **__: Any) -> list[int]:
    """Where rows and heads are too few for all processors, keys are split, and each part has its own sums in fp32; but
    not with dropout.

    aten/native/transformers/cuda/flash_attn/flash_api.cpp, `set_params_splitkv`.
    """
    rows, heads, length, size = q_BHTE.shape
    splits = _flash_splits(card, rows * heads * -(-length // 64), k.shape[2], size)
    if splits == 1 or dropout > 0.0:
        return []
    sums = 4 * splits * rows * heads * length
    return [sums, sums * _round_up(size, 32 if size <= 128 else 64)]


def _flash_splits(card: Card, tiles: int, keys: int, size: int) -> int:
    """`num_splits_heuristic` there: the fewest splits that keep 85% of the best occupancy of half-processors."""
    places = 2 * card.processors
    blocks = -(-keys // (256 if size <= 64 else 128 if size <= 128 else 64))
    if tiles >= 0.8 * places:
        return 1
    occupancy: dict[int, float] = {}
    for splits in range(1, min(128, places, blocks) + 1):
        if splits == 1 or -(-blocks // splits) != -(-blocks // (splits - 1)):
            waves = tiles * splits / places
            occupancy[splits] = waves / math.ceil(waves)
    best = max(occupancy.values())
    return next(splits for splits, share in occupancy.items() if share >= 0.85 * best)


def _flash_backward(dout: Tensor, q_BHTE: Tensor, k: Tensor, *_: Any, **__: Any) -> list[int]:
    """Sums of fp32 for dq, and dk and dv of each query head where heads share keys: `mha_bwd` in flash_api.cpp."""
    rows, heads, length, size = q_BHTE.shape
    copied = [] if dout.transpose(1, 2).is_contiguous() else [dout.nbytes]
    lines = rows * heads * _round_up(length, 128)
    sums = [4 * lines, 4 * lines * _round_up(size, 32 if size <= 128 else 64)]
    expanded = q_BHTE.element_size() * rows * k.shape[2] * heads * size
    return [*copied, *sums, *([expanded] * 2 if k.shape[1] != heads else [])]


def _documents(q_THE: Tensor, *_: Any, **__: Any) -> list[int]:
    """Nothing; but more documents than a plan knows of are told in four bytes each."""
    return [4 * q_THE.shape[0]]


def _documents_backward(
    dout: Tensor, q_THE: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, begins: Tensor, *_: Any, **__: Any
) -> list[int]:
    """The same for documents that lie one behind the other, with 128 lines more for each: `mha_varlen_bwd`."""
    tokens, heads, size = q_THE.shape
    copied = [] if dout.is_contiguous() else [dout.nbytes]
    lines = heads * (tokens + 128 * (begins.numel() - 1))
    sums = [4 * lines, 4 * lines * _round_up(size, 32 if size <= 128 else 64)]
    return [*copied, *sums, *([q_THE.nbytes] * 2 if k.shape[1] != heads else [])]


def _efficient(q_BHTE: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> list[int]:
    """The output in fp32, where a 16-bit one does not fit the registers (`kNeedsOutputAccumulatorBuffer` in
    mem_eff_attention/kernel_forward.h)."""
    wide = v.shape[3] > 128 and q_BHTE.element_size() < 4
    return [4 * q_BHTE.shape[0] * q_BHTE.shape[1] * q_BHTE.shape[2] * v.shape[3]] if wide else []


def _efficient_backward(card: Card, dout: Tensor, q_BHTE: Tensor, k: Tensor, *_: Any, **__: Any) -> list[int]:
    """What aten/native/transformers/cuda/attention_backward.cu takes, and the kernel's own workspace.

    The sum of dout * out over E is taken by the kernel, or from copies in fp32 where that does not.
    """
    rows, heads, length, size = q_BHTE.shape
    half = q_BHTE.element_size() < 4
    copied = [] if dout.transpose(1, 2).is_contiguous() else [dout.nbytes]
    whole, sums = 4 * q_BHTE.numel(), 4 * rows * heads * length
    largest = next(limit for limit in _EFFICIENT if size <= limit)
    tiles = [tile for tile in _EFFICIENT[largest] if half or tile != _HALF]
    taken = tiles[:1] if card.large_blocks else tiles
    working = max(_gradient_sums(tile, largest, q_BHTE, k.shape[2]) for tile in taken)
    if half and (card.capability[0] > 7 or card.capability == (7, 5)):
        return [*copied, sums, working]
    wholes = [whole, whole, whole] if half else [whole]
    return [*copied, *wholes, sums, sums, -sums, *(-it for it in wholes), working]


def _gradient_sums(tile: _Tile, largest: int, q_BHTE: Tensor, keys: int) -> int:
    """`workspace_size` in mem_eff_attention/kernel_backward.h: fp32 sums of dq for each tile of queries, and of dk and
    dv for each split of the keys where these do not fit the registers."""
    rows, heads, length, size = q_BHTE.shape
    columns = -(-length // tile.queries) * -(-size // tile.keys)
    elements = columns * (4 + tile.queries * tile.keys)  # four for the lock
    if q_BHTE.element_size() == 2 and largest > tile.queries:
        splits = max(1, min(-(-keys // tile.keys), 200 // (rows * heads)))
        elements += 2 * splits * tile.keys * _round_up(size, tile.queries)
    return 4 * rows * heads * _round_up(elements, 4)


def _embedding_backward(dout: Tensor, indices: Tensor, vocabulary: int, *_: Any) -> list[int]:
    """Positions are sorted by token, and rows of one token summed in fp32, ten at a time: aten/native/cuda/Embedding.cu
    and EmbeddingBackwardKernel.cu. Up to 3072 positions another kernel takes nothing."""
    count, size = indices.numel(), dout.shape[-1]
    if count <= 3072:
        return []
    tokens = min(count, vocabulary)
    parts = count // 10 + tokens
    return [*[8 * count] * 5, *[8 * tokens] * 2, 8 * parts, 4 * parts * size]


def _nonzero(card: Card, x: Tensor, *_: Any, **__: Any) -> list[int]:
    """Counts of each block, and their sums: aten/native/cuda/Nonzero.cu."""
    items = 512 * 16
    blocks = -(-x.numel() // items)
    each = -(-blocks // ((2 if x.element_size() == 1 else 1) * card.processors)) or 1
    blocks = -(-x.numel() // (each * items))
    return [4 * blocks, 8 * blocks]


def _sort(x: Tensor, *_: Any, **__: Any) -> list[int]:
    """cub's radix sort passes values and positions to and fro; short lines are sorted where they lie
    (aten/native/cuda/Sort.cpp)."""
    return [] if x.numel() <= 4096 else [x.nbytes + 8 * x.numel(), 8 * x.numel()]


def _sum(card: Card, x: Tensor, dims: Sequence[int] | None = None, *_: Any, **__: Any) -> list[int]:
    """What blocks of threads that share a sum leave for each other, and a counter for each group of them.

    aten/native/cuda/Reduce.cuh: `setReduceConfig`, `global_memory_size` and `semaphore_size`.
    """
    reduced = {dim % x.ndim for dim in dims} if dims else set(range(x.ndim))
    inner, *outer = _merged(x, reduced) or [(1, 1, True)]
    outputs = math.prod(size for dim, size in enumerate(x.shape) if dim not in reduced)
    inputs = x.numel() // max(1, outputs)
    if not inputs or not outputs:
        return []
    vector, width, height = 1, outputs, inputs
    if inner[2]:
        width, height = inputs, outputs
        if inner[1] == 1 and width > 128 and not any(is_summed for *_, is_summed in outer):
            width //= 4
    elif inner[1] == 1:
        lines = [inner[0], *(stride for _, stride, _ in outer)]
        vector = next(count for count in (4, 2, 1) if all(line % count == 0 for line in lines))
        width //= vector
    most = 512 // vector
    width, height = (min(most, 1 << max(0, size.bit_length() - 1)) for size in (width, height))
    block = min(width, 32)
    rows = min(height, most // block)
    block = min(width, most // rows)
    each = -(-inputs // block) if inner[2] else inputs
    if each < 16 * rows and each < 256:
        return []
    each = -(-each // rows)
    groups = -(-outputs // vector // block) if not inner[2] else outputs
    places = card.processors * (card.threads // (block * rows))
    if each < 256 or groups > places:
        return []
    parts = max(min(-(-places // groups), -(-each // 16)), -(-each // 256))
    if parts == 1:
        return []
    sums = max(4, x.element_size()) * outputs * parts * (1 if inner[2] else block * vector)
    return [sums, 4 * groups]


def _merged(x: Tensor, reduced: set[int]) -> list[tuple[int, int, bool]]:
    """(size, stride, whether it is summed) of the dimensions of `x`, the innermost first, neighbours as one."""
    found: list[tuple[int, int, bool]] = []
    for stride, size, dim in sorted((x.stride(dim), x.shape[dim], dim) for dim in range(x.ndim) if x.shape[dim] > 1):
        is_summed = dim in reduced
        if found and found[-1][2] == is_summed and found[-1][0] * found[-1][1] == stride:
            found[-1] = (found[-1][0] * size, found[-1][1], is_summed)
        else:
            found.append((size, stride, is_summed))
    return found


def _norm(card: Card, x: Tensor, order: float = 2, dims: Sequence[int] | None = None, *_: Any, **__: Any) -> list[int]:
    return _sum(card, x, dims)


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> list[int]:
    """The values as the integers that they are summed as, and, of a single line, what cub keeps for each of its tiles
    (aten/native/cuda/ScanUtils.cuh)."""
    wanted = dtype or (x.dtype if x.is_floating_point() else torch.int64)
    converted = [] if wanted == x.dtype else [wanted.itemsize * x.numel()]
    tiles = -(-x.numel() // 1024) + 32
    line = x.numel() == x.shape[dim] if x.ndim else False
    return [*converted, *([sum(_round_up(size * tiles, 256) for size in (4, 8, 8))] if line else [])]


def _softmax_backward(dout: Tensor, *_: Any) -> list[int]:
    """dout * out: aten/native/cuda/SoftMax.cu."""
    return [dout.nbytes]


def _rms_norm(tiled: Scratch, x: Tensor, weight: Tensor, eps: float, offset: bool) -> list[int]:
    """The kernel takes nothing but a copy of what is not contiguous."""
    if not norms.fused(x, weight, offset):
        return tiled(x, weight, eps, offset)
    return [] if x.is_contiguous() else [x.nbytes, RESULT]


def _rms_norm_backward(tiled: Scratch, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: bool) -> list[int]:
    """dy * w, and the same."""
    if not norms.fused(x, weight, offset):
        return tiled(dy, x, weight, rstd, offset)
    return [dy.nbytes, *(it.nbytes for it in (dy, x) if not it.is_contiguous()), RESULT]


def _rms_norm_weight(
    tiled: Scratch, card: Card, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: bool
) -> list[int]:
    """And what blocks of threads leave that sum over tokens."""
    tile = torch.empty((norms.tile_rows(x, "cuda"), x.shape[-1]), device="meta")
    return [*tiled(dy, x, weight, rstd, offset), *_sum(card, tile, [0])]


def _copies(*tensors: Tensor) -> list[int]:
    """Of those of which rows are no views."""
    pairs = [(it, it.flatten(0, -2)) for it in tensors]
    return [it.nbytes for it, view in pairs if view.untyped_storage()._cdata != it.untyped_storage()._cdata]


def norms_in_tiles(kind: str) -> Mapping[Any, Scratch]:
    """Of `runtime.norms` on a device of this kind, where no kernel does all."""

    def tile(x: Tensor) -> tuple[int, int]:
        """Bytes of one in fp32, and of a number for each of its rows."""
        rows = norms.tile_rows(x, kind)
        return 4 * rows * x.shape[-1], 4 * rows

    def forward(x: Tensor, weight: Tensor, eps: float, offset: bool) -> list[int]:
        """The values and their squares, or the quotient and what is rounded of it. In fp32 values are not copied."""
        wide, numbers = tile(x)
        return [*_copies(x), 8 * x.shape[-1], wide, numbers if offset and x.dtype == torch.float32 else wide]

    def backward(dy: Tensor, x: Tensor, *_: Any) -> list[int]:
        """The scaled gradient, the quotient and their product."""
        wide, numbers = tile(x)
        return [*_copies(x, dy), 8 * x.shape[-1], wide, wide, wide, numbers]

    def of_weight(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: bool) -> list[int]:
        """The quotient, and without `offset` what it is rounded to, and that in fp32."""
        wide, _ = tile(x)
        narrow = wide // 4 * x.element_size()
        copied = [] if x.dtype == torch.float32 else [wide, -wide]
        rounded = [] if offset or x.dtype == torch.float32 else [narrow, wide, -narrow, -wide]
        return [*_copies(x, dy), 8 * x.shape[-1], wide, *copied, *rounded]

    ops = torch.ops.lowmem_ft
    return {
        ops.rms_norm.default: forward,
        ops.rms_norm_backward.default: backward,
        ops.rms_norm_weight_backward.default: of_weight,
    }


def copied_factors(*factors: Tensor | None) -> list[int]:
    """What BLAS is given instead of low-rank factors without neighbouring elements, one after the other."""
    return [max((it.nbytes for it in factors if it is not None and 1 not in it.stride()), default=0)]


def _product(
    out: Tensor, a: Tensor, b: Tensor, bias: Any, c: Any, by: Tensor | None, d: Tensor | None, *_: Any
) -> list[int]:
    """aten/native/cuda/Blas.cpp copies what cuBLAS cannot read as it lies."""
    return copied_factors(by, d)


def _dequantize_int8(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> list[int]:
    """Ours (`quant.ops`): the scale of one step; the product casts in its registers."""
    return [scale.nbytes, RESULT]
