"""Signals that ask to stop: Ctrl-C, and what a system or a terminal sends before it ends."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# as of a cluster's scheduler, and of a connection that is lost
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def clean_up_when_ended() -> None:
    """Let ENDING signals leave what is under way as exceptions do, so that nothing half-written stays; those that
    someone else cares for, or that are ignored (nohup), are left as they are."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)  # as shells tell of it

    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, leave)


@contextmanager
def first_interrupt(*, ending: bool = False) -> Iterator[list[int]]:
    """A list in which the first Ctrl-C is noted, so that the work under way can end well; a second one interrupts at
    once. With `ending` also one of ENDING where Python handles it. Signals reach the main thread only: elsewhere
    nothing is noted."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def handle(number: int, frame: Any) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    also = [number for number in ENDING if ending and callable(signal.getsignal(number))]
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, *also)}
    try:
        yield noted
    finally:
        restore()
