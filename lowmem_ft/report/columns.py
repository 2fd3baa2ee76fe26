"""Columns of a table that loses nothing in a narrow terminal, where rich would cut words."""

from __future__ import annotations

from rich.table import Column


def columns(*headers: str) -> list[Column]:
    """The first, by which a row is known and which is copied, stays in one piece; long words of others are folded."""
    return [Column(header, no_wrap=not at, overflow="fold") for at, header in enumerate(headers)]
