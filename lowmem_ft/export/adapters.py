"""Adapters in the forms in which servers take them: a GGUF file for llama.cpp, a folder for vLLM."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers import PretrainedConfig

from lowmem_ft.adapters.inject import adapter_at, injection_of
from lowmem_ft.adapters.lora import LoraLinear
from lowmem_ft.adapters.peft_format import read_adapter_config
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.core.files import write_text
from lowmem_ft.export.gguf import ARCHITECTURES, heads_of, permute
from lowmem_ft.export.gguf_file import GgufFile, Slot
from lowmem_ft.export.gguf_read import unpermute
from lowmem_ft.export.trained import Trained, TrainedWeights
from lowmem_ft.quant.shards import PYTORCH, write_file

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
# model_type of those that it puts no adapter on, or does not know; read from the sources of vLLM 0.32
_NO_ADAPTERS_IN_VLLM = frozenset({"bloom", "falcon", "gpt2", "gpt_neo", "gptj", "mpt", "stablelm"})
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """Of one layer: the update s B A; `A_KI` and `B_OK` in fp32."""

    path: str
    A_KI: Tensor
    B_OK: Tensor
    scaling: float
    alpha: float

    @property
    def rank(self) -> int:
        return self.A_KI.shape[0]


def plain_factors(trained: TrainedWeights, config: PretrainedConfig, *, server: str) -> list[Factors]:
    """The layers' updates, if they are all that was trained.

    Raises:
        UnsupportedError: DoRA, biases, whole modules or experts, which `server` has no place for.
    """
    if not isinstance(trained, Trained):
        raise _unserved(server, config, "a method of peft other than LoRA, or a variant of LoRA")
    injection = injection_of(trained.model)
    named = {
        "DoRA": injection.dora,
        "trained biases": injection.bias != "none",
        "whole trained modules": bool(injection.trained_modules),
        "adapters on stacked experts": any(
            not isinstance(adapter_at(trained.model, path), LoraLinear) for path in injection.paths
        ),
    }
    wrong = [name for name, is_there in named.items() if is_there]
    if wrong:
        raise _unserved(server, config, ", ".join(wrong))
    found = []
    for path in injection.paths:
        adapter, update = adapter_at(trained.model, path), trained.update(f"{path}.weight")
        found.append(
            Factors(path=path, A_KI=update.A_KI, B_OK=update.B_OK, scaling=update.scaling, alpha=adapter.alpha)
        )
    return found


def _unserved(server: str, config: PretrainedConfig, given: str) -> UnsupportedError:
    ways = "lowmem-ft merge, or export --gguf" if config.model_type in ARCHITECTURES else "lowmem-ft merge"
    return UnsupportedError(
        f"{server} cannot serve this adapter beside its base model.",
        given=given,
        allowed="LoRA and rsLoRA on linear layers",
        fix=f"{ways}: a merged model has all of it",
    )


def write_vllm(trained: TrainedWeights, config: PretrainedConfig, adapter: Path, folder: Path) -> int:
    """Write a folder that vLLM takes (`--lora-modules NAME=FOLDER`) and return the rank that it must allow.

    vLLM knows one rank and one alpha. Where patterns name others, all get the largest rank, filled up with zeros, and
    their scaling goes into B.

    Raises:
        UnsupportedError: see `plain_factors`; a rank above 512; or a model, or one of its layers, on which vLLM puts no
            adapter.
    """
    layers = plain_factors(trained, config, server="vLLM")
    if config.model_type in _NO_ADAPTERS_IN_VLLM:
        raise UnsupportedError(
            "vLLM takes no adapters on models of this architecture.", given=config.model_type,
            fix="lowmem-ft merge: a merged folder needs none",
        )  # fmt: skip
    # vLLM multiplies with the two halves of the base's matrix itself, and would drop the update without a word
    absorbed = [it.path for it in layers if it.path.endswith(".kv_b_proj")]
    if absorbed:
        raise UnsupportedError(
            "vLLM does not apply an adapter on this layer.", given=absorbed[0],
            fix="lowmem-ft merge; or train with adapter.targets that leave kv_b_proj out",
        )  # fmt: skip
    rank = max(it.rank for it in layers)
    if rank > VLLM_RANKS[-1]:
        raise UnsupportedError(
            "vLLM takes no adapter of this rank.", given=rank, allowed=f"up to {VLLM_RANKS[-1]}",
            fix="lowmem-ft merge: vLLM serves the merged folder",
        )  # fmt: skip
    settings = read_adapter_config(adapter)
    if not settings.get("rank_pattern") and not settings.get("alpha_pattern"):
        shutil.copyfile(adapter / SAFETENSORS_WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME)
    else:
        settings |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        tensors: dict[str, Tensor] = {}
        for it in layers:
            A_KI, B_OK = it.A_KI.new_zeros(rank, it.A_KI.shape[1]), it.B_OK.new_zeros(it.B_OK.shape[0], rank)
            A_KI[: it.rank], B_OK[:, : it.rank] = it.A_KI, it.B_OK * it.scaling
            tensors |= _named(it.path, A_KI, B_OK)
        write_file(folder / SAFETENSORS_WEIGHTS_NAME, tensors, PYTORCH)
    write_text(folder / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def write_gguf_adapter(trained: TrainedWeights, config: PretrainedConfig, path: Path) -> None:
    """Write the adapter for llama.cpp (`--lora FILE`): tensors NAME.lora_a (K, I) and NAME.lora_b (O, K), in f32.

    llama.cpp scales each update by alpha / K with one alpha for all, so what is left of a layer's own scaling goes into
    its B.

    Raises:
        UnsupportedError: see `plain_factors`; or an architecture that GGUF does not know.
    """
    import gguf

    layers = plain_factors(trained, config, server="llama.cpp")
    alpha = _common_alpha(layers)
    names, permutes, architecture = _names(layers, config)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    tensors: dict[str, Tensor] = {}
    for it in layers:
        heads = heads_of(f"{it.path}.weight", config) if permutes else 0
        own = it.scaling * it.rank / alpha
        B_OK = it.B_OK if own == 1 else it.B_OK * own
        tensors[f"{names[it.path]}.lora_a"] = it.A_KI
        tensors[f"{names[it.path]}.lora_b"] = permute(B_OK, heads) if heads else B_OK
    slots = {name: Slot(shape=tuple(tensor.shape), type="f32") for name, tensor in tensors.items()}
    file = GgufFile(path, writer, slots)
    for name, tensor in tensors.items():
        file.write(name, tensor)


def unpack_gguf_adapter(
    file: Path, trained: TrainedWeights, config: PretrainedConfig, adapter: Path, folder: Path
) -> None:
    """Write what a GGUF adapter says as peft's files into `folder`, to check it. Of `adapter` the config is read."""
    import gguf

    layers = plain_factors(trained, config, server="llama.cpp")
    names, permutes, _ = _names(layers, config)
    paths = {name: path for path, name in names.items()}
    reader = gguf.GGUFReader(file)
    alpha_field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    assert alpha_field is not None, "it was just written"
    read: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        name, _, which = tensor.name.rpartition(".")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        read.setdefault(paths[name], {})[which] = torch.from_numpy(tensor.data.copy()).view(shape)
    tensors: dict[str, Tensor] = {}
    for path, pair in read.items():
        heads = heads_of(f"{path}.weight", config) if permutes else 0
        B_OK = unpermute(pair["lora_b"], heads) if heads else pair["lora_b"]
        tensors |= _named(path, pair["lora_a"], B_OK.contiguous())
    settings: dict[str, Any] = read_adapter_config(adapter)
    settings |= {"lora_alpha": alpha_field.contents(), "alpha_pattern": {}, "use_rslora": False}
    write_file(folder / SAFETENSORS_WEIGHTS_NAME, tensors, PYTORCH)
    write_text(folder / CONFIG_NAME, json.dumps(settings))


def _names(layers: list[Factors], config: PretrainedConfig) -> tuple[dict[str, str], bool, str]:
    """(path -> GGUF name of its weight, whether rows of q and k are permuted, name of the architecture)."""
    import gguf

    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise UnsupportedError(
            "This architecture cannot be written as GGUF here.", given=config.model_type,
            allowed=", ".join(ARCHITECTURES), fix="lowmem-ft merge, and convert the folder with llama.cpp's own script",
        )  # fmt: skip
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names = {it.path: table.get_name(f"{it.path}.weight", try_suffixes=(".weight",)) for it in layers}
    return {path: str(name) for path, name in names.items()}, known.permutes, known.name


def _common_alpha(layers: list[Factors]) -> float:
    """The alpha for which most layers keep their B as it is."""
    return Counter(it.scaling * it.rank for it in layers).most_common(1)[0][0]


def _named(path: str, A_KI: Tensor, B_OK: Tensor) -> dict[str, Tensor]:
    return {f"{_PREFIX}{path}.lora_A.weight": A_KI, f"{_PREFIX}{path}.lora_B.weight": B_OK}
