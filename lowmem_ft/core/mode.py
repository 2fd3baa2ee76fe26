"""Modes for a while: a model's own, and PyTorch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

# Held by whoever changes for a moment what all threads share, as transformers does with the default dtype while it
# builds a model: another thread would take that for the user's, and leave it behind.
ONE_FOR_ALL = threading.Lock()

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


@contextmanager
def neutral_torch() -> Iterator[None]:
    """Within, PyTorch is as it is when it has just been imported, whatever a notebook has set for its own tensors:
    gradients off, inference mode, autocast, a default dtype or device. Also a decorator.
    """
    import torch

    with ExitStack() as stack:
        with ONE_FOR_ALL:
            dtype = torch.get_default_dtype()
            if dtype != torch.float32:
                stack.callback(torch.set_default_dtype, dtype)
                torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
