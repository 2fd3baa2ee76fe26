"""Learning rate by step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, *, total: int, peak: float, schedule: Literal["cosine", "linear", "constant"], warmup: float
) -> float:
    """The rate of optimizer step `step` (from 0) of `total`.

    Args:
        warmup: a share of `total` below 1, else a number of steps, over which the rate rises linearly to `peak`.
        schedule: afterwards `constant`, or falling to zero at `total` along a line or half a cosine
            (Loshchilov and Hutter 2017, "SGDR", without restarts).
    """
    rising = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - rising) / max(1, total - rising))
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
