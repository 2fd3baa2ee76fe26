"""Some of a model's blocks in the place of all, and which of them compute the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy

from torch import nn

from lowmem_ft.runtime.blocks import causal_model, find_blocks, find_decoder


@contextmanager
def only_blocks(model: nn.Module, only: Sequence[int] | None, *, counted: bool = True) -> Iterator[None]:
    """Within it `model` has these of its blocks alone, and a config that says so.

    Args:
        counted: so does the config that the decoder itself looks at, but not where its embeddings have a part for each
            block.
    """
    if only is None:
        yield
        return
    path, blocks = find_blocks(model)
    parent_path, _, name = path.rpartition(".")
    parent, text = model.get_submodule(parent_path), causal_model(model).config.get_text_config()
    decoder = find_decoder(model)
    own = decoder.config
    per_layer = {key: value for key, value in vars(text).items() if _one_each(value, len(blocks))}
    count = text.num_hidden_layers
    setattr(parent, name, nn.ModuleList([blocks[index] for index in only]))
    for key, value in per_layer.items():
        setattr(text, key, [value[index] for index in only])
    if not counted:
        decoder.config = copy(text)
    text.num_hidden_layers = len(only)
    try:
        yield
    finally:
        setattr(parent, name, blocks)
        decoder.config = own
        text.num_hidden_layers = count
        for key, value in per_layer.items():
            setattr(text, key, value)


@contextmanager
def numbered(blocks: Sequence[nn.Module], only: Sequence[int] | None) -> Iterator[None]:
    """Within it these of the blocks have the numbers from 0 on, by which they find their place in a cache."""
    changed = [
        (vars(module), name, before, after)
        for after, before in enumerate(only or ())
        for module in blocks[before].modules()
        for name in ("layer_idx", "layer_id")
        if vars(module).get(name) == before
    ]
    try:
        for attributes, name, _, after in changed:
            attributes[name] = after
        yield
    finally:
        for attributes, name, before, _ in changed:
            attributes[name] = before


def block_kinds(model: nn.Module) -> list[int]:
    """A number for each block of `model`, the same for blocks that compute the same.

    Equal are names, classes, sizes and plain settings of all their modules, what the config lists for the layer, and
    whether something is trained below it, so that gradients go through.
    """
    _, blocks = find_blocks(model)
    lowest = lowest_trained(model)
    settings = vars(causal_model(model).config.get_text_config()).values()
    lists = [value for value in settings if _one_each(value, len(blocks))]
    numbers: dict[Hashable, int] = {}
    found = []
    for at, block in enumerate(blocks):
        modules = tuple(_module_kind(name, module, at) for name, module in block.named_modules())
        found.append(numbers.setdefault((*(str(value[at]) for value in lists), modules, at > lowest), len(numbers)))
    return found


def lowest_trained(model: nn.Module) -> int:
    """The first block in which something is trained, so that gradients go down to it; -1: below all of them."""
    _, blocks = find_blocks(model)
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    if any(parameter.requires_grad for module in embeddings for parameter in module.parameters()):
        return -1
    trained = (at for at, block in enumerate(blocks) if any(it.requires_grad for it in block.parameters()))
    return next(trained, len(blocks))


def _module_kind(name: str, module: nn.Module, index: int) -> Hashable:
    """Of a module in block `index`, whose own number (`layer_idx`, `layer_id`) is no setting."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    shapes = tuple((key, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for key, tensor in tensors)
    settings = tuple(
        (key, repr(value))
        for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and not (key.startswith("layer") and value == index)
    )
    return name, type(module), shapes, settings


def _one_each(value: object, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count
