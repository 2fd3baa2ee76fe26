"""Fine-tune large language models inside the memory budget you name.

`plan` proves a budget, `load` gives a quantized model with an adapter, `save` writes that adapter, `train` runs a whole
fine-tuning, `generate` samples. Names are imported on first use, so `import lowmem_ft` costs nothing.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_ft.api import load, plan, save, train
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.core.errors import LowMemError
    from lowmem_ft.core.plan import Plan
    from lowmem_ft.generate import generate

__all__ = ["LowMemError", "Plan", "RunConfig", "generate", "load", "plan", "save", "train"]
_HOMES = {
    "LowMemError": "core.errors",
    "Plan": "core.plan",
    "RunConfig": "core.config",
    "generate": "generate",
    "load": "api",
    "plan": "api",
    "save": "api",
    "train": "api",
}

# Where the CPU multiplies bf16, bitsandbytes asks for a package with a product of packed weights. Ours is another one.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # whose import takes longer than this package's

        return version("lowmem-ft")
    if name not in _HOMES:
        raise AttributeError(f"module 'lowmem_ft' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"lowmem_ft.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Importing the submodule `generate` would put it in the place of the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
