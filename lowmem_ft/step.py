"""One training or evaluation step. Training and planning run this same code, the planner on fake tensors.

Letters in names: B rows, T positions of a row, N = B * T, D hidden size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lowmem_ft.core.errors import DataError, LowMemError
from lowmem_ft.data.examples import IGNORE_INDEX
from lowmem_ft.data.isolation import attention_inputs
from lowmem_ft.data.packing import Batch
from lowmem_ft.runtime.blocks import causal_model, find_decoder
from lowmem_ft.runtime.gradients import GradientAccumulator
from lowmem_ft.runtime.head import Head
from lowmem_ft.runtime.loss import Scores, cross_entropy_and_gradients
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.runtime.scaler import LossScaler


class Ready(Protocol):
    """What a step uses of `lowmem_ft.assemble.Assembled`."""

    @property
    def model(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...
    @property
    def head(self) -> Head: ...
    @property
    def loss_chunk_tokens(self) -> int: ...
    @property
    def grad_clip(self) -> float | None: ...
    @property
    def optimizer(self) -> AdamW | None: ...
    @property
    def accumulator(self) -> GradientAccumulator | None: ...
    @property
    def scaler(self) -> LossScaler | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a training step reports.

    Attributes:
        loss: mean over the step's loss tokens, in nats, before the update.
        tokens: positions that are not padding.
        loss_tokens: positions in the loss.
        grad_norm: global L2 norm before clipping.
        skipped: the update was left out, because gradients overflowed in fp16.
    """

    loss: float
    tokens: int
    loss_tokens: int
    grad_norm: float
    skipped: bool


def train_step(ready: Ready, batches: Sequence[Batch], *, lr: float) -> StepResult:
    """Forward and backward of every micro-batch, then one update.

    The loss is the sum over all loss tokens of the step divided by their number, however they are split.

    Raises:
        DataError: no position of the step is in the loss.
        LowMemError: loss or gradients are not finite, and there is no loss scale to lower. Nothing was updated.
    """
    result = sum_gradients(ready, batches)
    if not result.skipped:
        update(ready, lr=lr)
    return result


def sum_gradients(ready: Ready, batches: Sequence[Batch]) -> StepResult:
    """The first part of `train_step`: gradients lie in the accumulator then, and no weight has changed yet. It can be
    done again from its beginning, also after one that an error has ended."""
    head, accumulator = ready.head, ready.accumulator
    assert accumulator is not None, "assembled without training"
    counts = [batch.loss_tokens for batch in batches]
    loss_tokens = sum(counts)
    if loss_tokens == 0:
        raise DataError("No token of this step is in the loss.", fix="check data.assistant_only and the chat template")
    if not ready.model.training:
        ready.model.train()
    accumulator.reset()  # also of what a step that was aborted left behind
    scale = ready.scaler.scale if ready.scaler is not None else 1.0
    loss_sum = torch.zeros((), dtype=torch.float32, device=ready.device)
    for batch, count in zip(batches, counts, strict=True):
        if count > 0:
            loss_sum += _backward(ready, head, accumulator, batch.to(ready.device), count, scale / loss_tokens)
    norm = accumulator.clip(ready.grad_clip, scale=scale)
    loss, grad_norm = _values(loss_sum / loss_tokens, norm)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if ready.scaler is not None:
        ready.scaler.update(finite=finite)
    elif not finite:
        raise LowMemError(
            "Training diverged: loss or gradients are not finite.",
            given=f"loss {loss}, gradient norm {grad_norm}",
            fix="lower train.lr, or check the data for broken examples; go on from the last checkpoint with --resume",
        )
    tokens = sum(batch.tokens for batch in batches)
    return StepResult(loss=loss, tokens=tokens, loss_tokens=loss_tokens, grad_norm=grad_norm, skipped=not finite)


def update(ready: Ready, *, lr: float, resume: bool = False) -> None:
    """The second part of `train_step`, which is left out where the first has `skipped` it.

    Args:
        resume: go on with an update that an error has ended, where it ended.
    """
    optimizer, accumulator = ready.optimizer, ready.accumulator
    assert optimizer is not None, "assembled without training"
    assert accumulator is not None, "assembled without training"
    optimizer.set_lr(lr)
    (optimizer.resume if resume else optimizer.step)(gradient=accumulator.gradient)


class Evaluated(NamedTuple):
    """What an evaluation reports, of one batch or of several.

    Attributes:
        loss: summed, in nats.
        loss_tokens: positions in the loss.
        correct: of these whose label is the likeliest token.
    """

    loss: float = 0.0
    loss_tokens: int = 0
    correct: int = 0

    @property
    def mean_loss(self) -> float:
        """Nats per loss token."""
        return self.loss / self.loss_tokens

    @property
    def accuracy(self) -> float:
        """Share of the loss tokens that the model takes for the likeliest."""
        return self.correct / self.loss_tokens

    def and_also(self, other: Evaluated) -> Evaluated:
        """Both together."""
        return Evaluated(self.loss + other.loss, self.loss_tokens + other.loss_tokens, self.correct + other.correct)


def eval_step(ready: Ready, batch: Batch) -> Evaluated:
    """Loss and accuracy of `batch`, with the model in evaluation mode."""
    loss, scores = _scored(ready, batch)
    summed, correct = _values(loss, scores.correct_N.sum().float())
    return Evaluated(summed, batch.loss_tokens, int(correct))


def eval_rows(ready: Ready, batch: Batch) -> list[Evaluated]:
    """The same of each row of `batch`."""
    shape = batch.labels.shape
    counts = (batch.labels != IGNORE_INDEX).sum(1).tolist()
    _, scores = _scored(ready, batch)
    losses = scores.loss_N.cpu().view(shape).sum(1, dtype=torch.float64).tolist()
    correct = scores.correct_N.cpu().view(shape).sum(1).tolist()
    return [Evaluated(*row) for row in zip(losses, counts, correct, strict=True)]


@torch.no_grad()
def _scored(ready: Ready, batch: Batch) -> tuple[Tensor, Scores]:
    """Summed loss, fp32, and what each position adds to it."""
    training = ready.model.training
    ready.model.eval()
    try:
        batch = batch.to(ready.device)
        hidden_ND = _hidden_states(ready, batch)
        scores = Scores.zeros(len(hidden_ND), ready.device)
        loss, _ = cross_entropy_and_gradients(
            hidden_ND,
            batch.labels.flatten(),
            ready.head,
            chunk_tokens=ready.loss_chunk_tokens,
            kept=batch.loss_tokens,
            hidden_grad=False,
            scores=scores,
        )
    finally:
        ready.model.train(training)
    return loss, scores


def _backward(
    ready: Ready, head: Head, accumulator: GradientAccumulator, batch: Batch, count: int, grad_scale: float
) -> Tensor:
    """Summed loss of one micro-batch; its gradients, times `grad_scale`, go to the accumulator."""
    hidden_ND = _hidden_states(ready, batch)
    loss, grad_ND = cross_entropy_and_gradients(
        hidden_ND.detach(),
        batch.labels.flatten(),
        head,
        chunk_tokens=ready.loss_chunk_tokens,
        grad_scale=grad_scale,
        kept=count,
        hidden_grad=hidden_ND.requires_grad,
        weight_grad=_buffer(accumulator, head.weight),
        bias_grad=_buffer(accumulator, head.bias),
    )
    if grad_ND is not None:
        torch.autograd.backward(hidden_ND, grad_ND)
    return loss


def _buffer(accumulator: GradientAccumulator, parameter: Tensor | None) -> Tensor | None:
    """Where the gradient of a trained head goes: straight to its sum, so that it takes no memory of its own."""
    if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
        return accumulator.buffer(parameter)
    return None


def _hidden_states(ready: Ready, batch: Batch) -> Tensor:
    """What the head reads, (N, D): the decoder runs alone, the model's own head never does."""
    causal, decoder = causal_model(ready.model), find_decoder(ready.model)
    adapter = getattr(ready.model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        hidden_BTD = _prompted_hidden_states(ready.model, causal, decoder, batch)
    else:
        inputs = attention_inputs(causal, batch, dtype=ready.compute_dtype)
        hidden_BTD = decoder(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])


def _prompted_hidden_states(model: Any, causal: Any, decoder: nn.Module, batch: Batch) -> Tensor:
    """Hidden states of the real positions under peft's prompt, prefix or P-tuning, (B, T, D).

    Such an adapter lives in the forward of peft's wrapper, which puts virtual tokens in front. So the whole model
    runs, its head on one position, and the decoder's output is caught.
    """
    caught: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, args, output: caught.append(output.last_hidden_state))
    takes_keep = "logits_to_keep" in inspect.signature(type(causal).forward).parameters
    try:
        model(
            input_ids=batch.input_ids,
            attention_mask=(batch.segment_ids != 0).long(),
            use_cache=False,
            **({"logits_to_keep": 1} if takes_keep else {}),
        )
    finally:
        hook.remove()
    return caught[0][:, -batch.input_ids.shape[1] :]


def _values(*scalars: Tensor) -> list[float]:
    """The numbers in fp32 scalars, waiting for the device once. A simulated step has none: they read as zero."""
    together = torch.stack(scalars)
    values: list[float] = [0.0] * len(scalars) if together.is_meta else together.tolist()
    return values
