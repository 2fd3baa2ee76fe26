"""A model folder in safetensors format: found, checked, and read tensor by tensor.

Everything that can be known without reading a weight is checked when the folder is opened. Weights are then read with
plain file reads into memory of our own. (A memory map would be simpler, but the pages that it touches count as the
process's memory until the system takes them back, which breaks the promise of a bounded peak.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.core.files import replace_text
from lowmem_ft.core.json_text import read_json, read_json_file, read_settings
from lowmem_ft.quant.ops import Layout, QuantSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OWN_INDEX = "lowmem_ft.safetensors.index.json"  # of a cache entry that only this package can read
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10  # of each weight file
CHUNK_BYTES = 8 << 20  # read and cast in pieces of this size, so that a cast never needs a second whole tensor
MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own limit

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model's folder: configs, tokenizer, templates
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_MOST_LABELS = 1 << 20
_A_MODEL = "a folder with config.json and safetensors files, or a hub id such as Qwen/Qwen3-0.6B"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `file`, first byte `offset`, `shape`, and `dtype` as it is stored."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that can be read one by one: a checkpoint, or a checkpoint seen through its dequantization.

    Attributes:
        scratch_per_value: bytes that dequantizing takes for each value of a piece, CHUNK_BYTES / 4 values at most.
    """

    scratch_per_value: ClassVar[int]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_into(self, name: str, out: Tensor, index: int | None = None) -> None:
        """Fill contiguous `out` with tensor `name`, or with its slice `index` along dimension 0, cast to `out.dtype`.

        `out` has as many elements as what is read, on any device. Raises CheckpointError for NaN or Inf.
        """
        ...


@runtime_checkable
class StoredSource(Protocol):
    """A source that holds some matrices in the storage of `quant.ops`, to be taken without quantizing again."""

    def stored(self, name: str) -> tuple[QuantSpec, tuple[int, int]] | None:
        """Format and logical (O, I) shape in which tensor `name` is stored, or None if it is not quantized."""
        ...

    def read_storage(self, name: str) -> dict[str, Tensor]:
        """Its storage tensors, on the CPU, by the names of `quant.ops.layout`."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checked model folder. Made by `Checkpoint.open`."""

    scratch_per_value: ClassVar[int] = 0

    folder: Path
    name: str  # what the user called it: a path or a hub id
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the safetensors headers
    trust_remote_code: bool = False

    @classmethod
    def open(
        cls, path_or_hub_id: str | os.PathLike[str], *, trust_remote_code: bool = False, weights: bool = True
    ) -> Checkpoint:
        """Find and check a checkpoint. No weight is read.

        Args:
            path_or_hub_id: a local folder, or a repository on the Hugging Face hub (`HF_HUB_OFFLINE` is honoured, and
                only safetensors and small text files are downloaded).
            trust_remote_code: download and run Python code that comes with the checkpoint. Never done unless asked.
            weights: False for planning, which needs only config.json: weight files are checked where all of them are,
                and not downloaded where they are not. Without them `tensors` is empty.

        Raises:
            CheckpointError: nothing there, only pickle files, or broken files (shard missing or truncated, index that
                does not match the shards).
            UnsupportedError: the architecture is unknown to transformers, or is remote code that is not trusted.
        """
        folder = _find_folder(path_or_hub_id, weights=weights, code=trust_remote_code)
        config = _read_config(folder, trust_remote_code=trust_remote_code)
        if (folder / OWN_INDEX).exists():
            raise UnsupportedError("this is an entry of the cache of quantized weights, not a model of its own",
                                   given=folder, fix="give the checkpoint; the cache is found by itself")  # fmt: skip
        if not weights and not all(os.path.isfile(file) for file in _named_files(folder, INDEX)[0]):
            return cls(folder, str(path_or_hub_id), config, {}, (), {}, trust_remote_code)
        files, tensors, metadata = scan(folder)
        return cls(folder, str(path_or_hub_id), config, tensors, files, metadata, trust_remote_code)

    def read_into(self, name: str, out: Tensor, index: int | None = None) -> None:
        """See `TensorSource.read_into`."""
        info = self.tensors[name]
        start = 0 if index is None else index * (info.numel // info.shape[0])
        self.read_elements(name, out, start=start)

    def read_elements(self, name: str, out: Tensor, *, start: int = 0, check: bool = True) -> None:
        """Fill contiguous `out` with `out.numel()` elements of the flattened tensor `name` from element `start` on.

        Without `check`, NaN and Inf are let through: for packed codes that are stored under a floating-point type.
        """
        info = self.tensors[name]
        assert out.is_contiguous()
        assert start + out.numel() <= info.numel
        size, flat = info.dtype.itemsize, out.view(-1)
        direct = out.device.type == "cpu" and out.dtype == info.dtype
        step = CHUNK_BYTES // size
        scratch = torch.empty(0 if direct else min(step, out.numel()), dtype=info.dtype)
        with _readable(info.file), open(info.file, "rb", buffering=0) as file:
            file.seek(info.offset + start * size)
            for begin in range(0, out.numel(), step):
                piece = flat[begin : begin + step]
                target = piece if direct else scratch[: piece.numel()]
                _fill(file, target, info.file)
                if not direct:
                    piece.copy_(target)
                if check:
                    check_finite(piece, name, info.file)

    def read(self, name: str, *, dtype: torch.dtype | None = None, check: bool = True) -> Tensor:
        """The whole tensor on the CPU, in its stored dtype or cast to `dtype`."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=dtype or info.dtype)
        self.read_elements(name, out, check=check)
        return out

    def same_content(self, first: str, second: str) -> bool:
        """Whether two tensors are stored with the same bytes. Reads no further than the first piece that differs."""
        a, b = self.tensors[first], self.tensors[second]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        with _readable(a.file), open(a.file, "rb") as stream_a, open(b.file, "rb") as stream_b:
            stream_a.seek(a.offset)
            stream_b.seek(b.offset)
            sizes = [min(CHUNK_BYTES, a.nbytes - begin) for begin in range(0, a.nbytes, CHUNK_BYTES)]
            return all(stream_a.read(size) == stream_b.read(size) for size in sizes)

    def sample(self) -> str:
        """SHA-256 (16 hex digits) over the sizes of the weight files and some pieces of each, 1 MiB at most. It tells
        other weights in a moment."""
        total = hashlib.sha256()
        for file in self.files:
            with _readable(file), open(file, "rb") as stream:
                size = file.stat().st_size
                total.update(str(size).encode())
                for part in range(_SAMPLES):
                    stream.seek(max(0, size - _SAMPLE_BYTES) * part // (_SAMPLES - 1))
                    total.update(stream.read(_SAMPLE_BYTES))
        return total.hexdigest()[:16]

    def fingerprint(self, memo: Path | None = None) -> str:
        """SHA-256 (hex) over the content of the configuration and of every weight file.

        Args:
            memo: a JSON file that remembers each file's hash by path, size and modification time (ns), so that
                asking again reads nothing.
        """
        known = _read_memo(memo)
        total = hashlib.sha256()
        for file in (self.folder / "config.json", *self.files):
            with _readable(file), open(file, "rb") as stream:
                stat = file.stat()
                key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
                if key not in known:
                    known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{file.name}={known[key]};".encode())
        if memo is not None and known != _read_memo(memo):
            with contextlib.suppress(OSError):  # it only saves time
                memo.parent.mkdir(parents=True, exist_ok=True)
                write_json(memo, known)
        return total.hexdigest()


def safetensors_header(tensors: Layout, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The header of a safetensors file that holds these tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    return header


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    replace_text(path, json.dumps(value, indent=1))


def check_finite(values: Tensor, name: str, where: Path) -> None:
    """Raise CheckpointError if a floating-point tensor holds NaN or Inf (both of which show in its extremes)."""
    if not values.is_floating_point() or not values.numel() or values.dtype.itemsize < 2:
        return
    low, high = torch.aminmax(values)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            "the checkpoint has NaN or Inf in its weights",
            given=f"{name} in {where}, read as {str(values.dtype).removeprefix('torch.')}",
            fix="use another copy or version of this checkpoint: a model with such weights computes nothing but NaN",
        )


def scan(folder: Path, index_name: str = INDEX) -> tuple[tuple[Path, ...], dict[str, TensorInfo], dict[str, str]]:
    """The weight files of a folder, their tensors and metadata; the index, if any, checked against them."""
    files, weight_map = _find_files(folder, index_name)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        infos, extra = read_header(file)
        tensors |= infos
        metadata |= extra
    for tensor, file_name in weight_map.items():
        if tensor not in tensors or tensors[tensor].file.name != file_name:
            raise CheckpointError(
                "the checkpoint's index names a tensor that its file does not hold",
                given=f"{tensor} in {folder / file_name}",
                fix="download the checkpoint again, all files of the same version",
            )
    return files, tensors, metadata


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and metadata that a safetensors file's header declares, checked against the file's size."""
    with _readable(file), open(file, "rb") as stream:
        return _header(stream, file, size=file.stat().st_size)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Within it what the system says of `file` becomes a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "a weight file cannot be read", given=f"{file} ({error.strerror})", fix="see who may read it, and its disk"
        ) from error


def _header(stream: BinaryIO, file: Path, *, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    def broken(why: str) -> CheckpointError:
        return CheckpointError(
            f"a weight file is broken: {why}", given=f"{file} ({size} bytes)", fix="download or copy this file again"
        )

    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise broken("it ends within its header, or is no safetensors file")
    try:
        header: dict[str, Any] = read_json(stream.read(length))
        metadata = {**header.pop("__metadata__", {})}
        entries = [_entry(name, described) for name, described in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken("its header cannot be read") from error
    tensors: dict[str, TensorInfo] = {}
    for name, dtype, shape, begin, end in entries:
        if dtype not in DTYPES:
            raise UnsupportedError("a tensor has a data type that is not supported", given=f"{name}: {dtype} in {file}",
                                   allowed=", ".join(DTYPES))  # fmt: skip
        tensors[name] = TensorInfo(file, 8 + length + begin, shape, DTYPES[dtype])
        if end - begin != tensors[name].nbytes:
            raise broken(f"the size of {name} does not match its shape")
        if 8 + length + end > size:
            raise broken(f"it is truncated: {name} ends at byte {8 + length + end}")
    # as the format wants it; otherwise a wrong offset gives a tensor the bytes of another
    covered = 0
    for name, _, _, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != covered:
            raise broken(f"{name} does not begin where the tensor before it ends")
        covered = end
    if 8 + length + covered != size:
        raise broken("no tensor lies at its end")
    return tensors, metadata


def _entry(name: str, described: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, first byte and end of a tensor, as a header describes it."""
    begin, end = map(operator.index, described["data_offsets"])
    return name, str(described["dtype"]), tuple(map(operator.index, described["shape"])), begin, end


def _fill(file: Any, target: Tensor, path: Path) -> None:
    view = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type,unused-ignore]
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError("a weight file ended early while it was read", given=path, fix="copy this file again")
        view = view[count:]


def _read_memo(memo: Path | None) -> dict[str, str]:
    try:
        known = read_json_file(memo) if memo is not None else {}
    except (OSError, ValueError):  # absent or damaged: it only saves time
        return {}
    return known if isinstance(known, dict) else {}


def _find_folder(path_or_hub_id: str | os.PathLike[str], *, weights: bool, code: bool) -> Path:
    folder, name = Path(path_or_hub_id).expanduser(), str(path_or_hub_id)
    if not name.strip():
        raise CheckpointError("no model is named", given=repr(name), allowed=_A_MODEL)
    if os.path.isdir(folder):  # unlike pathlib's it answers where nobody may look
        if not os.access(folder, os.R_OK | os.X_OK):
            raise CheckpointError("the model folder may not be looked at", given=folder, fix="see who may read it")
        return folder
    if os.path.exists(folder):
        config = folder.suffix in (".yaml", ".yml")
        fix = "`lowmem-ft train` takes a config: give the `model` that it names" if config else None
        raise CheckpointError("a model is a folder with config.json and safetensors files", given=f"the file {name}",
                              fix=fix or f"give its folder: {folder.parent}")  # fmt: skip
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        fix = "check the path; if a run's base model has moved, put its new path under `model` in the run's config.yaml"
        what = "the model folder does not exist, or may not be looked at"
        raise CheckpointError(what, given=_placed(folder), allowed=_A_MODEL, fix=fix)
    return _download(name, weights=weights, code=code)


def _placed(folder: Path) -> str:
    """A path, and of a relative one where it begins."""
    return str(folder) if folder.is_absolute() else f"{folder} in {Path.cwd()}"


def _download(hub_id: str, *, weights: bool, code: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    small = [*SMALL_FILES, *(["*.py"] if code else [])]
    # of folders templates alone (additional_chat_templates): what else lies there is the model in other formats
    below = [f"*/*.{kind}" for kind in ("json", "txt", "model", "py", "safetensors")]
    what = "the model is neither a local folder nor a hub repository that can be reached or is in the hub's cache"
    given = f"{hub_id}, which is no folder in {Path.cwd()}"
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=small, ignore_patterns=below))
        if not weights:
            return folder
        what = "the model's weights can be neither reached nor found in the hub's cache, which has its small files"
        given = f"{hub_id}, in {folder}"
        files = [file.name for file in _named_files(folder, INDEX)[0]]
        if all((folder / name).exists() for name in files):
            return folder  # of which versions of the hub's library below 2 would ask the network all the same
        # the very same revision, and only the files that make up the model: many repositories hold it twice
        offline: bool = constants.HF_HUB_OFFLINE
        folder = Path(snapshot_download(hub_id, revision=folder.name, allow_patterns=[*small, *files],
                                        ignore_patterns=below, local_files_only=offline))  # fmt: skip
        if offline and not any((folder / name).exists() for name in files):
            raise LocalEntryNotFoundError("offline, what is in the cache is taken for all there is")
        return folder
    except CheckpointError:
        raise
    except Exception as error:  # without a network one of httpx, or of httpx2 in later versions of the hub's library
        raise CheckpointError(
            what,
            given=given,
            allowed=_A_MODEL,
            fix=f"check the name and the network ({type(error).__name__}), or download the model on a connected machine"
            + (" (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""),
        ) from error


def _read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        fix = "give a transformers checkpoint"
        if (folder / "adapter_config.json").is_file():
            fix = "this is an adapter: name the model that it was trained on, which its adapter_config.json says"
        elif os.environ.get("HF_HUB_OFFLINE") and folder.parent.name == "snapshots":
            fix = "the hub's cache has only a part of this model, and HF_HUB_OFFLINE is set: download all of it"
        raise CheckpointError("the model folder has no config.json", given=folder, fix=fix)
    raw = read_settings(path)
    labels = [it.get("num_labels") for it in (raw, *raw.values()) if isinstance(it, dict)]
    if any(isinstance(it, int) and it > _MOST_LABELS for it in labels):  # transformers makes a text for each
        raise CheckpointError("config.json has more labels than any model", given=path, allowed=_MOST_LABELS,
                              fix="take num_labels out: a language model has none")  # fmt: skip
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here; each means that this config builds no model
        if "auto_map" in raw and not trust_remote_code:
            raise UnsupportedError(
                "this model is remote code: Python files that come with the checkpoint, which are not run",
                given=f"{raw.get('model_type')} in {folder}",
                fix="trust_remote_code=True runs them; do so only if you have read them",
            ) from error
        raise UnsupportedError("transformers cannot read this model's configuration",
                               given=f"model_type {raw.get('model_type')!r} in {path}: {first_line(error)}",
                               fix="a newer transformers may know this architecture") from error  # fmt: skip
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    kernels = [name for name in (getattr(it, "_attn_implementation", None) for it in parts) if "/" in str(name or "")]
    if kernels and not trust_remote_code:
        raise UnsupportedError(
            "this model's config.json asks for attention code from the hub, which is not run",
            given=f"attn_implementation {kernels[0]} in {path}",
            fix="take the key out of config.json; trust_remote_code=True runs such code",
        )
    return config


def _named_files(folder: Path, index_name: str) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The weight files that there should be, and tensor name -> file name where there is an index."""
    index = folder / index_name
    weight_map = _weight_map(index) if index.is_file() else {}
    names = sorted(set(weight_map.values())) if index.is_file() else [SINGLE]
    return tuple(folder / name for name in names), weight_map


def _find_files(folder: Path, index_name: str) -> tuple[tuple[Path, ...], dict[str, str]]:
    """`_named_files`, all of which are there."""
    files, weight_map = _named_files(folder, index_name)
    missing = [file.name for file in files if not os.path.isfile(file)]  # unlike pathlib's it answers for any name
    if not missing and files:
        return files, weight_map
    if weight_map:
        raise CheckpointError("weight files that the index names are missing", given=", ".join(missing[:4]),
                              allowed=f"{len(files)} files in {folder}", fix="download them again")  # fmt: skip
    pickles = [p.name for p in _pickles(folder)]
    if pickles:
        raise CheckpointError(
            "the checkpoint has only pickle files, which can run any code when they are read",
            given=", ".join(pickles[:4]),
            allowed="safetensors",
            fix="convert it with transformers: from_pretrained, then save_pretrained, on a machine that you can lose",
        )
    raise CheckpointError("the model folder has no weights", given=folder, allowed=f"{SINGLE} or {INDEX}")


def _pickles(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json_file(index)["weight_map"]
        if not all(isinstance(f, str) and Path(f).name == f for f in weight_map.values()):
            raise ValueError("a file name that is none, or leads out of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the index of the weight files cannot be read", given=f"{index}: {error}",
                              fix="download it again") from error  # fmt: skip
    return dict(weight_map)


def first_line(error: BaseException) -> str:
    """Of its message, which in other libraries may go on for a page."""
    return str(error).strip().split("\n", 1)[0]
