"""Bytes and durations as people write them (`6GiB`, `800MB`, `3h`), both ways."""

from __future__ import annotations

import math
import re

from lowmem_ft.core.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": int(base ** (power + 1))
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}
_FOLDED = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `6GiB` (1024s), `6GB` or `6G` (1000s), `800MB`, `1.5GiB` or a plain number of bytes.

    Raises:
        ConfigError: the text is no size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    factor = _FOLDED.get(match[2].lower()) if match else None
    value = float(match[1]) * factor if match is not None and factor is not None else 0.0
    size = round(value) if value < math.inf else 0
    of_bytes = match is not None and match[2].lower() in ("", "b")
    if size < 1 or (of_bytes and size != value):
        raise ConfigError(
            "Not a size.",
            given=repr(text),
            allowed="a positive number and a unit: 6GiB, 6GB, 800MB, 512MiB or whole bytes",
            fix=f"write {match[1]}GiB, if that is what you mean" if match and of_bytes else "write for example 8GiB",
        )
    return size


def parse_count(text: str | int) -> int:
    """A number such as `50M`, `2B`, `800k` or a plain one.

    Raises:
        ConfigError: the text is no number, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB]?)\s*", str(text))
    value = float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()] if match else 0.0
    count = int(value) if value < math.inf else 0
    if count < 1:
        raise ConfigError("Not a number.", given=repr(text), allowed="a positive number: 50M, 2B, 800k or 1234567")
    return count


def format_size(size: int | float) -> str:
    """`size` bytes in the largest binary unit that keeps it above one: 6442450944 -> `6.00 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def format_least(size: int) -> str:
    """`size` bytes, rounded up, to be given as a budget: what one process takes differs by a little from the next."""
    size += size >> 10
    if size < 2**30:
        return f"{-(-size // 2**20)} MiB"
    return f"{-(-size * 100 // 2**30) / 100:.2f} GiB"


def parse_duration(text: str | int | float) -> float:
    """Seconds of a duration such as `3h`, `90m`, `1h30m`, `45s` or a plain number of seconds.

    Raises:
        ConfigError: the text is no duration, or not positive.
    """
    whole = str(text).strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", whole)
    if re.fullmatch(r"\d+(\.\d+)?", whole):
        seconds = float(whole)
    else:
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds <= 0 or (parts and "".join(number + unit for number, unit in parts) != whole):
        raise ConfigError("Not a duration.", given=repr(text), allowed="3h, 90m, 1h30m, 45s or seconds", fix="write 3h")
    return seconds
