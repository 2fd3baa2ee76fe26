"""Dynamic loss scaling, for devices that compute in fp16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2)."""

from __future__ import annotations

from typing import Any

from lowmem_ft.core.errors import LowMemError


class LossScaler:
    """Keeps the factor on the loss as large as fp16 gradients bear.

    Args:
        scale: the first factor.
        growth_interval: the factor doubles after so many steps in a row with finite gradients.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.scale = scale
        self.growth_interval = growth_interval
        self._good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Take note of a step. The caller leaves out the update of one whose gradients were not `finite`.

        Raises:
            LowMemError: gradients are not finite although the loss is no longer scaled up.
        """
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
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self._good_steps = float(state["scale"]), int(state["good_steps"])
