"""What the output head of a model reads: the decoder runs alone, the model's own head never does.

Letters in shapes: B rows, T positions, N = B * T, D hidden size.
"""

from __future__ import annotations

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
    decoder = find_decoder(model)
    if _is_prompted(model):
        hidden_BTD = _prompted_hidden_states(model, decoder, batch)
    else:
        hidden_BTD = decoder(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])


def _is_prompted(model: Any) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


class _Enough(Exception):  # noqa: N818 - no error
    """The decoder is done, and nobody asked for more."""


def _prompted_hidden_states(model: Any, decoder: nn.Module, batch: Batch) -> Tensor:
    """Hidden states of the real positions under peft's prompt, prefix or P-tuning, (B, T, D).

    Such an adapter lives in the forward of peft's wrapper, which puts virtual tokens in front. So the whole model is
    called, and left when the decoder has its output. Its head, even of one position, would take the largest product of
    all: of 16-bit floats the CPU copies the head's matrix for each row (1.2 GB for 50 rows of a small model).
    """
    caught: list[Tensor] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output.last_hidden_state)
        raise _Enough

    hook = decoder.register_forward_hook(leave)
    try:
        model(input_ids=batch.input_ids, attention_mask=(batch.segment_ids != 0).long(), use_cache=False)
    except _Enough:
        return caught[0][:, -batch.input_ids.shape[1] :]
    finally:
        hook.remove()
    raise AssertionError("peft's wrapper calls the decoder")
