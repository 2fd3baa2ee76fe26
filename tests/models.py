"""Tiny random models of the architectures that the toolkit is tested on, one table for every test that needs them.

Sizes are small but deliberately not round: no matrix below is only multiples of 64, so that quantization blocks
cross row ends, as they do in real models with odd widths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowmem_ft.assemble import drop_nothing

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# name -> (model_type, overrides over SMALL)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12, "num_hidden_layers": 6},
    ),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 48}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm": (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "head_dim": 16}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
        },
    ),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}),
    # eight and more of our own choice
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 40}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "starcoder2": ("starcoder2", {}),
    "phi": ("phi", {}),
    "gptj": ("gptj", {"n_embd": 48, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 128}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "glm4": ("glm4", {"head_dim": 12}),
    "smollm3": ("smollm3", {}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 48, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128}),
}

# Others that differ in kind from those above, each of which tests/unit/test_further_architectures.py trains once
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": (
        "llama4_text",
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 80,
            "head_dim": 16,
            "attention_chunk_size": 8,
            "num_hidden_layers": 4,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 24,
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 131,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 131,
            "laurel_rank": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        },
    ),
    "deepseek_v32": (
        "deepseek_v32",
        {
            **{"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2},
            **{"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
            **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
            **{"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2},
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {"head_dim": 12, "mamba_d_ssm": 96, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16},
    ),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.0}),
}

MOE_ARCHITECTURES = frozenset({"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "olmoe"})


def tiny_config(name: str, **overrides: Any) -> Any:
    """The transformers config of a tiny model of architecture `name`."""
    model_type, own = (ARCHITECTURES | FURTHER)[name]
    settings = {**SMALL, **own, **overrides}
    if model_type in ("gpt2", "gptj"):  # they map these names onto their own, and refuse both at once
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            settings.pop(key)
        settings.pop("intermediate_size")
    if model_type in ("gpt_neo", "mpt", "bloom"):
        for key in ("num_hidden_layers", "num_attention_heads"):
            settings.pop(key)
        if model_type == "mpt":
            settings.pop("hidden_size")
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **overrides: Any
) -> PreTrainedModel:
    """A random model of architecture `name`, its weights (biases and norms too) drawn from `seed` on `device`."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            # Gemma multiplies by 1 + weight: with 2 for q and k attention would pick one token, and blow up all rounding
            centre = 1.0 if "norm" in key and key.endswith("weight") and not name.startswith("gemma") else 0.0
            parameter.copy_(centre + noise * (0.1 if parameter.dim() < 2 else 0.08))
    model.tie_weights()
    return model.eval()


def save_tiny(name: str, folder: Path, *, max_shard_size: str = "5GB", seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny checkpoint (config and safetensors, no tokenizer) into `folder` and return it."""
    tiny_model(name, seed=seed, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, in which training mode drops nothing."""
    drop_nothing(model)
    return model
