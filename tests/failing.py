"""Memory that runs out when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Failing(TorchDispatchMode):
    """Counts the operations that take memory, from 1 on; those that `fails` names raise OutOfMemoryError.

    Operations of our own and of bitsandbytes count too, although they write to what they are given.
    """

    def __init__(self, fails: Callable[[int], bool] = lambda count: False) -> None:
        super().__init__()
        self.count, self._fails = 0, fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fresh = any(returned.alias_info is None for returned in func._schema.returns)
        if fresh or func.namespace not in ("aten", "prim", "profiler"):
            self.count += 1
            if self._fails(self.count):
                raise torch.OutOfMemoryError(f"allocation {self.count} of this step fails")
        return func(*args, **(kwargs or {}))
