"""Settings that every test shares."""

import gc
import os
import shutil
import tempfile

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # nothing of a test stays in the user's cache, also of those that start commands
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lowmem-ft-tests-")
    # what the command line sets for itself would change the plans of tests that follow in the same process
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    # xdist workers share the cores: one thread each is faster than two that wait for each other
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> None:
    """What is imported is never garbage. With all of transformers to look through, a collection takes 0.3 s, and every
    measurement of memory and every load of a model begins with one."""
    gc.collect()
    gc.freeze()
