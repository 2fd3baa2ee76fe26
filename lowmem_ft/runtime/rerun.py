"""What running a forward a second time needs: the same random numbers, the same autocast, and what nobody reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Random:
    """The state of the generators that work on `device` draws from."""

    device: torch.device
    host_state: Tensor = field(default_factory=torch.get_rng_state)
    device_state: Tensor | None = None

    def __post_init__(self) -> None:
        if self.device.type == "meta":  # simulated: as large, and seen by whoever traces
            self.host_state = torch.empty_like(self.host_state, device="cpu")
        if self.device.type not in ("cpu", "meta"):
            self.device_state = torch.get_device_module(self.device).get_rng_state(self.device)

    def restored(self) -> Any:
        """A context in which the generators are as they were; afterwards they are as before."""
        stack = ExitStack()
        if self.device.type == "meta":
            before = torch.empty_like(self.host_state)
            stack.callback(before.size)  # held until then, as `fork_rng` holds it
            return stack
        if self.device_state is None:
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            stack.enter_context(torch.random.fork_rng(devices=[self.device], device_type=self.device.type))
            torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)
        torch.set_rng_state(self.host_state)
        return stack


@dataclass(slots=True)
class Unread:
    """The layers whose outputs only reach the outputs of what is run again by sums; None before its first backward."""

    layers: list[Any] | None = None

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it these layers return memory that they do not fill."""
        for layer in self.layers or ():
            layer.unread = True
        try:
            yield
        finally:
            for layer in self.layers or ():
                layer.unread = False


def active_autocast(device: torch.device) -> list[tuple[str, torch.dtype]]:
    """(kind of device, dtype) of the autocasts that work on `device` is under."""
    active = [kind for kind in {device.type, "cpu"} if kind != "meta" and torch.is_autocast_enabled(kind)]
    return [(kind, torch.get_autocast_dtype(kind)) for kind in active]
