"""Where things are in a transformers causal language model: its decoder and the decoder's blocks."""

from __future__ import annotations

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
    # Llama 4's language model looks for its decoder under the name that the multimodal one has; ModernBERT's has its
    # output matrix there
    if decoder is causal or decoder is causal.get_output_embeddings():
        decoder = next((it for it in causal.children() if isinstance(it, PreTrainedModel)), decoder)
    assert isinstance(decoder, nn.Module)
    return decoder


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers of `model`, in the order in which they run.

    Returns:
        The list's path inside `model` and the list.

    Raises:
        UnsupportedError: not one list of blocks is as long as the config's number of layers.
    """
    decoder = find_decoder(model)
    count: int = causal_model(model).config.get_text_config().num_hidden_layers
    lists: dict[str, nn.ModuleList] = {}
    outermost: list[str] = []
    level: dict[nn.Module, str] = {decoder: ""}
    while level and not outermost:  # of lists with the right length those count that lie the least deep
        below = {child: path + name for module, path in level.items() for name, child in module.named_children()}
        listed = {path: child for child, path in below.items() if isinstance(child, nn.ModuleList)}
        lists |= listed
        # gemma3n also lists projections, which may be as many
        outermost = [path for path, it in listed.items() if len(it) == count and not all(map(_is_leaf, it))]
        level = {child: f"{path}." for child, path in below.items()}
    if len(outermost) != 1:
        known = outermost or [path for path in lists if not any(path.startswith(f"{it}.") for it in lists)]
        sizes = ", ".join(f"{path} of {len(lists[path])}" for path in known) or "none"
        raise UnsupportedError(
            "The decoder layers of this architecture were not found as one list of blocks, each of which runs once.",
            given=f"{type(decoder).__name__} with these lists: {sizes}",
            allowed=f"one ModuleList with a block for each of the {count} layers that the config names",
        )
    blocks = lists[outermost[0]]
    path = next(path for path, module in model.named_modules() if module is blocks)
    return path, blocks


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def stand_alone(model: nn.Module) -> bool:
    """Whether some of the blocks can run without the others: not if embeddings of each block know how many there are,
    or if blocks attend to keys and values of others, or to what the indexer of another has chosen."""
    config = causal_model(model).config.get_text_config()
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        return False
    return not any(getattr(config, name, 0) for name in ("hidden_size_per_layer_input", "num_kv_shared_layers"))
