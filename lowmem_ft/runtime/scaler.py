"""Dynamic loss scaling, for devices that compute in fp16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2)."""

from __future__ import annotations

import math
from typing import Any

from lowmem_ft.core.errors import LowMemError

_MOST_LOST = 4  # steps in a row whose loss is not finite


class LossScaler:
    """Keeps the factor on the loss as large as fp16 gradients bear.

    Args:
        scale: the first factor.
        growth_interval: the factor doubles after so many steps in a row with finite gradients.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.scale = scale
        self.growth_interval = growth_interval
        self._good_steps = self._lost = 0

    def update(self, *, finite: bool, loss: float = 0.0) -> None:
        """Take note of a step. The caller leaves out the update of one whose gradients or `loss` were not `finite`.

        Raises:
            LowMemError: gradients are not finite although the loss is no longer scaled up; or the loss itself is not,
                which no scale changes, in `_MOST_LOST` steps in a row.
        """
        self._lost = 0 if math.isfinite(loss) else self._lost + 1
        if self._lost == _MOST_LOST:
            raise LowMemError(
                "The loss itself is not finite, step after step: the model computes numbers that fp16 cannot hold.",
                given=f"{self._lost} steps in a row",
                allowed="numbers up to 65504",
                fix="set policy.compute_dtype: float32, or bfloat16 on a card that has it; or check the data",
            )
        if self._lost:
            return
        if not finite:
            if self.scale <= 1.0:
                raise LowMemError(
                    "Training diverged: the gradients are not finite at any loss scale.",
                    fix="lower train.lr, or check the data for broken examples",
                )
            self.scale /= 2.0
            self._good_steps = 0
            return
        self._good_steps += 1
        if self._good_steps == self.growth_interval:
            self.scale *= 2.0
            self._good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self._good_steps, "lost": self._lost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self._good_steps = float(state["scale"]), int(state["good_steps"])
        self._lost = int(state["lost"])
