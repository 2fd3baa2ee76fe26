"""A checksum of what a safetensors file holds, for its header: the format itself has none."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from lowmem_ft.quant.checkpoint import TensorInfo
from lowmem_ft.quant.shards import pieces

CHECKSUM = "checksum"  # its key in the header
READ_BYTES = 1 << 20  # of a file, at a time


def content_checksum(tensors: Mapping[str, Tensor | TensorInfo], beside: str = "") -> str:
    """CRC-32 of names, types, shapes and content of tensors, in memory or in a file, and of what is said `beside`."""
    checksum = zlib.crc32(beside.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        for piece in _in_file(tensor) if isinstance(tensor, TensorInfo) else pieces(tensor):
            checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"


def _in_file(tensor: TensorInfo) -> Iterator[bytes]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        for first in range(0, tensor.nbytes, READ_BYTES):
            yield file.read(min(READ_BYTES, tensor.nbytes - first))
