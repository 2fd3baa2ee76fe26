"""Quantize and dequantize one matrix: thin calls to bitsandbytes, in chunks, plus a plain PyTorch reference.

The formats are those of bitsandbytes, bit for bit: NF4 (QLoRA, arXiv:2305.14314) and FP4 in blocks of 64 values with
optional double quantization of the scales, and row-wise absmax int8 (LLM.int8(), arXiv:2208.07339) used weight-only.
Letters in shapes: O outputs, I inputs, N values of the matrix, B = ceil(N / 64) blocks, K = ceil(B / 256).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Literal, Protocol, TypeAlias, get_args

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_ft.core.errors import CheckpointError, ConfigError, UnsupportedError

Kind: TypeAlias = Literal["nf4", "fp4", "int8", "none"]
Bits: TypeAlias = Literal[4, 8, 16]
FourBitType: TypeAlias = Literal["nf4", "fp4"]
Layout: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 64  # values that share one scale; what transformers + bitsandbytes use
NESTED_BLOCK = 256  # scales that share one second-level scale
CHUNK = 1 << 18  # values quantized at a time: bitsandbytes takes 17 bytes of scratch per value, so about 4 MiB
# Bytes that bitsandbytes' CPU code takes for each value of a chunk beside its fp32 copy: scaled values 4, positions 4,
# codes 1, their halves 1; FP4 looks its positions up in int64, by int64
_WORK = {"nf4": 10, "fp4": 24}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """How the frozen base weights are stored.

    Args:
        bits: 4, 8, or 16 for not quantized.
        type: the 4-bit data type; without effect at other widths.
        double_quant: store the 4-bit scales as 8-bit codes too (0.37 bits less per value); 4 bits only.

    Raises:
        ConfigError: an unknown width or type.
    """

    bits: Bits = 4
    type: FourBitType = "nf4"
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise ConfigError("unknown quantization width", given=self.bits, allowed="4, 8 or 16 bits")
        if self.type not in get_args(FourBitType):
            raise ConfigError("unknown 4-bit type", given=self.type, allowed="nf4 or fp4")

    @property
    def kind(self) -> Kind:
        """The name of the storage format, as `dequantize` takes it."""
        kinds: dict[Bits, Kind] = {4: self.type, 8: "int8", 16: "none"}
        return kinds[self.bits]


def layout_bytes(tensors: Layout) -> int:
    """Bytes of tensors of these shapes and dtypes."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


def layout(shape: Sequence[int], spec: QuantSpec) -> Layout:
    """Name -> (shape, dtype) of each storage tensor that `quantize` returns for a matrix of `shape`."""
    return _SCHEMES[spec.kind].layout(tuple(shape), spec)


def quantize(weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """Quantize a matrix; the codes and scales are those that bitsandbytes computes for the whole tensor.

    Args:
        weight: (O, I), float32, bfloat16 or float16, on any device; contiguous or not.
        spec: 4 or 8 bits.

    Returns:
        On the device of `weight`, 4-bit: `qweight` uint8 (ceil(N / 2), 1), two codes per byte, the first in the high
        half; `absmax` float32 (B,). Double-quantized: `absmax` uint8 (B,), `nested_absmax` float32 (K,),
        `nested_offset` float32 (), `nested_code` float32 (256,). int8: `qweight` int8 (O, I), `scale` float32 (O,).
        Scratch beyond that is about 4 MiB, whatever the size of the matrix.

    Raises:
        CheckpointError: 8 bits, and a weight is outside the range of float16 (which bitsandbytes quantizes from).
    """
    return _SCHEMES[spec.kind].quantize(weight.detach(), spec)


def quantize_scratch(shape: Sequence[int], spec: QuantSpec, dtype: torch.dtype, *, transposed: bool = False) -> int:
    """Bytes that `quantize` takes on the CPU beside what it returns, for a matrix of `shape`; elsewhere it takes less.

    Args:
        transposed: the matrix is given as a transposed view.
    """
    values = prod(shape)
    if spec.kind == "int8":  # a float16 copy, two products in fp32; of each row its scale, twice
        rows = min(shape[0], max(1, CHUNK // shape[1]))
        return 10 * rows * shape[1] + 8 * rows
    width = shape[1] if transposed else 1
    chunk, blocks = min(values, _rows_of_blocks(width) * width), -(-values // BLOCK)
    piece = dtype.itemsize if transposed else 0
    copies = piece + (0 if dtype == torch.float32 else 4)

    def at_work(count: int) -> int:
        return (_WORK[spec.kind] + copies) * count + 4 * -(-count // BLOCK) + (4 if count % BLOCK else 0)

    kept = -(-9 * chunk // 16)  # codes and scales of a chunk, which live on until those of the next are there
    loop = max(at_work(chunk), at_work(min(values - chunk, chunk)) + kept)
    if not spec.double_quant:
        return loop
    # until the end the scales are in fp32; then their distance from the mean, too
    nested = layout_bytes({name: it for name, it in layout(shape, spec).items() if name != "qweight"})
    return max(4 * blocks + loop - nested, 8 * blocks + kept + piece * chunk)


def dequantize(storage: Mapping[str, Tensor], *, kind: Kind, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The matrix that `storage` stands for: the float32 product of code and scale, rounded once to `dtype`.

    Args:
        storage: what `quantize` returned; further entries are ignored.
        kind: `QuantSpec.kind`.
        shape: (O, I); or (G, O, I) of G matrices that `dequantizes_together` takes. All of their storage but
            `nested_code` has a leading G then.
        dtype: float32, bfloat16 or float16.

    Raises:
        UnsupportedError: another dtype, for which bitsandbytes would return uninitialised memory.
    """
    if dtype not in _DTYPES:
        raise UnsupportedError("quantized weights cannot compute in this dtype", given=dtype, allowed=_DTYPES)
    return _SCHEMES[kind].dequantize(storage, tuple(shape), dtype)


def dequantizes_together(shape: Sequence[int], kind: Kind) -> bool:
    """Whether `dequantize` takes several matrices of this shape: in 4 bits each must fill its blocks."""
    return kind == "int8" or prod(shape) % BLOCK == 0


class _Scheme(Protocol):
    def layout(self, shape: tuple[int, ...], spec: QuantSpec) -> Layout: ...
    def quantize(self, weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]: ...
    def dequantize(self, storage: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


class _FourBit:
    def __init__(self, kind: FourBitType) -> None:
        self.kind = kind

    def layout(self, shape: tuple[int, ...], spec: QuantSpec) -> Layout:
        values = prod(shape)
        blocks = -(-values // BLOCK)
        tensors: Layout = {"qweight": ((-(-values // 2), 1), torch.uint8), "absmax": ((blocks,), torch.float32)}
        if spec.double_quant:
            tensors["absmax"] = ((blocks,), torch.uint8)
            tensors["nested_absmax"] = ((-(-blocks // NESTED_BLOCK),), torch.float32)
            tensors["nested_offset"] = ((), torch.float32)
            tensors["nested_code"] = ((256,), torch.float32)
        return tensors

    def quantize(self, weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
        values = weight.numel()
        qweight = torch.empty((-(-values // 2), 1), dtype=torch.uint8, device=weight.device)
        absmax = torch.empty((-(-values // BLOCK),), dtype=torch.float32, device=weight.device)
        for start, chunk in _block_chunks(weight):
            codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(chunk, BLOCK, self.kind, torch.uint8)
            qweight[start // 2 : start // 2 + codes.numel()] = codes
            absmax[start // BLOCK : start // BLOCK + scales.numel()] = scales
        if not spec.double_quant:
            return {"qweight": qweight, "absmax": absmax}
        offset = absmax.mean()  # over the whole matrix, so the second level cannot be done chunk by chunk
        nested, state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        return {
            "qweight": qweight,
            "absmax": nested,
            "nested_absmax": state.absmax,
            "nested_offset": offset,
            "nested_code": state.code,
        }

    def dequantize(self, storage: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        qweight, absmax = storage["qweight"], storage["absmax"]
        if absmax.dtype == torch.uint8:
            nested, blocks = storage["nested_absmax"], absmax.shape[-1]
            if absmax.ndim > 1:  # each matrix ends with a whole block of scales then
                absmax = F.pad(absmax, (0, nested.shape[-1] * NESTED_BLOCK - blocks))
            absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
                absmax, nested, storage["nested_code"], NESTED_BLOCK, torch.float32
            )
            absmax += storage["nested_offset"].unsqueeze(-1) if absmax.ndim > 1 else storage["nested_offset"]
            absmax = absmax[..., :blocks]
        if absmax.ndim > 1:
            qweight, absmax = qweight.view(-1, 1), absmax.reshape(-1)
        result: Tensor = torch.ops.lowmem_ft.dequantize_4bit.default(qweight, absmax, self.kind, shape, dtype)
        return result


class _RowwiseInt8:
    def layout(self, shape: tuple[int, ...], spec: QuantSpec) -> Layout:
        return {"qweight": (shape, torch.int8), "scale": (shape[:1], torch.float32)}

    def quantize(self, weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
        qweight = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[:1], dtype=torch.float32, device=weight.device)
        for rows in _row_chunks(weight.shape):
            # bitsandbytes' Int8Params rounds to float16 first; so do we, to store the same codes.
            half = weight[rows].to(torch.float16).contiguous()
            qweight[rows], scale[rows], _ = bnb.functional.int8_vectorwise_quant(half)
        if not scale.isfinite().all():
            raise CheckpointError(
                "a weight is too large to be quantized to 8 bits, which goes through float16",
                given=f"a matrix of shape {tuple(weight.shape)} with absmax {weight.abs().max().item():g}",
                allowed=f"absolute values up to {torch.finfo(torch.float16).max:g}",
                fix="use 4 bits (`quant.bits: 4`)",
            )
        return {"qweight": qweight, "scale": scale}

    def dequantize(self, storage: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rows = storage["qweight"].view(-1, shape[-1]), storage["scale"].view(-1)
        result: Tensor = torch.ops.lowmem_ft.dequantize_int8.default(*rows, dtype)
        return result.view(shape)


_SCHEMES: Mapping[Kind, _Scheme] = {"nf4": _FourBit("nf4"), "fp4": _FourBit("fp4"), "int8": _RowwiseInt8()}


def _block_chunks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first value's flat index, flat values) of pieces of `weight` in row-major order, cut only between blocks.

    A transposed view (Conv1D) is copied piece by piece, never whole.
    """
    rows = weight.view(-1, 1) if weight.is_contiguous() else weight.flatten(1)
    width = rows.shape[1]
    step = _rows_of_blocks(width)
    for first in range(0, rows.shape[0], step):
        yield first * width, rows[first : first + step].reshape(-1)


def _rows_of_blocks(width: int) -> int:
    """Rows of a chunk that ends on a block's end."""
    fewest = BLOCK // gcd(width, BLOCK)
    return fewest * max(1, CHUNK // (fewest * width))


def _row_chunks(shape: Sequence[int]) -> Iterator[slice]:
    step = max(1, CHUNK // prod(shape[1:]))
    return (slice(first, first + step) for first in range(0, shape[0], step))


torch.library.define(
    "lowmem_ft::dequantize_4bit",
    "(Tensor qweight, Tensor absmax, str kind, SymInt[] shape, ScalarType dtype) -> Tensor",
)
torch.library.define("lowmem_ft::dequantize_int8", "(Tensor qweight, Tensor scale, ScalarType dtype) -> Tensor")


@torch.library.impl("lowmem_ft::dequantize_4bit", "default")
def _dequantize_4bit(
    qweight: Tensor, absmax: Tensor, kind: FourBitType, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    kernel = torch.ops.bitsandbytes.dequantize_4bit.default
    if qweight.device.type != "cpu":
        result: Tensor = kernel(qweight, absmax, BLOCK, kind, shape, dtype)
        return result
    # The CPU kernel finds scales by row and column and gets them wrong where the row length is a multiple of 16 but
    # not of 64. As rows of one block each it is right for every shape, and faster. A short last block is filled up.
    values, blocks = prod(shape), absmax.numel()
    if values == blocks * BLOCK:
        result = kernel(qweight, absmax, BLOCK, kind, (blocks, BLOCK), dtype)
        return result.view(shape)
    packed = F.pad(qweight.view(-1), (0, blocks * BLOCK // 2 - qweight.numel()))
    result = kernel(packed, absmax, BLOCK, kind, (blocks, BLOCK), dtype)
    return result.view(-1)[:values].view(shape)


@torch.library.register_fake("lowmem_ft::dequantize_4bit")  # type: ignore[untyped-decorator]
def _(qweight: Tensor, absmax: Tensor, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return qweight.new_empty(shape, dtype=dtype)


def reference_4bit(
    qweight: Tensor, absmax: Tensor, kind: FourBitType, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`lowmem_ft::dequantize_4bit` in plain PyTorch: code[q] x absmax in float32, rounded once."""
    code: Tensor = bnb.functional.get_4bit_type(kind, device=qweight.device)
    flat = qweight.view(-1)
    values_N = code[torch.stack([flat >> 4, flat & 15], dim=-1).view(-1).long()][: prod(shape)]
    scales_N = absmax.repeat_interleave(BLOCK)[: prod(shape)]
    return (values_N * scales_N).to(dtype).view(*shape)


@torch.library.impl("lowmem_ft::dequantize_int8", "default")
def _dequantize_int8(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    unit_O1 = (scale / 127).unsqueeze(1)
    result = torch.empty_like(qweight, dtype=dtype)
    if qweight.device.type != "cpu":
        return torch.mul(qweight, unit_O1, out=result)
    for rows in _row_chunks(qweight.shape):  # the CPU product goes through float32 copies of its operands
        torch.mul(qweight[rows], unit_O1[rows], out=result[rows])
    return result


@torch.library.register_fake("lowmem_ft::dequantize_int8")  # type: ignore[untyped-decorator]
def _(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(qweight, dtype=dtype)


def reference_int8(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`lowmem_ft::dequantize_int8` in plain PyTorch: q x (scale / 127) in float32, rounded once."""
    return (qweight.float() * (scale / 127).unsqueeze(1)).to(dtype)
