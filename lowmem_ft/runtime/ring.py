"""A ring of slots on the device, through which the pieces of a tier pass: one is at work while the next one comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_ft.runtime.tiers import Tier, device_memory

SLOTS = 2  # the piece at work and the next one


class Ring:
    """Which streamed block lies in which slot, and which comes next. Used by the run and by its prediction.

    Args:
        count: streamed blocks, numbered from 0 here in the order of the model.

    Attributes:
        current: the block at work, or None before the first.
    """

    def __init__(self, count: int) -> None:
        self.current: int | None = None
        self._last = count - 1
        self._holds: list[int | None] = [None] * SLOTS

    def ask(self, block: int, *, returns: bool) -> list[tuple[int, int]]:
        """Make `block` the one at work.

        Args:
            returns: whether a backward pass follows the forward pass.

        Returns:
            (slot, block) of the copies to begin now, the first first.
        """
        wanted = list(dict.fromkeys((block, self._next(block, returns))))
        copies = []
        for coming in wanted:
            if coming not in self._holds:
                slot = next(at for at, held in enumerate(self._holds) if held not in wanted)
                self._holds[slot] = coming
                copies.append((slot, coming))
        self.current = block
        return copies

    def slot_of(self, block: int) -> int:
        """Where a block lies, or is being copied to."""
        return self._holds.index(block)

    def _next(self, block: int, returns: bool) -> int:
        """The block that is asked for after `block`: the passes go forward and, if there is one, back in reverse."""
        came = -1 if self.current is None else self.current
        wraps = came == self._last and block == 0  # from one forward pass into the next
        if block > came or wraps:
            turns = block == self._last
            after = block + 1 if not turns else self._last - 1 if returns else 0
        else:
            after = block - 1 if block > 0 else 1
        return min(max(after, 0), self._last)


class Slots:
    """The pieces of a tier that are on the device, or on their way to it.

    Args:
        tier: which holds a piece for each of `sizes`, in bytes.
        device: of the slots, each as large as the largest piece.

    Attributes:
        memory: of each slot, uint8.
    """

    def __init__(self, tier: Tier, sizes: Sequence[int], device: torch.device) -> None:
        self.memory = [device_memory(max(sizes, default=0), device) for _ in range(SLOTS)]
        self._tier, self._count = tier, len(sizes)
        self._copies: list[object] = [None] * SLOTS
        self._ring = Ring(self._count)

    @property
    def current(self) -> int | None:
        """The piece at work."""
        return self._ring.current

    def holding(self, piece: int) -> Tensor:
        """The slot that a piece lies in, or is being copied to."""
        return self.memory[self._ring.slot_of(piece)]

    def settle(self) -> None:
        """Wait for what is on its way, as one must before the slots are given up."""
        for copy in self._copies:
            if copy is not None:
                self._tier.wait(copy)

    def bring(self, piece: int, *, returns: bool) -> Tensor:
        """The slot that holds a piece, while the one that will be asked for next begins to come.

        Args:
            returns: whether a backward pass follows the forward pass.
        """
        try:
            for slot, coming in self._ring.ask(piece, returns=returns):
                self._copies[slot] = self._tier.start(coming, self.memory[slot])
            self._tier.wait(self._copies[self._ring.slot_of(piece)])
        except BaseException:
            self._ring = Ring(self._count)  # whoever asks again must not take what did not come for what did
            raise
        return self.holding(piece)
