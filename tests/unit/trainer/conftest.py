"""The data of tests of runs."""

from pathlib import Path

import pytest

from tests.assets import write_share


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small share of the embedded data."""
    write_share(tmp_path, train=60, eval=8)
    return tmp_path
