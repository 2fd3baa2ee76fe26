"""What the tests of the loader share: loading a folder, reference models, tiny multimodal checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear, get_base_weight
from lowmem_ft.quant.loader import LoadReport, load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec
from tests.models import tiny_config

NF4 = QuantSpec()
BF16 = QuantSpec(bits=16)
TOKENS = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(7))


def load(folder: Path, spec: QuantSpec = NF4, **options: Any) -> tuple[PreTrainedModel, LoadReport]:
    """Open, build and load a checkpoint, every tensor staying where it is made."""
    checkpoint = Checkpoint.open(folder)
    model = meta_model(checkpoint)
    report = load_weights(model, checkpoint, spec=spec, place=lambda name, tensor: tensor, **options)
    return model, report


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    """(B, T, V) float32."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm-wise relative error."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def reference(folder: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it, in bf16."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager").eval()


def dequantized_reference(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The checkpoint as transformers loads it, holding the dequantized weights of `model` where it is quantized."""
    plain = reference(folder)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, QuantLinear):
                target = plain.get_submodule(path)
                weight = get_base_weight(module)
                target.weight.copy_(weight.t() if isinstance(target, Conv1D) else weight)
            elif isinstance(module, QuantStack):
                for e, expert in enumerate(plain.get_parameter(path)):
                    expert.copy_(get_base_weight(module, index=e))
    return plain


def change_tensors(file: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Rewrite a safetensors file with some tensors replaced, added, or removed (None)."""
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip


def save_gemma3(folder: Path) -> PreTrainedModel:
    """A tiny multimodal Gemma 3 with tied embeddings, in `folder` and as transformers loads it from there."""
    text = tiny_config("gemma3").to_dict()
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()


def save_mistral3(folder: Path) -> PreTrainedModel:
    """A tiny multimodal Mistral 3 with a head of its own, in `folder` and as transformers loads it from there."""
    text = tiny_config("mistral").to_dict()
    config = Mistral3Config(text_config=text, vision_config={**VISION, "model_type": "pixtral", "head_dim": 8})
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    Mistral3ForConditionalGeneration(config).save_pretrained(folder)
    return Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
