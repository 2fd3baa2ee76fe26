"""RMS normalization without copies of all tokens in fp32.

The models' own takes four such copies at once in backward, and keeps one until then: with long sequences the norm
behind the last block is where memory peaks. Here forward keeps one number for each token, and both passes work on some
tokens at a time, or in one kernel on a card. Values are rounded where the models round them.

Letters in shapes: N tokens (all axes but the last), D features. Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# Bytes in fp32 that are worked on at a time: on a CPU what its cache holds (four times as fast as with 4 MiB), on a
# card enough to fill it
TILE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


class RMSNorm(nn.Module):
    """y = w * x / rms(x), the quotient rounded to the dtype of x as Llama does; with `offset` (1 + w) * x / rms(x),
    rounded once, as Gemma does.

    Args:
        weight: w, (D,).
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float, *, offset: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.offset)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, offset={self.offset}"


def use_norms(model: nn.Module) -> None:
    """Put an `RMSNorm` in the place of every module of `model` that computes as Llama's or Gemma's norms do."""
    for path, module in list(model.named_modules()):
        if _same(type(module), LlamaRMSNorm, "forward"):
            model.set_submodule(path, RMSNorm(module.weight, module.variance_epsilon, offset=False))
        elif _same(type(module), GemmaRMSNorm, "forward") and _same(type(module), GemmaRMSNorm, "_norm"):
            model.set_submodule(path, RMSNorm(module.weight, module.eps, offset=True))


def _same(kind: type, known: type, name: str) -> bool:
    """Whether two classes have the same code under this name: transformers copies it from model to model."""
    code, other = (getattr(getattr(it, name, None), "__code__", None) for it in (kind, known))
    return code is not None and other is not None and _told(code) == _told(other)


def _told(code: Any) -> tuple[Any, ...]:
    """What a function does, without its documentation."""
    return code.co_code, code.co_names, tuple(it for it in code.co_consts if not isinstance(it, str))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        y: Tensor
        y, rstd = torch.ops.lowmem_ft.rms_norm.default(x, weight, eps, offset)
        ctx.offset = offset
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.lowmem_ft.rms_norm_backward.default(dy, x, weight, rstd, ctx.offset)
        if ctx.needs_input_grad[1]:
            dweight = torch.ops.lowmem_ft.rms_norm_weight_backward.default(dy, x, weight, rstd, ctx.offset)
        return dx, dweight, None, None


torch.library.define("lowmem_ft::rms_norm", "(Tensor x, Tensor weight, float eps, bool offset) -> (Tensor, Tensor)")
_OF_BACKWARD = "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool offset) -> Tensor"
torch.library.define("lowmem_ft::rms_norm_backward", _OF_BACKWARD)
torch.library.define("lowmem_ft::rms_norm_weight_backward", _OF_BACKWARD)


@torch.library.register_fake("lowmem_ft::rms_norm")  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    return _empty(x, weight, offset)


@torch.library.register_fake("lowmem_ft::rms_norm_backward")  # type: ignore[untyped-decorator]
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("lowmem_ft::rms_norm_weight_backward")  # type: ignore[untyped-decorator]
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: bool) -> Tensor:
    return torch.empty_like(weight)


def tile_rows(x: Tensor, kind: str) -> int:
    """Tokens that are worked on at a time on a device of this kind."""
    return min(x.numel() // x.shape[-1], max(1, TILE_BYTES[kind] // (4 * x.shape[-1])))


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tokens of each, some at a time: views, (rows, last axis). What works on them is a function of its own,
    or names would hold what was made for one tile while the next is worked on."""
    rows = tile_rows(tensors[0], tensors[0].device.type)
    flat = [it.flatten(0, -2) for it in tensors]
    for start in range(0, len(flat[0]), rows):
        yield tuple(it[start : start + rows] for it in flat)


@torch.library.impl("lowmem_ft::rms_norm", "default")
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    if x.is_cuda and fused(x, weight, offset):
        y, rstd = torch.ops.aten._fused_rms_norm.default(x, weight.shape, None, eps)
        return y.mul_(weight), rstd
    y, rstd = _empty(x, weight, offset)
    for x_tile, y_tile, rstd_tile in _tiles(x, y, rstd):
        _normalize(x_tile, y_tile, rstd_tile, weight, eps, offset)
    return y, rstd


def _normalize(x: Tensor, y: Tensor, rstd: Tensor, weight: Tensor, eps: float, offset: bool) -> None:
    rstd.copy_(torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).add_(eps)))
    wide = x.float() * rstd
    y.copy_(wide.mul_(1.0 + weight.float()) if offset else weight * wide.to(x.dtype))


@torch.library.impl("lowmem_ft::rms_norm_backward", "default")
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: bool) -> Tensor:
    if x.is_cuda and fused(x, weight, offset):
        rms = torch.ops.aten._fused_rms_norm_backward.default
        fused_dx: Tensor = rms(dy * weight, x, weight.shape, rstd, None, [True, False])[0]
        return fused_dx
    dx = x.new_empty(x.shape)
    for dy_tile, x_tile, rstd_tile, dx_tile in _tiles(dy, x, rstd, dx):
        _differentiate(dy_tile, x_tile, rstd_tile, dx_tile, weight, offset)
    return dx


def _differentiate(dy: Tensor, x: Tensor, rstd: Tensor, dx: Tensor, weight: Tensor, offset: bool) -> None:
    scaled = dy.float() * (1.0 + weight.float()) if offset else (dy * weight).float()
    unit = x.float() * rstd
    unit.mul_((scaled * unit).mean(-1, keepdim=True))
    dx.copy_(scaled.sub_(unit).mul_(rstd))


@torch.library.impl("lowmem_ft::rms_norm_weight_backward", "default")
def rms_norm_weight_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: bool) -> Tensor:
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for dy_tile, x_tile, rstd_tile in _tiles(dy, x, rstd):
        total += _of_weight(dy_tile, x_tile, rstd_tile, offset)
    return total.to(weight.dtype)


def _of_weight(dy: Tensor, x: Tensor, rstd: Tensor, offset: bool) -> Tensor:
    unit = x.float() * rstd
    if not offset:
        unit = unit.to(x.dtype).float()
    return unit.mul_(dy).sum(0)


def fused(x: Tensor, weight: Tensor, offset: bool) -> bool:
    """Whether PyTorch's kernel for cards does it, with a quotient that is rounded before w comes in."""
    return not offset and weight.dtype == x.dtype


def _empty(x: Tensor, weight: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
