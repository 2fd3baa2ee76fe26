"""Output head and cross-entropy in one, chunk by chunk: the logits of all tokens never exist at once.

The idea of computing the gradient with the loss, while a chunk's logits are there, is from Liger Kernel (Hsu et al.
2024, arXiv:2410.10989). Letters in names: N tokens, D hidden size, V vocabulary, K tokens in the loss, C a chunk of
them, R a few rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.quant.products import mm
from lowmem_ft.runtime.blocks import causal_model, find_decoder

# fp32 logits are made for this many elements at a time (8 MiB). On the CPU that stays in the cache: measured on one
# Zen 4 core at V = 32000, 25% faster than a chunk at once; on a GPU a kernel over it takes longer than its launch.
_SLAB = 1 << 21
# Rows of a chunk are filled up to this multiple, so that steps with other numbers of loss tokens multiply matrices of
# the same few sizes: oneDNN compiles a kernel for each new one and keeps it (1 MB more after each step otherwise).
_ROWS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """logits = softcap(scale * (h W^T + b)), softcap(z) = cap * tanh(z / cap).

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        softcap: `cap`, or None where the model has none.
        scale: factor on the logits before the cap; where a model scales the hidden states instead, that factor.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def scratch_bytes(self, chunk_tokens: int) -> int:
        """What the loss takes, at most, beside the gradients that it returns: logits of one chunk and fp32 slabs."""
        vocabulary, hidden = self.weight.shape
        slab = 4 * min(max(_SLAB, vocabulary), chunk_tokens * vocabulary)
        per_token = (vocabulary + 2 * hidden) * self.weight.element_size()
        return chunk_tokens * per_token + slab * (1 if self.softcap is None else 2)


def chunked_cross_entropy(
    hidden_ND: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    chunk_tokens: int,
    grad_scale: float = 1.0,
    ignore_index: int = -100,
    kept: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of all tokens whose label is not `ignore_index`, differentiable.

    Args:
        hidden_ND: what the head reads, in any floating dtype; it is computed in the dtype of `head.weight`.
        labels_N: int64, the target of each row, already shifted.
        chunk_tokens: so many rows of logits exist at once. Only rows in the loss are computed.
        grad_scale: factor on all gradients, applied in fp32 before they are rounded.
        kept: how many labels are not `ignore_index`, if the caller knows; else they are counted, which waits for the
            device and cannot work on fake tensors.

    Returns:
        fp32 scalar. Gradients go to `hidden_ND` and to the head's weight and bias where these require grad.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight, head.bias, labels_N, head, chunk_tokens, grad_scale, ignore_index, kept
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are ready after forward, so that backward only hands them out, once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        head: Head,
        chunk_tokens: int,
        grad_scale: float,
        ignore_index: int,
        kept: int | None,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        bias_grad = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        loss, hidden_grad = cross_entropy_and_gradients(
            hidden_ND,
            labels_N,
            head,
            chunk_tokens=chunk_tokens,
            grad_scale=grad_scale,
            ignore_index=ignore_index,
            kept=kept,
            hidden_grad=wants_hidden,
            weight_grad=weight_grad,
            bias_grad=bias_grad,
        )
        ctx.gradients = hidden_grad, weight_grad, bias_grad
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy can be differentiated once: it frees its gradients")
        gradients, ctx.gradients = ctx.gradients, None
        # multiplied even by one: to look at the factor first would wait for the device
        scaled = [None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in gradients]
        return *scaled, None, None, None, None, None, None


@torch.no_grad()
def cross_entropy_and_gradients(
    hidden_ND: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    chunk_tokens: int,
    grad_scale: float = 1.0,
    ignore_index: int = -100,
    kept: int | None = None,
    hidden_grad: bool = True,
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunked_cross_entropy` without autograd: loss and gradients in one go.

    Args:
        hidden_grad: whether the gradient of `hidden_ND` is wanted.
        weight_grad: fp32 (V, D), to which the gradient of the head's weight is *added*: given the buffer in which a
            step accumulates, a trained head needs no gradient tensor beside it.
        bias_grad: fp32 (V,), likewise.

    Returns:
        The loss, an fp32 scalar, and the gradient (N, D) in the dtype of `hidden_ND` or None.
    """
    tokens, vocabulary = hidden_ND.shape[0], head.weight.shape[0]
    in_loss_N = labels_N != ignore_index
    if kept is None:
        kept = int(in_loss_N.sum())
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    grad_ND = torch.zeros_like(hidden_ND) if hidden_grad else None
    differentiate = hidden_grad or weight_grad is not None or bias_grad is not None
    rows_K = torch.nonzero_static(in_loss_N, size=kept).squeeze(1)
    chunk = min(chunk_tokens, -(-kept // _ROWS) * _ROWS)
    logits_CV = head.weight.new_empty(chunk, vocabulary)
    hidden_CD = head.weight.new_empty(chunk, hidden_ND.shape[1])
    slab = head.weight.new_empty(min(chunk, max(1, _SLAB // vocabulary)), vocabulary, dtype=torch.float32)
    slope = None if head.softcap is None else torch.empty_like(slab)
    for start in range(0, kept, max(chunk, 1)):
        rows_C = rows_K[start : start + chunk]
        count = len(rows_C)
        hidden_CD[:count] = hidden_ND.index_select(0, rows_C)
        hidden_CD[count:] = 0.0
        labels_C1 = labels_N.index_select(0, rows_C).unsqueeze(1)
        mm(hidden_CD, head.weight.t(), bias=head.bias, out=logits_CV)
        for at in range(0, count, len(slab)):
            logits_RV, labels_R1 = logits_CV[at : min(at + len(slab), count)], labels_C1[at : at + len(slab)]
            loss += _rows(logits_RV, labels_R1, slab, slope, head, grad_scale if differentiate else None)
        logits_CV[count:] = 0.0
        if grad_ND is not None:
            grad_ND.index_copy_(0, rows_C, mm(logits_CV, head.weight)[:count].to(grad_ND.dtype))
        if weight_grad is not None:
            # in pieces, because the product comes in the compute dtype before it is added in fp32
            height = max(1, _SLAB // weight_grad.shape[1])
            for at in range(0, vocabulary, height):
                weight_grad[at : at + height].add_(mm(logits_CV[:, at : at + height].t(), hidden_CD))
        if bias_grad is not None:
            bias_grad.add_(logits_CV.sum(0, dtype=torch.float32))
    assert tokens == labels_N.shape[0]
    return loss, grad_ND


def _rows(
    logits_RV: Tensor, labels_R1: Tensor, slab: Tensor, slope: Tensor | None, head: Head, grad_scale: float | None
) -> Tensor:
    """Summed loss of a few rows; their `logits_RV` (before scale and cap) become d(loss)/d(logits) * grad_scale."""
    z_RV = slab[: len(logits_RV)]
    z_RV.copy_(logits_RV)
    if head.scale != 1.0:
        z_RV.mul_(head.scale)
    if head.softcap is not None and slope is not None:
        slope = slope[: len(logits_RV)]
        z_RV.div_(head.softcap).tanh_()
        torch.mul(z_RV, z_RV, out=slope).neg_().add_(1.0)
        z_RV.mul_(head.softcap)
    target_R1 = z_RV.gather(1, labels_R1)
    largest_R1 = z_RV.amax(1, keepdim=True)
    sum_R1 = z_RV.sub_(largest_R1).exp_().sum(1, keepdim=True)
    loss = (sum_R1.log() + largest_R1 - target_R1).sum()
    if grad_scale is not None:
        factor = grad_scale * head.scale
        z_RV.mul_(factor / sum_R1)
        z_RV.scatter_add_(1, labels_R1, torch.full_like(target_R1, -factor))
        if slope is not None:
            z_RV.mul_(slope)
        logits_RV.copy_(z_RV)
    return loss


def head_of(model: nn.Module) -> Head:
    """The output head of `model`, with the scale and soft cap that its forward applies.

    These are measured, not looked up: architectures name them differently (of two with `logits_scaling` one divides by
    it and one multiplies). The model's own forward runs with known hidden states in place of its decoder's and known
    logits in place of the head's, on the CPU and without touching a weight, so it works on meta and fake models too.

    Raises:
        UnsupportedError: the head is no plain linear layer, or the forward does something else to hidden states or
            logits than a scale and a soft cap.
    """
    causal = causal_model(model)
    linear = causal.get_output_embeddings()
    if hasattr(linear, "modules_to_save"):  # peft trains a copy
        linear = linear.modules_to_save[linear.active_adapters[0]]
    if type(linear) is not nn.Linear:
        raise _unsupported(causal, f"its head is {type(linear).__name__}, not a plain linear layer")
    with torch.no_grad():
        factor, softcap = _measure(causal, find_decoder(model), linear)
    return Head(weight=linear.weight, bias=linear.bias, softcap=softcap, scale=factor)


class _Hidden(MoeModelOutputWithPast):  # type: ignore[misc]
    """A decoder's output of which only the last hidden states are known."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _measure(causal: nn.Module, decoder: nn.Module, linear: nn.Linear) -> tuple[float, float | None]:
    """(scale, soft cap) of the forward of `causal` between decoder, head and returned logits."""
    generator = torch.Generator("cpu").manual_seed(0)
    # eighths are exact in every dtype that a forward may cast to; the second token is larger, to show a norm
    hidden = torch.randint(-16, 17, (1, 2, linear.in_features), generator=generator, device="cpu") / 8.0
    hidden[:, 1] *= 4.0
    noise = torch.randn(1, 2, linear.out_features, generator=generator, device="cpu")
    before, small = _probe(causal, decoder, linear, hidden, noise * 1e-4)  # a cap leaves these alone
    _, large = _probe(causal, decoder, linear, hidden, noise.sign() * 1e6)
    _, middle = _probe(causal, decoder, linear, hidden, noise * 20.0)
    scale_before, scale_after = _slope(hidden, before), _slope(noise * 1e-4, small)
    capped = bool(large.abs().max() < 1e5 * abs(scale_after))
    softcap = float(large.abs().max()) if capped else None
    ours = noise * 20.0 * scale_after
    ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
    # hidden states may be cast to bf16 on their way (2^-9); logits are fp32 on both sides: a few roundings of 6e-8
    if not (torch.allclose(before, hidden * scale_before, rtol=2**-8) and torch.allclose(middle, ours, rtol=1e-5)):
        raise _unsupported(causal, "its forward changes the logits by more than a scale and a soft cap")
    if scale_before != 1.0 and linear.bias is not None:
        raise _unsupported(causal, "it scales the hidden states of a head that has a bias")
    return scale_before * scale_after, softcap


def _probe(causal: Any, decoder: Any, linear: Any, hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(what the head was given, what the model returned), fp32, for these hidden states and these raw logits."""
    received: list[Tensor] = []

    def run_decoder(*args: object, **kwargs: object) -> _Hidden:
        return _Hidden(last_hidden_state=hidden)

    def run_head(given: Tensor) -> Tensor:
        received.append(given)
        return logits.clone()

    before = [(module, vars(module).get("forward")) for module in (decoder, linear)]
    try:
        decoder.forward, linear.forward = run_decoder, run_head
        returned = causal(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="cpu"), use_cache=False).logits
        return received[0].float(), returned.float()
    except Exception as error:  # whatever a foreign forward may raise on input that is not its own
        raise _unsupported(causal, f"its forward cannot be run around the head ({error!r})") from error
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


def _slope(given: Tensor, returned: Tensor) -> float:
    """The factor between two tensors, by least squares, to fp32 precision."""
    x, y = given.double().flatten(), returned.double().flatten()
    return float((x.dot(y) / x.dot(x)).float()) if x.shape == y.shape else 1.0


def _unsupported(causal: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"The output head of this architecture cannot be served: {why}.",
        given=type(causal).__name__,
        allowed="logits = softcap(scale * (hidden @ weight.T + bias))",
    )
