"""Ctrl-C as a wish to stop soon."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def first_interrupt() -> Iterator[list[int]]:
    """A list in which the first Ctrl-C is noted, so that the work under way can end well; a second one interrupts at
    once. Signals reach the main thread only: elsewhere nothing is noted."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def handle(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
