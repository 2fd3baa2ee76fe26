"""Fine-tune large language models inside the memory budget you name.

`plan` proves a budget, `load` gives a quantized model with an adapter, `train` runs a whole fine-tuning, `generate`
samples. Names are imported on first use, so `import lowmem_ft` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_ft.api import load, plan, train
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.core.errors import LowMemError
    from lowmem_ft.core.plan import Plan
    from lowmem_ft.generate import generate

__all__ = ["LowMemError", "Plan", "RunConfig", "generate", "load", "plan", "train"]
_HOMES = {
    "LowMemError": "core.errors",
    "Plan": "core.plan",
    "RunConfig": "core.config",
    "generate": "generate",
    "load": "api",
    "plan": "api",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowmem_ft' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"lowmem_ft.{_HOMES[name]}"), name)
    globals()[name] = value  # `generate` is also a submodule, which importing it would otherwise leave here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
