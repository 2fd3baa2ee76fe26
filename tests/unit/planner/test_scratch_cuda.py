"""What operators take inside on CUDA, against sums worked out by hand from the sources that the functions name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_ft.data.packing import as_bounds
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.profile import profile_names
from lowmem_ft.planner.scratch import scratch_of, whole_of
from lowmem_ft.planner.scratch_cuda import Card
from lowmem_ft.planner.trace import RESULT, Event, Tracer
from lowmem_ft.runtime.attend import Asked, attend_on_card
from lowmem_ft.runtime.attention import attention

AMPERE, ADA, TURING = Card(), Card(capability=(8, 9), processors=128), Card(capability=(7, 5), processors=40)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(rows: int, count: int, length: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As projections leave them: (B, T, H, E) in memory, seen as (B, H, T, E)."""
    return meta(rows, length, count, size, dtype=dtype).transpose(1, 2)


def births(card: Card, q: Tensor, groups: int, mask: Tensor | None = None) -> list[Event]:
    """Of forward and backward of our attention."""
    tracer = Tracer(scratch_of("cuda", card), whole_of("cuda", card))
    with tracer:
        shared = [heads(q.shape[0], groups, q.shape[2], q.shape[3], q.dtype) for _ in range(2)]
        tensors = [t.requires_grad_() for t in (q, *shared)]
        tracer.begin()
        out = attention(*tensors, mask, 1.0)
        torch.autograd.grad(out, tensors, torch.empty_like(out))
    return [event for event in tracer.trace.events if event.nbytes > 0]


def inside(card: Card, *args: Any) -> list[tuple[str, int]]:
    return [(event.op.split(".")[1], event.nbytes) for event in births(card, *args) if event.inside]


def test_flash_attention_sums_in_fp32_and_expands_shared_heads() -> None:
    backward = "_scaled_dot_product_flash_attention_backward"
    lines = 4 * 32 * 1024  # 1000 positions in tiles of 128
    dq = (backward, lines * 128 * 4)
    assert inside(AMPERE, heads(4, 32, 1000, 128), 32) == [(backward, lines * 4), dq]
    expanded = (backward, 4 * 1000 * 32 * 128 * 2)
    assert inside(AMPERE, heads(4, 32, 1000, 128), 8) == [(backward, lines * 4), dq, expanded, expanded]
    assert inside(AMPERE, heads(4, 32, 1024, 80), 32)[1] == (backward, lines * 96 * 4)


@pytest.mark.parametrize(("tokens", "count", "measured"), [(2048, 11, 110.421875), (8192, 41, 435.640625)])
def test_documents_have_sums_of_128_more_positions_each(tokens: int, count: int, measured: float) -> None:
    """MiB that an H200 took for documents of 200 positions, 32 query and 8 key-value heads of 128 (2026-11-26); of the
    second 0.36 more, which its allocator had not split off."""
    q, k = meta(tokens, 32, 128), meta(tokens, 8, 128)
    begins = meta(count + 1, dtype=torch.int32)
    backward, none = torch.ops.aten._flash_attention_backward.default, meta(2, dtype=torch.int64)
    tracer = Tracer(scratch_of("cuda", AMPERE), whole_of("cuda", AMPERE))
    with tracer:
        tracer.begin()
        lse = meta(32, tokens, dtype=torch.float32)
        made = backward(q, q, k, k, q, lse, begins, begins, 200, 200, 0.0, True, none, none[0])
    assert len(made) == 3
    total = sum(it.nbytes for it in tracer.trace.events if it.nbytes > 0 and it.op.startswith("aten._flash"))
    assert total / 2**20 == measured


@pytest.mark.parametrize(("card", "dtype"), [(AMPERE, torch.bfloat16), (TURING, torch.float16)])
def test_what_documents_take_does_not_depend_on_how_many_there_are(card: Card, dtype: torch.dtype) -> None:
    """Nor on how long they are, so that a plan with one in each row holds for all."""

    def peak(bounds: list[int], groups: int) -> int:
        tracer = Tracer(scratch_of("cuda", card), whole_of("cuda", card))
        documents = as_bounds(bounds).expand(1, 1, 2048, -1)
        with tracer:
            q, k, v = (heads(2, count, 2048, 128, dtype).requires_grad_() for count in (8, groups, groups))
            tracer.begin()
            out = attention(q, k, v, documents, 1.0)
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
        return max(tracer.trace.curve())

    for groups in (8, 2):
        planned = peak([0, 2048, 4096], groups)
        if card == AMPERE:
            assert planned == peak([0, 100, 2048, 2500, 4096], groups), "few enough for one call"
        for cut in ([*range(0, 4097, 64)], [0, *range(2040, 2048), *range(2048, 4096, 2040), 4096], [*range(4097)]):
            assert peak(cut, groups) <= planned


def test_flash_attention_splits_keys_only_where_tiles_are_few() -> None:
    forward = "_scaled_dot_product_flash_attention"
    names = [name for name, _ in inside(AMPERE, heads(1, 4, 256, 64), 4)]
    assert forward not in names, "one block of 256 keys cannot be split"
    # 4 heads x 32 tiles of queries on 216 places, 8 blocks of keys: 8 parts fill 0.95 of their waves, the best; 2 parts
    # fill 0.59 and 3 fill 0.89, which is near enough
    sums = 3 * 4 * 2048
    assert inside(AMPERE, heads(1, 4, 2048, 64), 4)[:2] == [(forward, sums * 4), (forward, sums * 64 * 4)]
    assert inside(AMPERE, heads(8, 32, 2048, 64), 32)[0][0] != forward


@pytest.mark.parametrize("card", [AMPERE, ADA])
def test_efficient_attention_has_sums_of_dq_for_each_tile(card: Card) -> None:
    backward, mask = "_scaled_dot_product_efficient_attention_backward", meta(1, 1, 512, 512, dtype=torch.bool)
    tiles = 2 * 8 * (512 // 64)
    assert inside(card, heads(2, 8, 512, 64), 8, mask) == [
        (backward, 4 * 2 * 8 * 512),
        (backward, tiles * (16 + 4 * 64 * 64)),
    ]
    # at 128 a tile of 64 x 64 holds the sums of dk and dv outside of the registers, for 8 splits of the keys. Cards
    # with large blocks take tiles of 128 x 128, as an H200 did
    of_queries, of_keys = 8 * 2 * (16 + 4 * 64 * 64), 2 * 4 * 8 * 64 * 128
    large = 4 * (16 + 4 * 128 * 128)
    taken = 2 * 8 * (large if card is AMPERE else of_queries + of_keys)
    assert inside(card, heads(2, 8, 512, 128), 8, mask)[1] == (backward, taken)
    if card is AMPERE:
        full, sums = 4 * 2 * (16 + 4 * 128 * 64), 4 * 2 * 8 * 512
        taken = [nbytes for _, nbytes in inside(card, heads(2, 8, 512, 128, torch.float32), 8)]
        assert taken[-4:] == [128 * sums, sums, sums, 2 * 8 * full], "dout * out, its sums, and what the kernel wants"


def test_architectures_take_different_kernels() -> None:
    q = heads(2, 8, 256, 64, torch.float16)
    assert inside(AMPERE, q, 8)[0][0] == "_scaled_dot_product_flash_attention_backward"
    assert inside(TURING, heads(2, 8, 256, 64, torch.float16), 8)[0][0].endswith("efficient_attention_backward")
    wide = inside(TURING, heads(1, 2, 64, 256, torch.float16), 2)
    assert wide[0] == ("_scaled_dot_product_efficient_attention", 4 * 2 * 64 * 256)
    full = inside(TURING, heads(2, 8, 256, 64, torch.float32), 8)
    assert full[0][1] == 4 * 2 * 8 * 256 * 64, "dout * out in fp32, and its sums, are tensors of their own"


def test_a_mask_is_made_additive_and_shared_heads_are_repeated() -> None:
    mask = meta(2, 1, 100, 100, dtype=torch.bool)
    seen = births(AMPERE, heads(2, 6, 100, 32), 2, mask)
    taken = [event.nbytes for event in seen if event.op == "aten.new_zeros.default"]
    assert taken == [2 * 100 * 112 * 2] * 2
    repeated = [event.nbytes for event in seen if event.op == "aten.repeat_interleave.self_int"]
    assert repeated == [2 * 6 * 100 * 32 * 2] * 4, "k and v, in forward and in backward"


def test_keys_of_a_prefix_go_to_the_efficient_kernel() -> None:
    """As PyTorch's own attention takes them; ours wants as many keys as queries."""
    tracer = Tracer(scratch_of("cuda", AMPERE), whole_of("cuda", AMPERE))
    with tracer:
        q, k = heads(2, 6, 100, 32).requires_grad_(), heads(2, 2, 104, 32)
        mask = meta(2, 1, 100, 104, dtype=torch.bool)
        out = attend_on_card(Asked(q, k, k, mask), capability=AMPERE.capability)
        assert out is not None
        assert out.shape == q.shape
        out.sum().backward()
    births = [event for event in tracer.trace.events if event.nbytes > 0 and "efficient" in event.op]
    sums = 2 * 6 * 2 * (16 + 4 * 64 * 64)
    assert births[0].nbytes == 2 * 6 * 100 * 32 * 2
    assert births[-1].nbytes == sums


def test_blocks_that_share_a_sum_leave_parts_of_it() -> None:
    """As an H200 recorded them: sums of biases of a GPT-NeoX in fp32, and the norm of an adapter's gradients."""
    scratch, aten = scratch_of("cuda", Card(capability=(9, 0), processors=132)), torch.ops.aten
    summed = scratch[aten.sum.dim_IntList]
    full = torch.float32
    assert summed(meta(4096, 512, dtype=full), [0]) == [16777216, 16]
    assert summed(meta(4, 1024, 1536, dtype=full), [0, 1]) == [50331648, 48]
    assert summed(meta(4096, 512), [-1]) == []
    assert summed(meta(2, 0, 3), [1]) == []
    assert scratch[aten.linalg_vector_norm.default](meta(7_000_000, dtype=full)) == [4 * 132 * 4, 4]


def test_scans_and_softmax_take_copies() -> None:
    scratch, aten = scratch_of("cuda", AMPERE), torch.ops.aten
    assert scratch[aten.cumsum.default](meta(3, 1000, dtype=torch.bool), -1) == [24000]
    assert scratch[aten.cumsum.default](meta(1, 512, dtype=torch.bool), -1) == [4096, 1280]
    dout = meta(3, 4, 100, 100)
    assert scratch[aten._softmax_backward_data.default](dout, dout, -1, dout.dtype) == [dout.nbytes]


def test_other_operators() -> None:
    scratch, aten = scratch_of("cuda", AMPERE), torch.ops.aten
    dequantize = scratch[torch.ops.lowmem_ft.dequantize_int8.default]
    assert dequantize(meta(40, 8, dtype=torch.int8), meta(40, dtype=torch.float32), torch.bfloat16) == [160, RESULT]
    embedding = scratch[aten.embedding_dense_backward.default]
    assert embedding(meta(3072, 64), meta(3072, dtype=torch.int64), 500, -1, False) == []
    sums = embedding(meta(4096, 64), meta(4096, dtype=torch.int64), 500, -1, False)[-1]
    assert sums == 4 * (409 + 500) * 64
    # 10 million flags in blocks of 8192, at most two for each of 108 processors: 1221 blocks go 6 to a block
    assert scratch[aten.nonzero_static.default](meta(10**7, dtype=torch.bool)) == [4 * 204, 8 * 204]
    assert scratch[aten.sort.stable](meta(5000, dtype=torch.int64)) == [80_000, 40_000]


def test_every_profile_of_a_card_says_which_card() -> None:
    for name in profile_names():
        device = find_device(name) if name != "cpu" else None
        if device is not None:
            card = Card.of(device)
            assert card.capability >= (7, 0)
            assert card.processors > 0
