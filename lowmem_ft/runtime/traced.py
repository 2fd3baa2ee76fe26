"""What the runtime says to whoever traces it on tensors without data, where some work stands for other work like it.

Four operators that do nothing, each of which `planner.trace` understands. So a step of many equal tiles, chunks or
updates is traced as fast as one of few, and says the same bytes and seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# For how many of its like each following operation stands; and for how many each following tile stands in time alone,
# as the rows of all are the same
torch.library.define("lowmem_ft::stands_for", "(Tensor x, int times) -> ()")
torch.library.define("lowmem_ft::each_is", "(Tensor x, float tiles) -> ()")
# Before and after work that always takes the same: what it returned if that is known, which is then all that is left
# to do; and what it did return
torch.library.define("lowmem_ft::known", "(Tensor x, str work) -> Tensor[]")
torch.library.define("lowmem_ft::learn", "(Tensor x, str work, Tensor result) -> ()")
STANDS_FOR, EACH_IS = torch.ops.lowmem_ft.stands_for.default, torch.ops.lowmem_ft.each_is.default
KNOWN, LEARN = torch.ops.lowmem_ft.known.default, torch.ops.lowmem_ft.learn.default


@torch.library.register_fake("lowmem_ft::stands_for")  # type: ignore[untyped-decorator]
def _(x: Tensor, times: int) -> None:
    return None


@torch.library.register_fake("lowmem_ft::each_is")  # type: ignore[untyped-decorator]
def _(x: Tensor, tiles: float) -> None:
    return None


@torch.library.register_fake("lowmem_ft::known")  # type: ignore[untyped-decorator]
def _(x: Tensor, work: str) -> list[Tensor]:
    return []


@torch.library.register_fake("lowmem_ft::learn")  # type: ignore[untyped-decorator]
def _(x: Tensor, work: str, result: Tensor) -> None:
    return None


@contextmanager
def standing_for(x: Tensor, times: int) -> Iterator[None]:
    """What is done within, on tensors without data as `x` is, stands for as many of its like."""
    if times == 1:
        yield
        return
    STANDS_FOR(x, times)
    yield
    STANDS_FOR(x, 1)


def traced_tiles(rows: Sequence[int]) -> list[int]:
    """Without data: for how many of its height each tile stands; 0 where another stands for it."""
    heights = Counter(rows)
    return [heights.pop(high, 0) for high in rows]
