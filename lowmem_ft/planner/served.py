"""Whether a model's own code does what training asks of it, as far as that is seen without data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_ft.core.errors import LowMemError, UnsupportedError
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.data.isolation import PROBE_TOKENS, not_isolated, taking_masks
from lowmem_ft.data.packing import Batch
from lowmem_ft.quant.checkpoint import first_line
from lowmem_ft.runtime.blocks import causal_model, find_decoder
from lowmem_ft.runtime.hidden import decoder_inputs


def check_served(model: Any, batch: Batch, *, dtype: torch.dtype) -> None:
    """Give the decoder of `model`, whose tensors have no data, short rows and, of packed documents, masks.

    Rows of a run are as long as their longest document, so that a model which takes some lengths alone is none for it.

    Raises:
        UnsupportedError: it takes no rows of token ids alone, keeps some of a batch, or does not tell packed documents
            apart.
    """
    causal, decoder = causal_model(model), find_decoder(model)
    before = _attributes(decoder)
    with _running_its_own_code(causal.config.model_type), torch.no_grad():
        decoder(input_ids=batch.input_ids[:, : 2 * PROBE_TOKENS], use_cache=False)
    left = next((path for path, value in _attributes(decoder).items() if value is not before.get(path)), None)
    if left is not None:
        raise UnsupportedError(
            f"Layers of {causal.config.model_type} keep tensors of a batch, and in training its graph, until the next "
            "one, which no plan of a step counts.",
            given=left,
            fix="use another model",
        )
    if not batch.packed:
        return
    with taking_masks(causal), torch.no_grad():
        inputs = decoder_inputs(model, batch, dtype=dtype)
        masks = tree_leaves(inputs.get("attention_mask"))
        with _Reading(masks) as reading:
            decoder(input_ids=batch.input_ids, use_cache=False, **inputs)
    if masks and not reading.seen:
        raise not_isolated(causal, "its decoder never looks at an attention mask")


def _attributes(decoder: nn.Module) -> dict[str, Tensor]:
    """Path -> tensor that a module holds beside parameters and buffers."""
    modules = decoder.named_modules()
    found = ((f"{path}.{key}", value) for path, module in modules for key, value in vars(module).items())
    return {path: value for path, value in found if isinstance(value, Tensor)}


@contextmanager
def _running_its_own_code(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any kind: each architecture's own code runs here
        if isinstance(error, LowMemError) or is_out_of_memory(error):
            raise
        raise UnsupportedError(
            f"The decoder of {name} does not run on rows of token ids alone, which training gives it.",
            given=f"{type(error).__name__}: {first_line(error)}",
            fix="see what that names: a setting in config.json; a type (policy.compute_dtype: float32 serves most); "
            "or what only another model gives, without which this one cannot be trained",
        ) from error


def without_gradient(trained: Mapping[str, nn.Parameter], learning: Mapping[nn.Parameter, bool]) -> str | None:
    """What to say of the layers whose adapters no gradient has reached, in steps as `Stage.learning` tells of them."""
    layers = [
        re.split(r"\.(?=lora_|base_layer)", name)[0] for name, it in trained.items() if not learning.get(it, True)
    ]
    ends = dict.fromkeys(".".join(layer.split(".")[-2:]) for layer in layers)
    if not ends:
        return None
    pattern = "|".join(re.escape(end) for end in ends)
    return (
        f"adapters of {', '.join(ends)} learn nothing, as no gradient reaches them (an indexer's choice has none, and "
        f"some matrices are read without a call of their layer): leave them out with "
        f"adapter.targets: '(?!.*({pattern})$).*'"
    )


class _Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it `seen` tells whether any operation was given one of these tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wanted = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (it for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor))
        self.seen = self.seen or any(it.untyped_storage()._cdata in self._wanted for it in given)
        return func(*args, **(kwargs or {}))
