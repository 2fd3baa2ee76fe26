"""What the tests of exports share: a tiny trained model, its policy and its adapter on disk, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowmem_ft.adapters.peft_format import save_adapter
from lowmem_ft.assemble import assemble, attention_of
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from tests.models import save_tiny
from tests.unit.adapters.helpers import shake

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(7))
POLICY = Policy(
    bits=4, quant="nf4", double_quant=True, compute_dtype="float32", micro_batch_tokens=64, accumulation=1,
    resident_blocks=2, streamed_blocks=0, stream_from="disk", keep_blocks=2, recompute_blocks=0, offload_blocks=0,
    optimizer="adamw8bit", loss_chunk_tokens=32,
)  # fmt: skip


def policy_of(bits: int, dtype: str = "float32", blocks: int = 2) -> Policy:
    kinds: dict[int, Any] = {4: "nf4", 8: "int8", 16: "none"}
    values: dict[str, Any] = {"bits": bits, "quant": kinds[bits], "compute_dtype": dtype}
    return replace(POLICY, **values, resident_blocks=blocks, keep_blocks=blocks)


@dataclass(frozen=True)
class Trained:
    """A run as a merge finds it, and the logits of its model, (2, 24, V) fp32."""

    config: RunConfig
    policy: Policy
    adapter: Path
    logits: Tensor


def trained(name: str, folder: Path, *, bits: int = 4, dtype: str = "float32", size: float = 0.05,
            model: dict[str, Any] | None = None, base: Path | None = None, **adapter: Any) -> Trained:  # fmt: skip
    """The tiny model `name`, or that in `base`, as if it had been trained: noise of `size` on all that is."""
    base = base or folder / "base"
    if not base.exists():
        save_tiny(name, base, **(model or {}))
    config = RunConfig.from_dict({"model": str(base), "adapter": {"rank": 4, **adapter}, "output": str(folder / "run")})
    policy = policy_of(bits, dtype)
    ready = assemble(config, policy, CPU, optimizer=False)
    shake(ready.model, size=size)
    ready.model.eval()
    save_adapter(ready.model, folder / "adapter", base_model=config.model)
    return Trained(config, policy, folder / "adapter", logits(ready.model))


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return result


def plain(folder: Path, **options: Any) -> PreTrainedModel:
    """A model as transformers alone loads it; with the caps of Gemma 2's scores, which its SDPA leaves out."""
    attention = attention_of(AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **options).eval()
