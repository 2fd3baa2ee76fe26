"""Inputs of blocks, kept below the device between forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem_ft.runtime.tiers import PAGE, NoTier, TakingTier, device_memory

SLOTS = 2  # on the device during backward: the input at work, and the next one on its way up


class Shelf:
    """Tensors go down one by one in forward and come up in reverse in backward, beside the work.

    One that goes down lives until the next one follows it. Those that come up share two slots.

    Args:
        count: places.
        open_tier: bytes of each place -> where they lie. Not asked in a simulated run, whose tensors are on meta.
    """

    def __init__(self, count: int, open_tier: Callable[[list[int]], TakingTier]) -> None:
        self._count, self._open_tier = count, open_tier
        self._size = 0  # bytes of a place
        self._tier: TakingTier = NoTier()
        self._full: set[int] = set()
        self._going: tuple[object, Tensor] | None = None
        self._slots: list[Tensor] = []
        self._coming: dict[int, object] = {}  # by place, which lies in the slot of its parity

    def put(self, place: int, tensor: Tensor) -> None:
        """Begin to take `tensor` down. It must not change any more."""
        self._settle()
        self._slots, self._coming = [], {}  # of a backward pass that was aborted
        nbytes = -(-tensor.nbytes // PAGE) * PAGE
        if nbytes > self._size:
            self._size = nbytes
            self._tier = NoTier() if tensor.is_meta else self._open_tier([nbytes] * self._count)
        flat = tensor.detach().contiguous()
        self._going = self._tier.store(place, flat), flat
        self._full.add(place)

    def take(self, place: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor of `place`. It is valid until the next but one is taken."""
        self._settle()
        if not self._slots:
            self._slots = [device_memory(self._size, device) for _ in range(SLOTS)]
        for coming in (place, place - 1):
            if coming in self._full and coming not in self._coming:
                self._coming[coming] = self._tier.start(coming, self._slots[coming % SLOTS])
        self._tier.wait(self._coming.pop(place))
        found = self._slots[place % SLOTS][: shape.numel() * dtype.itemsize].view(dtype).view(shape)
        self._full.remove(place)
        if not self._full:
            self._slots = []  # nothing of it is held between steps
        return found

    def _settle(self) -> None:
        """Wait for what is going down, and let go of it."""
        if self._going is not None:
            self._tier.wait(self._going[0])
            self._going = None
