"""Bytes of a run in closed form: exact for everything that is stored, estimated for what a step computes.

Weights, adapters, gradients and optimizer state are counted on the model that `assemble` builds on the meta device,
so they are what training will hold. Activations follow from the widths of a block's layers: of each token a block
keeps what its linears read (once where siblings read the same), what they return, and per norm one fp32 copy and one
copy in the compute dtype (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 4, with the terms of
bf16 RMSNorm models filled in). The estimates lean to the high side: `tests/unit/planner` holds them against real runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowmem_ft.assemble import Assembled
from lowmem_ft.core.plan import Policy
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.runtime.blocks import find_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Sizes in bytes, widths in elements; what a policy costs follows from them alone."""

    base_weights: int
    adapter: int
    gradients: int
    optimizer: int
    blocks: int
    hidden: int
    vocab: int
    itemsize: int  # bytes per element of the compute dtype
    kept_per_token: int  # bytes that one kept block holds per token
    attention_scores_per_token_pair: int  # bytes per (query, key) pair in a block whose attention is eager; else 0
    largest_matrix: int  # elements of the largest matrix that is dequantized at once
    parameters: int  # of the base, logical
    flops_per_token: float  # forward, without attention

    @classmethod
    def of(cls, ready: Assembled) -> Footprint:
        """Count on a model assembled on the meta device."""
        model = ready.model.get_base_model() if hasattr(ready.model, "get_base_model") else ready.model
        config = model.config.get_text_config()
        trainable = set(ready.trainable.values())
        block = _largest_block(find_blocks(model)[1])
        itemsize = ready.compute_dtype.itemsize
        matrices = [(_elements(module), _uses(module, config)) for module in model.modules() if _is_matrix(module)]
        heads = getattr(config, "num_attention_heads", 1)
        return cls(
            base_weights=_nbytes(t for t in _tensors(ready.model) if t not in trainable),
            adapter=_nbytes(trainable),
            gradients=sum(4 * p.numel() for p in trainable),
            optimizer=_nbytes(ready.optimizer.state_tensors().values()) if ready.optimizer else 0,
            blocks=len(find_blocks(model)[1]),
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            itemsize=itemsize,
            kept_per_token=_kept_per_token(block, config, itemsize),
            attention_scores_per_token_pair=0 if ready.attn_implementation != "eager" else heads * (4 + 2 * itemsize),
            largest_matrix=max(_one_matrix(module) for module in model.modules() if _is_matrix(module)),
            parameters=sum(elements for elements, _ in matrices) + _nbytes_other(model, itemsize) // itemsize,
            flops_per_token=sum(2.0 * elements * share for elements, share in matrices),
        )

    def breakdown(self, policy: Policy, seq_len: int) -> dict[str, int]:
        """Allocated bytes at the training peak (backward through the first block that is not kept) by holder."""
        tokens = policy.micro_batch_tokens
        block = tokens * self.kept_per_token + tokens * seq_len * self.attention_scores_per_token_pair
        inputs = tokens * self.hidden * self.itemsize
        held = policy.keep_blocks * block + policy.recompute_blocks * inputs
        at_work = block if policy.recompute_blocks else 0
        gradients_of_activations = tokens * self.kept_per_token // 2 + 2 * inputs
        mask = tokens * seq_len * (1 + 2 * self.itemsize)  # boolean, and as the attention kernel expands it
        return {
            "base_weights": self.base_weights,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": held + at_work + gradients_of_activations + mask,
            "loss": policy.loss_chunk_tokens * self.vocab * (4 + self.itemsize) + 2 * inputs,
            "workspace": 2 * self.largest_matrix * self.itemsize,
            "overhead": 0,
        }

    def evaluation_bytes(self, policy: Policy, seq_len: int) -> int:
        """Allocated peak of an evaluation: one block at work, nothing kept for a backward pass."""
        tokens = policy.micro_batch_tokens
        block = tokens * self.kept_per_token + tokens * seq_len * self.attention_scores_per_token_pair
        parts = self.breakdown(policy, seq_len)
        resident = ("base_weights", "adapter", "gradients", "optimizer", "loss", "workspace")
        return block + sum(parts[name] for name in resident)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, QuantStack))


def _elements(module: nn.Module) -> int:
    if isinstance(module, QuantStack):
        return int(math.prod(module.shape))
    return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]


def _one_matrix(module: nn.Module) -> int:
    return _elements(module) // (module.shape[0] if isinstance(module, QuantStack) else 1)


def _uses(module: nn.Module, config: Any) -> float:
    """The share of a module's weights that one token meets."""
    return _experts_per_token(config) / module.shape[0] if isinstance(module, QuantStack) else 1.0


def _experts_per_token(config: Any) -> int:
    return int(getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1)


def _kept_per_token(block: nn.Module, config: Any, itemsize: int) -> int:
    hidden = int(config.hidden_size)
    read: set[tuple[str, int]] = set()  # siblings of one parent that read the same width read the same tensor
    widths = 0
    widest = 0
    for name, module in block.named_modules():
        if isinstance(module, QuantStack):
            widths += _experts_per_token(config) * sum(module.shape[1:])
            widest = max(widest, _experts_per_token(config) * max(module.shape[1:]))
        elif isinstance(module, nn.Linear):
            read.add((name.replace(".base_layer", "").rpartition(".")[0], module.in_features))
            widths += module.out_features
            widest = max(widest, module.in_features, module.out_features)
    norms = sum(1 for m in block.modules() if getattr(getattr(m, "weight", None), "dim", lambda: 0)() == 1)
    inputs = sum(width for _, width in read)
    return itemsize * (inputs + widths + widest) + norms * hidden * (4 + itemsize)


def _largest_block(blocks: Iterable[nn.Module]) -> nn.Module:
    return max(blocks, key=lambda block: sum(_elements(m) for m in block.modules() if _is_matrix(m)))


def _tensors(model: nn.Module) -> set[Tensor]:
    return {*model.parameters(), *model.buffers()}


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _nbytes_other(model: nn.Module, itemsize: int) -> int:
    """Bytes of the frozen parameters outside matrices: embeddings, norms."""
    matrices = {p for m in model.modules() if _is_matrix(m) for p in m.parameters(recurse=False)}
    return sum(p.numel() * itemsize for p in model.parameters() if p not in matrices and not p.requires_grad)
