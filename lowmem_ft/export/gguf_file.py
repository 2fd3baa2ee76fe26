"""One GGUF file, written tensor by tensor or piece by piece in any order: all offsets are known beforehand.

The `gguf` package writes header, metadata and the list of tensors, and quantizes; what lies here is where data goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_ft.core.errors import UnsupportedError

# What the gguf package can write from Python; llama.cpp's k-quants it only reads
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BLOCK = 32  # values that share a scale, in all of these
VALUES = 1 << 20  # quantized at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A tensor of a file: `type` is one of TYPES; `shape` as PyTorch has it."""

    shape: tuple[int, ...]
    type: str

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def bytes_of(self, values: int) -> int:
        """Bytes that so many values take, whole blocks."""
        block, size = _sizes(self.type)
        assert values % block == 0, "a piece ends within a block"
        return values // block * size


class GgufFile:
    """A file with header, metadata and room for everything.

    Args:
        path: does not exist.
        writer: a `gguf.GGUFWriter` with all metadata and no tensors.
        tensors: GGUF name -> slot, in the order in which they shall lie.

    Attributes:
        nbytes: of all tensors.
        written: bytes of them so far.
    """

    def __init__(self, path: Path, writer: Any, tensors: Mapping[str, Slot]) -> None:
        import gguf
        import numpy as np

        self._path, self._tensors, self._offsets = path, tensors, dict[str, int]()
        self.nbytes, self.written = sum(slot.bytes_of(slot.numel) for slot in tensors.values()), 0
        for name, slot in tensors.items():
            kind = gguf.GGMLQuantizationType[slot.type.upper()]
            writer.add_tensor_info(name, slot.shape, np.dtype(np.float32), slot.bytes_of(slot.numel), raw_dtype=kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        alignment = writer.data_alignment
        end = path.stat().st_size
        for name, slot in tensors.items():
            end = -(-end // alignment) * alignment
            self._offsets[name] = end
            end += slot.bytes_of(slot.numel)
        writer.close()
        with open(path, "r+b") as stream:
            stream.truncate(-(-end // alignment) * alignment)

    def write(self, name: str, values: Tensor, *, start: int = 0) -> None:
        """Write values of any float dtype from element `start` on; both end with blocks.

        Raises:
            UnsupportedError: a value is beyond fp16, which is also what scales are stored in.
        """
        slot = self._tensors[name]
        flat = values.detach().contiguous().view(-1)
        with open(self._path, "r+b", buffering=0) as stream:
            stream.seek(self._offsets[name] + slot.bytes_of(start))
            for begin in range(0, flat.numel(), VALUES):
                part = flat[begin : begin + VALUES].to(device="cpu", dtype=torch.float32)
                if slot.type != "f32" and part.abs().max() > torch.finfo(torch.float16).max and slot.type != "bf16":
                    raise UnsupportedError(
                        f"a weight is beyond the range of {slot.type}", given=name, fix="export as bf16 or f32"
                    )
                data = memoryview(encode(part, slot.type))
                self.written += len(data)
                while data:
                    data = data[stream.write(data) :]


def encode(values: Tensor, kind: str) -> bytes:
    """fp32 values (N,), whole blocks, as they lie in a file."""
    import gguf

    if kind in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        return values.to(dtype).view(torch.uint8).numpy().tobytes()
    encoded: bytes = gguf.quants.quantize(
        values.view(-1, BLOCK).numpy(), gguf.GGMLQuantizationType[kind.upper()]
    ).tobytes()
    return encoded


def type_of(shape: tuple[int, ...], kind: str, *, vocabulary: bool) -> str:
    """The type that a tensor is stored in where `kind` is asked for, by llama.cpp's own habits.

    Vectors stay in f32, rows that are no whole blocks in f16, and embeddings and head lose less than 8 bits nowhere.
    """
    if len(shape) < 2:
        return "f32"
    block, _ = _sizes(kind)
    if shape[-1] % block:
        return "f16"
    return "q8_0" if vocabulary and kind.startswith(("q4", "q5")) else kind


def _sizes(kind: str) -> tuple[int, int]:
    import gguf

    block, size = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return int(block), int(size)
