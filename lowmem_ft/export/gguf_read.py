"""GGUF files read back tensor by tensor, for the check where a model does not fit into memory whole."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_ft.export.gguf import architecture_of, gguf_tensors, heads_of
from lowmem_ft.export.merge import write_configs
from lowmem_ft.export.weights import MergedWeights
from lowmem_ft.quant.checkpoint import CHUNK_BYTES, INDEX
from lowmem_ft.quant.ops import Layout
from lowmem_ft.quant.shards import ShardFiles


def unpack_gguf(file: Path, weights: MergedWeights, folder: Path) -> None:
    """Write the tensors of a GGUF file into `folder` as transformers has them, in bf16, or in f32 where the file is.

    Of `weights` only names and shapes are used.
    """
    import gguf

    config = weights.model.config
    permutes = architecture_of(config).permutes
    tensors, shapes = gguf_tensors(weights, "f32"), weights.tensors()
    names = {place.name: (name, place) for name, places in tensors.items() for place in places}
    reader = gguf.GGUFReader(file)
    read = [tensor for tensor in reader.tensors if tensor.name in names]
    exact = {names[it.name][0] for it in read if it.tensor_type == gguf.GGMLQuantizationType.F32}
    layout: Layout = {
        name: (shape, torch.float32 if name in exact else torch.bfloat16) for name, (shape, _) in shapes.items()
    }
    files = ShardFiles(folder, layout, index_name=INDEX)
    for tensor in read:
        name, place = names[tensor.name]
        count, own, columns = (1, 1, *place.slot.shape)[-3:]
        rows, begin = (own, 0) if place.rows is None else (shapes[name][0][-2], place.rows[0])
        heads = heads_of(name, config) if permutes else 0
        lines = tensor.data.reshape(count * own, -1)
        for index in range(count):
            parts = _unpacked(lines[index * own : (index + 1) * own], columns, tensor.tensor_type, layout[name][1])
            at = (index * rows + begin) * columns
            for part in [unpermute(torch.cat([*parts]), heads)] if heads else parts:
                files.write(name, part, start=at)
                at += part.numel()
                _let_go(reader.data)
    write_configs(weights, folder)


def _unpacked(lines: Any, columns: int, kind: Any, dtype: torch.dtype) -> Iterator[Tensor]:
    """A matrix from its lines in the file, some at a time: unpacking takes several times their bytes in fp32."""
    import gguf

    height = max(1, CHUNK_BYTES // (4 * columns))
    for first in range(0, len(lines), height):
        # of its own, as what lies in the file is let go of
        values = np.array(gguf.quants.dequantize(lines[first : first + height], kind))
        yield torch.from_numpy(values).view(-1, columns).to(dtype)


def _let_go(mapped: Any) -> None:
    """Take what was read of a mapped file out of the resident set, where it would stay to the end."""
    if isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.base.madvise(mmap.MADV_DONTNEED)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `gguf.permute`."""
    return rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
