"""One form for every message to a user: what went wrong, what was given, what is allowed, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lowmem_ft.core.printable import printable


class LowMemError(Exception):
    """Bad input. The command line prints the message without a traceback and exits with `exit_code`.

    Args:
        what: one sentence that names the problem.
        given: what was found (a value, a path, a shape).
        allowed: what would have been accepted.
        fix: what the user can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, given: object = None, allowed: object = None, fix: str | None = None) -> None:
        self.what, self.given, self.allowed, self.fix = what, given, allowed, fix
        lines = [what]
        lines += [f"  given:   {given}"] if given is not None else []
        lines += [f"  allowed: {allowed}"] if allowed is not None else []
        lines += [f"  fix:     {fix}"] if fix is not None else []
        super().__init__(printable("\n".join(lines)))


class ConfigError(LowMemError, ValueError):
    """A key, value or combination of values that the configuration does not allow."""


class CheckpointError(LowMemError, ValueError):
    """Model files that are missing, broken, or in a format that cannot be read safely."""


class UnsupportedError(LowMemError, ValueError):
    """An architecture, method or device that cannot do what was asked."""


class DataError(LowMemError, ValueError):
    """Training or evaluation records that cannot be used."""


class ParityError(LowMemError):
    """What was exported does not compute what was trained."""


class SpillError(LowMemError):
    """What lies on a disk below the device cannot be written or read, as where there is no room for it."""


class BudgetError(LowMemError):
    """Nothing fits the budget."""

    exit_code = 3


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word closest to `word`, or None where none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return close[0] if close else None
