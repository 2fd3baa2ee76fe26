"""What lies below the device, in host RAM or on disk, and how it comes up and goes down: one block at a time.

Every block is one flat run of bytes, so that it takes a single copy. Disk is read past the page cache where the file
system allows it: cached pages would be a second copy of the model in RAM, which no budget knows of.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_ft.core.errors import SpillError, UnsupportedError
from lowmem_ft.core.files import is_full, nearest_existing
from lowmem_ft.core.out_of_memory import is_out_of_memory

PAGE = 4096  # direct reads want offsets, sizes and memory in multiples of it
_CACHED = 64 << 20  # bytes that may wait in the page cache for the disk
STAGES = 2  # pinned buffers between disk and device: one is read into while the other is copied from


class Tier(Protocol):
    """A place for the bytes of blocks."""

    def write(self, block: int, offset: int, tensor: Tensor) -> None:
        """Store a tensor of a block at its offset in bytes."""

    def start(self, block: int, slot: Tensor) -> object:
        """Begin to fill `slot` (uint8, on the device) with a block, when all work given to the device so far is done.

        Returns:
            what `wait` takes.
        """

    def wait(self, copy: Any) -> None:
        """Let the work that is given to the device from now on see the copy's result."""

    def rows(self, indices: Tensor, nbytes: int) -> Tensor:
        """Of what lies there, seen as rows of so many bytes one after the other, those of `indices` (N, int64, in RAM).

        Returns:
            (N, nbytes) uint8, in RAM.
        """

    def buffer(self, block: int, nbytes: int) -> Any:
        """So many bytes from the beginning of a block on, and of those behind it, where they lie: what
        `torch.frombuffer` takes. Of a file it takes no memory until it is read."""


class TakingTier(Tier, Protocol):
    """One that also takes from the device while that works."""

    def store(self, block: int, tensor: Tensor) -> object:
        """Begin to copy a block's bytes down, from the device, when all work given to it so far is done.

        Returns:
            what `wait` takes; until then `tensor` must live and keep its values.
        """


def device_memory(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised uint8 memory that begins on a page; it takes `PAGE` bytes more than asked for."""
    whole = torch.empty(nbytes + PAGE, dtype=torch.uint8, device=device)
    begin = 0 if whole.is_meta else -whole.data_ptr() % PAGE
    return whole[begin : begin + nbytes]


def refuse_loading(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """What is loaded would come into a slot that the next block overwrites, or into a placeholder.

    Raises:
        UnsupportedError: `state` holds one of `names`, whose weights lie below the device.
    """
    given = next((name for name in names if name in state), None)
    if given is not None:
        raise UnsupportedError(
            "A weight that lies below the device is frozen, and nothing can be loaded over it.",
            given=f"load_state_dict with {given}",
            allowed="a state that holds trained weights alone, with strict=False",
            fix="leave the base weights out, or load the model in a budget that keeps all on the device",
        )


def refuse_copy(held: object, _: object) -> None:
    """`__deepcopy__` of what holds bytes, and `__reduce_ex__` of a model that has such: its copy would read and spoil
    what the original one reads."""
    raise UnsupportedError(
        "A model of which something lies below the device cannot be copied or pickled.",
        given=type(held).__name__,
        fix="load it once more, or in a budget that keeps all on the device; `lowmem_ft.save` keeps what was trained",
    )


class NoTier:
    """Of a simulated run: nothing is stored and nothing is copied."""

    def write(self, block: int, offset: int, tensor: Tensor) -> None:
        raise AssertionError("a simulated run has no weights")

    def store(self, block: int, tensor: Tensor) -> None:
        assert tensor.is_meta

    def start(self, block: int, slot: Tensor) -> None:
        assert slot.is_meta

    def wait(self, copy: None) -> None:
        """Nothing was begun."""

    def rows(self, indices: Tensor, nbytes: int) -> Tensor:
        raise AssertionError("a simulated run has no weights")

    def buffer(self, block: int, nbytes: int) -> Any:
        raise AssertionError("a simulated run has no weights")


class DiskTier:
    """A file without a name, which is gone when the process ends, however it ends. For a device that is a CPU.

    Args:
        folder: where the file lies.
        sizes: bytes of each block, multiples of `PAGE`.
        holds, instead: what lies in it, and what a user can do to have less of it, for errors.

    Raises:
        SpillError: the folder cannot be written, or has no room; from then on, too, whatever is written or read.
    """

    __deepcopy__ = refuse_copy

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[int],
        *,
        holds: str = "streamed weights",
        instead: str = "raise the budget so that fewer blocks are streamed",
    ) -> None:
        assert all(size % PAGE == 0 for size in sizes), sizes
        self._folder, self._sizes, self._holds, self._instead = folder, list(sizes), holds, instead
        self._starts = [0, *accumulate(sizes)][: len(sizes)]
        with self._clear_errors():
            self._file, self._direct, name = _unnamed_file(folder)
            # a full disk is found here, and not with half of the weights written
            if hasattr(os, "posix_fallocate") and any(sizes):
                os.posix_fallocate(self._file.fileno(), 0, sum(sizes))
        self._written = 0
        self._mapped: weakref.WeakValueDictionary[tuple[int, int], mmap.mmap] = weakref.WeakValueDictionary()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lowmem-ft-stream")
        weakref.finalize(self, _close, self._reader, {self._file, self._direct}, name)

    @property
    def direct(self) -> bool:
        """Whether it reads past the page cache."""
        return self._direct is not self._file

    def write(self, block: int, offset: int, tensor: Tensor) -> None:
        data = memoryview(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type,unused-ignore]
        self._written += len(data)
        with self._clear_errors():
            self._file.seek(self._starts[block] + offset)
            while data:
                data = data[self._file.write(data) :]
            if self._written >= _CACHED:
                _forget_pages(self._file)
                self._written = 0

    def store(self, block: int, tensor: Tensor) -> Future[None]:
        return self._reader.submit(self.write, block, 0, tensor)

    def start(self, block: int, slot: Tensor) -> Future[None]:
        return self._reader.submit(self.read, block, slot)

    def wait(self, copy: Future[None]) -> None:
        copy.result()

    def rows(self, indices: Tensor, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # which the thread that fills it is not in
            found = torch.empty(len(indices), nbytes, dtype=torch.uint8)
        self._reader.submit(self._read_rows, indices, found).result()  # one thread reads: a file has one position
        return found

    def buffer(self, block: int, nbytes: int) -> memoryview:
        begin = self._starts[block] % mmap.ALLOCATIONGRANULARITY  # not a page everywhere
        found = self._mapped.get((block, nbytes))
        if found is None:  # each takes an open file, so that all who ask for a block share one
            start, access = self._starts[block] - begin, mmap.ACCESS_COPY  # PyTorch knows no memory but to write to
            with self._clear_errors():
                found = mmap.mmap(self._file.fileno(), begin + nbytes, access=access, offset=start)
            self._mapped[block, nbytes] = found
        return memoryview(found)[begin:]

    def _read_rows(self, indices: Tensor, found: Tensor) -> None:
        wanted, nbytes = indices.numpy(), found.shape[1]
        room, held = device_memory((nbytes // PAGE + 2) * PAGE, torch.device("cpu")), -1
        for at in wanted.argsort(kind="stable"):
            row = int(wanted[at])
            page, begin = divmod(row * nbytes, PAGE)
            if row != held:  # the same token again
                self._fill(room[: -(-(begin + nbytes) // PAGE) * PAGE], page * PAGE)
                held = row
            found[at] = room[begin : begin + nbytes]

    def read(self, block: int, into: Tensor) -> None:
        """Fill the first bytes of `into` (uint8, in RAM, beginning on a page) with a block, now."""
        self._fill(into[: self._sizes[block]], self._starts[block])

    def _fill(self, into: Tensor, start: int) -> None:
        """Read whole pages from byte `start` of the file on."""
        data = memoryview(into.numpy())  # type: ignore[arg-type,unused-ignore]
        with self._clear_errors():
            if self._written:
                _forget_pages(self._file)
                self._written = 0
            self._direct.seek(start)
            while data:
                done = self._direct.readinto(data)
                if not done:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                data = data[done:]
            if self._direct is self._file:
                _forget_pages(self._file)

    @contextlib.contextmanager
    def _clear_errors(self) -> Any:
        try:
            yield
        except OSError as error:
            if is_out_of_memory(error):  # as of the system, for a read past its cache: then the step is done again
                raise
            full = is_full(error)
            raise SpillError(
                f"No space left for {self._holds}."
                if full
                else f"{self._holds[0].upper()}{self._holds[1:]} cannot be written or read.",
                given=f"{self._folder}: {error.strerror}",
                allowed=f"{sum(self._sizes)} bytes on a local disk",
                fix=f"free some space, let `cache` or `output` name a folder on another disk, or {self._instead}",
            ) from error


class HostTier:
    """Pinned host RAM, below a device that copies by itself.

    The memory is registered with the driver instead of allocated by it: PyTorch rounds pinned allocations up to powers
    of two, which could double them.

    Args:
        sizes: bytes of each block.
    """

    __deepcopy__ = refuse_copy

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._starts = [0, *accumulate(sizes)]
        self._arena = device_memory(self._starts[-1], torch.device("cpu"))
        self._blocks = [self._arena[a:b] for a, b in pairwise(self._starts)]
        self._stream, self._device = _own_stream(self, device), device
        _pin(self, self._arena, device)

    def write(self, block: int, offset: int, tensor: Tensor) -> None:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        self._blocks[block][offset : offset + data.numel()].copy_(data)

    def store(self, block: int, tensor: Tensor) -> torch.cuda.Event:
        data = tensor.view(-1).view(torch.uint8)
        return _copy(self._stream, data, self._blocks[block][: data.numel()], after=_now(tensor.device))

    def start(self, block: int, slot: Tensor) -> torch.cuda.Event:
        return _copy(self._stream, self._blocks[block], slot[: len(self._blocks[block])], after=_now(slot.device))

    def wait(self, copy: torch.cuda.Event) -> None:
        copy.wait(torch.cuda.current_stream(self._device))  # by itself it takes that of whatever card is current

    def rows(self, indices: Tensor, nbytes: int) -> Tensor:
        count = len(self._arena) // nbytes
        return self._arena[: count * nbytes].view(count, nbytes).index_select(0, indices)

    def buffer(self, block: int, nbytes: int) -> Any:
        return self._arena[self._starts[block] :][:nbytes].numpy()


class StagedDiskTier:
    """A file below a device that is not the CPU: read into pinned buffers by turns, and copied from there.

    Args:
        folder, sizes: as for `DiskTier`.
    """

    __deepcopy__ = refuse_copy

    def __init__(self, folder: Path, sizes: Sequence[int], device: torch.device) -> None:
        self._disk = DiskTier(folder, sizes)
        self._stream, self._device = _own_stream(self, device), device
        self._sizes = list(sizes)
        self._stages: list[Tensor] = []  # until the first copy: of a table whose rows are looked up there is none
        self._busy: list[tuple[torch.cuda.Event, Tensor] | None] = [None] * STAGES  # copies on their way, and where to
        self._turn = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lowmem-ft-stage")
        weakref.finalize(self, _close, self._worker)

    def write(self, block: int, offset: int, tensor: Tensor) -> None:
        self._disk.write(block, offset, tensor)

    def start(self, block: int, slot: Tensor) -> Future[torch.cuda.Event]:
        return self._worker.submit(self._bring, block, slot, _now(slot.device))

    def wait(self, copy: Future[torch.cuda.Event]) -> None:
        copy.result().wait(torch.cuda.current_stream(self._device))

    def rows(self, indices: Tensor, nbytes: int) -> Tensor:
        return self._disk.rows(indices, nbytes)

    def buffer(self, block: int, nbytes: int) -> Any:
        return self._disk.buffer(block, nbytes)

    def _bring(self, block: int, slot: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        if not self._stages:
            arena = device_memory(STAGES * max(self._sizes), torch.device("cpu"))
            _pin(self, arena, self._device)
            self._stages = list(arena.view(STAGES, -1))
        turn, self._turn = self._turn, (self._turn + 1) % STAGES
        before = self._busy[turn]
        if before is not None:
            before[0].synchronize()
        self._disk.start(block, self._stages[turn]).result()  # by the one thread that reads
        size = self._sizes[block]
        done = _copy(self._stream, self._stages[turn][:size], slot[:size], after=after)
        self._busy[turn] = done, slot
        return done


def _own_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream for copies, for as long as `owner` lives, which the default stream does not wait for.

    PyTorch makes 32 of them when it is first asked for one, which take 70 MiB of an H200 (driver 580).
    """
    torch.cuda.synchronize(device)  # then the device has the context that a stream belongs to
    handle = ctypes.c_void_p()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        with torch.cuda.device(device):
            made = driver.cuStreamCreate(ctypes.byref(handle), 1) == 0  # CU_STREAM_NON_BLOCKING
    except OSError:
        made = False
    if not made:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    weakref.finalize(owner, driver.cuStreamDestroy_v2, handle)
    return torch.cuda.ExternalStream(handle.value, device=device)  # type: ignore[no-untyped-call]


def _now(device: torch.device) -> torch.cuda.Event:
    """An event after all work that this thread has given to `device`."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _copy(stream: torch.cuda.Stream, source: Tensor, target: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
    stream.wait_event(after)
    # in a thread that has not set a device, leaving the stream alone would give the first card a context
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _pin(owner: object, memory: Tensor, device: torch.device) -> None:
    """Lock `memory` in RAM for direct copies to and from `device`, for as long as `owner` lives."""
    if memory.numel() == 0:
        return
    driver: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):  # or another card would get a context
        code = driver.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if code != driver.cudaError.success:
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=device)  # a launch tells of the error that registering has left, and ends it
            # whatever the driver calls it: what a host, a container or a control group allows is used up
            said = driver.cudaGetErrorString(code)
            raise MemoryError(f"{memory.numel()} bytes of host memory cannot be pinned ({said})")
    weakref.finalize(owner, _unpin, driver, memory.data_ptr(), device)


def _unpin(driver: Any, address: int, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError):  # a device that failed copies no more
        torch.cuda.synchronize(device)  # what is on its way may lie there
    driver.cudaHostUnregister(address)


def _unnamed_file(folder: Path) -> tuple[FileIO, FileIO, str | None]:
    """A new file, opened for writing, and for reading past the page cache where that is possible; and its name if it
    has one: Windows removes no file that is open."""
    handle, name = tempfile.mkstemp(dir=nearest_existing(folder), prefix=".lowmem-ft-stream-")
    file = direct = FileIO(handle, "r+")
    with contextlib.suppress(OSError):  # tmpfs and some network file systems cannot
        direct = FileIO(os.open(name, os.O_RDONLY | os.O_DIRECT)) if hasattr(os, "O_DIRECT") else file
    try:
        os.unlink(name)
    except PermissionError:
        return file, direct, name
    return file, direct, None


def _forget_pages(file: FileIO) -> None:
    """Drop what was written or read from the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _close(threads: ThreadPoolExecutor, files: Collection[FileIO] = (), name: str | None = None) -> None:
    threads.shutdown(wait=False)  # what is still to be read holds the tier, so there is nothing
    for file in files:
        file.close()
    if name is not None:
        os.unlink(name)
