"""Inputs of blocks, kept below the device between forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from lowmem_ft.runtime.tiers import PAGE, NoTier, TakingTier, device_memory

SLOTS = 2  # inputs on the device during backward: the one at work, and the next one on its way up


class Shelf:
    """Tensors go down one by one in forward and come up in reverse in backward, beside the work.

    The last one stays on the device, as it is the first to be asked for. One that goes down lives until the next one
    follows it, and one that comes up takes its memory when the one above it is taken.

    Args:
        count: places.
        open_tier: bytes of each place but the last -> where they lie. Not asked in a simulated run, whose tensors are
            on meta.
    """

    def __init__(self, count: int, open_tier: Callable[[list[int]], TakingTier]) -> None:
        self._last, self._open_tier = count - 1, open_tier
        self._size = 0  # bytes of a place
        self._tier: TakingTier = NoTier()
        self._full: set[int] = set()
        self._going: tuple[object, Tensor] | None = None
        self._staying: Tensor | None = None
        self._coming: tuple[object, Tensor] | None = None

    def put(self, place: int, tensor: Tensor) -> None:
        """Begin to take `tensor` down. It must not change any more."""
        self._settle()
        flat = tensor.detach().contiguous()
        if place == self._last:
            self._staying = flat
            return
        self._full = {it for it in self._full if it < place}  # others are of an aborted pass
        nbytes = -(-tensor.nbytes // PAGE) * PAGE
        if nbytes > self._size:
            self._widen(nbytes, tensor.device)
        self._going = self._tier.store(place, flat), flat
        self._full.add(place)

    def _widen(self, nbytes: int, device: torch.device) -> None:
        """Have places of so many bytes. What lies in them moves: the first input of a pass may be smaller than those
        behind it, as where a model adds its blocks' outputs up in fp32 (Mamba)."""
        simulated = device.type == "meta"
        moving = {} if simulated else {place: device_memory(self._size, device) for place in self._full}
        for place, memory in moving.items():
            self._tier.wait(self._tier.start(place, memory))
        self._size, self._tier = 0, NoTier()  # first what it had is given back
        tier: TakingTier = NoTier() if simulated else self._open_tier([nbytes] * self._last)
        self._size, self._tier = nbytes, tier
        for place, memory in moving.items():
            tier.wait(tier.store(place, memory))

    def take(self, place: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor of `place`, while the one below it begins to come."""
        staying, came, coming = self._staying, self._coming, None
        self._staying = None
        if place - 1 in self._full:
            memory = device_memory(self._size, device)  # if there is none, what is on its way is still to be waited for
            coming = self._tier.start(place - 1, memory), memory
            self._full.remove(place - 1)
        self._coming = coming
        if place == self._last:
            assert staying is not None
            return staying
        assert came is not None
        self._tier.wait(came[0])
        return came[1][: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def clear(self) -> None:
        """Let go of what an aborted pass has left, when that is no longer on its way."""
        with contextlib.suppress(Exception):  # it did not arrive, and nobody asks for it any more
            self._settle()
        self._going = self._coming = self._staying = None
        self._full.clear()

    def _settle(self) -> None:
        """Wait for what is on its way, and let go of it: of the last tensor that was put, or of an aborted pass."""
        for moving in (self._going, self._coming):
            if moving is not None:
                self._tier.wait(moving[0])
        self._going = self._coming = None
