"""What the output head of a model reads: the decoder runs alone, the model's own head never does.

Letters in shapes: B rows, T positions, N = B * T, D hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_ft.data.isolation import attention_inputs
from lowmem_ft.data.packing import Batch
from lowmem_ft.runtime.blocks import causal_model, find_decoder


def decoder_inputs(model: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """What the decoder takes beside token ids: a mask that isolates documents, if rows have several."""
    return {} if _is_prompted(model) else attention_inputs(causal_model(model), batch, dtype=dtype)


def hidden_states(model: Any, batch: Batch, inputs: dict[str, Any]) -> Tensor:
    """What the head reads, (N, D).

    Args:
        inputs: from `decoder_inputs`; several passes over a batch may share them.
    """
    causal, decoder = causal_model(model), find_decoder(model)
    if _is_prompted(model):
        hidden_BTD = _prompted_hidden_states(model, causal, decoder, batch)
    else:
        hidden_BTD = decoder(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])


def _is_prompted(model: Any) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _prompted_hidden_states(model: Any, causal: Any, decoder: nn.Module, batch: Batch) -> Tensor:
    """Hidden states of the real positions under peft's prompt, prefix or P-tuning, (B, T, D).

    Such an adapter lives in the forward of peft's wrapper, which puts virtual tokens in front. So the whole model
    runs, its head on one position, and the decoder's output is caught.
    """
    caught: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, args, output: caught.append(output.last_hidden_state))
    takes_keep = "logits_to_keep" in inspect.signature(type(causal).forward).parameters
    try:
        model(
            input_ids=batch.input_ids,
            attention_mask=(batch.segment_ids != 0).long(),
            use_cache=False,
            **({"logits_to_keep": 1} if takes_keep else {}),
        )
    finally:
        hook.remove()
    return caught[0][:, -batch.input_ids.shape[1] :]
