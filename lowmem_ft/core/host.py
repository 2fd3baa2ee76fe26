"""The host's memory allocator, and how its threads wait."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

LARGE = 4 << 20  # bytes from which a piece of memory is mapped on its own
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def prefer_huge_pages() -> None:
    """Let PyTorch ask for 2 MiB pages for its large tensors. It reads this setting when it first allocates one."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def prefer_short_waits() -> None:
    """Let threads that wait for each other give their cores away soon; read when torch is imported.

    libgomp's own spinning makes a step of the demo's model take three times as long where something else runs on one of
    two cores (12 s of 4 s; 2026-11-27), and no spinning at all 20% longer where nothing does (2.6 s of 2.1 s). A
    thousand turns are as fast as either: with ten thousand it is twice as long on a busy machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@cache
def map_large_tensors() -> None:
    """Give every piece of memory of 4 MiB or more a mapping of its own, from now on in this process.

    Then a freed tensor goes back to the operating system at once, and the process holds little more than its tensors
    hold, the same from run to run. By default glibc raises this limit to 32 MiB as it goes and keeps the holes between
    tensors that stay. New mappings cost page faults, so the limit is a compromise: a step of a 137M Llama that
    recomputes 2 x 1024 tokens takes 10.9 s and 369 MiB above its imports with 4 MiB, 17 s and 282 MiB with 1 MiB (2
    Zen 3 cores; with 4 KiB pages instead of huge ones 13.7 s). Does nothing elsewhere than on glibc.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)


def release_freed_memory() -> None:
    """Give freed memory that glibc keeps in its heap back to the operating system. Does nothing elsewhere."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


class Trimmer:
    """Gives freed memory back to the operating system after every few MiB of work.

    glibc puts the many short-lived tensors of a load between those that stay, and keeps the holes: the peak of the same
    load varied by 90 MiB from run to run, and DoRA's norms of half a billion int8 weights left as much.
    """

    def __init__(self, every_bytes: int = 8 << 20) -> None:
        self._every, self._since = every_bytes, 0

    def worked(self, nbytes: int) -> None:
        """Call it after work on `nbytes`. Costs some 0.3 ms when it does something."""
        self._since += nbytes
        if self._since >= self._every:
            release_freed_memory()
            self._since = 0


@cache
def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
