"""Sizes and durations as people write them."""

import pytest

from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.sizes import format_least, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * 2**30), ("6GB", 6 * 10**9), ("6g", 6 * 10**9), ("800MB", 800 * 10**6), (" 1.5 gib ", 3 * 2**29),
     ("512KiB", 2**19), ("77", 77), (77, 77), ("2TiB", 2**41)],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "0", "6gigs", "6 G i B", "1e3MB", "0.4", "1.5", "2.5B", "0.0001KB", "9" * 400, None]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="Not a size"):
        parse_size(text)


def test_format() -> None:
    assert [format_size(n) for n in (12, 1536, 6 * 2**30, 3 * 2**40)] == ["12 B", "1.50 KiB", "6.00 GiB", "3.00 TiB"]


@pytest.mark.parametrize(("text", "seconds"), [("3h", 10800), ("90m", 5400), ("1h30m", 5400), ("45", 45), (7.5, 7.5)])
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3x", "h", "1h 30", "0s", "-3h"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="Not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("size", [1, 503_300_000, 2**30 - 1, 2**30, 1_567_891_234, 75 * 10**9])
def test_the_least_that_suffices_is_rounded_up(size: int) -> None:
    assert 1.0005 * size < parse_size(format_least(size)) + 1 < 1.012 * size + 2**20
