"""Exact save and restore of a run: trainable weights, optimizer, random numbers, data cursor.

A checkpoint is one safetensors file, `step-00000100.safetensors`: tensors under `weights/`, `optimizer/` and `random/`,
everything else as JSON in its header, and there a checksum of both, since safetensors has none. It is written under a
temporary name, flushed to the disk and renamed, so a file with that name is complete whatever happened while it was
written.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.core.files import SAVING, open_to_others
from lowmem_ft.quant.shards import pieces
from lowmem_ft.runtime.rerun import random_states

_NAME = re.compile(r"step-(\d+)\.safetensors")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to a safetensors file that is either whole or not there.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what was there before stays.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    header = dict(metadata or {})
    header["checksum"] = _checksum(tensors, header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors, too, writes to a name of its own first, which would stay where the process is killed
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{SAVING}{os.getpid()}-") as scratch:
            temporary = Path(scratch) / path.name
            save_file(tensors, temporary, header)
            open_to_others(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "A file could not be written.",
            given=f"{path} ({error})",
            fix="free disk space or choose another output folder; the files written before are untouched",
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizer_tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    device: torch.device,
    retain: int = 2,
) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `retain`.

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
    for old in checkpoints(folder)[:-retain]:
        old.unlink()
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the metadata of a file that `write_tensors` wrote; no metadata reads as empty.

    Raises:
        CheckpointError: the file is truncated, damaged or no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("checksum", (now := _checksum(tensors, header))) != now:  # files of before it was written go on
            raise ValueError("its content is not what was written")
        return tensors, json.loads(header.get("state", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            "A checkpoint cannot be read.", given=f"{path} ({error})", fix="delete it: the one before is used then"
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
            if saved[name].shape != parameter.shape:
                raise CheckpointError(
                    f"'{name}' has another shape in the checkpoint.",
                    given=tuple(saved[name].shape),
                    allowed=tuple(parameter.shape),
                    fix="resume with the adapter settings that the run was started with",
                )
            parameter.copy_(saved[name])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where the generators of random numbers for work on `device` are, under the names of a checkpoint."""
    return dict(zip(("random/cpu", "random/cuda"), random_states(device), strict=False))


def restore_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators of random numbers to where `random_state` was asked for."""
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """CRC-32 of names, types, shapes and bytes of `tensors`, and of the state in the header."""
    checksum = zlib.crc32(header.get("state", "").encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        for piece in pieces(tensor):
            checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"


def below(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors whose names start with `group/`, without it."""
    return {name.removeprefix(f"{group}/"): t for name, t in tensors.items() if name.startswith(f"{group}/")}


def _same_names(saved: Iterable[str], present: Iterable[str]) -> None:
    difference = sorted(set(saved) ^ set(present))
    if difference:
        raise CheckpointError(
            "The checkpoint holds other trainable weights than the model.",
            given=", ".join(difference[:5]) + (" ..." if len(difference) > 5 else ""),
            fix="resume with the adapter settings that the run was started with",
        )
