"""8-bit moments on a CPU: the nearest codes, and updates that come near those with moments in fp32."""

from __future__ import annotations

from itertools import accumulate

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from lowmem_ft.planner import scratch
from lowmem_ft.planner.verify import allocator_events
from lowmem_ft.runtime import moments
from lowmem_ft.runtime.optim import AdamW


def values(count: int, signed: bool) -> Tensor:
    """Of nine orders of magnitude, with zeros and whole blocks of them."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(count, generator=generator) * 10 ** (-8 * torch.rand(count, generator=generator))
    found[::7] = 0.0
    found[moments.BLOCK : 2 * moments.BLOCK] = 0.0
    return found if signed else found.abs()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [100, 1024, 5000])
def test_codes_are_the_nearest(count: int, signed: bool) -> None:
    given, blocks = values(count, signed), -(-count // moments.BLOCK)
    stored, scales = torch.empty(count, dtype=torch.uint8), torch.empty(blocks)
    moments.encode(given.clone(), stored, scales, signed=signed)
    code = moments.code(signed=signed)
    for block in range(blocks):
        here = slice(block * moments.BLOCK, (block + 1) * moments.BLOCK)
        assert scales[block] == given[here].abs().max()
        allowed = code if signed else code[1:]
        shares = given[here].double() / max(float(scales[block]), 1e-30)
        distance = (shares.unsqueeze(1) - allowed.double()).abs().min(1).values
        chosen = (shares - code[stored[here].long()].double()).abs()
        assert signed or (stored[here] > 0).all(), "a first moment would be divided by nothing"
        # shares are rounded to fp32 before they are compared
        assert (chosen <= distance + 1e-7 * shares.abs()).all()


def test_every_upper_half_of_a_number_has_its_first_code() -> None:
    """At the ends of all intervals of numbers with the same upper 16 bits."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    for signed in (True, False):
        code = moments.code(signed=signed)
        for lower in (0, 0xFFFF):
            numbers = (upper | lower).view(torch.float32)
            numbers = numbers[numbers.abs() < 1.0]
            numbers = numbers if signed else numbers[numbers >= 0]
            padded = torch.cat([torch.ones(1), numbers])  # so that the scale of all is one
            stored = torch.empty(len(padded), dtype=torch.uint8)
            first, middles = moments._tables(signed)
            expected = torch.bucketize(padded, (code[1:] + code[:-1]) / 2)
            key = padded.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
            stored = first.index_select(0, key)
            stored += padded > middles.index_select(0, stored.int())
            assert torch.equal(stored.long(), expected)


@pytest.mark.parametrize(("orders", "most"), [(0, 0.02), (2, 0.08), (3, 0.2), (4, 0.35)])
def test_updates_come_near_those_in_fp32(orders: int, most: float) -> None:
    """Where gradients in a block differ by orders of magnitude, too: with code 0 they were 26 times too large."""
    size = 1 << 14
    spread = 10 ** (-orders * torch.rand(size, generator=torch.Generator().manual_seed(1)))

    def trained(kind: str) -> Tensor:
        parameter = nn.Parameter(torch.zeros(size))
        optimizer: torch.optim.Optimizer = {
            "ours": lambda: AdamW([parameter], lr=1e-3, bits=8),
            "bitsandbytes": lambda: bitsandbytes.optim.AdamW8bit([parameter], lr=1e-3, weight_decay=0.0),
            "exact": lambda: torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0),
        }[kind]()
        generator = torch.Generator().manual_seed(2)
        mean = 0.3 * torch.randn(size, generator=generator)
        for _ in range(200):
            parameter.grad = (mean + torch.randn(size, generator=generator)) * spread
            optimizer.step()
        return parameter.detach()

    exact = trained("exact")
    own, theirs = ((trained(kind) - exact).norm() / exact.norm() for kind in ("ours", "bitsandbytes"))
    assert own < most
    assert orders == 0 or own < 0.7 * theirs


@pytest.mark.parametrize("count", [1 << 16, 5000])
def test_an_update_takes_what_is_planned(count: int) -> None:
    value, gradient = torch.zeros(count), torch.randn(count)
    stored = [torch.zeros(count, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(-(-count // moments.BLOCK)) for _ in range(2)]
    codes = moments.code(signed=True), moments.code(signed=False)
    update = torch.ops.lowmem_ft.adam_8bit.default

    def step() -> None:
        update(value, gradient, *stored, *scales, *codes, 0.9, 0.999, 1e-8, 0.0, 1e-3, 1)

    step()  # makes the tables
    measured = max(accumulate(allocator_events(step)))
    planned = max(accumulate(scratch._CPU[update](value)))
    assert measured <= planned <= 1.01 * measured


def test_operator_contract() -> None:
    count = 2 * moments.BLOCK
    given = [torch.randn(count), torch.randn(count), *(torch.zeros(count, dtype=torch.uint8) for _ in range(2))]
    scales, codes = [torch.zeros(2), torch.zeros(2)], [moments.code(signed=signed) for signed in (True, False)]
    arguments = (*given, *scales, *codes, 0.9, 0.999, 1e-8, 0.01, 1e-3, 1)
    torch.library.opcheck(torch.ops.lowmem_ft.adam_8bit.default, arguments)
