"""A trained model as a folder that transformers loads without this package or peft: `lowmem-ft merge`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.export.weights import MergedWeights
from lowmem_ft.export.write import copy_small_files, small_files
from lowmem_ft.quant.bnb_format import pack, packed_layout
from lowmem_ft.quant.cache import skipped_by_transformers
from lowmem_ft.quant.checkpoint import INDEX, write_json
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.loader import head_path, meta_model
from lowmem_ft.quant.ops import Layout, QuantSpec, layout_bytes, quantize
from lowmem_ft.quant.shards import ShardFiles
from lowmem_ft.quant.swap import swap_quantized

Progress = Callable[[int, int], None]
CONFIG_BYTES = 8 << 10  # config.json and generation_config.json
LISTED_BYTES = 160  # of a tensor in a header and in the index, beside its two names


@torch.no_grad()
def write_merged(weights: MergedWeights, folder: Path, *, progress: Progress | None = None) -> None:
    """Write the merged model in the dtype of `weights` into `folder`, with tokenizer and configuration.

    At any time there exist one matrix (of stacked experts one slice) and a few MiB.

    Raises:
        CheckpointError, UnsupportedError, OSError: as reading and writing find them.
    """
    tensors = weights.tensors()
    total, done = layout_bytes(tensors), 0
    files = ShardFiles(folder, tensors, index_name=INDEX)
    for name, start, part in weights.parts():
        files.write(name, part, start=start)
        done += part.numel() * tensors[name][1].itemsize
        if progress is not None:
            progress(done, total)
    assert done == total, "every value is written once"
    write_configs(weights, folder)


@torch.no_grad()
def write_quantized(weights: MergedWeights, spec: QuantSpec, folder: Path, *, progress: Progress | None = None) -> None:
    """Write the merged model quantized again, in bitsandbytes' format, as transformers loads it.

    Args:
        weights: in float32 and as the model holds them (`stored=False`), so that nothing is rounded before.

    Raises:
        UnsupportedError: stacked experts, or layers that transformers does not quantize.
    """
    assert not weights.stored, "quantized tensors have the model's names"
    dtype = torch.bfloat16 if weights.compute == torch.float32 else weights.compute
    model = meta_model(weights.checkpoint, dtype=dtype)
    head = head_path(model)
    swap_quantized(model, spec=spec, skip=[] if head is None else [head])
    skip = skipped_by_transformers(model, weights.template.text)
    if skip is None:
        raise UnsupportedError(
            "transformers has no quantized form of this architecture (stacked experts, or linear layers of its own)",
            given=type(model).__name__,
            fix="merge without --quantize",
        )
    state = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.template.text.state_dict().items()}
    plain = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    layers = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    tensors: Layout = {}
    for name in weights.tensors():
        if name in layers:
            tensors |= packed_layout(name.removesuffix(".weight"), layers[name].shape, spec)
        else:
            tensors[name] = (state[name][0], plain[name])
    total, done = layout_bytes(tensors), 0
    files = ShardFiles(folder, tensors, index_name=INDEX)
    for name, start, tensor in weights.parts(whole=layers):
        if name not in layers:
            files.write(name, tensor, start=start)
            done += tensor.numel() * tensors[name][1].itemsize
        else:
            path, layer = name.removesuffix(".weight"), layers[name]
            conv = isinstance(weights.template.text.get_submodule(path), Conv1D)
            storage = quantize(tensor.t() if conv else tensor, spec)
            for part, values in pack(path, storage, shape=layer.shape, spec=spec, dtype=dtype).items():
                files.write(part, values)
                done += values.nbytes
        if progress is not None:
            progress(done, total)
    assert done == total, "every value is written once"
    write_configs(weights, folder, quantized=(spec, dtype, skip))


def folder_bytes(weights: MergedWeights, tensors: Layout) -> int:
    """Size of the folder with these tensors, rounded up by a few KiB."""
    listed = sum(2 * len(name) + LISTED_BYTES for name in tensors)
    copied = sum(file.stat().st_size for file in small_files(weights.checkpoint.folder))
    return layout_bytes(tensors) + listed + copied + CONFIG_BYTES


def write_configs(
    weights: MergedWeights, folder: Path, *, quantized: tuple[QuantSpec, torch.dtype, tuple[str, ...]] | None = None
) -> None:
    """config.json, generation_config.json, and copies of tokenizer and chat template."""
    config = copy.deepcopy(weights.model.config)
    config.architectures = [type(weights.model).__name__]
    config.dtype = weights.dtype
    config.use_cache = True
    if quantized is not None:
        spec, dtype, skip = quantized
        config.dtype = dtype
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=spec.bits == 4,
            load_in_8bit=spec.bits == 8,
            bnb_4bit_quant_type=spec.type,
            bnb_4bit_use_double_quant=spec.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(skip),
        ).to_dict()
    config.save_pretrained(folder)
    source = weights.checkpoint.folder
    if (source / "generation_config.json").is_file():
        assert weights.model.generation_config is not None
        write_json(folder / "generation_config.json", weights.model.generation_config.to_diff_dict())
    copy_small_files(source, folder)
    if weights.checkpoint.trust_remote_code:
        for file in source.glob("*.py"):
            (folder / file.name).write_bytes(file.read_bytes())
