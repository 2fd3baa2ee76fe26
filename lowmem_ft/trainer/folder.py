"""The run folder: where everything lies, and metrics that a resumed run continues."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import CheckpointError, ConfigError
from lowmem_ft.core.files import is_full, nearest_existing, remove_half_written, replace_text
from lowmem_ft.core.json_text import read_json, read_json_file
from lowmem_ft.core.plan import Plan
from lowmem_ft.core.run import Run
from lowmem_ft.runtime.state import checkpoints


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run, and the small text files in it. Text is written under a temporary name and renamed."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The trainable weights of the evaluation with the lowest loss."""
        return self.checkpoints / "best.safetensors"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model said at evaluations, a line for each answer."""
        return self.path / "samples.jsonl"

    @property
    def finished(self) -> Path:
        """Written last: its presence says that the run is complete."""
        return self.path / "result.json"

    def refuse_another(self) -> None:
        """Raises ConfigError if the folder holds a run already, or its checkpoints: new ones would go as older ones."""
        if _is_there(self.metrics) or (os.path.isdir(self.checkpoints) and checkpoints(self.checkpoints)):
            raise ConfigError(
                "The output folder holds a run already.",
                given=str(self.path),
                fix="--resume goes on with it; or set output to another folder, or delete this one",
            )

    def refuse_unwritable(self) -> None:
        """Raises CheckpointError if nothing can be written into the folder, or if it cannot be made."""
        place = nearest_existing(self.path.absolute())
        if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
            why = errno.EACCES if os.path.isdir(place) else errno.ENOTDIR
            if hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY:
                why = errno.EROFS
            raise _unwritable(place, OSError(why, os.strerror(why)))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process trains into this folder, which is made, meanwhile.

        The folder itself is locked, so that nothing is left of a lock when the process ends, however it does.

        Raises:
            ConfigError: another process does.
            CheckpointError: the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if sys.platform == "win32":
            yield
            return
        import fcntl

        with contextlib.ExitStack() as held:
            try:
                descriptor = os.open(self.path, os.O_RDONLY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    "Another process is training into the output folder.",
                    given=self.path,
                    fix="wait until it ends, or set output to another folder",
                ) from None
            except OSError:  # a file system without locks
                pass
            yield

    def start(self, config: RunConfig, plan: Plan) -> None:
        """Make the folder and write plan.json, and config.yaml so that it serves from any folder. What a killed process
        was writing goes."""
        for folder in (self.path, self.checkpoints, self.adapter):
            remove_half_written(folder)
        self.write("config.yaml", config.rooted().to_yaml())
        self.write("plan.json", plan.to_json())

    def write(self, name: str, text: str) -> None:
        """Write a text file in one piece.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        target = self.path / name
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(target, text)
        except OSError as error:
            raise _unwritable(target, error) from error

    def plan(self) -> Plan | None:
        """What plan.json says; None where there is nothing, or what this version cannot read."""
        try:
            plan = Plan.from_dict(read_json_file(self.path / "plan.json"))
            return plan if plan.run_config else None
        except (OSError, ValueError):
            return None

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        self._append(self.metrics, [line])

    def log_samples(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to samples.jsonl. Raises as `log`."""
        self._append(self.samples, lines)

    def _append(self, file: Path, lines: list[dict[str, Any]]) -> None:
        try:
            with file.open("a", encoding="utf-8") as opened:
                opened.write("".join(json.dumps(_finite(line), ensure_ascii=False) + "\n" for line in lines))
        except OSError as error:
            first = "free disk space" if is_full(error) else f"see that {file.parent} is there and can be written"
            fix = f"{first}, and go on from the newest checkpoint with --resume"
            raise CheckpointError("A file could not be written.", given=f"{file} ({error})", fix=fix) from error

    def forget_after(self, step: int) -> None:
        """Cut off what was logged after `step`: the steps that a resumed run does again."""
        for file in (self.metrics, self.samples):
            try:
                if file.exists():
                    os.truncate(file, _length_until(file, step))
                elif file == self.metrics:  # whose presence says that there is a run
                    file.touch()
            except OSError as error:
                raise _unwritable(file, error) from error

    def write_result(self, result: dict[str, Any]) -> None:
        """Mark the run as complete."""
        self.write(self.finished.name, json.dumps(_finite(result), indent=2))

    def result(self) -> Run:
        """A finished run, as it told of itself.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            result = read_json_file(self.finished)
            result.pop("base", None)
            return Run(folder=self.path, plan=Plan.from_dict(result.pop("plan")), **result)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "delete it: the run then goes on from its newest checkpoint"
            why = str(error).partition("\n")[0]
            raise CheckpointError("A run's result cannot be read.", given=f"{self.finished} ({why})", fix=fix) from None

    def warn_of_other_base(self, sample: str) -> None:
        """Warn if `sample` (of `Checkpoint.sample`) is not of the weights that the finished run was trained on."""
        try:
            base = read_json_file(self.finished)["base"]
        except (OSError, ValueError, KeyError, TypeError):  # a run that is not finished
            return
        if base != sample:
            warnings.warn(
                f"{self.path} was trained on other weights than its model has now: on these it computes something else",
                stacklevel=2,
            )


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        "A file could not be written.",
        given=f"{path} ({error})",
        allowed="an output folder that can be written",
        fix=f"{'free disk space, or ' if is_full(error) else ''}set output to another folder",
    )


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """`line` with null for what JSON has no word for, such as the norm of gradients that overflowed."""
    return {key: None if isinstance(it, float) and not math.isfinite(it) else it for key, it in line.items()}


def _is_there(file: Path) -> bool:
    """Whether a file exists; where that cannot be asked, writing says why."""
    try:
        return file.exists()
    except OSError:  # a name too long, a folder that lets nobody look inside
        return False


def _length_until(file: Path, step: int) -> int:
    """Bytes of the lines of a file of a run up to those of `step`."""
    length = 0
    with file.open("rb") as opened:
        for line in opened:  # and not all at once: those of a long run take more than a step does
            try:
                if read_json(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):  # the line that a killed run was writing
                break
            length += len(line)
    return length
