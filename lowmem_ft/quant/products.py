"""Matrix products that are fast in every dtype on every processor.

Most CPUs multiply no 16-bit floats. PyTorch then falls back to loops without a library behind them: on a Zen 3 core
with AVX2, `dy @ W` in bf16 runs at 0.8 GFLOP/s where fp32 reaches 170. There the operands are converted to fp32 tile
by tile and the result is rounded once, which is what hardware with bf16 units computes too.

Letters in shapes: N rows, K summed over, M columns. All of a product may have a leading G: then G are made at once, but
for those of 16-bit floats on a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

ROWS = 64  # a CPU that multiplies 16-bit floats does it for multiples of so many
TILE = 1024  # rows, columns and length of the sum that are multiplied in fp32 at a time: tiles of 4 MiB


def mm(a_NK: Tensor, b_KM: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a @ b + bias, (N, M) in the dtype of `a`, rounded once; written to `out` if it is given (any strides)."""
    if out is None:
        out = a_NK.new_empty(*a_NK.shape[:-1], b_KM.shape[-1])
    torch.ops.lowmem_ft.product.default(out, a_NK, b_KM, bias, None, None, None, 0.0)
    return out


def mm_low_rank(
    a_NK: Tensor,
    b_KM: Tensor,
    d_RM: Tensor,
    alpha: float,
    *,
    by: Tensor | None = None,
    c_NR: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """a @ b + bias + alpha * (c @ d) and c, where c is given, or is a @ by with `by` (K, R).

    One pass over `a` and `out` serves both products where they are computed in tiles.
    """
    if out is None:
        out = a_NK.new_empty(*a_NK.shape[:-1], b_KM.shape[-1])
    if c_NR is None:
        assert by is not None, "either c or what it is made with"
        c_NR = a_NK.new_empty(*a_NK.shape[:-1], by.shape[-1])
    torch.ops.lowmem_ft.product.default(out, a_NK, b_KM, bias, c_NR, by, d_RM, alpha)
    return out, c_NR


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has a fast matrix product for `dtype`, as oneDNN sees it."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
    return supported is not None and bool(supported())


class _Rooms(threading.local):
    """Memory for one tile of each operand and of the result in fp32, kept by each thread that multiplies; and for a few
    rows in 16 bits.

    It lies outside of PyTorch's allocator. Taken anew for each product its pages would be mapped and cleared each time,
    which costs 5% of a step.
    """

    def __init__(self) -> None:
        self.tiles = torch.from_numpy(np.empty((3, TILE * TILE), dtype=np.float32)).unbind(0)
        self._padded: dict[str, Tensor] = {}

    def padded(self, name: str, rows: Tensor) -> Tensor:
        """A room of `ROWS` rows like these, which are fewer, that begins with them; zeros follow."""
        size = ROWS * rows.shape[1]
        if name not in self._padded or self._padded[name].numel() < size:
            self._padded[name] = torch.from_numpy(np.zeros(size, dtype=np.int16))
        room = self._padded[name][:size].view(rows.dtype).view(ROWS, -1)
        room[: len(rows)] = rows
        room[len(rows) :] = 0
        return room

    def all(self) -> list[Tensor]:
        return [*self.tiles, *self._padded.values()]


_rooms = _Rooms()


def kept_bytes() -> int:
    """What this thread has for its products, outside of PyTorch's allocator."""
    return sum(room.nbytes for room in _rooms.all())


torch.library.define(
    "lowmem_ft::product",
    "(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, Tensor(b!)? c, Tensor? by, Tensor? d, float alpha) -> ()",
)


def _product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    by: Tensor | None,
    d: Tensor | None,
    alpha: float,
) -> None:
    if a.device.type != "cpu" or a.element_size() != 2:
        _multiply(out, a, b, bias, c, by, d, alpha)
    elif a.ndim == 3:
        for g in range(len(a)):
            bias_g, c_g, by_g, d_g = (None if it is None else it[g] for it in (bias, c, by, d))
            _product(out[g], a[g], b[g], bias_g, c_g, by_g, d_g, alpha)
    elif not multiplies(a.dtype) or (sums_rows(a) and not is_one_of_few(a.shape[1])):
        _product_in_float32(out, a, b, bias, c, by, d, alpha)
    elif sums_rows(a):
        _multiply(out, a, b, bias, c, by, d, alpha)
    else:
        _multiply_in_few_shapes(lambda out, a, c: _multiply(out, a, b, bias, c, by, d, alpha), out, a, c)


torch.library.impl("lowmem_ft::product", "default", _product)


def few_numbers_of_rows(most: int) -> list[int]:
    """Those for which oneDNN multiplies 16-bit floats, up to `most`: powers of two, and three times as many."""
    doubled = (times * ROWS << power for power in range(most.bit_length()) for times in (1, 3))
    return sorted(rows for rows in doubled if rows <= most)


def is_one_of_few(rows: int) -> bool:
    """Whether so many rows are multiplied at once."""
    return rows in few_numbers_of_rows(rows)


def pieces(rows: int) -> list[int]:
    """How many rows each of the products multiplies that make up one of `rows`; the last one is filled up."""
    if is_one_of_few(rows):
        return [rows]
    whole, rest = divmod(rows, ROWS)
    powers = (ROWS << power for power in reversed(range(whole.bit_length())) if whole >> power & 1)
    return [*powers, *([ROWS] if rest else [])]


def sums_rows(a: Tensor) -> bool:
    """Whether the product is a gradient, which sums over rows: then its first operand is turned."""
    return a.stride(0) == 1 and a.stride(1) != 1


def as_rows(x: Tensor, *, stacked: bool = False) -> Tensor:
    """(..., D) -> (N, D), laid out row by row; with `stacked` matrices, of which each has rows of its own, as it is.

    Next to a convolution a single sequence is laid out column by column (several are copied here anyway), which looks
    like the turned operand of a gradient: oneDNN compiled several products for each length, and kept them.
    """
    if stacked:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows.contiguous() if sums_rows(rows) else rows


def _multiply(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    by: Tensor | None,
    d: Tensor | None,
    alpha: float,
) -> None:
    stacked = a.ndim == 3
    multiply, add = (torch.bmm, torch.baddbmm) if stacked else (torch.mm, torch.addmm)
    if bias is not None:
        add(bias.unsqueeze(1) if stacked else bias, a, b, out=out)
    else:
        multiply(a, b, out=out)
    if c is not None and d is not None:
        if by is not None:
            multiply(a, by, out=c)
        add(out, c, d, alpha=alpha, out=out)


def _multiply_in_few_shapes(
    multiply: Callable[[Tensor, Tensor, Tensor | None], None], out: Tensor, a: Tensor, c: Tensor | None
) -> None:
    """The same in pieces of 64, 128, 256 ... rows, the last one filled up.

    oneDNN compiles a product for each shape, which takes longer than to multiply a few rows, and keeps it: a tiny
    mixture of experts, each of which has another number of rows in each step, took 660 MB more after 50 steps.

    Args:
        multiply: from some rows of `a`, and of `c`, to the same rows of `out`.
    """
    start, rows = 0, a.shape[0]
    for height in pieces(rows):
        part = slice(start, start + height)
        start += height
        if start <= rows:
            multiply(out[part], a[part], None if c is None else c[part])
            continue
        out_room, a_room = _rooms.padded("out", out[part]), _rooms.padded("a", a[part])
        c_room = None if c is None else _rooms.padded("c", c[part])
        multiply(out_room, a_room, c_room)
        out[part] = out_room[: len(out[part])]
        if c is not None and c_room is not None:
            c[part] = c_room[: len(c[part])]


@torch.library.register_fake("lowmem_ft::product")  # type: ignore[untyped-decorator]
def _(out: Tensor, a: Tensor, b: Tensor, *_: object) -> None:
    assert a.ndim == b.ndim in (2, 3)
    assert a.dtype == b.dtype == out.dtype, (a.dtype, b.dtype, out.dtype)
    assert (*a.shape, b.shape[-1]) == (*out.shape[:-1], b.shape[-2], out.shape[-1])
    assert a.shape[:-2] == b.shape[:-2]


def _product_in_float32(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    by: Tensor | None,
    d: Tensor | None,
    alpha: float,
) -> None:
    a_room, b_room, out_room = _rooms.tiles
    by_float, d_float = (None if t is None else t.float() for t in (by, d))
    for top in range(0, a.shape[0], TILE):
        rows = slice(top, top + TILE)
        c_tile = None
        if c is not None:
            c_tile = c[rows].float() if by is None else a.new_zeros(c[rows].shape, dtype=torch.float32)
        for left in range(0, b.shape[1], TILE):
            columns = slice(left, left + TILE)
            tile = _shaped(out_room, out[rows, columns])
            if bias is not None:
                tile.copy_(bias[columns])
            for start in range(0, a.shape[1], TILE):
                summed = slice(start, start + TILE)
                a_tile, b_tile = _filled(a_room, a[rows, summed]), _filled(b_room, b[summed, columns])
                tile.addmm_(a_tile, b_tile, beta=0.0 if bias is None and start == 0 else 1.0)
                if c_tile is not None and by_float is not None and left == 0:
                    c_tile.addmm_(a_tile, by_float[summed])
            if c_tile is not None and d_float is not None:
                tile.addmm_(c_tile, d_float[:, columns], alpha=alpha)
            out[rows, columns] = tile
        if c is not None and c_tile is not None and by is not None:
            c[rows] = c_tile


def _filled(room: Tensor, part: Tensor) -> Tensor:
    return _shaped(room, part).copy_(part)


def _shaped(room: Tensor, like: Tensor) -> Tensor:
    """A piece of `room` in the shape of a matrix, laid out along its rows or columns as that is: copies are fast so."""
    rows, columns = like.shape
    if like.stride(0) == 1 and like.stride(1) != 1:
        return room[: rows * columns].view(columns, rows).t()
    return room[: rows * columns].view(rows, columns)
