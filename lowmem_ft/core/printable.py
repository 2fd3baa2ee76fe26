"""Text of others, such as names in files, as a terminal may be given it."""

from __future__ import annotations

import re
import sys

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line feeds


def printable(text: str) -> str:
    """`text` with control characters written out, as `\\x1b`: what they tell a terminal to do, it would do."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def is_terminal() -> bool:
    """Whether standard output is one."""
    return sys.stdout.isatty()


def for_output(text: str) -> str:
    """What a model said as standard output is given it: `printable` on a terminal, and else as it is."""
    return printable(text) if is_terminal() else text
