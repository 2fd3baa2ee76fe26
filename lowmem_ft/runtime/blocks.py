"""Where things are in a transformers causal language model: its decoder and the decoder's blocks."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lowmem_ft.core.errors import UnsupportedError


def causal_model(model: nn.Module) -> Any:
    """The transformers model itself: what a `peft.PeftModel` wraps, else `model`."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that turns token ids into the hidden states that the output head reads.

    `runtime.head.head_of` verifies the choice against the model's own forward.
    """
    causal = causal_model(model)
    try:
        decoder = causal.get_decoder()
    except (AttributeError, NotImplementedError) as error:
        raise UnsupportedError("This is no decoder-only language model.", given=type(causal).__name__) from error
    if decoder is causal:  # Llama 4's language model looks for its decoder under the name that the multimodal one has
        decoder = next((it for it in causal.children() if isinstance(it, PreTrainedModel)), decoder)
    assert isinstance(decoder, nn.Module)
    return decoder


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers of `model`, in the order in which they run.

    Returns:
        The list's path inside `model` and the list.

    Raises:
        UnsupportedError: no list of modules is as long as the config's number of layers.
    """
    decoder = find_decoder(model)
    count: int = causal_model(model).config.get_text_config().num_hidden_layers
    lists = [
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise UnsupportedError(
            "The decoder layers of this architecture were not found.",
            given=type(decoder).__name__,
            allowed=f"models that hold a ModuleList of their {count} layers",
        )
    # the outermost list, and of several (gemma3n also lists projections) the one with the most weights
    outermost = min(path.count(".") for path, _ in lists)
    candidates = [module for path, module in sorted(lists, key=itemgetter(0)) if path.count(".") == outermost]
    blocks = candidates[0] if len(candidates) == 1 else max(candidates, key=_weights)
    path = next(path for path, module in model.named_modules() if module is blocks)
    return path, blocks


def stand_alone(model: nn.Module) -> bool:
    """Whether some of the blocks can run without the others: not if embeddings of each block know how many there are,
    or if blocks attend to keys and values of others, or to what the indexer of another has chosen."""
    config = causal_model(model).config.get_text_config()
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        return False
    return not any(getattr(config, name, 0) for name in ("hidden_size_per_layer_input", "num_kv_shared_layers"))


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
