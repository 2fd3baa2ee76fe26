"""Logits of a trained run, of its adapter on the base before quantization, and of what was exported from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowmem_ft.assemble import assemble, attention_of
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.export.parity import HeldOut, logits_of, tidy
from lowmem_ft.quant.checkpoint import Checkpoint

ROOM = 1 << 30  # beside the weights of a model that is loaded whole


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRun:
    """A run to export from.

    Attributes:
        adapter: the trained one, a folder in peft's format.
        device: where logits are computed, and merges.
        scratch: folder for what lies below the device meanwhile.
    """

    config: RunConfig
    policy: Policy
    adapter: Path
    device: torch.device
    scratch: Path

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.policy.compute_dtype)
        return dtype

    def logits(self, text: HeldOut) -> list[Tensor]:
        """What the trained model says, under the policy it was trained with."""
        return self._assembled(self.config, self.policy, self.adapter, text)

    def unquantized_logits(self, text: HeldOut, *, nbytes: int) -> list[Tensor]:
        """What the same adapter says on the base as it was before it was quantized.

        Args:
            nbytes: of the base's weights; where they do not fit, blocks and embeddings are streamed.
        """
        return self._assembled(self.config, self._in_16_bits(nbytes), self.adapter, text)

    def folder_logits(self, folder: Path, text: HeldOut, *, dtype: torch.dtype | None = None) -> list[Tensor]:
        """What transformers says of an exported folder; where it does not fit, this package, streaming its blocks.

        Quantized folders are read by this package where transformers would use bitsandbytes' kernels for CPUs, which
        round the scales once more.

        Args:
            dtype: to compute in; None: that of the run if that is float32, else that of the folder.
        """
        nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        quantized = "quantization_config" in (folder / "config.json").read_text(encoding="utf-8")
        if (quantized and self.device.type == "cpu") or not self.fits(nbytes):
            moved = self.config.model_copy(update={"model": str(folder), "cache": None})
            return self._assembled(moved, self._in_16_bits(nbytes), False, text)
        chosen = dtype or (torch.float32 if self.compute_dtype == torch.float32 and not quantized else "auto")
        return self.transformers_logits(folder, text, dtype=chosen)

    def exact_logits(self, folder: Path, text: HeldOut) -> list[Tensor]:
        """What a folder in 16 bits says in fp32; where that does not fit, block by block, each of twice its size."""
        nbytes = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if self.fits(nbytes):
            return self.transformers_logits(folder, text, dtype=torch.float32)
        moved = self.config.model_copy(update={"model": str(folder), "cache": None})
        return self._assembled(moved, replace(self._in_16_bits(nbytes), compute_dtype="float32"), False, text)

    def transformers_logits(self, folder: Path, text: HeldOut, **options: Any) -> list[Tensor]:
        """The logits of a model that `from_pretrained` loads with these options."""
        trust = self.config.trust_remote_code
        attention = attention_of(Checkpoint.open(self.config.model, trust_remote_code=trust, weights=False).config)
        if attention is not None:
            options["attn_implementation"] = attention
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map={"": self.device}, trust_remote_code=trust, **options
        )
        found = logits_of(model.eval(), text)
        del model
        tidy()
        return found

    def fits(self, nbytes: int) -> bool:
        """Whether a model with so many bytes of weights can be held whole."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
            free = min(free, self.config.budget.memory or free)
        return nbytes + ROOM <= free

    def _in_16_bits(self, nbytes: int) -> Policy:
        policy = replace(self.policy, bits=16, quant="none")
        if self.fits(nbytes):
            return policy
        blocks = policy.resident_blocks + policy.streamed_blocks
        below = policy.stream_embeddings if self.config.adapter.train_modules else "both"  # what is trained stays
        return replace(
            policy, resident_blocks=0, streamed_blocks=blocks, stream_from="disk", stream_embeddings=below,
            keep_blocks=0, recompute_blocks=blocks, offload_blocks=0,
        )  # fmt: skip

    def _assembled(self, config: RunConfig, policy: Policy, adapter: Path | bool, text: HeldOut) -> list[Tensor]:
        config = config.model_copy(update={"output": str(self.scratch)})
        ready = assemble(config, policy, self.device, adapter=adapter, optimizer=False)
        found = logits_of(ready.model.eval(), text)
        del ready
        tidy()
        return found
