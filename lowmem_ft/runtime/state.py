"""Exact save and restore of a run: trainable weights, optimizer, random numbers, data cursor.

A checkpoint is one safetensors file, `step-00000100.safetensors`: tensors under `weights/`, `optimizer/` and `random/`,
everything else as JSON in its header, and there a checksum of both, since safetensors has none. It is written under a
temporary name, flushed to the disk and renamed, so a file with that name is complete whatever happened while it was
written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowmem_ft.core.errors import CheckpointError, LowMemError
from lowmem_ft.core.files import SAVING, remove, writing_prefix
from lowmem_ft.core.json_text import read_json
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.quant.checkpoint import read_header
from lowmem_ft.quant.checksum import CHECKSUM, content_checksum
from lowmem_ft.quant.shards import write_file
from lowmem_ft.runtime.rerun import random_states

RETAINED = 2  # checkpoints of a run
WITHOUT = "delete it: the run then goes on from what else it has saved"
MAPPED = 8 << 20  # bytes of a file that are read before it is mapped anew
_NAME = re.compile(r"step-(\d+)\.safetensors")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to a safetensors file that is either whole or not there.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what was there before stays.
    """
    header = dict(metadata or {})
    header[CHECKSUM] = content_checksum(tensors, header.get("state", ""))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=writing_prefix(SAVING)) as scratch:
            temporary = Path(scratch) / path.name
            write_file(temporary, tensors, header)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            "A file could not be written.",
            given=f"{path} ({error})",
            fix="free disk space or choose another output folder; the files written before are untouched",
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = (path for path in folder.glob("*") if _NAME.fullmatch(path.name) and os.path.isfile(path))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, "it is one of `checkpoints`"
    return int(match[1])


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizer_tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    device: torch.device,
) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `RETAINED`.

    Args:
        weights: trainable parameters by name.
        optimizer_tensors: the optimizer's state by name.
        meta: what JSON can hold: optimizer counters, data cursor, loss scale, best evaluation.
        device: of the run, whose random numbers go on.
    """
    tensors = {f"weights/{name}": parameter.data for name, parameter in weights.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors.items()}
    tensors |= random_state(device)
    path = folder / f"step-{step:08d}.safetensors"
    write_tensors(path, tensors, {"state": json.dumps({"step": step, **meta})})
    for old in checkpoints(folder)[:-RETAINED]:
        remove(old)  # or the next time: a file that somebody has open on Windows is no reason to end a run
    return path


class _Read(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for, by the names under which they are known where they come from."""

    def __init__(self, read: Callable[[str], Tensor], names: Mapping[str, str]) -> None:
        self._read, self._names = read, names

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


class _File:
    """A safetensors file, mapped anew after every `MAPPED` bytes: what was read of a mapping counts as the process's
    memory until the whole mapping goes."""

    def __init__(self, path: Path) -> None:
        self._path, self._mapped, self._left = path, _open(path), MAPPED
        self.names: list[str] = list(self._mapped.keys())
        self.meta: dict[str, str] = self._mapped.metadata() or {}

    def read(self, name: str) -> Tensor:
        """On the CPU, not to be written to."""
        if self._left <= 0:
            self._mapped, self._left = _open(self._path), MAPPED
        tensor: Tensor = self._mapped.get_tensor(name)
        self._left -= tensor.nbytes
        return tensor


def read_checkpoint(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the metadata of a file that `write_tensors` wrote; no metadata reads as empty.

    Each tensor is read when it is asked for; those that `fill` copies take 2 * `MAPPED` bytes at most.

    Raises:
        CheckpointError: the file is truncated, damaged or no checkpoint.
    """
    try:
        file, header = _File(path), read_header(path)[0]
        content = content_checksum(header, file.meta.get("state", ""))
        if file.meta.get(CHECKSUM) != content:
            raise ValueError("its content is not what was written")
        meta = read_json(file.meta.get("state", "{}"))
        if not isinstance(meta, dict):
            raise ValueError("what it tells of its run is no JSON object")
    except (OSError, SafetensorError, ValueError, CheckpointError) as error:
        raise CheckpointError("A checkpoint cannot be read.", given=f"{path} ({error})", fix=WITHOUT) from error
    return _Read(file.read, {name: name for name in file.names}), meta


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Within it what the file of a checkpoint lacks, or has in another form than a run needs, is a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, LowMemError) or is_out_of_memory(error):
            raise
        raise CheckpointError(
            "A checkpoint does not hold what a run goes on from.",
            given=f"{path} ({type(error).__name__}: {error})",
            fix=WITHOUT,
        ) from error


def restore_weights(weights: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy the `weights/` of a checkpoint into the parameters of the same names.

    Raises:
        CheckpointError: names or shapes differ: the checkpoint belongs to another adapter.
    """
    saved = below(tensors, "weights")
    _same_names(saved, weights)
    with torch.no_grad():
        for name, parameter in weights.items():
            shape = saved[name].shape
            if shape != parameter.shape:
                raise CheckpointError(
                    f"'{name}' has another shape in the checkpoint.",
                    given=tuple(shape),
                    allowed=tuple(parameter.shape),
                    fix="resume with the adapter settings that the run was started with",
                )
            fill(parameter, saved, name)


def fill(tensor: Tensor, saved: Mapping[str, Tensor], name: str) -> None:
    """Copy what is `saved` under a name, of the same shape, in pieces, each from a mapping of its own."""
    if tensor.nbytes <= MAPPED:
        tensor.copy_(saved[name])
        return
    rows = max(1, MAPPED * len(tensor) // tensor.nbytes)
    for first in range(0, len(tensor), rows):
        tensor[first : first + rows].copy_(saved[name][first : first + rows])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where the generators of random numbers for work on `device` are, under the names of a checkpoint."""
    return dict(zip(("random/cpu", "random/cuda"), random_states(device), strict=False))


def restore_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators of random numbers to where `random_state` was asked for."""
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)


def below(tensors: Mapping[str, Tensor], group: str) -> Mapping[str, Tensor]:
    """The tensors whose names start with `group/`, without it."""
    names = {name.removeprefix(f"{group}/"): name for name in tensors if name.startswith(f"{group}/")}
    return _Read(tensors.__getitem__, names)


def _same_names(saved: Iterable[str], present: Iterable[str]) -> None:
    difference = sorted(set(saved) ^ set(present))
    if difference:
        raise CheckpointError(
            "The checkpoint holds other trainable weights than the model.",
            given=", ".join(difference[:5]) + (" ..." if len(difference) > 5 else ""),
            fix="resume with the adapter settings that the run was started with",
        )
