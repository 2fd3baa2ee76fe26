"""Settings that every test shares."""

import gc
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # xdist workers share the cores: one thread each is faster than two that wait for each other
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """For many measurements of memory: each collects garbage first, 0.3 s with all of transformers to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
