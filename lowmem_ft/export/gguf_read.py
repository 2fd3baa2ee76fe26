"""GGUF files read back tensor by tensor, for the check where a model does not fit into memory whole."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_ft.export.gguf import architecture_of, gguf_tensors, heads_of
from lowmem_ft.export.merge import write_configs
from lowmem_ft.export.weights import MergedWeights
from lowmem_ft.quant.checkpoint import INDEX
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
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = torch.from_numpy(found.copy() if np.may_share_memory(found, reader.data) else found)
        _let_go(reader.data)
        values = values.view(place.slot.shape)
        heads = heads_of(name, config) if permutes else 0
        if place.rows is None:
            files.write(name, unpermute(values, heads) if heads else values)
            continue
        _, rows, columns = shapes[name][0]
        for index, matrix in enumerate(values):
            files.write(name, matrix, start=(index * rows + place.rows[0]) * columns)
    write_configs(weights, folder)


def _let_go(mapped: Any) -> None:
    """Take what was read of a mapped file out of the resident set, where it would stay to the end."""
    if isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.base.madvise(mmap.MADV_DONTNEED)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `gguf.permute`."""
    return rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
