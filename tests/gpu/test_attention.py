"""Attention on a card against the same in fp32 on the CPU: every kernel, head sizes that none of them loads too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowmem_ft.data.packing import as_bounds
from lowmem_ft.runtime.attend import Asked, attend_on_card
from lowmem_ft.runtime.attention import attention

pytestmark = pytest.mark.gpu
LENGTH, CLOSE = 96, {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def two_documents(rows: int) -> Tensor:
    """Of two documents in each row: true where a position sees another, (rows, 1, LENGTH, LENGTH)."""
    at = torch.arange(LENGTH)
    same = torch.stack([(at < 30 + row)[:, None] == (at < 30 + row)[None] for row in range(rows)])
    return (same & (at[:, None] >= at[None]))[:, None]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("size", [12, 20, 64, 80, 128, 256, 512])
def test_as_in_fp32_on_the_cpu(size: int, groups: int, masked: bool, dtype: torch.dtype, sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def heads(count: int) -> Tensor:  # as projections leave them
        return torch.randn(2, LENGTH, count, size, generator=generator).transpose(1, 2)

    q, k, v = heads(4), heads(groups), heads(groups)
    dout = torch.randn(2, LENGTH, 4, size, generator=generator)
    mask = two_documents(2) if masked else None
    sinks_H = [torch.linspace(-2, 2, 4)] if sinks else []

    def found(device: str, dtype: torch.dtype) -> list[Tensor]:
        given = [it.to(device, dtype).requires_grad_() for it in (q, k, v, *sinks_H)]
        out = attention(*given[:3], None if mask is None else mask.to(device), size**-0.5, None, *given[3:])
        return [out.detach(), *torch.autograd.grad(out, given, dout.to(device, dtype))]

    for at, (ours, expected) in enumerate(zip(found("cuda", dtype), found("cpu", torch.float32), strict=True)):
        assert ours.shape == expected.shape
        # those of sinks are a few sums over all tokens, in which errors of either sign do not average out
        close = CLOSE[dtype] * (2 if at == 4 else 1)
        assert (ours.float().cpu() - expected).norm() <= close * expected.norm()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("mask", [None, "seen", "added"])
@pytest.mark.parametrize(("keys", "wide"), [(LENGTH, 20), (LENGTH + 7, 20), (LENGTH, 12)])
def test_what_our_operator_does_not_serve(mask: str | None, keys: int, wide: int, dtype: torch.dtype) -> None:
    """Prefixes, values of another size, all that is seen by all, and masks that are added."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, e, generator=generator)
        for heads, n, e in ((4, LENGTH, 20), (2, keys, 20), (2, keys, wide))
    )
    seen = torch.rand(2, 1, LENGTH, keys, generator=generator) < 0.5
    seen[..., 0] = True
    added = torch.randn(2, 4, LENGTH, keys, generator=generator)
    dout = torch.randn(2, 4, LENGTH, wide, generator=generator)

    def found(device: str, dtype: torch.dtype) -> list[Tensor]:
        given = [it.to(device, dtype).requires_grad_() for it in (q, k, v)]
        told = None if mask is None else seen.to(device) if mask == "seen" else added.to(device, dtype)
        asked = Asked(*given, attn_mask=told, enable_gqa=True)
        plain = nn.functional.scaled_dot_product_attention
        out = attend_on_card(asked) if device == "cuda" else plain(**asked._asdict())
        assert out is not None
        return [out.detach(), *torch.autograd.grad(out, given, dout.to(device, dtype))]

    for ours, expected in zip(found("cuda", dtype), found("cpu", torch.float32), strict=True):
        assert ours.shape == expected.shape
        assert (ours.float().cpu() - expected).norm() <= CLOSE[dtype] * expected.norm()


BOUNDS = [
    [0, 1024, 2048],
    [0, 1000, 1024, 1025, 1100, 2048],
    [0, *range(8, 1017, 8), 1020, 1024, 1028, 2040, 2048],  # more than a call of the backward kernel takes
    sorted({*range(0, 2048, 3), 1024, 2048}),
]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("window", [1024, 100])
@pytest.mark.parametrize(("size", "sinks"), [(12, False), (64, False), (64, True), (128, False)])
@pytest.mark.parametrize("bounds", BOUNDS, ids=len)
def test_documents_attend_within_themselves(
    bounds: list[int], size: int, sinks: bool, window: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1024, heads, size, generator=generator).transpose(1, 2) for heads in (4, 2, 2))
    dout = torch.randn(2, 1024, 4, size, generator=generator)
    documents = as_bounds(bounds).expand(1, 1, window, -1)
    sinks_H = [torch.linspace(-2, 2, 4)] if sinks else []

    def found(device: str, dtype: torch.dtype) -> list[Tensor]:
        given = [it.to(device, dtype).requires_grad_() for it in (q, k, v, *sinks_H)]
        out = attention(*given[:3], documents, size**-0.5, None, *given[3:])
        return [out.detach(), *torch.autograd.grad(out, given, dout.to(device, dtype))]

    for ours, expected in zip(found("cuda", dtype), found("cpu", torch.float32), strict=True):
        assert ours.shape == expected.shape
        assert (ours.float().cpu() - expected).norm() <= CLOSE[dtype] * expected.norm()
