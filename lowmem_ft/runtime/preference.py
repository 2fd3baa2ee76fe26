"""Losses over preferences: from the log-probability of each answer to what each token's gradient is weighed by.

DPO (Rafailov et al. 2023, arXiv:2305.18290; with label smoothing: Mitchell 2023, "cDPO"), IPO (Azar et al. 2023,
arXiv:2310.12036, with the means per token that its authors confirmed to TRL), ORPO (Hong et al. 2024,
arXiv:2403.07691), SimPO (Meng et al. 2024, arXiv:2405.14734) and KTO (Ethayarajh et al. 2024, arXiv:2402.01306).

A loss of a whole step is a mean over its pairs (of KTO, its answers), however it is split into micro-batches. So is
ORPO's likelihood of the better answers, over their tokens, and the divergence that KTO holds its rewards against.

Letters in shapes: A answers of a micro-batch, P pairs, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.preference import WITH_REFERENCE, learns_preferences, settings_of
from lowmem_ft.data.packing import Answers

Method = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
CERTAIN = -1e-6  # the largest mean log-probability whose odds fp32 still tells from infinite ones


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is learned from preferences; the settings are `PreferenceConfig`'s."""

    method: Method
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def has_reference(self) -> bool:
        """Whether answers are held against what the base says of them, its adapters off."""
        return self.method in WITH_REFERENCE

    @property
    def forwards(self) -> int:
        """Forward passes of a micro-batch's tokens beside the one that is differentiated."""
        return {"dpo": 1, "ipo": 1, "kto": 3}.get(self.method, 0)


def objective_of(config: RunConfig) -> Objective | None:
    """What `config` learns from preferences; None where it learns answers."""
    if not learns_preferences(config):
        return None
    return Objective(method=cast(Method, config.train.objective), **settings_of(config))


class Judged(NamedTuple):
    """Of pairs (P,), or of answers of one sort (A,)."""

    losses: Tensor
    chosen: Tensor  # rewards
    rejected: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What the sums of a micro-batch are divided by, so that the losses of a step are means.

    Attributes:
        examples: pairs of the step; of KTO, answers.
        likely: tokens of the better answers, where their likelihood is in the loss.
        scale: of the gradients.
    """

    examples: int
    likely: int
    scale: float = 1.0

    @classmethod
    def of(cls, objective: Objective, batches: Sequence[Answers], *, scale: float = 1.0) -> Share:
        examples = sum(len(it) if objective.method == "kto" else it.good for it in batches)
        likely = sum(it.likely for it in batches) if objective.method == "orpo" else 0
        return cls(examples=examples, likely=likely, scale=scale)


NAMES = ("loss", "nll", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")


class Totals:
    """Sums over answers and pairs of a step, on the device until they are asked for.

    Attributes:
        sums: fp32, one for each of NAMES.
        chosen, rejected: how many answers were seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(NAMES), dtype=torch.float32, device=device)
        self.chosen = self.rejected = 0

    def loss(self, share: Share) -> Tensor:
        """The step's, an fp32 scalar."""
        return self.sums[0] / share.examples + self.sums[1] / max(1, share.likely)

    def metrics(self, objective: Objective, share: Share, sums: Sequence[float], divergence: float) -> dict[str, float]:
        """What metrics.jsonl says, under TRL's names.

        Args:
            sums: the values of `self.sums`.
            divergence: of KTO, from the reference.
        """
        counts = {"chosen": self.chosen, "rejected": self.rejected}
        found: dict[str, float] = {}
        for name, value in zip(NAMES[2:], sums[2:], strict=True):
            count = share.examples if name == "rewards/accuracies" else counts[name.rpartition("/")[2]]
            if count and not (name == "rewards/accuracies" and objective.method == "kto"):
                found[name] = value / count
        if self.chosen and self.rejected:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        if objective.method == "orpo":
            found["nll_loss"] = sums[1] / max(1, share.likely)
        if objective.method == "kto":
            found["kl"] = divergence
        return found


def log_probabilities(losses_N: Tensor, answers: Answers) -> Tensor:
    """(A,) fp32, the sum over each answer's tokens, from the cross-entropy of every position.

    Sums of slices, not an indexed addition, whose order CUDA does not keep.
    """
    return -torch.stack([losses_N[begin:end].sum() for begin, end in answers.spans])


def token_weights(
    objective: Objective,
    losses_N: Tensor,
    reference_A: Tensor | None,
    answers: Answers,
    share: Share,
    totals: Totals,
    divergence: Tensor | None = None,
    *,
    differentiate: bool = True,
) -> Tensor | None:
    """The gradient of the step's loss by each position's cross-entropy, (N,) fp32, times `share.scale`.

    Args:
        losses_N: the cross-entropy of each position in the loss, 0 elsewhere.
        reference_A: log-probabilities under the reference, where the objective has one.
        totals: to which losses, rewards and log-probabilities are added.
        divergence: of KTO, from the reference: a scalar >= 0.
    """
    logps_A = log_probabilities(losses_N, answers).requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        judged, means_A = _judge(objective, logps_A, reference_A, answers, divergence)
        loss = judged.losses.sum()
    grad_A = torch.autograd.grad(loss, logps_A)[0] if differentiate else None
    _add(objective, judged, means_A.detach(), loss.detach(), answers, totals)
    likely = answers.whole[: answers.good] if objective.method == "orpo" else ()
    for begin, end in likely:
        totals.sums[1] += losses_N[begin:end].sum()
    if grad_A is None:
        return None
    weights_N = torch.zeros_like(losses_N)
    for begin, end in likely:
        weights_N[begin:end] += share.scale / share.likely
    grad_A.mul_(-share.scale / share.examples)  # of a cross-entropy, which is a negative log-probability
    for at, (begin, end) in enumerate(answers.spans):
        weights_N[begin:end] += grad_A[at]
    return weights_N


def _judge(
    objective: Objective, logps_A: Tensor, reference_A: Tensor | None, answers: Answers, divergence: Tensor | None
) -> tuple[Judged, Tensor]:
    """Losses and rewards, and what is said of the answers' log-probabilities: sums, or means per token."""
    if objective.method in ("orpo", "simpo"):
        logps_A = logps_A / _lengths(logps_A, answers)
    if objective.method == "kto":
        assert reference_A is not None
        assert divergence is not None
        return _kto(objective, logps_A - reference_A, answers, divergence), logps_A
    scores_A = logps_A if reference_A is None else logps_A - reference_A
    if objective.method == "ipo":
        delta_P = _difference(scores_A / _lengths(logps_A, answers), answers)
        losses = (delta_P - 1 / (2 * objective.beta)) ** 2
    else:
        losses = PAIRWISE[objective.method](objective, scores_A, answers)
    rewards_A = objective.beta * scores_A.detach()
    return Judged(losses, rewards_A[: answers.good], rewards_A[answers.good :]), logps_A


def _lengths(like_A: Tensor, answers: Answers) -> Tensor:
    """(A,) tokens of each answer. `new_tensor` would wait for a card that still computes what answers are worth."""
    return torch.tensor(answers.tokens, dtype=like_A.dtype).to(like_A.device, non_blocking=True)


def _difference(values_A: Tensor, answers: Answers) -> Tensor:
    return values_A[: answers.good] - values_A[answers.good :]


def _logistic(objective: Objective, logits_P: Tensor) -> Tensor:
    smoothing = objective.label_smoothing
    return -F.logsigmoid(logits_P) * (1 - smoothing) - F.logsigmoid(-logits_P) * smoothing


def _dpo(objective: Objective, scores_A: Tensor, answers: Answers) -> Tensor:
    return _logistic(objective, objective.beta * _difference(scores_A, answers))


def _simpo(objective: Objective, scores_A: Tensor, answers: Answers) -> Tensor:
    return _logistic(objective, objective.beta * _difference(scores_A, answers) - objective.gamma)


def _orpo(objective: Objective, scores_A: Tensor, answers: Answers) -> Tensor:
    likely_A = scores_A.clamp(max=CERTAIN)
    odds_A = likely_A - _log_of_rest(likely_A)
    return -objective.beta * F.logsigmoid(_difference(odds_A, answers))


def _log_of_rest(logps: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, each way where the other one cancels (Mächler 2012, "Rmpfr: log1mexp")."""
    near = logps > -0.693
    small, large = torch.where(near, logps, -0.693), torch.where(near, -0.693, logps)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def _kto(objective: Objective, ratios_A: Tensor, answers: Answers, divergence: Tensor) -> Judged:
    beta = objective.beta
    good_A, bad_A = ratios_A[: answers.good], ratios_A[answers.good :]
    good = objective.desirable_weight * (1 - torch.sigmoid(beta * (good_A - divergence)))
    bad = objective.undesirable_weight * (1 - torch.sigmoid(beta * (divergence - bad_A)))
    return Judged(torch.cat([good, bad]), beta * good_A.detach(), beta * bad_A.detach())


PAIRWISE: Mapping[str, Callable[[Objective, Tensor, Answers], Tensor]] = {"dpo": _dpo, "simpo": _simpo, "orpo": _orpo}


def _add(objective: Objective, judged: Judged, means_A: Tensor, loss: Tensor, answers: Answers, totals: Totals) -> None:
    zero = torch.zeros_like(loss)
    right = zero if objective.method == "kto" else (judged.chosen > judged.rejected).sum()
    said = [means_A[: answers.good].sum(), means_A[answers.good :].sum()]
    totals.sums += torch.stack([loss, zero, judged.chosen.sum(), judged.rejected.sum(), right.to(loss), *said])
    totals.chosen += answers.good
    totals.rejected += len(answers) - answers.good
