"""Attention with capped scores on a card against the same in fp32 on the CPU, in one tile and in many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowmem_ft.data.packing import as_bounds
from lowmem_ft.runtime import attention_capped
from lowmem_ft.runtime.attention import attention
from tests.gpu.test_attention import CLOSE, LENGTH, two_documents

pytestmark = pytest.mark.gpu
MASKS: dict[str, Tensor | None] = {
    "causal": None,
    "mask": two_documents(2),
    "documents": as_bounds([0, 30, LENGTH, 2 * LENGTH]).expand(1, 1, LENGTH, -1),
    "window": as_bounds([0, LENGTH, 2 * LENGTH]).expand(1, 1, 17, -1),
}


@pytest.mark.parametrize("tile_bytes", [4 * 4 * LENGTH * 20, 64 << 20])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("groups", [4, 2])
def test_as_in_fp32_on_the_cpu(
    groups: int, kind: str, dtype: torch.dtype, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_capped, "_TILE_BYTES_ON_CARDS", tile_bytes)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, LENGTH, heads, 20, generator=generator).transpose(1, 2) for heads in (4, groups, groups))
    dout = torch.randn(2, LENGTH, 4, 20, generator=generator)
    mask = MASKS[kind]

    def found(device: str, dtype: torch.dtype) -> list[Tensor]:
        given = [it.to(device, dtype).requires_grad_() for it in (q, k, v)]
        told = mask if mask is None or mask.dtype == torch.int32 else mask.to(device)
        out = attention(*given, told, 0.5, softcap=3.0)
        return [out.detach(), *torch.autograd.grad(out, given, dout.to(device, dtype))]

    for ours, expected in zip(found("cuda", dtype), found("cpu", torch.float32), strict=True):
        assert ours.shape == expected.shape
        assert (ours.float().cpu() - expected).norm() <= CLOSE[dtype] * expected.norm()
