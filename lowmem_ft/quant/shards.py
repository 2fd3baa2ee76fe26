"""Safetensors files written tensor by tensor, or piece by piece, in any order: all offsets are known beforehand."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lowmem_ft.quant.checkpoint import CHUNK_BYTES, safetensors_header, write_json
from lowmem_ft.quant.ops import Layout, layout_bytes

SHARD_BYTES = 2 << 30
ALIGN = 64


class ShardFiles:
    """The files of a model, at first with headers and room for everything.

    Args:
        folder: exists.
        tensors: name -> (shape, dtype) of all that will be written, in the order in which it shall lie.
        index_name: of the JSON file that says which tensor lies where.
    """

    def __init__(self, folder: Path, tensors: Layout, *, index_name: str) -> None:
        shards = split_shards(tensors)
        files = [folder / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / index_name, {"metadata": {"total_size": layout_bytes(tensors)}, "weight_map": weight_map})
        self._places: dict[str, tuple[Path, int]] = {}
        self._tensors = tensors
        for file, shard in zip(files, shards, strict=True):
            text = shard_header(shard)
            offset = 8 + len(text)
            with open(file, "wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                stream.truncate(offset + layout_bytes(shard))
            for name, entry in shard.items():
                self._places[name] = (file, offset)
                offset += layout_bytes({name: entry})

    def write(self, name: str, tensor: Tensor, *, start: int = 0) -> int:
        """Write a tensor, or the part of it that begins at element `start`, from any device; cast piece by piece.

        Returns:
            the CRC-32 of the bytes.
        """
        file, offset = self._places[name]
        dtype, checksum = self._tensors[name][1], 0
        with open(file, "r+b", buffering=0) as stream:
            stream.seek(offset + start * dtype.itemsize)
            for piece in pieces(tensor, dtype):
                checksum = zlib.crc32(piece, checksum)
                while piece:
                    piece = piece[stream.write(piece) :]
        return checksum


def pieces(tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[memoryview]:
    """The bytes of a tensor, cast to `dtype`, 8 MiB at a time."""
    flat = tensor.detach().contiguous().view(-1)
    step = CHUNK_BYTES // flat.element_size()
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step].to(device="cpu", dtype=dtype or flat.dtype)
        yield memoryview(part.view(torch.uint8).numpy())  # type: ignore[arg-type,unused-ignore]


def split_shards(tensors: Layout) -> list[Layout]:
    """The tensors of each file, in their order."""
    shards: list[Layout] = [{}]
    filled = 0
    for name, entry in tensors.items():
        size = layout_bytes({name: entry})
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += size
    return shards


def shard_header(shard: Layout) -> bytes:
    """The header of a safetensors file that holds its tensors in this order."""
    text = json.dumps(safetensors_header(shard, {"format": "pt"})).encode()
    return text.ljust(-(-(len(text) + 8) // ALIGN) * ALIGN - 8)
