"""Quantized weights on disk, so that a second load of the same checkpoint in the same format quantizes nothing.

An entry is a folder, written under a temporary name and renamed when complete. Its tensors are in bitsandbytes'
safetensors layout where that can express them, and then `transformers.AutoModelForCausalLM.from_pretrained(entry)`
loads it. What transformers has no quantized form for (stacked experts, linear layers of its own classes) lies there
under the names of `quant.ops.layout`; such an entry has an index of another name, and only this package reads it.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.core.files import is_full, remove, remove_orphans, writing_prefix
from lowmem_ft.core.json_text import read_json_file
from lowmem_ft.quant.bnb_format import pack, packed_layout, unpack
from lowmem_ft.quant.checkpoint import (
    DTYPE_NAMES,
    INDEX,
    OWN_INDEX,
    Checkpoint,
    scan,
    write_json,
)
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.ops import Layout, QuantSpec, layout_bytes
from lowmem_ft.quant.shards import ShardFiles, pieces, shard_header, split_shards

FORMAT = 1  # raise it when what is written changes: older entries are then never looked at
MARKER = "lowmem_ft.json"
_WRITING = ".writing-"  # how names of folders begin until they are complete
_LISTED_BYTES = 64  # a tensor's file name and checksum, and what JSON puts around them
_CONFIG_BYTES = 4 << 10  # generation_config.json, what is said of the quantization, the marker's head


class Holder(Protocol):
    """Takes the tensors of a model one by one."""

    def hold_storage(self, path: str, storage: Mapping[str, Tensor]) -> None: ...
    def hold_tensor(self, name: str, tensor: Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheEntry:
    """The place of one checkpoint in one format in the cache, whether it exists or not.

    Attributes:
        folder: of this entry.
        plain: names of the tensors that are not quantized.
    """

    folder: Path
    model: PreTrainedModel
    spec: QuantSpec
    dtype: torch.dtype
    plain: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    skip: tuple[str, ...] | None  # modules that transformers shall not convert; None: it cannot read this entry at all

    @classmethod
    def of(
        cls,
        cache: Path,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        *,
        unswapped: PreTrainedModel,
        spec: QuantSpec,
        dtype: torch.dtype,
        absent: Collection[str],
    ) -> CacheEntry:
        """The entry for `model`, swapped and on meta, made from `unswapped`.

        `absent` names tensors of the model that are not stored: tied ones, and those that it computes itself.
        """
        fingerprint = checkpoint.fingerprint(cache / "fingerprints.json")
        storage = "dq" if spec.bits == 4 and spec.double_quant else "sq"
        name = f"{fingerprint[:32]}-{spec.kind}-{storage}-{DTYPE_NAMES[dtype].lower()}-v{FORMAT}"
        plain = _plain_tensors(model, absent)
        skip = skipped_by_transformers(model, unswapped)
        return cls(folder=cache / name, model=model, spec=spec, dtype=dtype, plain=plain, skip=skip)

    @property
    def index_name(self) -> str:
        """Of the index file; under another name than its own, transformers does not take the entry for a model."""
        return OWN_INDEX if self.skip is None else INDEX

    def is_complete(self) -> bool:
        """Whether it can be read. A damaged entry is removed, if that is allowed, so that it is made again."""
        if not os.path.exists(self.folder):
            return False
        try:
            _, tensors, _ = scan(self.folder, self.index_name)
            found = {name: (info.shape, info.dtype) for name, info in tensors.items()}
            marker = _marker(self.folder)
            # another transformers may mean another layout by the same names
            same = (marker["format"], marker["transformers"]) == (FORMAT, transformers.__version__)
            complete = same and found == self.tensors() and set(marker["checksums"]) == set(found)
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            remove(self.folder)
        return complete

    def tensors(self) -> Layout:
        """Name -> (shape, dtype) of everything that the entry holds, in the order of the model."""
        return _quantized_tensors(self.model) | dict(self.plain)

    def load(self, holder: Holder, progress: Callable[[int, int], None] | None, *, first: Collection[str] = ()) -> None:
        """Read the entry and hand each layer's tensors to `holder`, before all others those that are named `first`.

        Raises:
            CheckpointError: the content is not what was written; the entry is removed.
        """
        files, tensors, _ = scan(self.folder, self.index_name)
        source = Checkpoint(self.folder, str(self.folder), self.model.config, tensors, files)
        checksums, total, done = _marker(self.folder)["checksums"], sum(i.nbytes for i in tensors.values()), 0

        def read(name: str) -> Tensor:
            nonlocal done
            tensor = source.read(name)
            if _checksum(tensor) != checksums[name]:
                remove(self.folder)
                raise CheckpointError("the cache of quantized weights was damaged, and has been removed",
                                      given=f"{name} in {self.folder}", fix="run again; it is made anew")  # fmt: skip
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
            return tensor

        for name in self.plain:
            if name in first:
                holder.hold_tensor(name, read(name))
        for path, module in _quantized(self.model):
            parts = {name: read(name) for name in _stored_layout(path, module)}
            if isinstance(module, QuantLinear):
                holder.hold_storage(path, unpack(path, parts, module.spec))
            else:
                holder.hold_storage(path, {name.rpartition(".")[2]: tensor for name, tensor in parts.items()})
        for name in self.plain:
            if name not in first:
                holder.hold_tensor(name, read(name))

    def writer(self) -> CacheWriter:
        """A context in which the entry is written; left normally, it is complete, else nothing remains of it."""
        return CacheWriter(self)

    def write_configs(self, folder: Path) -> None:
        """config.json (and generation_config.json) as transformers reads them."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        if self.skip is not None:
            config.quantization_config = BitsAndBytesConfig(
                load_in_4bit=self.spec.bits == 4,
                load_in_8bit=self.spec.bits == 8,
                bnb_4bit_quant_type=self.spec.type,
                bnb_4bit_use_double_quant=self.spec.double_quant,
                bnb_4bit_compute_dtype=self.dtype,
                llm_int8_skip_modules=list(self.skip),
            ).to_dict()
        config.save_pretrained(folder)
        if self.model.generation_config is not None:
            write_json(folder / "generation_config.json", self.model.generation_config.to_diff_dict())


def entry_bytes(model: PreTrainedModel, *, absent: Collection[str]) -> int:
    """Size of an entry for `model`, swapped and on meta, on the disk; `absent` as for `CacheEntry.of`.

    No weight is read, so what is written of each tensor in the JSON files is rounded up.
    """
    tensors = _quantized_tensors(model) | _plain_tensors(model, absent)
    files = sum(len(shard_header(shard)) + layout_bytes(shard) for shard in split_shards(tensors))
    listed = sum(2 * len(name) + _LISTED_BYTES for name in tensors)  # in the index and in the marker
    return files + listed + len(model.config.to_json_string()) + _CONFIG_BYTES


class CacheWriter:
    """Writes an entry tensor by tensor, in any order: all offsets are known beforehand.

    Raises:
        CheckpointError: no space left, or the folder cannot be written. Nothing half-written remains.
    """

    def __init__(self, entry: CacheEntry) -> None:
        self._entry, self._tensors, self._checksums = entry, entry.tensors(), dict[str, int]()
        cache = entry.folder.parent
        with self._no_space():
            cache.mkdir(parents=True, exist_ok=True)
            remove_orphans(cache, _WRITING)
            self._folder = Path(tempfile.mkdtemp(prefix=writing_prefix(_WRITING), dir=cache))
        try:
            with self._no_space():
                if shutil.disk_usage(cache).free < layout_bytes(self._tensors):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._files = ShardFiles(self._folder, self._tensors, index_name=entry.index_name)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # gone already if it was finished

    def write_storage(self, path: str, module: QuantLinear | QuantStack, storage: Mapping[str, Tensor]) -> None:
        """Write the storage of the quantized layer or stack at `path`."""
        if isinstance(module, QuantLinear):
            parts = pack(path, storage, shape=module.shape, spec=module.spec, dtype=module.dtype)
        else:
            parts = {f"{path}.{name}": tensor for name, tensor in storage.items()}
        for name, tensor in parts.items():
            self.write_tensor(name, tensor)

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device, in pieces."""
        with self._no_space():
            self._checksums[name] = self._files.write(name, tensor)

    def finish(self) -> None:
        """Make the entry visible, complete."""
        assert set(self._checksums) == set(self._tensors), "every tensor must have been written"
        entry = self._entry
        with self._no_space():
            entry.write_configs(self._folder)
            marker = {
                "format": FORMAT,
                "transformers": transformers.__version__,
                "spec": asdict(entry.spec),
                "checksums": self._checksums,
            }
            write_json(self._folder / MARKER, marker)
            for file in self._folder.iterdir():
                with open(file, "r+b") as stream:
                    os.fsync(stream.fileno())
            if not entry.folder.exists():  # otherwise another process has just finished the same entry
                os.rename(self._folder, entry.folder)

    @contextmanager
    def _no_space(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = is_full(error)
            raise CheckpointError(
                "no space left for the cache of quantized weights" if full else "the cache cannot be written",
                given=f"{self._entry.folder.parent}: {error.strerror}",
                allowed=f"{layout_bytes(self._tensors)} bytes",
                fix="free some space, name another cache folder, or load without a cache",
            ) from error


def _quantized(model: PreTrainedModel) -> Iterator[tuple[str, QuantLinear | QuantStack]]:
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantStack):
            yield path, module


def _quantized_tensors(model: PreTrainedModel) -> Layout:
    names: Layout = {}
    for path, module in _quantized(model):
        names |= _stored_layout(path, module)
    return names


def _plain_tensors(model: PreTrainedModel, absent: Collection[str]) -> Layout:
    quantized = {path for path, _ in _quantized(model)}
    return {
        name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in absent and (name.rpartition(".")[0] not in quantized or name.endswith(".bias"))
    }


def _stored_layout(path: str, module: QuantLinear | QuantStack) -> Layout:
    if isinstance(module, QuantLinear):
        return packed_layout(path, module.shape, module.spec)
    return {f"{path}.{name}": (tuple(t.shape), t.dtype) for name, t in module.storage().items()}


def skipped_by_transformers(model: PreTrainedModel, unswapped: PreTrainedModel) -> tuple[str, ...] | None:
    """What to tell transformers not to convert so that it quantizes the very same modules, or None if nothing does."""
    modules = dict(model.named_modules())
    if any(isinstance(module, QuantStack) for module in modules.values()):
        return None
    skip = tuple(
        path
        for path, module in unswapped.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and not isinstance(modules[path], QuantLinear)
    )
    patterns = [*skip, *(model._keep_in_fp32_modules or ())]
    for path, module in modules.items():
        original = unswapped.get_submodule(path)
        if isinstance(module, QuantLinear) and not (
            (type(original) is nn.Linear or isinstance(original, Conv1D)) and should_convert_module(path, patterns)
        ):
            return None
    return skip


def _marker(folder: Path) -> dict[str, Any]:
    marker: dict[str, Any] = read_json_file(folder / MARKER)
    return marker


def _checksum(tensor: Tensor) -> int:
    checksum = 0
    for piece in pieces(tensor):
        checksum = zlib.crc32(piece, checksum)
    return checksum
