"""RMS normalization on a card: in one kernel, or in tiles, against the models' own."""

from __future__ import annotations

import pytest
import torch

from tests.unit.runtime.test_norms import FEATURES, gradients, pair

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_the_models_do_it(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs, ours = (it.cuda() for it in pair(kind, dtype, dtype))
    x, dy = (torch.randn(3, 70, FEATURES, dtype=dtype, device="cuda") for _ in range(2))
    close = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(gradients(ours, x, dy), gradients(theirs, x, dy), strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= close * b.double().norm()
