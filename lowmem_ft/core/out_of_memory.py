"""What says that memory ran out; an error of its own it has only in some places."""

from __future__ import annotations

import errno

import torch

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # in errors of no own class


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the device or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))
