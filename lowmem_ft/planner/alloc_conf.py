"""The settings of PyTorch's CUDA allocator that a run will have, as far as the model of it knows them."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Mapping, MutableMapping

# as c10/cuda/CUDAAllocatorConfig.h reads them: the second one only where the first is not set
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_OF_THE_DEVICE = {
    "large_segment_size_mb",
    "max_split_size_mb",
    "max_non_split_rounding_mb",
    "garbage_collection_threshold",
    "roundup_power2_divisions",
    "per_process_memory_fraction",
}


def prefer_expandable_segments(environ: MutableMapping[str, str] = os.environ, platform: str = sys.platform) -> None:
    """Let PyTorch's allocator grow its segments, which leaves no holes between them; call it before torch is imported.

    Nothing is done where the user has chosen, or where it is not to be had: on Windows, and on cards that map no
    virtual memory. Where there is no driver, plans are for a card elsewhere, whose runs will have it.
    """
    if any(name in environ for name in VARIABLES) or platform == "win32" or not _maps_virtual_memory():
        return
    environ[VARIABLES[1]] = "expandable_segments:True"


def _maps_virtual_memory() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    count, able = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return True
    for device in range(count.value):
        # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED; the ordinal serves as device
        if driver.cuDeviceGetAttribute(ctypes.byref(able), 102, device) != 0 or not able.value:
            return False
    return True


def expandable_segments(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> bool:
    """Whether the allocator of a run in this environment grows its segments.

    A plan for a card that is not here takes this process's environment for that of the run, too. Warns of settings that
    a plan knows nothing of: they change what is reserved, not what is allocated.
    """
    name = next((name for name in VARIABLES if name in environ), None)
    if name is None:
        return False
    settings = dict(_settings(environ[name]))
    unknown = sorted(_OF_THE_DEVICE & settings.keys())
    if settings.get("backend", "native") != "native":
        unknown.append(f"backend:{settings['backend']}")
    if unknown:
        warnings.warn(
            f"{name}: plans do not model {', '.join(unknown)}; the run may reserve more or less than planned.",
            stacklevel=2,
        )
    wanted = settings.get("expandable_segments", "False").lower() == "true"
    if wanted and platform == "win32":
        warnings.warn(f"{name}: expandable segments do not exist on Windows; planned without them.", stacklevel=2)
        return False
    return wanted


def _settings(text: str) -> list[tuple[str, str]]:
    """(key, value) of each setting; a value may be a list in brackets."""
    return re.findall(r"([^,:\[\]]+):(\[[^\]]*\]|[^,\[\]]*)", re.sub(r"\s", "", text))
