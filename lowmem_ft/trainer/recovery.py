"""A step that runs out of memory is done again, so that the run goes on as if it had not.

Until the update a step changes nothing but gradients, and those are summed anew. An update that stops goes on where it
stopped. The first time a step fails it is done again as it was, after memory that nobody uses has gone back: then it
gives the same bits. When that does not help, the next safer policy takes over for the rest of the run. Who keeps,
recomputes or offloads does not show in the result. Other micro-batches, tiles and loss chunks sum in another order,
which shows in the last digits of losses and gradients; a dropout draws other masks for the first two.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from lowmem_ft.assemble import Assembled
from lowmem_ft.core.errors import BudgetError, LowMemError, SpillError
from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.loader import MicroBatches
from lowmem_ft.data.packing import Batch
from lowmem_ft.runtime import state
from lowmem_ft.runtime.budget import Watch, fill_pool
from lowmem_ft.runtime.memory import process_bytes
from lowmem_ft.runtime.streaming import Moved
from lowmem_ft.runtime.vocabulary import Matrix, Which
from lowmem_ft.step import (
    Evaluated,
    StepResult,
    eval_rows,
    eval_step,
    evaluate_preferences,
    sum_gradients,
    update,
)

T = TypeVar("T")

_SMALLEST_CHUNK = 32  # loss tokens; less saves less than the rest of a step takes
_SMALLEST_TILE = 256  # tokens of an MLP; less takes less than the weights that are dequantized for it
_OF_STEPS = {"micro_batch_tokens", "accumulation", "loss_chunk_tokens"}  # what can change from one step to the next
_OF_STEPS |= {"keep_blocks", "recompute_blocks", "offload_blocks", "keep_attention"}
_OF_STEPS |= {"mlp_tile_tokens", "experts_together", "recompute_mlp_act"}
_OF_TIERS = {"resident_blocks", "streamed_blocks", "stream_from"}  # and can once: weights go down and do not come back
_EMBEDDINGS: tuple[Which, ...] = ("none", "input", "both")  # what is below


class NoSaferPolicyError(BudgetError):
    """Memory ran out, and there is no safer policy left. Nothing of the step has been done."""


@dataclass(frozen=True, slots=True)
class _Failure:
    problem: str


class Recovery:
    """Runs the steps of a training run under a policy that gets safer when it must.

    Args:
        ready: under `policy`.
        alternatives: safer policies, the fastest first, as in `Plan.alternatives`.
        may_recompute: whether blocks that keep their activations can do without.
        watch: of the budget, where crossing it is seen afterwards.
        host_budget: bytes that the process may take of the host beside a card; 0 where that is unknown.
        pool: see `Predicted.pool_bytes`. Once memory has run out there is no use in it.
        say: told what was done about a failure.

    Attributes:
        ready: as given.
        policy: in force.
        repeated: how often something has been done again so far.
    """

    def __init__(
        self,
        ready: Assembled,
        policy: Policy,
        *,
        alternatives: Sequence[Policy] = (),
        may_recompute: bool = True,
        watch: Watch | None = None,
        host_budget: int = 0,
        pool: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.ready, self.policy, self._planned = ready, policy, policy
        self._alternatives, self._passed = list(alternatives), 0
        self._may_recompute, self._watch, self._host_budget, self._say = may_recompute, watch, host_budget, say
        self._pool = pool
        self.repeated = 0

    def step(self, batches: MicroBatches, *, lr: float) -> StepResult:
        """`train_step`, whatever memory does.

        Raises:
            NoSaferPolicyError: nothing helps.
            SpillError: a disk has no room for what the step puts there. Of both nothing of the step has been done.
        """
        random = state.random_state(self.ready.device)

        def gradients() -> StepResult:
            state.restore_random(random, self.ready.device)
            fill_pool(self.ready.device, self._pool)
            now = batches.within(self.policy.micro_batch_tokens)
            return sum_gradients(self.ready, now, now.mismatched)

        try:
            result = self._insist(gradients, lambda: self._safer(batches.widest))
        except (NoSaferPolicyError, SpillError):
            self._let_go()
            state.restore_random(random, self.ready.device)  # as if the step had not begun
            raise
        if not result.skipped:
            self._update(lr)
        return result

    def _update(self, lr: float) -> None:
        assert self.ready.optimizer is not None, "training assembles an optimizer"
        stopped = False

        def updated() -> None:
            nonlocal stopped
            resume, stopped = stopped, True
            update(self.ready, lr=lr, resume=resume)

        try:
            self._insist(updated, self.ready.optimizer.halve_slices)
        except NoSaferPolicyError as error:
            raise BudgetError(
                "Memory ran out in the middle of an update.",
                given=error.given,
                fix="close what else takes memory, and go on from the last checkpoint with --resume",
            ) from error

    def evaluate(self, batches: MicroBatches, progress: Callable[[int, int], None]) -> tuple[float, dict[str, float]]:
        """Mean loss over `batches`, in nats per loss token, and the `accuracy` of tokens; or, of preferences, per pair
        or answer, and what `evaluate_preferences` says beside.

        Raises:
            NoSaferPolicyError: nothing helps.
        """

        if self.ready.objective is not None:

            def judged() -> dict[str, float]:
                now = batches.within(self.policy.micro_batch_tokens)
                return evaluate_preferences(self.ready, now, now.mismatched, progress)

            said = self._insist(judged, lambda: self._smaller(batches.widest))
            return said.pop("loss"), said

        def each(batch: Batch) -> list[Evaluated]:
            return [eval_step(self.ready, batch)]

        found = functools.reduce(Evaluated.and_also, self._over(batches, each, progress))
        return found.mean_loss, {"accuracy": found.accuracy}

    def evaluate_rows(self, batches: MicroBatches, progress: Callable[[int, int], None]) -> list[Evaluated]:
        """Loss and accuracy of each row, in the order of `batches.rows`. Raises as `evaluate`."""
        return self._over(batches, lambda batch: eval_rows(self.ready, batch), progress)

    def _over(
        self, batches: MicroBatches, work: Callable[[Batch], list[T]], progress: Callable[[int, int], None]
    ) -> list[T]:
        """What `work` finds in each micro-batch, one after the other."""

        def whole() -> list[T]:
            found: list[T] = []
            now = batches.within(self.policy.micro_batch_tokens)
            for done, batch in enumerate(now, start=1):
                found += work(batch)
                progress(done, len(now))
            return found

        return self._insist(whole, lambda: self._smaller(batches.widest))

    def once_more(self, work: Callable[[], T]) -> T:
        """The result of `work`, which is done again once where memory runs out.

        Raises:
            NoSaferPolicyError: it runs out again.
        """
        return self._insist(work, lambda: False)

    def optional(self, work: Callable[[], T], what: str) -> T | None:
        """The result of `work`, which is done again once where memory runs out; then it is left out, and that told."""
        try:
            return self.once_more(work)
        except NoSaferPolicyError as error:
            self._say(f"Memory does not suffice for {what}, which are left out: {error.given}")
            return None

    def state_dict(self) -> dict[str, Any] | None:
        """The policy in force, as JSON can hold it; None while it is the plan's."""
        if self.policy == self._planned:
            return None
        return {"planned": asdict(self._planned), "policy": asdict(self.policy), "passed": self._passed}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Go on under the policy that was in force, if the plan is the one that it came from."""
        if saved is not None and saved["planned"] == asdict(self._planned):
            self._passed = saved["passed"]
            self._follow(Policy(**saved["policy"]))

    def _insist(self, work: Callable[[], T], retreat: Callable[[], bool]) -> T:
        """`work`, again and again: once as it was, then after each retreat, as long as there is one."""
        failures = 0
        while True:
            result = _attempt(work)
            if not isinstance(result, _Failure):
                return result
            failures += 1
            self.repeated += 1
            self._let_go()
            before = self.policy
            if failures > 1 and not retreat():
                raise NoSaferPolicyError(
                    "Memory ran out, and there is no safer policy left.",
                    given=f"{result.problem} ({self.policy.describe()})",
                    fix="raise budget.memory, or lower data.seq_len or adapter.rank",
                )
            how = "as it was" if self.policy == before else f"with {self.policy.describe()}"
            self._say(f"Out of memory ({result.problem}): done again {how}.")

    def _let_go(self) -> None:
        """Give back what a failed attempt has held."""
        self._pool = 0
        for parameter in self.ready.trainable.values():
            parameter.grad = None
        self.ready.activations.let_go()
        self._count_anew()

    def _count_anew(self) -> None:
        """Give back what nobody holds; what was taken until now does not count against what comes."""
        gc.collect()
        if self.ready.device.type == "cuda":
            torch.cuda.empty_cache()
        release_freed_memory()
        if self._watch is not None:
            self._watch.reset()

    def _safer(self, row_tokens: int) -> bool:
        """Follow the next safer policy; False if there is none."""
        return self._follow_first(self._next(row_tokens))

    def _smaller(self, row_tokens: int) -> bool:
        """The same for an evaluation, which holds no activations."""
        return self._follow_first(self._reductions(row_tokens))

    def _next(self, row_tokens: int) -> Iterator[Policy]:
        """Safer policies than the one in force: those of the plan, then what is left to save."""
        while self._passed < len(self._alternatives):
            planned = _no_larger(self._alternatives[self._passed], self.policy)
            self._passed += 1
            if _reachable(planned, self.policy):
                yield planned
        policy = self.policy
        if policy.keep_blocks and self._may_recompute:
            yield replace(policy, keep_blocks=0, recompute_blocks=policy.recompute_blocks + policy.keep_blocks)
        if policy.keep_attention:
            yield replace(policy, keep_attention=False)
        yield from self._reductions(row_tokens)
        depth = policy.resident_blocks + policy.streamed_blocks
        if policy.resident_blocks:
            for tier in self._tiers(depth):
                yield replace(policy, resident_blocks=0, streamed_blocks=depth, stream_from=tier)
        if policy.stream_embeddings != _EMBEDDINGS[-1]:
            for tier in self._tiers(0, self.ready.below.matrices):
                yield replace(policy, stream_embeddings=_EMBEDDINGS[-1], stream_from=tier)
        if policy.recompute_blocks:
            yield replace(policy, recompute_blocks=0, offload_blocks=policy.offload_blocks + policy.recompute_blocks)

    def _tiers(self, blocks: int, matrices: Sequence[Matrix] = ()) -> tuple[Literal["host", "disk"], ...]:
        """Where so many blocks, or these embeddings and head, may go: what the host has no room for, to the disk. That
        it can pin so much shows when it is asked to."""
        if self.ready.device.type == "cpu" or self.policy.stream_from == "disk":
            return ("disk",)
        stored = Moved.of(self.ready.below.streamable, blocks, matrices).stored
        return ("disk",) if 0 < self._host_budget < process_bytes() + stored else ("host", "disk")

    def _reductions(self, row_tokens: int) -> Iterator[Policy]:
        """The policy with half the rows in a micro-batch, or, with one row, smaller tiles, fewer experts together or a
        smaller loss chunk."""
        policy = self.policy
        rows = policy.micro_batch_tokens // row_tokens
        tile = policy.mlp_tile_tokens or policy.micro_batch_tokens
        if rows > 1:
            tokens = rows // 2 * row_tokens
            times = math.ceil(policy.micro_batch_tokens * policy.accumulation / tokens)
            yield replace(policy, micro_batch_tokens=tokens, accumulation=times)
        if rows <= 1 and tile > _SMALLEST_TILE and len(self.ready.mlps):
            yield replace(policy, mlp_tile_tokens=max(_SMALLEST_TILE, tile // 4))
        if rows <= 1 and policy.experts_together > 1 and len(self.ready.experts):
            yield replace(policy, experts_together=max(1, policy.experts_together // 4))
        if policy.loss_chunk_tokens > _SMALLEST_CHUNK:
            yield replace(policy, loss_chunk_tokens=max(_SMALLEST_CHUNK, policy.loss_chunk_tokens // 4))

    def _follow_first(self, policies: Iterator[Policy]) -> bool:
        """Follow the first of them that can be, if any."""
        return any(self._follow(policy) for policy in policies)

    def _follow(self, policy: Policy) -> bool:
        """Whether `policy` could be taken up. On the way weights lie here and below."""
        try:
            self.ready.follow(policy)
        except Exception as error:
            # what is trained cannot be streamed, a disk may be full, and to move weights takes memory, too
            if isinstance(error, LowMemError) or is_out_of_memory(error):
                return False
            raise
        finally:
            self._count_anew()
        self.policy = policy
        return True


def _no_larger(policy: Policy, now: Policy) -> Policy:
    """`policy` without larger micro-batches, tiles, loss chunks or more experts together than there are now: an
    evaluation may have made them smaller."""
    tokens = min(policy.micro_batch_tokens, now.micro_batch_tokens)
    return replace(
        policy,
        micro_batch_tokens=tokens,
        accumulation=math.ceil(policy.micro_batch_tokens * policy.accumulation / tokens),
        loss_chunk_tokens=min(policy.loss_chunk_tokens, now.loss_chunk_tokens),
        mlp_tile_tokens=min((it for it in (policy.mlp_tile_tokens, now.mlp_tile_tokens) if it), default=0),
        experts_together=min(policy.experts_together, now.experts_together),
    )


def _reachable(policy: Policy, now: Policy) -> bool:
    """Whether `policy` is another one that can be taken up without loading the model again."""
    theirs, ours = asdict(policy), asdict(now)
    free = _OF_STEPS | (_OF_TIERS if policy.resident_blocks == 0 else set())
    if _EMBEDDINGS.index(policy.stream_embeddings) > _EMBEDDINGS.index(now.stream_embeddings):
        free = free | {"stream_embeddings", "stream_from"}
    return policy != now and all(theirs[name] == ours[name] for name in theirs if name not in free)


def _attempt(work: Callable[[], T]) -> T | _Failure:
    """The result of `work`, or that memory ran out. What a failure holds goes when this function ends."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _Failure((str(error) or type(error).__name__).splitlines()[0])
