"""What goes to oneDNN on a CPU that multiplies 16-bit floats."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lowmem_ft.quant import products


def multiplied_shapes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Shapes of the first factors of all products from now on, on any CPU as if it multiplied 16-bit floats."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    shapes: set[tuple[int, ...]] = set()
    multiply = products._multiply

    def seen(out: Tensor, a: Tensor, *rest: Any) -> None:
        shapes.add(tuple(a.shape))
        multiply(out, a, *rest)

    monkeypatch.setattr(products, "_multiply", seen)
    return shapes
