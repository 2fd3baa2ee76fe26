"""What running a forward a second time needs: the same random numbers, the same autocast, and what nobody reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that work on `device` draws from: on the host, and on a card its own."""
    host = torch.get_rng_state()
    if device.type == "meta":  # simulated: as large, and seen by whoever traces
        host = torch.empty_like(host, device="cpu")
    if device.type in ("cpu", "meta"):
        return [host]
    return [host, torch.get_device_module(device).get_rng_state(device)]


def with_random(device: torch.device, states: Sequence[Tensor]) -> ExitStack:
    """A context in which the generators are as `random_states` had found them; afterwards they are as before."""
    stack = ExitStack()
    if device.type == "meta":
        before = torch.empty_like(states[0])
        stack.callback(before.size)  # held until then, as `fork_rng` holds it
        return stack
    if len(states) == 1:
        stack.enter_context(torch.random.fork_rng(devices=[]))
    else:
        stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        torch.get_device_module(device).set_rng_state(states[1], device)
    torch.set_rng_state(states[0])
    return stack


def as_before(device: torch.device, states: Sequence[Tensor], autocast: Sequence[tuple[str, torch.dtype]]) -> ExitStack:
    """A context with the random numbers and the autocasts of a first run. Without `states` numbers are drawn on."""
    stack = with_random(device, states) if states else ExitStack()
    for device_type, dtype in autocast:
        stack.enter_context(torch.autocast(device_type, dtype=dtype))
    return stack


class _Running(threading.local):
    again = False


_running = _Running()


def runs_again() -> bool:
    """Whether this thread runs something a second time, whose first run kept its inputs alone."""
    return _running.again


@dataclass(slots=True)
class Unread:
    """The layers whose outputs only reach the outputs of what is run again by sums; None before its first backward."""

    layers: list[Any] | None = None

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """For a second run: within it these layers return memory that they do not fill."""
        for layer in self.layers or ():
            layer.unread = True
        before, _running.again = _running.again, True
        try:
            yield
        finally:
            _running.again = before
            for layer in self.layers or ():
                layer.unread = False


def active_autocast(device: torch.device) -> list[tuple[str, torch.dtype]]:
    """(kind of device, dtype) of the autocasts that work on `device` is under."""
    active = [kind for kind in {device.type, "cpu"} if kind != "meta" and torch.is_autocast_enabled(kind)]
    return [(kind, torch.get_autocast_dtype(kind)) for kind in active]
