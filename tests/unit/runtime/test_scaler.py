"""The dynamic loss scale."""

import pytest

from lowmem_ft.core.errors import LowMemError
from lowmem_ft.runtime.scaler import LossScaler


def test_halves_on_overflow_and_doubles_after_enough_good_steps() -> None:
    scaler = LossScaler(growth_interval=3)
    assert scaler.scale == 2.0**16
    scaler.update(finite=False)
    assert scaler.scale == 2.0**15
    for _ in range(2):
        scaler.update(finite=True)
    scaler.update(finite=False)  # the good steps before it no longer count
    for expected in (2.0**14, 2.0**14, 2.0**15, 2.0**15):
        scaler.update(finite=True)
        assert scaler.scale == expected


def test_state_goes_on_where_it_was() -> None:
    first, second = LossScaler(growth_interval=3), LossScaler(growth_interval=3)
    first.update(finite=False)
    first.update(finite=True)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        first.update(finite=True)
        second.update(finite=True)
    assert second.scale == first.scale == 2.0**16


def test_a_scale_that_cannot_sink_further_is_an_error() -> None:
    scaler = LossScaler(scale=1.0)
    with pytest.raises(LowMemError, match="diverged"):
        scaler.update(finite=False)


def test_a_loss_that_is_not_finite_is_told_from_gradients_that_are_not() -> None:
    """No scale changes it, so that the scale stays; a batch may be broken, but not one after the other."""
    scaler = LossScaler()
    for _ in range(3):
        scaler.update(finite=False, loss=float("nan"))
    scaler.update(finite=True, loss=1.0)
    assert scaler.scale == 2.0**16
    for _ in range(3):
        scaler.update(finite=False, loss=float("inf"))
    resumed = LossScaler()
    resumed.load_state_dict(scaler.state_dict())  # a run that is stopped now has seen three, too
    for one in (scaler, resumed):
        with pytest.raises(LowMemError, match=r"compute_dtype: float32"):
            one.update(finite=False, loss=float("inf"))
