"""Products in fp32 tiles: right for every shape, layout and way of adding, whatever the CPU multiplies itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_ft.quant import products
from lowmem_ft.quant.products import mm, mm_low_rank, multiplies
from tests.unit.quant.multiplied import multiplied_shapes
from tests.unit.runtime.memory import peak_bytes

SHAPES = [(1, 1, 1), (3, 5, 2), (0, 4, 3), (17, 64, 33), (40, 7, 90)]


@pytest.fixture(params=["native", "float32"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways on every machine; small tiles, so that every loop runs more than once."""
    name: str = request.param
    monkeypatch.setattr(products, "multiplies", lambda dtype: name == "native")
    monkeypatch.setattr(products, "TILE", 16)
    return name


def operands(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, summed, columns = shape
    torch.manual_seed(0)
    a, b, out = torch.randn(rows, summed), torch.randn(summed, columns), torch.randn(rows, columns)
    if layout == "transposed":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif layout == "strided":
        a, b, out = (torch.cat([t, t], 1)[:, : t.shape[1]] for t in (a, b, out))
    return a.to(dtype), b.to(dtype), out.to(dtype)


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_at_once(dtype: torch.dtype, layout: str, way: str) -> None:
    torch.manual_seed(0)
    a, b, d = (torch.randn(3, *shape).to(dtype) for shape in ((17, 64), (64, 33), (2, 33)))
    by, bias = torch.randn(3, 64, 2).to(dtype), torch.randn(3, 33).to(dtype)
    if layout == "transposed":
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    one_by_one = [mm_low_rank(a[g], b[g], d[g], 2.0, by=by[g], bias=bias[g]) for g in range(3)]
    close: dict[str, Any] = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    for found, expected in zip(mm_low_rank(a, b, d, 2.0, by=by, bias=bias), zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), **close)
    torch.testing.assert_close(mm(a, b), torch.stack([mm(a[g], b[g]) for g in range(3)]), **close)


@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_double(shape: tuple[int, int, int], dtype: torch.dtype, layout: str, way: str) -> None:
    a, b, out = operands(shape, dtype, layout)
    exact = a.double() @ b.double()
    bias = torch.randn(shape[2]).to(dtype)
    # one rounding to the dtype; the native loops for 16 bits may round in between
    close: dict[str, Any] = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(mm(a, b).double(), exact, **close)
    c, d = torch.randn(shape[0], 2).to(dtype), torch.randn(2, shape[2]).to(dtype)
    low_rank = c.double() @ d.double()
    torch.testing.assert_close(mm_low_rank(a, b, d, 0.5, c_NR=c)[0].double(), exact + 0.5 * low_rank, **close)
    by = torch.randn(shape[1], 2).to(dtype)
    target = torch.full_like(out, float("nan"))
    found, c = mm_low_rank(a, b, d, 2.0, by=by, bias=bias, out=target)
    assert found is target
    torch.testing.assert_close(c.double(), a.double() @ by.double(), **close)
    # in 16 bits c is rounded before it is multiplied, by native products
    loose = {"rtol": close["rtol"], "atol": 4 * close["atol"]}
    low_rank = a.double() @ by.double() @ d.double()
    torch.testing.assert_close(target.double(), bias.double() + exact + 2 * low_rank, **loose)
    torch.testing.assert_close(mm(a, b, bias=bias).double(), bias.double() + exact, **close)
    into = torch.full((shape[0], 2 * shape[2]), float("nan"), dtype=dtype)[:, ::2]
    torch.testing.assert_close(mm(a, b, out=into).double(), exact, **close)


def test_one_rounding_in_float32_tiles(way: str) -> None:
    if way == "native":
        pytest.skip("PyTorch's own loops round where they like")
    a, b, out = operands((70, 200, 50), torch.bfloat16, "rows")
    assert torch.equal(mm(a, b), (a.double() @ b.double()).to(torch.bfloat16))
    sum_of_both = 2 * a.double() @ b.double()
    assert torch.equal(mm_low_rank(a, b, b, 1.0, c_NR=a, out=out)[0], sum_of_both.to(torch.bfloat16))


def test_a_processor_multiplies_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of rows comes, as oneDNN compiles and keeps each shape; gradients are summed over the rows."""
    shapes = multiplied_shapes(monkeypatch)
    close: dict[str, Any] = {"rtol": 4 * torch.finfo(torch.bfloat16).eps, "atol": 64 * torch.finfo(torch.bfloat16).eps}
    for rows in (1, 63, 64, 65, 192, 200, 320, 511):
        a, b, out = operands((rows, 24, 40), torch.bfloat16, "rows")
        exact = a.double() @ b.double()
        torch.testing.assert_close(mm(a, b, out=out.clone()).double(), exact, **close)
        by, d = torch.randn(24, 2).bfloat16(), torch.randn(2, 40).bfloat16()
        found, c = mm_low_rank(a, b, d, 1.0, by=by)
        torch.testing.assert_close(c.double(), a.double() @ by.double(), **close)
        torch.testing.assert_close(found.double(), exact + c.double() @ d.double(), rtol=0.05, atol=1.0)
        torch.testing.assert_close(mm(out.t(), a).double(), out.double().t() @ a.double(), rtol=0.02, atol=1.0)
    assert shapes == {(64, 24), (128, 24), (192, 24), (256, 24), (40, 64), (40, 192)}
    assert [products.pieces(rows) for rows in (1, 65, 192, 511)] == [[64], [64, 64], [192], [256, 128, 64, 64]]
    assert products.few_numbers_of_rows(1024) == [64, 128, 192, 256, 384, 512, 768, 1024]


@pytest.mark.parametrize("native", [True, False])
def test_64_bits_stay_64_bits(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Only 16-bit floats go in pieces or through fp32."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: native or dtype.itemsize != 2)
    a, b, out = operands((65, 24, 40), torch.float64, "rows")
    torch.testing.assert_close(mm(a, b), a @ b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mm(out.t(), a), out.t() @ a, rtol=1e-12, atol=1e-12)


def test_it_takes_no_memory_but_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies", lambda dtype: False)
    a, b, out = operands((300, 500, 200), torch.bfloat16, "rows")
    assert peak_bytes(lambda: mm(a, b)) == out.nbytes


@pytest.mark.parametrize("low_rank", [True, False])
def test_operator_contract(low_rank: bool) -> None:
    a, b, out = operands((3, 5, 2), torch.bfloat16, "rows")
    update = (torch.zeros(3, 1), torch.ones(5, 1), torch.ones(1, 2)) if low_rank else (None, None, None)
    bias = torch.randn(2).bfloat16() if low_rank else None
    arguments = (out, a, b, bias, *(None if t is None else t.bfloat16() for t in update), 1.0)
    torch.library.opcheck(torch.ops.lowmem_ft.product.default, arguments)


def test_float32_is_always_multiplied() -> None:
    assert multiplies(torch.float32)
