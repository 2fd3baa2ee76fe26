"""How models attend: through our operator (`runtime.attention`), or on a card by another kernel that is called by name.

Our operator is registered with transformers as the attention implementation `ATTENTION`, for training and evaluation.
Whatever else a model asks for (a key-value cache, dropout, a prefix) goes to transformers' own SDPA function, and some
models call PyTorch's themselves. Which kernel that picks depends on its version, the card and cuDNN's version: on an
H200 torch 2.11 took cuDNN's, and where a mask meets heads that share keys plain mathematics, with all scores. So on a
card it is chosen here, and a plan knows what it takes. On a CPU its backward of 16-bit floats has oneDNN compile three
kernels for each length, which stay: 383 MiB after 127 lengths up to 1024.

Letters in shapes: B rows, H query heads, G key-value heads, T queries, S keys, E head size, V that of values.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask, sliding_window_causal_mask_function

from lowmem_ft.data.isolation import ATTENTION, visible
from lowmem_ft.runtime.attention import attention
from lowmem_ft.runtime.attention_cuda import additive, padded, repeated, takes_flash
from lowmem_ft.runtime.blocks import find_blocks
from lowmem_ft.runtime.documents import tells_documents

_PLAIN = frozenset({"sliding_window", "position_ids", "output_attentions", "use_cache", "cache_position"})


def use_attention(model: PreTrainedModel, *, on_card: bool = False) -> None:
    """Let `model` attend through `attention`, if it goes by transformers' attention interface with SDPA, or would if
    that knew sinks and capped scores; if it calls PyTorch's function itself, by `attend_by_operator`, or `on_card` by
    `attend_on_card`.
    """
    beyond = model.config._attn_implementation == "eager" and (_has_sinks(model) or _caps_scores(model.config))
    if model.config._attn_implementation != "sdpa" and not beyond:
        return
    if type(model)._supports_attention_backend and not _makes_masks(model.config):
        AttentionInterface.register(ATTENTION, _transformers_attention)
        AttentionMaskInterface.register(ATTENTION, _transformers_mask)
        model.config._attn_implementation = ATTENTION
    elif not beyond:
        attend_within(find_blocks(model)[1], lambda: Attending(attend_on_card if on_card else attend_by_operator))


def _has_sinks(model: nn.Module) -> bool:
    """Whether attention has sinks, of which transformers' SDPA function knows nothing."""
    return any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in model.modules())


def _caps_scores(config: Any) -> bool:
    """Whether it caps the scores of attention (Gemma 2), which transformers' SDPA function leaves out."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def _makes_masks(config: Any) -> bool:
    """Whether attention changes its mask before it calls the interface: Doge, and where an indexer chooses keys, whose
    choice is put into masks of the implementations that transformers knows, and else left out."""
    return config.model_type == "doge" or hasattr(config.get_text_config(), "index_topk")


class Asked(NamedTuple):
    """The arguments of PyTorch's `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class Attending(TorchFunctionMode):
    """Within it `scaled_dot_product_attention` is `kernel`, but where that returns None."""

    def __init__(self, kernel: Callable[[Asked], Tensor | None]) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            out = self._kernel(Asked(*args, **kwargs))
            if out is not None:
                return out
        return func(*args, **kwargs)


class SingleQueries(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it a CPU multiplies single queries with keys, and their scores with values, in fp32.

    Of 16-bit floats oneDNN compiles both products for each number of keys, and keeps them: with attention that calls
    them itself (eager), four answers of 250 tokens made a process of a tiny BLOOM 0.5 GB larger.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _BATCHED:
            a = args[_BATCHED[func]]
            if a.shape[1] == 1 and a.device.type == "cpu" and a.dtype in (torch.bfloat16, torch.float16):
                return func(*(it.float() for it in args), **(kwargs or {})).to(a.dtype)
        return func(*args, **(kwargs or {}))


_BATCHED = {torch.ops.aten.bmm.default: 0, torch.ops.aten.baddbmm.default: 1}  # which argument is the first factor


def attend_within(blocks: Iterable[nn.Module], mode: Callable[[], TorchFunctionMode]) -> None:
    """Let the forward of each of `blocks` run within a mode of its own, also where backward calls it once more, which
    a mode that is entered once for all would not reach."""

    def within(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def attending(*args: Any, **kwargs: Any) -> Any:
            with mode():
                return forward(*args, **kwargs)

        return attending

    for block in blocks:
        block.forward = within(block.forward)


def attend_on_card(asked: Asked, *, capability: tuple[int, int] | None = None) -> Tensor | None:
    """(B, H, T, E), (B, G, S, E), (B, G, S, V) -> (B, H, T, V), as PyTorch's function with these arguments.

    Args:
        capability: of the card; by default that which holds the tensors.

    Returns:
        None where PyTorch chooses, see `_unserved`.
    """
    ours = attend_by_operator(asked)
    if ours is not None or _unserved(asked):
        return ours
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = asked
    size, wide, alike = query.shape[3], value.shape[3], key.shape[2] == query.shape[2]
    scale = size**-0.5 if scale is None else scale
    q, k, v = padded(query), padded(key), padded(value)
    flashes = takes_flash(q, capability, drops=dropout_p > 0.0)
    if attn_mask is None and size == wide and (alike or not is_causal) and flashes:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        out: Tensor = flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
        heads = q, repeated(q, k), repeated(q, v)
        out = efficient(*heads, additive(q, attn_mask), True, dropout_p, is_causal, scale=scale)[0]
    return out[..., :wide]


def attend_by_operator(asked: Asked) -> Tensor | None:
    """The same by `attention`; None where what is asked for is something else."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = asked
    seen = is_causal if attn_mask is None else attn_mask.dtype == torch.bool
    alike = query.shape[2:] == key.shape[2:] == value.shape[2:]
    if _unserved(asked) or not seen or not alike or dropout_p > 0.0:
        return None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return attention(query, key, value, attn_mask, scale).transpose(1, 2)


def _unserved(asked: Asked) -> bool:
    """Single queries, of answers that are generated, and masks that learn or are no masks of (B or 1, H or 1, T, S)."""
    query, mask = asked.query, asked.attn_mask
    if query.ndim != 4 or query.shape[2] == 1:
        return True
    return mask is not None and (mask.requires_grad or mask.ndim != 4)


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (B, H, T, E), (B, G, T, E) -> (B, T, H, E). Sinks come as `s_aux`."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    shapes = query.shape[-2:] == key.shape[-2:] == value.shape[-2:] and query.shape[2] > 1
    packed = tells_documents(attention_mask)
    masked = packed or (attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.ndim == 4)
    asked = any(value is not None and value is not False for name, value in kwargs.items() if name not in _PLAIN)
    if not shapes or dropout > 0 or asked or not (masked or (attention_mask is None and causal)):
        if attention_mask is not None and packed:
            attention_mask = visible(attention_mask, query.shape[0], query.shape[2], query.device)
        if s_aux is not None or softcap is not None:
            capped = {} if softcap is None else {"softcap": softcap}
            return _eagerly(module, query, key, value, attention_mask, dropout, scaling, **capped), None
        with Attending(attend_on_card) if query.is_cuda else nullcontext():
            result: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kept = getattr(module, "attended", None)
    return attention(query, key, value, attention_mask, scale, kept, s_aux, softcap), None


def _eagerly(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """By the model's own function, with all scores: single queries, of answers that are generated, and dropout."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    elif mask is None and query.shape[2] > 1:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        hidden = ~seen.tril_(key.shape[2] - query.shape[2])
        mask = query.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(query.dtype).min)[None, None]
    own = sys.modules[type(module).__module__].eager_attention_forward
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with SingleQueries() if query.device.type == "cpu" else nullcontext():  # type: ignore[no-untyped-call]
        out: Tensor = own(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)[0]
    return out


def _transformers_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' SDPA mask: none where plain causal attention is meant, and one for all rows where a window is.

    To see which, transformers looks at the values of position ids, which a simulated run does not have: there it would
    make a mask for each row. What `data.isolation.attention_inputs` tells of never comes here.
    """
    window = kwargs.get("local_size")
    simulated = torch.device(kwargs.get("device", "cpu")).type == "meta"
    if simulated and kwargs.get("attention_mask") is None:
        if window is None or kwargs["kv_length"] < window:
            return None
        kwargs["mask_function"] = sliding_window_causal_mask_function(window)
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask
