"""What a run logs, in TensorBoard, W&B or MLflow as well: through their own libraries, by way of accelerate."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import UnsupportedError

Name = Literal["tensorboard", "wandb", "mlflow"]
PROJECT = "lowmem-ft"  # of W&B, and MLflow's experiment; their own environment variables take its place
NO_METRICS = ("step", "skipped", "repeated", "held_out_changed")


class Trackers:
    """Trackers that are open, each of which gets every line of metrics.jsonl."""

    def __init__(self, open_ones: Sequence[Any]) -> None:
        self._open = list(open_ones)

    def log(self, line: Mapping[str, Any]) -> None:
        """One line: training steps below `train/`, evaluations below `eval/`. Who fails is asked no more."""
        group = "eval" if "eval_loss" in line else "train"
        values = {f"{group}/{key}": value for key, value in line.items() if key not in NO_METRICS}
        for tracker in [*self._open]:
            try:
                tracker.log(values, step=line["step"])
            except Exception as error:
                self._open.remove(tracker)
                _warn(tracker, error)


def _warn(tracker: Any, error: Exception) -> None:
    """Of an error, each library has its own: a run does not end because a server is gone."""
    why = f"{type(error).__name__}: {error}".partition("\n")[0]
    warnings.warn(f"{tracker.name} fails: what it lacks is in metrics.jsonl ({why})", stacklevel=3)


def check_trackers(config: RunConfig) -> None:
    """Raise UnsupportedError if a library that `train.track` names is not installed."""
    for name in config.train.track:
        if importlib.util.find_spec(name) is None:
            raise UnsupportedError(
                f"{name} is not installed.",
                given=f"train.track: {name}",
                allowed=", ".join(get_args(Name)),
                fix=f"pip install 'lowmem-ft[{name}]', or take it out of train.track",
            )


@contextmanager
def tracking(config: RunConfig, folder: Path) -> Iterator[Trackers]:
    """Within it what `train.track` names is open; then all is sent and closed.

    Raises:
        UnsupportedError: a library does not start.
    """
    opened: list[Any] = []
    try:
        for name in config.train.track:
            try:
                opened.append(_opened(name, folder))
                opened[-1].store_init_configuration(_flat(config.model_dump(mode="json")))
            except Exception as error:  # each library has its own
                fix = f"see to {name}'s own settings, or take it out of train.track"
                raise UnsupportedError(f"{name} could not be started.", given=str(error), fix=fix) from error
        yield Trackers(opened)
    finally:
        for tracker in opened:
            try:
                tracker.finish()
            except Exception as error:
                _warn(tracker, error)


def _opened(name: Name, folder: Path) -> Any:
    from accelerate import PartialState, tracking  # not imported where nothing is tracked

    PartialState()  # which they ask whether this is the main process
    tracker: Any
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker(folder.name, logging_dir=folder / "tensorboard")
    elif name == "wandb":
        tracker = tracking.WandBTracker(PROJECT, name=folder.name, dir=str(folder))
    else:
        tracker = tracking.MLflowTracker(PROJECT, run_name=folder.name)
    tracker.start()
    return tracker


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, and values that every tracker takes: numbers, truth values and text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
