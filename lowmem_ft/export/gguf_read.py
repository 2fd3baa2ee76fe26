"""GGUF files read back tensor by tensor, for the check where a model does not fit into memory whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowmem_ft.export.gguf import architecture_of, gguf_tensors, heads_of
from lowmem_ft.export.merge import write_configs
from lowmem_ft.export.weights import MergedWeights
from lowmem_ft.quant.checkpoint import INDEX
from lowmem_ft.quant.ops import Layout
from lowmem_ft.quant.shards import ShardFiles


def unpack_gguf(file: Path, weights: MergedWeights, folder: Path) -> None:
    """Write the tensors of a GGUF file into `folder` as transformers has them, in bf16 (f32 where they are vectors).

    Of `weights` only names and shapes are used.
    """
    import gguf

    config = weights.model.config
    permutes = architecture_of(config).permutes
    names = {given: (name, slot.shape) for name, (given, slot) in gguf_tensors(weights, "f32").items()}
    layout: Layout = {
        name: (shape, torch.float32 if len(shape) < 2 else torch.bfloat16) for name, shape in names.values()
    }
    files = ShardFiles(folder, layout, index_name=INDEX)
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name not in names:
            continue
        name, shape = names[tensor.name]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)
        heads = heads_of(name, config) if permutes else 0
        files.write(name, unpermute(values, heads) if heads else values)
    write_configs(weights, folder)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `gguf.permute`."""
    return rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
