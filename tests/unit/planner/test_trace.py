"""What operators return without data is asked once for arguments of equal shapes, strides and types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_ft.planner.results import Results
from lowmem_ft.planner.trace import RESULT, Tracer

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def facts(out: Any) -> Any:
    if isinstance(out, (tuple, list)):
        return [facts(item) for item in out]
    return None if out is None else (out.shape, out.stride(), out.dtype, out.untyped_storage().nbytes())


CALLS: list[tuple[Any, Callable[[], tuple[Any, ...]], dict[str, Any]]] = [
    (aten.mul.Tensor, lambda: (meta(4, 8), meta(8)), {}),
    (aten.add.Tensor, lambda: (meta(8, 4).t(), meta(4, 8)), {}),  # the result is transposed too
    (aten.mm.default, lambda: (meta(4, 8), meta(8, 2)), {}),
    (aten.topk.default, lambda: (meta(4, 8), 2), {}),
    (aten.cat.default, lambda: ([meta(4, 8), meta(2, 8)],), {}),
    (aten.add_.Tensor, lambda: (meta(4, 8), meta(8)), {}),
    (aten.maximum.out, lambda: (meta(4, 8), meta(8)), {"out": meta(4, 8)}),
    (aten.sum.dim_IntList, lambda: (meta(4, 8), [1]), {"dtype": torch.float32}),
    (aten.zeros.default, lambda: ([4, 8],), {"dtype": torch.uint8, "device": torch.device("meta")}),
]


@pytest.mark.parametrize(("func", "make", "kwargs"), CALLS, ids=lambda it: getattr(it, "__name__", ""))
def test_told_results_are_those_of_the_operator(func: Any, make: Callable[[], Any], kwargs: dict[str, Any]) -> None:
    asked: list[Any] = []

    def ask(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return func(*args, **kwargs)

    results = Results()
    for _ in range(3):
        args = make()
        out = results.of(str(func), ask, args, kwargs)
        assert facts(out) == facts(func(*make(), **kwargs))
        assert (out is args[0]) == (func is aten.add_.Tensor)
        assert (out is kwargs.get("out")) == (func is aten.maximum.out)
    assert len(asked) == 1


def test_what_decides_is_told_apart() -> None:
    """Types of numbers, of tensors and of those that PyTorch makes by default; strides; where a tensor lies."""
    results = Results()

    def dtype(func: Any, *args: Any, **kwargs: Any) -> torch.dtype:
        out: Tensor = results.of(str(func), func, args, kwargs)
        return out.dtype

    whole = meta(4, dtype=torch.int64)
    assert dtype(aten.mul.Tensor, whole, 1) == torch.int64
    assert dtype(aten.mul.Tensor, whole, 1.0) == torch.float32
    assert dtype(aten.mul.Tensor, meta(4), torch.tensor(1.0)) == torch.bfloat16, "a number in a tensor on the host"
    assert len(results._known) == 2, "of what lies on the host nothing is kept"
    assert dtype(aten.mul.Tensor, meta(4), meta(1, dtype=torch.float32)) == torch.float32
    before = torch.get_default_dtype()
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            assert dtype(aten.empty.memory_format, [4], device=torch.device("meta")) == default
        finally:
            torch.set_default_dtype(before)
    shapes = [results.of("clone", aten.clone.default, (x,), {}).stride() for x in (meta(4, 4), meta(4, 4).t())]
    assert shapes == [(4, 1), (1, 4)]


def test_what_may_be_a_view_is_asked_each_time() -> None:
    """`to` returns its argument or a copy; a copy is new memory, also the second time."""
    tracer = Tracer({}, {})
    with tracer:
        x = meta(4, 8)
        kept = [aten.to.dtype(x, torch.bfloat16), aten.to.dtype(x, torch.float32), aten.to.dtype(x, torch.float32)]
        views = [*aten.unbind.int(x, 0), aten.view.default(x, [32])]
    assert [event.nbytes for event in tracer.trace.events] == [64, 128, 128]
    assert len(kept) + len(views) == 8


def test_pieces_of_memory_are_new_each_time() -> None:
    tracer = Tracer({}, {})
    with tracer:
        x = meta(4, 8)
        for _ in range(3):
            x = x * 2.0
    sizes = [event.nbytes for event in tracer.trace.events]
    assert sizes == [64, 64, -64, 64, -64, 64, -64]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([512, 256], [64, 512, 256, -256, -512]),
        ([512, RESULT, 256], [512, 64, 256, -256, -512]),
        ([512, -512, RESULT], [512, -512, 64]),
        ([512, RESULT, -512], [512, 64, -512]),
    ],
)
def test_what_is_taken_inside_comes_before_or_after_the_result(pieces: list[int], expected: list[int]) -> None:
    tracer = Tracer({aten.neg.default: lambda *_: pieces}, {})
    with tracer:
        x = meta(4, 8)
        tracer.begin()
        kept = torch.neg(x)
    assert [event.nbytes for event in tracer.trace.events[1:]] == expected
    assert len(kept)


def test_of_pieces_of_one_size_the_oldest_is_given_back_first() -> None:
    """As expressions do it: `x.float() * y` has made the product before it lets go of the copy."""
    tracer = Tracer({aten.neg.default: lambda *_: [512, 512, -512]}, {})
    with tracer:
        x = meta(4, 8)
        tracer.begin()
        kept = torch.neg(x)
    first, second, *given_back = [event for event in tracer.trace.events if event.inside]
    assert [event.key for event in given_back] == [first.key, second.key]
    assert len(kept)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_summed_where_autograd_sums_them(shared: bool) -> None:
    """In the memory of the first of two, unless someone else holds that: as the profiler sees it on real tensors."""
    times = 1 << 16

    def step(x: Tensor) -> None:
        y = x * 2.0
        other = y + 1.0 if shared else y.cos()  # the gradient of a sum is handed on as it is
        ((y.sin() if shared else y.exp()) * other).sum().backward()

    tracer = Tracer({}, {})
    with tracer:
        x = torch.ones(times, device="meta", requires_grad=True)
        tracer.begin()
        step(x)
    real = torch.ones(times, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(real)
    taken = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    births = sum(event.nbytes() == 4 * times for event in taken)
    assert sum(event.nbytes == 4 * times for event in tracer.trace.events) - 1 == births, "x is there before"
