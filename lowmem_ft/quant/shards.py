"""Safetensors files written piece by piece: no second copy of a tensor, and the same bytes for the same tensors, which
safetensors' own writer does not promise (it orders metadata at random)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowmem_ft.quant.checkpoint import CHUNK_BYTES, safetensors_header, write_json
from lowmem_ft.quant.ops import Layout, layout_bytes

SHARD_BYTES = 2 << 30
ALIGN = 64
PYTORCH = {"format": "pt"}  # which transformers asks for


def write_file(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file, the largest data types first so that each tensor is aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    text = shard_header({name: (tuple(tensors[name].shape), tensors[name].dtype) for name in order}, metadata)
    with open(file, "wb") as stream:
        stream.write(text)
        for name in order:
            stream.writelines(pieces(tensors[name]))


class ShardFiles:
    """The files of a model, at first with headers and room for everything: what they hold is written in any order.

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
            offset = len(text)
            with open(file, "wb") as stream:
                stream.write(text)
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


def shard_header(shard: Layout, metadata: Mapping[str, str] = PYTORCH) -> bytes:
    """What stands before the tensors in a safetensors file that holds them in this order."""
    text = json.dumps(safetensors_header(shard, metadata), separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // ALIGN) * ALIGN - 8)
    return len(text).to_bytes(8, "little") + text
