"""Steps that run out of memory: whatever fails, and however often, the run goes on as if it had not."""

import errno
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import BudgetError
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.examples import Example
from lowmem_ft.data.loader import BatchLoader, MicroBatches
from lowmem_ft.runtime.budget import Watch
from lowmem_ft.runtime.memory import process_bytes
from lowmem_ft.step import StepResult
from lowmem_ft.trainer import recovery
from lowmem_ft.trainer.recovery import NoSaferPolicyError, Recovery
from tests.failing import Failing
from tests.models import save_tiny
from tests.unit.planner.policies import policy

DEPTH, LENGTH, ROWS = 2, 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("recovery") / "llama")


def planned(**changes: Any) -> Policy:
    """Two micro-batches of two rows; the first block recomputes, the last one keeps."""
    made: Policy = policy(
        rows=2, seq_len=LENGTH, depth=DEPTH, keep=1, accumulation=2, loss_chunk_tokens=16, optimizer="adamw8bit"
    )
    return replace(made, **changes)


class Trained:
    """A model after some steps, and what is compared of it."""

    def __init__(
        self,
        model: Path,
        of: Policy,
        *,
        dropout: float = 0.1,
        length: int = LENGTH,
        device: str = "cpu",
        alternatives: Sequence[Policy] = (),
        adapter: dict[str, Any] | None = None,
    ) -> None:
        settings = {"rank": 4, "dropout": dropout, "targets": ["v_proj"], **(adapter or {})}
        keys: dict[str, Any] = {
            "model": str(model), "output": str(model / "run"), "adapter": settings, "data": {"seq_len": length},
        }  # fmt: skip
        torch.manual_seed(0)
        self.ready: Assembled = assemble(RunConfig.from_dict(keys), of, torch.device(device))
        self.said: list[str] = []
        self.recovery = Recovery(self.ready, of, alternatives=alternatives, say=self.said.append)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 131, (ROWS, length), generator=generator).tolist()
        loader = BatchLoader(
            [Example(row, row) for row in ids], seq_len=length, packing=True, pad_id=0, seed=0,
            micro_batch_tokens=of.micro_batch_tokens, tokens_per_step=ROWS * length,
        )  # fmt: skip
        self.batches: MicroBatches = next(loader)
        self.begin = self.state()

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes."""
        assert self.ready.optimizer is not None
        held = {name: parameter.data for name, parameter in self.ready.trainable.items()}
        held |= self.ready.optimizer.state_tensors()
        return {"random": torch.get_rng_state(), **{name: tensor.clone() for name, tensor in held.items()}}

    def again(self) -> None:
        """Back to the begin."""
        assert self.ready.optimizer is not None
        held = {name: parameter.data for name, parameter in self.ready.trainable.items()}
        for name, tensor in {**held, **self.ready.optimizer.state_tensors()}.items():
            tensor.copy_(self.begin[name])
        torch.set_rng_state(self.begin["random"])
        for state in self.ready.optimizer.state.values():
            state["step"] = 0

    def step(self, fails: Callable[[int], bool] = lambda count: False) -> tuple[StepResult, int]:
        """What a step says, and how many allocations there were."""
        with Failing(fails) as failing:
            result = self.recovery.step(self.batches, lr=1e-2)
        assert self.ready.optimizer is not None
        assert set(self.ready.optimizer.state_meta()["steps"]) == {1}, "updated once, and all of them"
        return result, failing.count


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def check_failing(trained: Trained, of: Policy, every: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whichever allocation of a step fails, each `every`th of them by itself, the step gives the same bits. Returns how
    many there are."""
    # or these would take more time than the steps
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(recovery, "release_freed_memory", lambda: None)
    first, _ = trained.step()
    expected = trained.state()
    trained.again()
    later, count = trained.step()  # it recomputes less
    assert later == first
    assert same(trained.state(), expected)
    for number in range(1, count + 1, every):
        trained.again()
        assert trained.step(lambda at, number=number: at == number)[0] == first, number
        assert same(trained.state(), expected), number
    assert trained.recovery.policy == of
    assert trained.recovery.repeated == len(range(1, count + 1, every))
    return count


@pytest.mark.parametrize(("depth", "rows", "every"), [(1, ROWS, 1), (2, 2, 31)])
def test_whichever_allocation_fails_the_step_gives_the_same_bits(
    depth: int, rows: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One micro-batch of a block that recomputes, and two of one that does beside one that keeps."""
    model = save_tiny("llama", tmp_path / "llama", num_hidden_layers=depth)
    of = policy(rows=rows, seq_len=LENGTH, depth=depth, keep=depth - 1, accumulation=ROWS // rows)
    assert check_failing(Trained(model, of), of, every, monkeypatch) > 200


@pytest.mark.parametrize(
    ("name", "own", "adapter", "every"),
    [
        ("llama", {"resident_blocks": 0, "streamed_blocks": 2, "offload_blocks": 2, "recompute_blocks": 0}, {}, 29),
        ("llama", {"stream_embeddings": "both", "mlp_tile_tokens": 24}, {"dora": True, "targets": "all-linear"}, 199),
        ("mixtral", {"experts_together": 2}, {"targets": "all-linear"}, 97),
        ("llama", {"recompute_mlp_act": True, "keep_blocks": 2, "recompute_blocks": 0}, {"targets": "all-linear"}, 37),
    ],
    ids=["streamed and offloaded", "embeddings streamed, tiles, DoRA", "experts", "activation functions again"],
)
def test_some_of_the_allocations_fail_under_other_policies(
    name: str, own: dict[str, Any], adapter: dict[str, Any], every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(name, tmp_path / name, num_hidden_layers=2)
    of = replace(policy(rows=2, seq_len=LENGTH, depth=2, keep=0, accumulation=ROWS // 2), **own)
    check_failing(Trained(model, of, adapter=adapter, dropout=0.0), of, every, monkeypatch)


def test_failing_again_and_again_ends_in_safer_policies_and_the_same_step(model: Path) -> None:
    # without dropout, which draws other masks for other micro-batches
    trained = Trained(model, planned(), dropout=0.0)
    expected, _ = trained.step()
    weights = trained.state()
    seen = []  # each time 50 allocations later, which is more than it takes to follow a policy
    for failures in (2, 3, 4, 5, 6):
        trained = Trained(model, planned(), dropout=0.0)
        left = iter(range(failures))
        found, _ = trained.step(lambda at, left=left: at % 50 == 0 and next(left, None) is not None)
        assert trained.recovery.repeated == len(trained.said) == failures
        seen.append(trained.recovery.policy)
        if seen[-1].micro_batch_tokens == planned().micro_batch_tokens:
            assert found == expected
            assert same(trained.state(), weights)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)
    decided = [
        (it.keep_blocks, it.micro_batch_tokens, it.streamed_blocks, it.stream_embeddings, it.offload_blocks)
        for it in seen
    ]
    assert decided == [
        (0, 2 * LENGTH, 0, "none", 0), (0, LENGTH, 0, "none", 0), (0, LENGTH, DEPTH, "none", 0),
        (0, LENGTH, DEPTH, "both", 0), (0, LENGTH, DEPTH, "both", DEPTH),
    ]  # fmt: skip


def test_a_pool_that_is_not_to_be_had_is_asked_for_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fill(device: torch.device, nbytes: int) -> None:
        asked.append(nbytes)
        if nbytes:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recovery, "fill_pool", fill)
    trained = Trained(model, planned())
    expected, _ = trained.step()
    trained.again()
    trained.recovery = Recovery(trained.ready, planned(), pool=1 << 30)
    assert trained.step()[0] == expected
    assert trained.recovery.policy == planned()
    assert asked == [0, 1 << 30, 0]


def test_the_safer_policies_of_a_plan_come_first(model: Path) -> None:
    safer = planned(keep_blocks=0, recompute_blocks=DEPTH)
    unreachable = planned(streamed_blocks=1, resident_blocks=1)
    trained = Trained(model, planned(), alternatives=[unreachable, safer])
    trained.step(lambda at: at in (5, 10))
    assert trained.recovery.policy == safer
    assert trained.said[0].endswith("done again as it was.")
    assert trained.said[1].endswith(f"done again with {safer.describe()}.")


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("streamed", [0, 2])
def test_blocks_go_below_the_device_in_the_middle_of_a_run(
    streamed: int, bits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into another step and back through an evaluation the results are those of a run that has not moved them."""
    model = save_tiny("llama", tmp_path / "llama", num_hidden_layers=3)
    names: dict[int, Any] = {4: "nf4", 16: "none"}
    of = policy(
        rows=1, seq_len=LENGTH, depth=3, accumulation=ROWS, bits=bits, quant=names[bits], double_quant=bits == 4,
        resident_blocks=3 - streamed, streamed_blocks=streamed, stream_from="disk",
    )  # fmt: skip
    said = []
    for fails in (lambda at: False, lambda at: at in (5, 10)):
        trained = Trained(model, of)
        steps = [trained.step(fails)[0], trained.recovery.step(trained.batches, lr=1e-2)]
        said.append((steps, trained.recovery.evaluate(trained.batches, lambda done, total: None)[0], trained.state()))
    assert trained.recovery.policy.streamed_blocks == 3
    assert said[0][:2] == said[1][:2]
    assert same(said[0][2], said[1][2])


def test_what_is_trained_whole_stays_on_the_device(model: Path) -> None:
    of = planned(bits=16, quant="none", double_quant=False)
    trained = Trained(model, of, adapter={"train_modules": ["model.layers.1.mlp.up_proj"]})
    trained.step(lambda at: at in range(50, 300, 50))
    assert trained.recovery.policy.streamed_blocks == 0
    assert trained.recovery.policy.offload_blocks == DEPTH


def test_when_nothing_helps_nothing_has_changed(model: Path) -> None:
    trained = Trained(model, planned())
    with pytest.raises(NoSaferPolicyError, match="no safer policy left") as raised:
        trained.step(lambda at: at % 10 == 0)
    assert "raise budget.memory" in str(raised.value)
    assert raised.value.exit_code == 3
    assert same(trained.state(), trained.begin)


def test_an_update_that_stops_goes_on_where_it_stopped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the kernel has changed something already, and with ever smaller slices."""
    wide: dict[str, Any] = {"rank": 64, "targets": "all-linear"}  # of which an update takes many slices
    plain, trained = Trained(model, planned(), adapter=wide), Trained(model, planned(), adapter=wide)
    expected, _ = plain.step()
    optimizer = trained.ready.optimizer
    assert optimizer is not None
    optimizer.slice_elements = 1 << 14
    update, calls = optimizer._adam, iter(range(10**6))

    def failing(value: Tensor, grad: Tensor, own: Any, group: Any, step: int) -> None:
        update(value, grad, own, group, step)
        if next(calls) in (3, 4, 5):
            raise torch.OutOfMemoryError("after the kernel")

    monkeypatch.setattr(optimizer, "_adam", failing)
    torch.set_rng_state(plain.begin["random"])
    assert trained.step()[0] == expected
    assert same(plain.state(), trained.state())
    assert optimizer.slice_elements == 1 << 12

    monkeypatch.setattr(optimizer, "_adam", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(BudgetError, match="in the middle of an update") as raised:
        trained.recovery.step(trained.batches, lr=1e-2)
    assert not isinstance(raised.value, NoSaferPolicyError), "its weights must not be saved"


def test_evaluation_is_done_again_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(recovery, "release_freed_memory", lambda: None)
    trained = Trained(model, planned())
    loss = trained.recovery.evaluate(trained.batches, lambda done, total: None)[0]
    with Failing() as failing:
        trained.recovery.evaluate(trained.batches, lambda done, total: None)[0]
    for number in range(1, failing.count + 1, 11):
        with Failing(lambda at, number=number: at == number):
            assert trained.recovery.evaluate(trained.batches, lambda done, total: None)[0] == loss
    with Failing(lambda at: at in (5, 10)):
        found = trained.recovery.evaluate(trained.batches, lambda done, total: None)
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert trained.recovery.policy.micro_batch_tokens == LENGTH
    with pytest.raises(NoSaferPolicyError), Failing(lambda at: at % 5 == 0):
        trained.recovery.evaluate(trained.batches, lambda done, total: None)[0]


def test_the_policy_in_force_is_saved_and_taken_up_again(model: Path) -> None:
    trained = Trained(model, planned())
    assert trained.recovery.state_dict() is None
    trained.step(lambda at: at in (5, 10))
    saved = trained.recovery.state_dict()
    assert saved == {"planned": asdict(planned()), "policy": asdict(trained.recovery.policy), "passed": 0}
    resumed = Trained(model, planned())
    resumed.recovery.load_state_dict(saved)
    assert resumed.recovery.policy == trained.recovery.policy
    other = Trained(model, planned(loss_chunk_tokens=32))
    other.recovery.load_state_dict(saved)
    assert other.recovery.policy == planned(loss_chunk_tokens=32), "another plan decides anew"


def test_no_policy_that_is_less_safe_takes_over(model: Path) -> None:
    """What the plan had beside has been passed before a checkpoint, or has larger micro-batches than an evaluation
    could bear."""
    beside = planned(keep_blocks=0, recompute_blocks=DEPTH)
    trained = Trained(model, planned(), alternatives=[beside])
    trained.step(lambda at: at in (50, 100, 150))
    halved = replace(beside, micro_batch_tokens=LENGTH, accumulation=ROWS)
    assert trained.recovery.policy == halved
    resumed = Trained(model, planned(), alternatives=[beside])
    resumed.recovery.load_state_dict(trained.recovery.state_dict())
    resumed.step(lambda at: at in (50, 100))
    assert resumed.recovery.policy.streamed_blocks == DEPTH

    evaluated = Trained(model, planned(), alternatives=[beside])
    with Failing(lambda at: at in (5, 10)):
        evaluated.recovery.evaluate(evaluated.batches, lambda done, total: None)
    assert evaluated.recovery.policy == planned(micro_batch_tokens=LENGTH, accumulation=ROWS)
    evaluated.step(lambda at: at in (50, 100))
    assert evaluated.recovery.policy == halved


def test_what_is_beside_is_taken_up_in_the_tiles_of_now(model: Path) -> None:
    """Of MLPs and of the loss; none of them grows."""
    beside = planned(keep_blocks=0, recompute_blocks=DEPTH, loss_chunk_tokens=64)
    for tile, others, expected in ((8, 0, 8), (8, 4, 4), (4, 8, 4), (0, 0, 0)):
        of = planned(mlp_tile_tokens=tile)
        one = Recovery(Trained(model, of).ready, of, alternatives=[replace(beside, mlp_tile_tokens=others)])
        wanted = replace(beside, mlp_tile_tokens=expected, loss_chunk_tokens=of.loss_chunk_tokens)
        assert next(one._next(LENGTH)) == wanted


def test_fewer_experts_work_together_when_memory_runs_out(tmp_path: Path) -> None:
    """In micro-batches of one row, until they work one by one."""
    mixture = save_tiny("mixtral", tmp_path, num_hidden_layers=DEPTH)
    of = planned(
        keep_blocks=0, recompute_blocks=DEPTH, micro_batch_tokens=LENGTH, accumulation=ROWS, experts_together=3
    )
    expected, _ = Trained(mixture, of).step()
    trained = Trained(mixture, of)
    assert [it.experts_together for it in trained.recovery._reductions(LENGTH)] == [1]
    step, _ = trained.step(lambda at: at in (5, 200))
    assert trained.recovery.policy == replace(of, experts_together=1)
    assert step.loss == pytest.approx(expected.loss, rel=1e-4)
    one = replace(of, recompute_blocks=0, offload_blocks=DEPTH)
    after = Recovery(Trained(mixture, of).ready, replace(of, experts_together=1), alternatives=[one])
    assert next(after._next(LENGTH)) == replace(one, experts_together=1), "a safer policy does not bring them back"


def test_a_full_disk_leaves_weights_where_they_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plain, trained = Trained(model, planned(), dropout=0.0), Trained(model, planned(), dropout=0.0)
    expected, _ = plain.step()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSaferPolicyError):
        trained.step(lambda at: at % 10 == 0)
    assert trained.recovery.policy.resident_blocks == DEPTH
    assert same(trained.state(), trained.begin)
    monkeypatch.undo()
    assert trained.step()[0].loss == pytest.approx(expected.loss, rel=1e-5)


def test_weights_go_to_the_disk_where_the_host_of_a_card_has_no_room(model: Path) -> None:
    ready = replace(Trained(model, planned()).ready, device=torch.device("cuda"))
    both = ["host", "disk"]  # the host may not pin so much, which shows when it is asked to
    for allowed, tiers in ((0, both), (1 << 40, both), (process_bytes() + 1000, ["disk"])):
        found = [*Recovery(ready, planned(), host_budget=allowed)._next(LENGTH)]
        assert [it.stream_from for it in found if it.streams] == [*tiers, *tiers]


def test_crossing_the_budget_is_seen_and_mended(model: Path) -> None:
    """Memory that something else has taken meanwhile is gone when the step is done again."""
    plain = Trained(model, planned())
    expected, _ = plain.step()
    trained = Trained(model, planned())
    torch.set_rng_state(plain.begin["random"])
    watch = trained.recovery._watch = Watch(trained.ready.model, process_bytes() + (64 << 20))
    spoilt = iter([128 << 20])

    def spoil(*_: Any) -> None:
        nbytes = next(spoilt, 0)
        torch.zeros(nbytes, dtype=torch.uint8)

    hook = next(iter(trained.ready.trainable.values())).register_post_accumulate_grad_hook(spoil)
    assert trained.recovery.step(trained.batches, lr=1e-2) == expected
    hook.remove()
    watch.remove()
    assert trained.recovery.repeated == 1
    assert watch.peak > watch.budget
    assert "the process took" in trained.said[0]
    assert same(plain.state(), trained.state())


def test_what_it_takes_to_follow_a_policy_does_not_count_against_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that go down are read, and lie here until they are there: a peak of no step."""
    trained = Trained(model, planned())
    watch = trained.recovery._watch = Watch(trained.ready.model, process_bytes() + (64 << 20))
    follow = trained.ready.follow

    def spoil(*_: Any) -> None:
        torch.zeros(128 << 20, dtype=torch.uint8)

    def following(policy: Policy) -> None:
        spoil()
        follow(policy)

    monkeypatch.setattr(trained.ready, "follow", following)
    spoilt = iter(range(2))
    hook = next(iter(trained.ready.trainable.values())).register_post_accumulate_grad_hook(
        lambda _: None if next(spoilt, None) is None else spoil()
    )
    trained.recovery.step(trained.batches, lr=1e-2)
    hook.remove()
    watch.remove()
    assert trained.recovery.policy == planned(keep_blocks=0, recompute_blocks=DEPTH)
    assert trained.recovery.repeated == 2


@pytest.mark.filterwarnings("error:module forward hook")
def test_a_budget_that_is_crossed_when_blocks_are_streamed_already(model: Path) -> None:
    """Who looks at the budget came before the hooks of blocks that went down later, which it keeps from entering."""
    trained = Trained(model, planned(bits=16, quant="none", double_quant=False))
    watch = trained.recovery._watch = Watch(trained.ready.model, process_bytes() + (64 << 20))
    trained.step(lambda at: at in range(50, 300, 50))
    assert trained.recovery.policy.streamed_blocks == DEPTH
    torch.zeros(128 << 20, dtype=torch.uint8)
    trained.recovery.step(trained.batches, lr=1e-2)
    watch.remove()
    assert "the process took" in trained.said[-1]


def test_what_says_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"), OSError(errno.ENOMEM, "mmap")):
        assert is_out_of_memory(error)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    for error in (ValueError("out of memory"), RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full")):
        assert not is_out_of_memory(error)
