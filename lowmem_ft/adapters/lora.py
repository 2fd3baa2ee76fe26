"""LoRA, rsLoRA and DoRA over a frozen linear layer, as one autograd Function.

The base weight is looked up through `quant.linear.get_base_weight` in forward and once more in backward, so a
quantized weight exists in full precision only while a matmul reads it, and a streamed weight may be replaced
between the two. The only activation saved is the layer's input, as the tensor that came in: projections that read
the same input (q/k/v, gate/up) share one storage. `x A^T` is a rank wide and cheaper to recompute than to keep.

Legend: N tokens, I in features, O out features, R rank.

Hu et al. 2021, "LoRA" (arXiv:2106.09685); Kalajdzievski 2023, "rsLoRA" (arXiv:2312.03732); Liu et al. 2024,
"DoRA" (arXiv:2402.09353), whose weight norm is treated as a constant in backward (section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lowmem_ft.core.config import Init
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.quant.linear import get_base_weight
from lowmem_ft.quant.products import as_rows, mm, mm_low_rank

WeightSource = Callable[[torch.dtype], Tensor]

_DORA_ROWS = 1024  # rows of W whose gradient-sized product exists at a time in the magnitude's gradient


class LoraLinear(nn.Module):
    """`y = x W^T + b + s (dropout(x) A^T) B^T` over a frozen linear layer; DoRA where `magnitude` is set.

    Args:
        base_layer: nn.Linear, QuantLinear or transformers' Conv1D; it is kept, never copied or changed.
        rank: R.
        alpha: the update is scaled by alpha / R, or by alpha / sqrt(R) with `rslora`.
        dropout: probability of zeroing an input element on the low-rank path, in training mode.
        dora: learn the norm of each row of W + s B A; as peft does, DoRA's dropout acts on the direction only.
        dtype: of A and B. The magnitude is float32: in bf16 it could not even hold the norm it starts from.

    Shapes: `lora_A` (R, I), `lora_B` (O, R), `magnitude` (O,). Input (..., I) of any float dtype; the output
    (..., O) and the matmuls have the input's dtype.
    """

    magnitude: nn.Parameter | None
    unread = False  # set while nobody reads the values of the output, see runtime.activations

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        init: Init = "default",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = linear_shape(base_layer)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = lora_scaling(rank, alpha, rslora=rslora)
        self.enabled = True
        device = module_device(base_layer)
        self.lora_A = nn.Parameter(
            initial_factor(rank, self.in_features, rank=rank, init=init, dtype=dtype, device=device)
        )
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        self.register_parameter("magnitude", None)
        if dora:
            with torch.no_grad():
                norm_O = torch.linalg.vector_norm(get_base_weight(base_layer), dim=1, dtype=torch.float32)
            self.magnitude = nn.Parameter(norm_O.to(device))
        self.train(base_layer.training)

    def __setattr__(self, name: str, value: Any) -> None:
        # the forward reads the matrix below: an adapter of peft's (`all-linear` finds the place) would learn nothing
        if name == "base_layer" and isinstance(value, BaseTunerLayer):
            raise UnsupportedError(
                "The model has an adapter already, and takes none of peft's inside of that.",
                given=f"peft's {type(value).__name__} in the place of a base layer",
                fix="load the model with adapter=False, and give that to peft, or with peft_config to TRL's trainer",
            )
        super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The base layer's own weight, without the adapter; for code that asks for its dtype or device."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            y: Tensor = self.base_layer(x)
            return y
        p = self.dropout if self.training else 0.0
        return lora_linear(
            x, self.lora_A, self.lora_B, self.bias, self.magnitude,
            weight=self.base_weight, scaling=self.scaling, p=p, unread=self.unread,
        )  # fmt: skip

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """W as (O, I) of `dtype`, looked up anew at each call."""
        return get_base_weight(self.base_layer, dtype=dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, dora={self.magnitude is not None}"


def lora_linear(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None,
    *,
    weight: WeightSource,
    scaling: float,
    p: float,
    unread: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The adapted linear map of x (..., I) to (..., O); see `LoraLinear`.

    Without a magnitude G of them are computed at once: of (G, R, I), (G, O, R), a bias (G, O) and x (G, N, I).

    Args:
        weight: returns W (O, I), or (G, O, I), in the dtype it is given; called in forward and again in backward.
        scaling: s.
        p: dropout probability, 0 for none.
        unread: the output's values are not wanted, only its gradients: it stays uninitialised where those allow it.
        out: (..., O), what to return; filled where the output would be.
    """
    y: Tensor = _LoraFunction.apply(  # type: ignore[no-untyped-call]
        x, lora_A, lora_B, bias, magnitude, weight, scaling, p, unread, out
    )
    return y


class _LoraFunction(torch.autograd.Function):
    """With z = d(x) W^T + s (d(x) A^T) B^T, where d is the dropout:

    LoRA: y = x W^T + b + s (d(x) A^T) B^T.
    DoRA: y = c z + (x - d(x)) W^T + b with c = magnitude / ||W + s B A||, the norm held constant.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        magnitude: Tensor | None,
        weight: WeightSource,
        scaling: float,
        p: float,
        unread: bool,
        out: Tensor | None,
    ) -> Tensor:
        ctx.weight, ctx.scaling, ctx.p = weight, scaling, p
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.seed = _dropout_seed(x) if p > 0.0 else 0
        # not a view, which the model could not change in place (Falcon)
        y = x.new_empty(*x.shape[:-1], lora_B.shape[-2]) if out is None else out
        if unread and magnitude is None and p == 0.0:
            ctx.save_for_backward(x, lora_A, lora_B, None, None)
            return y
        x_NI = as_rows(x, stacked=lora_A.ndim == 3)
        W_OI: Tensor = weight(x.dtype)
        A_RI, B_OR = lora_A.to(x.dtype), lora_B.to(x.dtype)
        kept_NI = _dropout_mask(x_NI, p, ctx.seed).mul_(x_NI) if p > 0.0 else x_NI
        norm_O = None
        y_NO = y.view(*x_NI.shape[:-1], y.shape[-1])
        xA_NR = mm(kept_NI, A_RI.mT) if p > 0.0 else None
        update: dict[str, Any] = {"by": A_RI.mT, "out": y_NO} if xA_NR is None else {"c_NR": xA_NR, "out": y_NO}
        if magnitude is None:
            start = None if bias is None else bias.to(x.dtype)
            mm_low_rank(x_NI, W_OI.mT, B_OR.mT, scaling, bias=start, **update)
        else:
            mm_low_rank(kept_NI, W_OI.t(), B_OR.t(), scaling, **update)
            norm_O = _adapted_row_norm(W_OI, A_RI, B_OR, scaling)
            y_NO.mul_(magnitude / norm_O)
            if p > 0.0:
                y_NO.add_(mm(x_NI - kept_NI, W_OI.t()))
            if bias is not None:
                y_NO.add_(bias)
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, norm_O)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, magnitude, norm_O = ctx.saved_tensors
        need_x, need_A, need_B, need_bias, need_magnitude = ctx.needs_input_grad[:5]
        scaling, p = ctx.scaling, ctx.p
        x_NI, dy_NO = (as_rows(it, stacked=lora_A.ndim == 3) for it in (x, dy))
        A_RI, B_OR = lora_A.to(x.dtype), lora_B.to(x.dtype)
        mask_NI = _dropout_mask(x_NI, p, ctx.seed) if p > 0.0 else None
        kept_NI = x_NI if mask_NI is None else mask_NI * x_NI
        c_O1 = None if magnitude is None else (magnitude / norm_O).unsqueeze(1)
        B_scaled_OR = B_OR if c_O1 is None else (B_OR * c_O1).to(x.dtype)
        dx = dA = dB = dbias = dmagnitude = None
        if need_x:
            W_OI = ctx.weight(x.dtype)
            scaled_OI = W_OI if c_O1 is None else (W_OI * c_O1).to(x.dtype)
            if mask_NI is not None and c_O1 is None:
                dyB_NR = mm(dy_NO, B_OR)
                dx_NI = mm(dy_NO, W_OI).add_(mm(dyB_NR, A_RI).mul_(mask_NI), alpha=scaling)
            else:
                dx_NI, dyB_NR = mm_low_rank(dy_NO, scaled_OI, A_RI, scaling, by=B_scaled_OR)
            if mask_NI is not None and c_O1 is not None:
                dx_NI.mul_(mask_NI).add_(mm(dy_NO, W_OI).mul_(1 - mask_NI))
            dx = dx_NI.view(x.shape)
            del W_OI, scaled_OI
        else:
            dyB_NR = mm(dy_NO, B_scaled_OR)
        if need_A:
            dA = mm(dyB_NR.mT, kept_NI).mul_(scaling).to(lora_A.dtype)
        if need_B or need_magnitude:
            dyxA_OR = mm(dy_NO.mT, mm(kept_NI, A_RI.mT))
            dB = (dyxA_OR * (scaling if c_O1 is None else scaling * c_O1)).to(lora_B.dtype)
            if need_magnitude:
                dyz_O = scaling * torch.linalg.vecdot(dyxA_OR.float(), B_OR.float())
                dyz_O += _summed_products(dy_NO, kept_NI, ctx.weight(x.dtype))
                dmagnitude = dyz_O.div_(norm_O).to(magnitude.dtype)
        if need_bias:
            dbias = dy_NO.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dA, dB, dbias, dmagnitude, None, None, None, None, None


def _summed_products(dy_NO: Tensor, x_NI: Tensor, W_OI: Tensor) -> Tensor:
    """sum over tokens of dy * (x W^T), float32 (O,), without forming x W^T: row by row (dy^T x) . W."""
    parts = [slice(row, row + _DORA_ROWS) for row in range(0, W_OI.shape[0], _DORA_ROWS)]
    return torch.cat([mm(dy_NO[:, part].t(), x_NI).float().mul_(W_OI[part]).sum(1) for part in parts])


def _adapted_row_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """||W + s B A|| of each row, float32 (O,), without forming the sum.

    ||W_i||^2 + 2 s B_i . (A W_i^T) + s^2 B_i (A A^T) B_i^T: the widest temporary is (O, R).
    """
    A_RI, B_OR = A_RI.float(), B_OR.float()
    cross_OR = mm(W_OI, A_RI.to(W_OI.dtype).t()).float()
    square_O = torch.linalg.vector_norm(W_OI, dim=1, dtype=torch.float32).square_()
    square_O += torch.linalg.vecdot(B_OR, 2 * scaling * cross_OR + scaling**2 * (B_OR @ (A_RI @ A_RI.t())))
    # rounding may leave a row that cancels just below zero
    norm_O: Tensor = square_O.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()
    return norm_O


def _dropout_seed(x: Tensor) -> int:
    """A number from the host's default generator, which activation checkpointing sets back when it recomputes.

    Kept until backward instead of the generator's state, of which a CPU's takes 5 KB for each layer.
    """
    return 0 if x.is_meta else int(torch.randint(1 << 62, ()))


def _dropout_mask(like_NI: Tensor, p: float, seed: int) -> Tensor:
    """0 with probability p, else 1 / (1 - p), shaped as the input; the same again from the same seed."""
    generator = None if like_NI.is_meta else torch.Generator(device=like_NI.device).manual_seed(seed)
    return torch.empty_like(like_NI).bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out features, in features) of a linear layer, whichever way it stores its weight."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, nn.Linear | LoraLinear):
        return layer.out_features, layer.in_features
    raise TypeError(f"not a linear layer: {type(layer).__name__}")


def lora_scaling(rank: int, alpha: float, *, rslora: bool) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def initial_factor(
    rows: int, columns: int, *, rank: int, init: Init, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A's start, (rows, columns); B starts at zero, so the adapted model starts as the base model.

    Drawn on the host in float32, so that a seed gives the same adapter on every device.
    """
    start = torch.empty(rows, columns, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu")
    if init == "default":
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
    else:
        nn.init.normal_(start, std=1 / rank)
    return start.to(device=device, dtype=dtype)


def module_device(module: nn.Module) -> torch.device:
    """Where the module's tensors lie."""
    return next(tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors).device
