"""Attention, dropout and softmax without data take what they took on an H200."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner.scratch import scratch_of, whole_of
from lowmem_ft.planner.scratch_cuda import Card
from lowmem_ft.planner.sdpa import planned_attention
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.trace import Event, Tracer
from lowmem_ft.runtime.attend import Asked, Attending, attend_by_operator, attend_on_card, attend_within
from tests.models import save_tiny
from tests.unit.planner.policies import policy
from tests.unit.planner.test_scratch_cuda import AMPERE, TURING, heads, meta

FLASH, EFFICIENT = "flash_attention", "efficient_attention"


class Does(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def traced(card: Card, function: Callable[..., Tensor], *inputs: Tensor) -> list[Event]:
    """The events of a block on `card` that does nothing else, forward and backward."""
    block, tracer = Does(function), Tracer(scratch_of("cuda", card), whole_of("cuda", card))
    with tracer, planned_attention([block], "cuda", card.capability):
        given = [it.requires_grad_() for it in inputs]
        tracer.begin()
        out = block(*given)
        torch.autograd.grad(out, given, torch.empty_like(out))
    return tracer.trace.events


def kernels(events: Sequence[Event]) -> set[str]:
    return {kind for kind in (FLASH, EFFICIENT) if any(kind in event.op for event in events)}


def test_the_forward_that_a_block_had_is_put_back() -> None:
    """As `use_attention` gives one; without it an evaluation was planned by another kernel than the step before."""
    plain, attending = Does(F.relu), Does(F.relu)
    attend_within([attending], lambda: Attending(attend_by_operator))
    before = attending.forward
    with planned_attention([plain, attending], "cpu", (0, 0)):
        assert attending.forward is not before
    assert attending.forward is before
    assert "forward" not in vars(plain)


@pytest.mark.parametrize(
    ("card", "dtype", "settings", "kernel"),
    [
        (AMPERE, torch.bfloat16, {"is_causal": True}, FLASH),
        (AMPERE, torch.bfloat16, {"is_causal": True, "dropout_p": 0.1}, FLASH),
        (AMPERE, torch.bfloat16, {}, FLASH),  # every position sees all
        (AMPERE, torch.float32, {"is_causal": True}, EFFICIENT),
        (AMPERE, torch.float32, {"is_causal": True, "dropout_p": 0.1}, EFFICIENT),
        (TURING, torch.float16, {"is_causal": True, "dropout_p": 0.1}, EFFICIENT),
    ],
)
@pytest.mark.parametrize("groups", [4, 2])
def test_a_kernel_that_is_known_and_no_scores(
    card: Card, dtype: torch.dtype, settings: dict[str, object], kernel: str, groups: int
) -> None:
    q, k, v = (heads(2, count, 1000, 64, dtype) for count in (4, groups, groups))
    events = traced(card, partial(F.scaled_dot_product_attention, enable_gqa=True, **settings), q, k, v)
    assert kernels(events) == {kernel}
    assert max(event.nbytes for event in events) < 2 * 4 * 1000 * 1000 * 2


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize(
    ("size", "dropout", "roomy"), [(192, 0.1, False), (208, 0.0, True), (256, 0.0, False), (256, 0.1, True)]
)
def test_the_largest_heads_on_cards_with_less_shared_memory(
    size: int, dropout: float, roomy: bool, capability: tuple[int, int]
) -> None:
    """Some have no backward there: the kernel would leave the gradients as it finds them."""
    card, q = Card(capability=capability), heads(1, 2, 64, size)
    attend = partial(F.scaled_dot_product_attention, is_causal=True, dropout_p=dropout)
    expected = EFFICIENT if roomy and capability not in ((8, 0), (9, 0)) else FLASH
    assert kernels(traced(card, attend, q, q, q)) == {expected}


def test_masks_prefixes_and_values_of_another_size() -> None:
    seen, learned = meta(2, 1, 100, 104, dtype=torch.bool), meta(2, 4, 100, 104)
    q, k, v = heads(2, 4, 100, 64), heads(2, 4, 104, 64), heads(2, 4, 104, 32)
    for mask in (seen, learned):
        assert kernels(traced(AMPERE, partial(F.scaled_dot_product_attention, attn_mask=mask), q, k, k)) == {EFFICIENT}
    assert kernels(traced(AMPERE, partial(F.scaled_dot_product_attention, is_causal=False), q, k, v)) == {EFFICIENT}
    for left in (heads(2, 4, 1, 64), q[0]):
        assert attend_on_card(Asked(left, k, k), capability=(8, 0)) is None
    assert attend_on_card(Asked(q, k, k, learned.clone().requires_grad_()), capability=(8, 0)) is None


def test_dropout_keeps_a_mask_of_bytes() -> None:
    x = meta(2, 100, 64)
    taken = [event.nbytes for event in traced(AMPERE, nn.Dropout(0.1).train(), x) if event.nbytes > 0]
    assert taken == [x.numel(), *[x.nbytes] * 3], "the mask, what it leaves, and gradients of both"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_in_fp32_copies_no_fp16(dtype: torch.dtype) -> None:
    x = meta(2, 100, 64, dtype=dtype)
    events = traced(AMPERE, lambda it: F.softmax(it, dim=-1, dtype=torch.float32).to(it.dtype), x)
    assert ("_softmax" if dtype == torch.float16 else "to_copy") in events[0].op
    assert events[0].nbytes == 4 * x.numel()


@pytest.mark.parametrize(("name", "kernel"), [("stablelm", FLASH), ("falcon", EFFICIENT)])
def test_models_that_call_pytorchs_attention_themselves(name: str, kernel: str, tmp_path: Path) -> None:
    """Falcon always makes a mask."""
    model = save_tiny(name, tmp_path, max_position_embeddings=512)
    data = {"seq_len": 512, "packing": False}
    config = RunConfig.from_dict({"model": str(model), "data": data, "train": {"tokens_per_step": 512}})
    chosen = policy(rows=1, seq_len=512, depth=2, keep=2, compute_dtype="bfloat16")
    stage = Stage(config, chosen, kind="cuda", card=AMPERE)
    events = stage.step(chosen, keep=2).events
    assert kernels(events) == {kernel}
    assert not any(event.nbytes == 2 * 4 * 512 * 512 for event in events)
