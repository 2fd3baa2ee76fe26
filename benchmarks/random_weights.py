"""Checkpoints of real shapes with random weights, for a machine on which nothing can be downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[1] / "lowmem_ft" / "assets"  # of a package that need not be installed
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
INDEX = "model.safetensors.index.json"
SHARD_BYTES, WRITERS = 1 << 30, 8  # so that at most 8 GB are on their way
SPREAD = 0.02  # of the weights, about as trained ones are


def write_model(folder: Path, shape: Mapping[str, Any], *, device: str, quantized: bool = False) -> Path:
    """A checkpoint with random weights and the packaged tokenizer, if it is not there yet.

    Args:
        shape: the keys of a config, `model_type` among them.
        device: where the numbers are drawn, and quantized.
        quantized: NF4 with double quantization as bitsandbytes writes it, a quarter of the bytes; all matrices of one
            shape are equal then, so that each is quantized once. Else bf16.
    """
    if (folder / INDEX).exists():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from lowmem_ft.quant.bnb_format import pack, packed_layout
    from lowmem_ft.quant.linear import QuantLinear
    from lowmem_ft.quant.loader import head_path
    from lowmem_ft.quant.ops import QuantSpec, layout_bytes, quantize
    from lowmem_ft.quant.swap import swap_quantized

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**{"tie_word_embeddings": False, "dtype": "bfloat16", **shape})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    spec, head = QuantSpec(bits=4), head_path(model)
    if quantized:
        swap_quantized(model, spec=spec, skip=[head] if head else [])
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=[head] if head else [],
        ).to_dict()  # fmt: skip
    config.save_pretrained(folder)

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(SPREAD)
        return values + 1 if name.endswith("norm.weight") else values

    layers = {path: it for path, it in model.named_modules() if isinstance(it, QuantLinear)}
    storages = {
        it.shape: {name: part.cpu() for name, part in quantize(drawn("", it.shape), spec).items()}
        for it in layers.values()
    }
    plain = {n: it for n, it in model.state_dict().items() if n.rpartition(".")[0] not in layers or n.endswith("bias")}
    plain = {name: it for name, it in plain.items() if name not in model.all_tied_weights_keys}
    sizes = {path: layout_bytes(packed_layout(path, it.shape, spec)) for path, it in layers.items()}
    sizes |= {name: it.nbytes for name, it in plain.items()}
    shards, filled = list[list[str]]([[]]), 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size

    def write(at: int) -> dict[str, str]:
        tensors: dict[str, torch.Tensor] = {}
        for name in shards[at]:
            if name in layers:
                parts = pack(
                    name, storages[layers[name].shape], shape=layers[name].shape, spec=spec, dtype=torch.bfloat16
                )
                tensors |= {part: it.clone() for part, it in parts.items()}  # a file holds no tensor twice
            else:
                tensors[name] = drawn(name, tuple(plain[name].shape)).cpu()
        file = f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return dict.fromkeys(tensors, file)

    with ThreadPoolExecutor(WRITERS) as pool:
        where = {name: file for part in pool.map(write, range(len(shards))) for name, file in part.items()}
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # or this process would hold it while others are measured
    for name in TOKENIZER:
        shutil.copy(ASSETS / "doclm-7m" / name, folder)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return folder
