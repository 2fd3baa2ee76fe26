"""A model in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # core itself works without torch
    from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, every module is in evaluation mode; afterwards each is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
