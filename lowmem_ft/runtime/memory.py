"""What the process takes now and took at most, in bytes, as the operating system and the CUDA allocator count it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 of control groups writes nearly 2**63 for no limit


def process_bytes() -> int:
    """Resident set size of this process."""
    return int(psutil.Process().memory_info().rss)


def process_peak_bytes() -> int:
    """The largest resident set size of this process so far."""
    if sys.platform == "linux":
        # getrusage's ru_maxrss starts at the parent's size on Linux; VmHWM counts this program alone
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def reset_process_peak() -> bool:
    """Let `process_peak_bytes` count from now on; False where the system does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: resets VmHWM
    except OSError:
        return False
    return True


def cuda_process_bytes(index: int) -> int | None:
    """What this process takes of CUDA device `index`, context included, as `nvidia-smi` shows it.

    Returns:
        None without nvidia-ml-py (extra `gpu`), or where the driver does not tell (containers that hide process ids,
        parts of a card).
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            # by UUID, because CUDA_VISIBLE_DEVICES numbers the cards anew
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no library of the driver, or a part of a card (MIG), which has another UUID
        return None
    mine = [it.usedGpuMemory for it in running if it.pid == os.getpid()]
    return int(mine[0]) if mine and mine[0] else None


def device_peak_bytes(device: torch.device) -> int:
    """The most bytes that the device tier held: on CUDA the allocator's reserved peak, else the process's."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else process_peak_bytes()


def cgroup_bytes(roots: Iterable[Path] | None = None) -> int | None:
    """Bytes of RAM that the control groups of this process allow; None where none limits it or none can be read.

    Args:
        roots: their folders; None: those of this process, versions 1 and 2.
    """
    limits = []
    for root in _control_groups() if roots is None else roots:
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
                limits.append(int((root / name).read_text(encoding="ascii")))
    smallest = min(limits, default=_UNLIMITED)
    return smallest if smallest < _UNLIMITED else None


def _control_groups() -> list[Path]:
    """The group of this process and those above it. A container sees its own group as the root."""
    found = [_CGROUPS, _CGROUPS / "memory"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            root = _CGROUPS if not controllers else _CGROUPS / "memory" if controllers == "memory" else None
            if root is not None:
                group = root / path.lstrip("/")
                found += [group, *group.parents]
    return found
