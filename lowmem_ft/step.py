"""One training or evaluation step. Training and planning run this same code, the planner on fake tensors.

Letters in names: B rows, T positions of a row, N = B * T, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lowmem_ft.adapters.inject import adapters_disabled
from lowmem_ft.core.errors import DataError, LowMemError
from lowmem_ft.core.mode import evaluating
from lowmem_ft.data.examples import IGNORE_INDEX
from lowmem_ft.data.packing import Answers, Batch
from lowmem_ft.runtime.gradients import GradientAccumulator
from lowmem_ft.runtime.head import Head
from lowmem_ft.runtime.hidden import decoder_inputs, hidden_states
from lowmem_ft.runtime.loss import cross_entropy_and_gradients
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.runtime.preference import Objective, Share, Totals, log_probabilities, token_weights
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
    @property
    def objective(self) -> Objective | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a training step reports.

    Attributes:
        loss: mean over the step's loss tokens, in nats, before the update; of preferences, over pairs or answers.
        tokens: positions that are not padding.
        loss_tokens: positions in the loss.
        grad_norm: global L2 norm before clipping.
        skipped: the update was left out, because gradients overflowed in fp16.
        metrics: of preferences, means of rewards and log-probabilities before the update.
    """

    loss: float
    tokens: int
    loss_tokens: int
    grad_norm: float
    skipped: bool
    metrics: dict[str, float] = field(default_factory=dict)


def train_step(ready: Ready, batches: Sequence[Batch], *, lr: float, mismatched: Sequence[Batch] = ()) -> StepResult:
    """Forward and backward of every micro-batch, then one update.

    The loss is the sum over all loss tokens of the step divided by their number, however they are split. Of
    preferences it is the mean over all pairs (of KTO, answers) of the step.

    Args:
        mismatched: of KTO, the step's prompts with other answers, see `data.loader.MicroBatches.mismatched`.

    Raises:
        DataError: no position of the step is in the loss.
        LowMemError: loss or gradients are not finite, and there is no loss scale to lower. Nothing was updated.
    """
    result = sum_gradients(ready, batches, mismatched)
    if not result.skipped:
        update(ready, lr=lr)
    return result


def sum_gradients(ready: Ready, batches: Sequence[Batch], mismatched: Sequence[Batch] = ()) -> StepResult:
    """The first part of `train_step`: gradients lie in the accumulator then, and no weight has changed yet. It can be
    done again from its beginning, also after one that an error has ended."""
    accumulator, objective = ready.accumulator, ready.objective
    assert accumulator is not None, "assembled without training"
    facts = [(batch.loss_tokens, batch.tokens, batch.answers) for batch in batches]
    loss_tokens = sum(count for count, _, _ in facts)
    if loss_tokens == 0:
        raise DataError("No token of this step is in the loss.", fix="check data.assistant_only and the chat template")
    if not ready.model.training:
        ready.model.train()
    accumulator.reset()  # also of what a step that was aborted left behind
    scale = ready.scaler.scale if ready.scaler is not None else 1.0
    totals, divergence = Totals(ready.device), torch.zeros((), dtype=torch.float32, device=ready.device)
    share = Share(examples=loss_tokens, likely=0, scale=scale)
    if objective is not None:
        share = Share.of(objective, [it for _, _, it in facts if it is not None], scale=scale)
        if objective.method == "kto":
            divergence = _divergence(ready, mismatched)
    for batch, (count, _, _) in zip(batches, facts, strict=True):
        if objective is not None:
            _backward_preferences(ready, objective, accumulator, batch.to(ready.device), share, totals, divergence)
        elif count > 0:
            totals.sums[0] += _backward(ready, accumulator, batch.to(ready.device), count, scale / loss_tokens)
    norm = accumulator.clip(ready.grad_clip, scale=scale)
    loss, grad_norm, divergent, *sums = _values(totals.loss(share), norm, divergence, *totals.sums)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if ready.scaler is not None:
        ready.scaler.update(finite=finite, loss=loss)
    elif not finite:
        raise diverged(f"loss {loss}, gradient norm {grad_norm}")
    return StepResult(
        loss=loss,
        tokens=sum(tokens for _, tokens, _ in facts),
        loss_tokens=loss_tokens,
        grad_norm=grad_norm,
        skipped=not finite,
        metrics={} if objective is None else totals.metrics(objective, share, sums, divergent),
    )


def diverged(given: str) -> LowMemError:
    """The error that says that numbers are not finite."""
    return LowMemError(
        "Training diverged: loss or gradients are not finite.",
        given=given,
        fix="lower train.lr, or check the data for broken ones; --resume goes on from a checkpoint, if there is one",
    )


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
    loss, _, correct_N = _scored(ready, batch)
    summed, correct = _values(loss, correct_N.sum().float())
    return Evaluated(summed, batch.loss_tokens, int(correct))


def eval_rows(ready: Ready, batch: Batch) -> list[Evaluated]:
    """The same of each row of `batch`."""
    shape = batch.labels.shape
    counts = (batch.labels != IGNORE_INDEX).sum(1).tolist()
    _, losses_N, correct_N = _scored(ready, batch)
    losses = losses_N.cpu().view(shape).sum(1, dtype=torch.float64).tolist()
    correct = correct_N.cpu().view(shape).sum(1).tolist()
    return [Evaluated(*row) for row in zip(losses, counts, correct, strict=True)]


@torch.no_grad()
def _scored(ready: Ready, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, fp32; the loss of each position, (N,) fp32; and whether its label is the likeliest token, (N,)."""
    with evaluating(ready.model):
        batch = batch.to(ready.device)
        hidden_ND = _hidden_states(ready, batch)
        correct_N = torch.zeros(len(hidden_ND), dtype=torch.bool, device=ready.device)
        return *_cross_entropy(ready, hidden_ND, batch, correct_N), correct_N


@torch.no_grad()
def evaluate_preferences(
    ready: Ready,
    batches: Sequence[Batch],
    mismatched: Sequence[Batch] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """`loss`, and what a training step says of rewards, over all of `batches` as if they were one step, with the model
    in evaluation mode."""
    objective = ready.objective
    assert objective is not None, "assembled for answers"
    with evaluating(ready.model):
        totals, divergence = Totals(ready.device), torch.zeros((), dtype=torch.float32, device=ready.device)
        if objective.method == "kto":
            divergence = _divergence(ready, mismatched)
        seen: list[Answers] = []
        for done, batch in enumerate(batches, start=1):
            _judge(ready, objective, batch.to(ready.device), totals, divergence)
            seen.append(_answers(batch))
            progress(done, len(batches))
    share = Share.of(objective, seen)
    loss, divergent, *sums = _values(totals.loss(share), divergence, *totals.sums)
    return {"loss": loss, **totals.metrics(objective, share, sums, divergent)}


def _judge(ready: Ready, objective: Objective, batch: Batch, totals: Totals, divergence: Tensor) -> None:
    """Add what the answers of one micro-batch are worth to `totals`."""
    inputs = decoder_inputs(ready.model, batch, dtype=ready.compute_dtype)
    reference_A = _reference(ready, batch, inputs) if objective.has_reference else None
    losses_N = _losses(ready, hidden_states(ready.model, batch, inputs), batch)
    share = Share(examples=1, likely=1)  # sums, for now
    token_weights(objective, losses_N, reference_A, _answers(batch), share, totals, divergence, differentiate=False)


def _backward(ready: Ready, accumulator: GradientAccumulator, batch: Batch, count: int, grad_scale: float) -> Tensor:
    """Summed loss of one micro-batch; its gradients, times `grad_scale`, go to the accumulator."""
    hidden_ND = _hidden_states(ready, batch)
    return _differentiate(ready, accumulator, batch, hidden_ND, count, grad_scale, None)


def _backward_preferences(
    ready: Ready,
    objective: Objective,
    accumulator: GradientAccumulator,
    batch: Batch,
    share: Share,
    totals: Totals,
    divergence: Tensor,
) -> None:
    """The same of preferences: one sweep of the head for what answers are worth, and one for the gradients."""
    inputs = decoder_inputs(ready.model, batch, dtype=ready.compute_dtype)
    reference_A = _reference(ready, batch, inputs) if objective.has_reference else None
    hidden_ND = hidden_states(ready.model, batch, inputs)
    weights_N = token_weights(
        objective,
        _losses(ready, hidden_ND.detach(), batch),
        reference_A,
        _answers(batch),
        share,
        totals,
        divergence,
    )
    del reference_A, inputs  # how many answers there are shall not show in what backward holds
    _differentiate(ready, accumulator, batch, hidden_ND, batch.loss_tokens, 1.0, weights_N)


def _differentiate(
    ready: Ready,
    accumulator: GradientAccumulator,
    batch: Batch,
    hidden_ND: Tensor,
    count: int,
    grad_scale: float,
    weights_N: Tensor | None,
) -> Tensor:
    loss, grad_ND = cross_entropy_and_gradients(
        hidden_ND.detach(),
        batch.labels.flatten(),
        ready.head,
        chunk_tokens=ready.loss_chunk_tokens,
        grad_scale=grad_scale,
        kept=count,
        hidden_grad=hidden_ND.requires_grad,
        weight_grad=_buffer(accumulator, ready.head.weight),
        bias_grad=_buffer(accumulator, ready.head.bias),
        weights_N=weights_N,
    )
    if grad_ND is not None:
        torch.autograd.backward(hidden_ND, grad_ND)
    return loss


def _losses(ready: Ready, hidden_ND: Tensor, batch: Batch) -> Tensor:
    """The cross-entropy of each position in the loss, and 0 elsewhere, (N,) fp32."""
    return _cross_entropy(ready, hidden_ND, batch)[1]


def _cross_entropy(
    ready: Ready, hidden_ND: Tensor, batch: Batch, correct_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Its sum and `_losses`, without gradients; whether labels are the likeliest tokens goes to `correct_N`."""
    losses_N = torch.zeros(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    loss, _ = cross_entropy_and_gradients(
        hidden_ND,
        batch.labels.flatten(),
        ready.head,
        chunk_tokens=ready.loss_chunk_tokens,
        kept=batch.loss_tokens,
        hidden_grad=False,
        losses_N=losses_N,
        correct_N=correct_N,
    )
    return loss, losses_N


@torch.no_grad()
def _reference(ready: Ready, batch: Batch, inputs: dict[str, Any]) -> Tensor:
    """Log-probabilities of the answers under the base, whose adapters are off, (A,) fp32."""
    with evaluating(ready.model), adapters_disabled(ready.model):
        losses_N = _losses(ready, hidden_states(ready.model, batch, inputs), batch)
    return log_probabilities(losses_N, _answers(batch))


@torch.no_grad()
def _divergence(ready: Ready, mismatched: Sequence[Batch]) -> Tensor:
    """How much likelier the model finds other answers to its prompts than the reference does, on average; at least 0.
    An fp32 scalar."""
    total = torch.zeros((), dtype=torch.float32, device=ready.device)
    count = 0
    with evaluating(ready.model):
        for batch in mismatched:
            total += _ratios(ready, batch.to(ready.device)).sum()
            count += len(_answers(batch))
    assert count > 0, "KTO asks for mismatched answers"
    return (total / count).clamp_(min=0)


def _ratios(ready: Ready, batch: Batch) -> Tensor:
    """How much likelier the model finds each answer than the reference does, (A,) fp32."""
    inputs = decoder_inputs(ready.model, batch, dtype=ready.compute_dtype)
    reference_A = _reference(ready, batch, inputs)
    return (
        log_probabilities(_losses(ready, hidden_states(ready.model, batch, inputs), batch), _answers(batch))
        - reference_A
    )


def _answers(batch: Batch) -> Answers:
    assert batch.answers is not None, "preferences are learned from"
    return batch.answers


def _buffer(accumulator: GradientAccumulator, parameter: Tensor | None) -> Tensor | None:
    """Where the gradient of a trained head goes: straight to its sum, so that it takes no memory of its own."""
    if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
        return accumulator.buffer(parameter)
    return None


def _hidden_states(ready: Ready, batch: Batch) -> Tensor:
    return hidden_states(ready.model, batch, decoder_inputs(ready.model, batch, dtype=ready.compute_dtype))


def _values(*scalars: Tensor) -> list[float]:
    """The numbers in fp32 scalars, waiting for the device once. A simulated step has none: they read as zero."""
    together = torch.stack(scalars)
    values: list[float] = [0.0] * len(scalars) if together.is_meta else together.tolist()
    return values
