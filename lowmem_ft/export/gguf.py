"""A trained model as one GGUF file, which llama.cpp and Ollama run: `lowmem-ft export --gguf TYPE`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lowmem_ft.assemble import require_tokenizer
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.export.gguf_file import GgufFile, Slot, type_of
from lowmem_ft.export.gguf_vocab import add_tokenizer
from lowmem_ft.export.weights import MergedWeights

Progress = Callable[[int, int], None]
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How llama.cpp knows a model type.

    Attributes:
        name: of the GGUF architecture.
        permutes: whether rows of q and k are put from halves into pairs, as llama.cpp rotates neighbours there.
        read: whether transformers can read such a file (5.23 fails at stacked experts).
    """

    name: str
    permutes: bool = False
    read: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a tensor of the model, or some rows of each of its experts, lies in the file.

    Attributes:
        rows: of each expert (R, C), from and to; None: all there is.
    """

    name: str
    slot: Slot
    rows: tuple[int, int] | None = None


# transformers' model type -> what it is in GGUF; of the Llama family
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(name="llama", permutes=True),
    "mistral": Architecture(name="llama", permutes=True),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "mixtral": Architecture(name="llama", permutes=True, read=False),
    "qwen3_moe": Architecture(name="qwen3moe", read=False),
}
# with this in its name llama.cpp lets a model's special tokens drop white space, and loads it only if it has `</s>`
_MEANINGFUL = re.compile("(phi)-?(3)", re.IGNORECASE)
_STACKS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")


def require_gguf() -> None:
    """Raise UnsupportedError where the gguf package is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "Writing GGUF needs the gguf package.", given=str(error), fix="pip install 'lowmem-ft[export]'"
        ) from error


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The GGUF architecture of a model.

    Raises:
        UnsupportedError: another family, or an option that llama.cpp does not have for it.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UnsupportedError(
            "This architecture cannot be written as GGUF here.",
            given=config.model_type,
            allowed=", ".join(ARCHITECTURES),
            fix="merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py",
        )
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", True)
    if windowed and window < config.max_position_embeddings:
        raise UnsupportedError(
            "llama.cpp has no sliding window for this architecture, so longer texts would be read otherwise.",
            given=f"sliding_window {window} of {config.max_position_embeddings} positions",
            fix=f"set max_position_embeddings to {window} in the base model's config.json, if texts are no longer",
        )
    dense = getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None)
    if found.name == "qwen3moe" and (dense or not config.norm_topk_prob):
        raise UnsupportedError(
            "llama.cpp has experts in every block of this architecture, and scales their weights to sum 1.",
            given=f"decoder_sparse_step {config.decoder_sparse_step}, mlp_only_layers {config.mlp_only_layers}, "
            f"norm_topk_prob {config.norm_topk_prob}",
            allowed="1, none, true",
        )
    if found.name.startswith("qwen3") and getattr(config, "attention_bias", False):
        raise UnsupportedError("llama.cpp has no bias of attention's output here.", given="attention_bias: true")
    if config.hidden_act != "silu":
        raise UnsupportedError(
            "llama.cpp knows this architecture with one activation only.", given=config.hidden_act, allowed="silu"
        )
    return found


def gguf_tensors(weights: MergedWeights, kind: str) -> dict[str, list[Place]]:
    """The model's name -> where it lies in the file, for all tensors; matrices in `kind` where that can be."""
    import gguf

    config = weights.model.config
    architecture = architecture_of(config)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name, (shape, _) in weights.tensors().items():
        stack = _STACKS.fullmatch(name)
        if stack is not None:
            found[name] = _places_of_experts(int(stack[1]), stack[2], shape, kind)
            continue
        given = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if given is None:
            raise UnsupportedError("A tensor has no name in GGUF.", given=f"{name} of {config.model_type}")
        vocabulary = given in ("token_embd.weight", "output.weight")
        # which expert a token goes to must not depend on rounding
        chosen = "f32" if given.endswith(".ffn_gate_inp.weight") else kind
        found[name] = [Place(name=given, slot=Slot(shape=shape, type=type_of(shape, chosen, vocabulary=vocabulary)))]
    return found


def _places_of_experts(block: int, leaf: str, shape: tuple[int, ...], kind: str) -> list[Place]:
    """Experts lie stacked, gates and up projections apart, where the model has them one above the other."""
    experts, rows, columns = shape
    chosen = type_of(shape, kind, vocabulary=False)
    if leaf == "down_proj":
        return [Place(name=f"blk.{block}.ffn_down_exps.weight", slot=Slot(shape=shape, type=chosen), rows=(0, rows))]
    half = rows // 2
    slot = Slot(shape=(experts, half, columns), type=chosen)
    return [
        Place(name=f"blk.{block}.ffn_gate_exps.weight", slot=slot, rows=(0, half)),
        Place(name=f"blk.{block}.ffn_up_exps.weight", slot=slot, rows=(half, rows)),
    ]


def gguf_header(weights: MergedWeights, kind: str, *, name: str) -> tuple[Any, Tensor | None]:
    """A writer with all that a file says of the model and its tokenizer, and the factors of its frequencies.

    Args:
        weights, kind, name: as for `write_gguf`.

    Raises:
        CheckpointError, UnsupportedError: as the tokenizer and the architecture have it.
    """
    import gguf

    config = weights.model.config
    writer = gguf.GGUFWriter(None, architecture_of(config).name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_MEANINGFUL.sub(r"\1 \2", name))
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    factors = _add_rope(writer, config)
    base = weights.checkpoint
    add_tokenizer(writer, require_tokenizer(base), base.folder, vocab_size=config.vocab_size)
    return writer, factors


@torch.no_grad()
def write_gguf(weights: MergedWeights, kind: str, path: Path, *, name: str, progress: Progress | None = None) -> None:
    """Write the merged model to `path`.

    Args:
        weights: in float32, as the model holds them (`stored=False`).
        kind: one of `gguf_file.TYPES`.
        name: of the model, for people.

    Raises:
        CheckpointError, UnsupportedError: as reading, the tokenizer and the architecture have it.
    """
    config = weights.model.config
    architecture = architecture_of(config)
    tensors = gguf_tensors(weights, kind)
    writer, factors = gguf_header(weights, kind, name=name)
    slots = {place.name: place.slot for places in tensors.values() for place in places}
    if factors is not None:
        slots[ROPE_FACTORS] = Slot(shape=tuple(factors.shape), type="f32")
    file = GgufFile(path, writer, slots)
    if factors is not None:
        file.write(ROPE_FACTORS, factors)
    permuted = {it: heads_of(it, config) for it in tensors if architecture.permutes and heads_of(it, config)}
    stacks = [name for name, places in tensors.items() if places[0].rows is not None]
    for given, start, part in weights.parts(whole=[*permuted, *stacks]):
        places = tensors[given]
        if places[0].rows is not None:
            _write_experts(file, places, part, start)
        else:
            file.write(places[0].name, permute(part, permuted[given]) if given in permuted else part, start=start)
        del part  # before the next one exists
        if progress is not None:
            progress(file.written, file.nbytes)
    assert file.written == file.nbytes, "every value is written once"


def _write_experts(file: GgufFile, places: list[Place], part: Tensor, start: int) -> None:
    """One expert (R, C), or all (E, R, C)."""
    matrices = part.view(-1, *part.shape[-2:])
    first = start // matrices[0].numel()
    for place in places:
        assert place.rows is not None, "these are experts"
        begin, end = place.rows
        for index, matrix in enumerate(matrices):
            rows = matrix[begin:end]
            file.write(place.name, rows, start=(first + index) * rows.numel())


def heads_of(name: str, config: PretrainedConfig) -> int:
    """Of a projection to queries or keys the number of its heads, else 0."""
    if ".self_attn.q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".self_attn.k_proj." in name else 0


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head (..., first half, second half) -> pairs (0, d/2, 1, d/2 + 1, ...); (O,), (O, I) or (O, K)."""
    return rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def head_dim(config: PretrainedConfig) -> int:
    """Values of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """(d/2,) fp32: what Llama 3.1's scaling divides each frequency by; None without it.

    Frequencies whose wavelength is below one bound stay, above another are divided by `factor`, between them blended.
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    dim, base = head_dim(config), float(rope["rope_theta"])
    freq = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    wavelength = 2 * math.pi / freq
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    smooth = (context / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(wavelength < context / high, torch.ones_like(freq), blended)
    return torch.where(wavelength > context / low, torch.full_like(freq, factor), found).float()


def _add_sizes(writer: Any, config: PretrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    if getattr(config, "num_experts_per_tok", None):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_rope(writer: Any, config: PretrainedConfig) -> Tensor | None:
    """Write how positions are rotated; returns the factors of the frequencies, if there are any."""
    import gguf

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            "This scaling of positions cannot be written as GGUF here.", given=rope,
            allowed="default, linear, llama3, yarn",
        )  # fmt: skip
    if kind == "llama3" and writer.arch != "llama":
        raise UnsupportedError(
            "llama.cpp reads this scaling of positions of Llama and Mistral only.",
            given=f"{kind}, of {config.model_type}",
        )
    own = set(rope) - {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    if kind == "yarn" and own - {"partial_rotary_factor"}:
        raise UnsupportedError("Options of YaRN that are not written as GGUF here.", given=", ".join(sorted(own)))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        scaling = gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
    return rope_factors(config)


def _file_type(kind: str) -> int:
    import gguf

    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return int(gguf.LlamaFileType[name])
