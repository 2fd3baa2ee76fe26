"""How tensors that autograd saves for backward are kept, where several of ours have a say in it.

PyTorch asks the innermost pair of hooks alone. Here those that leave a tensor alone pass it on to those around them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# What takes a tensor, and gives back what to call in backward for it; None leaves it to others
Keep = Callable[[Tensor], Callable[[], Tensor] | None]


class _Active(threading.local):
    keeps: tuple[Keep, ...] = ()


_active = _Active()


@contextmanager
def keeping(keep: Keep) -> Iterator[None]:
    """Within it `keep` is asked first of each tensor that is saved."""
    before = _active.keeps
    _active.keeps = keeps = (keep, *before)

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        for it in keeps:
            found = it(tensor)
            if found is not None:
                return found
        held = tensor.detach()  # itself it would hold the graph that holds it, where that is no result's
        return lambda: held

    try:
        with saved_tensors_hooks(pack, lambda kept: kept()):
            yield
    finally:
        _active.keeps = before
