"""Attention that keeps the documents of a packed row apart, and the proof that a model obeys it.

Restarted position ids alone are not enough: OPT, MPT, BLOOM, XGLM, gpt-oss and (before transformers 5.24) Falcon read
them for positions and go on attending across documents, without a word. So packed rows always come with an explicit
mask, or with the bounds of their documents where attention is ours.

Shapes: B rows, T positions, N documents, D hidden size.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_ft.core.errors import LowMemError, UnsupportedError
from lowmem_ft.core.mode import evaluating
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.data.packing import Batch, as_bounds

ATTENTION = "lowmem_ft"  # the name under which transformers knows runtime.attention
_DROPOUTS = ("attention_dropout", "attn_pdrop")  # of attention, as configurations call it
_INDEXED = "indexed_attention", "deepseek_sparse_attention"  # the second is its name in transformers 5.17
_LAYER_TYPES = "full_attention", *_INDEXED, "sliding_attention", "chunked_attention"  # those that attend
PROBE_TOKENS = 8
# Relative difference of the hidden states of two copies of a document in one row, which differ only by where they
# stand. Measured on the architectures of tests/models.py (CPU, bf16 and fp32): at most 0.0005 with restarted
# positions; without, 0.034 for rotary ones (rounding in bf16, harmless) and 0.34 for learned absolute ones.
PROBE_TOLERANCE = 0.1


def attention_inputs(model: PreTrainedModel, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for the decoder's forward (`model.base_model`) that isolate the documents of `batch`.

    A batch of one document per row needs none: padding stands behind the document, where causal attention never
    looks, and the model takes its fast path (`is_causal`) with the positions it counts itself. But where rows are
    longer than a layer looks back, our own attention is told here, or transformers would make masks for it. Otherwise
    `attention_mask` is a (B, 1, T, T) tensor, or a dictionary of them for a model whose layers differ
    (`config.layer_types`), and `position_ids` is passed where the decoder takes it.

    Args:
        dtype: compute dtype, in which eager attention wants its additive mask. SDPA gets a boolean one, and our own
            attention `documents` in the place of a mask, which grow with their number and not with T * T.

    Raises:
        UnsupportedError: the attention implementation or a layer type takes no such mask, or positions cannot restart.
    """
    config, rows = model.base_model.config, batch.input_ids
    implementation, layer_types = config._attn_implementation, getattr(config, "layer_types", None) or []
    if implementation == ATTENTION and model.training and any(getattr(config, name, 0) for name in _DROPOUTS):
        implementation = "sdpa"  # which draws, and would make a mask in each layer
    unknown = sorted(set(layer_types) - set(_LAYER_TYPES))
    if batch.packed and unknown:
        raise UnsupportedError(
            f"Packing cannot be isolated for {config.model_type}: some layers do not attend, but carry a state along.",
            given=", ".join(unknown),
            allowed=", ".join(_LAYER_TYPES),
            fix="set data.packing: false",
        )
    windows = _windows(config, rows.shape[1])
    if not batch.packed and (implementation != ATTENTION or unknown or not any(windows.values())):
        return {}
    masks = {
        kind: _in_form_for(implementation, documents(batch, **limits), rows, dtype) if batch.packed or limits else None
        for kind, limits in windows.items()
    }
    inputs: dict[str, Any] = {"attention_mask": masks if layer_types else masks["all"]}
    if batch.packed and "position_ids" in _parameters(type(model.base_model).forward):
        inputs["position_ids"] = batch.position_ids
    elif batch.packed and _looks_positions_up(model):
        raise not_isolated(model, "it counts positions from the begin of the row, and its decoder takes no others")
    return inputs


def _looks_positions_up(model: PreTrainedModel) -> bool:
    """Whether there are embeddings beside those of tokens; where there are none, attention sees distances alone."""
    tokens = set(model.get_input_embeddings().modules())
    return any(isinstance(module, nn.Embedding) and module not in tokens for module in model.base_model.modules())


def _windows(config: Any, length: int) -> dict[str, dict[str, int]]:
    """Limits on how far each layer type looks back in rows of this length; the type of a uniform model is `all`."""
    sliding, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    window = {"window": sliding} if sliding is not None and sliding <= length else {}
    cut = {"chunk": chunk} if chunk is not None and chunk <= length else {}
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        return {"all": cut if sliding is None else window}
    limits = {"sliding_attention": window, "chunked_attention": cut}
    return {kind: limits.get(kind, {}) for kind in _LAYER_TYPES if kind in layer_types}


def documents(batch: Batch, *, window: int | None = None, chunk: int | None = None) -> Tensor:
    """(1, 1, W, N+1) int32 on the host, in the place of a mask: each position sees its document up to itself, and of
    that the last W positions at most. The last axis is `Batch.bounds`; along the third all is one and the same memory.

    Args:
        window: how far a position looks back, itself included; by default over all of the row.
        chunk: documents are cut into pieces of so many positions.
    """
    length = batch.input_ids.shape[1]
    bounds = batch.bounds
    if chunk is not None:
        spans = itertools.pairwise(bounds.tolist())
        bounds = as_bounds([*(at for first, last in spans for at in range(first, last, chunk)), int(bounds[-1])])
    return bounds.expand(1, 1, length if window is None else min(window, length), -1)


def visible(documents: Tensor, rows: int, length: int, device: torch.device) -> Tensor:
    """(B, 1, T, T) bool: which positions (last axis) a position may see. Each sees itself, so no line is empty."""
    bounds, at = documents[0, 0, 0], torch.arange(rows * length, dtype=torch.int32)
    begins = bounds[torch.searchsorted(bounds, at, right=True) - 1]
    first = torch.maximum(begins, at - (documents.shape[2] - 1)) % length
    seen_T = torch.arange(length, dtype=torch.int32, device=device)
    allowed_BTT = seen_T >= first.to(device, non_blocking=True).view(rows, length, 1)
    allowed_BTT &= seen_T <= seen_T[:, None]
    return allowed_BTT[:, None]


def _in_form_for(attn_implementation: str, documents: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as an attention implementation of transformers takes it, for `rows` of (B, T) tokens."""
    if attn_implementation == ATTENTION:
        return documents
    if attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedError(
            "This attention implementation takes no explicit mask, so packed documents cannot be isolated.",
            given=attn_implementation,
            allowed="sdpa, eager",
            fix="set data.packing: false",
        )
    allowed_B1TT = visible(documents, rows.shape[0], rows.shape[1], rows.device)
    if attn_implementation == "sdpa":
        return allowed_B1TT
    return torch.zeros_like(allowed_B1TT, dtype=dtype).masked_fill_(~allowed_B1TT, torch.finfo(dtype).min)


@lru_cache(maxsize=64)
def _parameters(decoder: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters of a decoder class's forward."""
    return frozenset(inspect.signature(decoder).parameters)


def check_isolation(model: PreTrainedModel) -> None:
    """Prove that `attention_inputs` isolates packed documents in `model`, with a probe of 2 x 16 tokens.

    Call it before adapters and activation policies are applied: it runs one forward and one backward. Weights may be
    frozen and quantized.

    Raises:
        UnsupportedError: a gradient crosses from one document to the other, positions do not restart, or the decoder
            does not take the mask.
    """
    batch = probe_batch(model)
    dtype = model.get_input_embeddings().weight.dtype
    with taking_masks(model):
        fault = isolation_fault(model, batch, attention_inputs(model, batch, dtype=dtype))
    if fault is not None:
        raise not_isolated(model, fault)


@contextmanager
def taking_masks(model: PreTrainedModel) -> Iterator[None]:
    """Within it, what the decoder raises when it is given a mask that isolates documents becomes a clear error.

    Raises:
        UnsupportedError: it was.
    """
    try:
        yield
    except LowMemError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        fault = f"its decoder does not take an explicit attention mask ({type(error).__name__}: {error})"
        raise not_isolated(model, fault) from error


def not_isolated(model: PreTrainedModel, fault: str) -> UnsupportedError:
    """What says that packed documents cannot be told apart in `model`."""
    name = model.config.model_type
    return UnsupportedError(f"Packing cannot be isolated for {name}: {fault}.", fix="set data.packing: false")


def probe_batch(model: PreTrainedModel) -> Batch:
    """The batch for `isolation_fault`: two rows, each with the same random document twice."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    document = torch.randint(0, embedding.weight.shape[0], (PROBE_TOKENS,), generator=generator)
    position = torch.arange(PROBE_TOKENS)
    segment = torch.tensor([1, 2], dtype=torch.int32).repeat_interleave(PROBE_TOKENS)
    rows = [tensor.expand(2, -1).contiguous() for tensor in (document.repeat(2), position.repeat(2), segment)]
    input_ids, position_ids, segment_ids = rows
    count = input_ids.numel()
    bounds = as_bounds(range(0, count + 1, PROBE_TOKENS))
    batch = Batch(input_ids, input_ids, position_ids, segment_ids, tokens=count, loss_tokens=count, bounds=bounds)
    return batch.to(embedding.weight.device)


def isolation_fault(model: PreTrainedModel, batch: Batch, inputs: dict[str, Any]) -> str | None:
    """What crosses between two documents of `PROBE_TOKENS` tokens under `inputs`, or None.

    The same document stands twice in a row, so equal hidden states show that positions restart, and the comparison
    needs no second forward whose kernels (and, in a mixture of experts, whose routing) could differ by rounding. The
    gradient of row 0 comes from its second document, that of row 1 from its first: one backward shows both ways.
    """
    first, second = slice(0, PROBE_TOKENS), slice(PROBE_TOKENS, 2 * PROBE_TOKENS)
    with torch.enable_grad(), evaluating(model), _embeddings_as_leaf(model) as leaves:
        output = model.base_model(input_ids=batch.input_ids, use_cache=False, **inputs)
        hidden_BTD = output[0]
        loss = hidden_BTD[0, second].float().square().sum() + hidden_BTD[1, first].float().square().sum()
        (gradient_BTD,) = torch.autograd.grad(loss, leaves)
    if not (gradient_BTD[0, second].any() and gradient_BTD[1, first].any()):
        return "its hidden states do not depend on its input embeddings"
    if gradient_BTD[0, first].any() or gradient_BTD[1, second].any():
        return "a packed document sees its neighbour"
    copies_BTD = hidden_BTD.detach().float()
    difference = (copies_BTD[:, first] - copies_BTD[:, second]).norm() / copies_BTD[:, first].norm()
    if not difference <= PROBE_TOLERANCE:
        return f"positions do not restart in each document (hidden states differ by {difference:.3f})"
    return None


@contextmanager
def _embeddings_as_leaf(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within, each output of the input embedding is cut from the graph, requires a gradient, and is listed."""
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # some decoders scale their embeddings in place

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()
