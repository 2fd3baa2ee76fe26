"""Where the bytes of blocks lie below the device, and how they come up."""

import contextlib
import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_ft.core.errors import LowMemError
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.runtime import tiers as module
from lowmem_ft.runtime.tiers import PAGE, DiskTier, StagedDiskTier, device_memory


def test_a_file_that_was_cut_short_is_a_clear_error(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, [2 * PAGE])
    tier.write(0, 0, torch.arange(2 * PAGE, dtype=torch.int64).to(torch.uint8))
    assert not list(tmp_path.iterdir()), "no name is left in the folder"
    into = device_memory(2 * PAGE, torch.device("cpu"))
    tier.wait(tier.start(0, into))
    assert torch.equal(into, torch.arange(2 * PAGE, dtype=torch.int64).to(torch.uint8))
    tier._file.truncate(PAGE)
    with pytest.raises(LowMemError, match="shorter than what was written"):
        tier.wait(tier.start(0, into))


def test_a_read_that_the_system_has_no_memory_for_is_no_broken_disk(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, [2 * PAGE])
    tier.write(0, 0, torch.zeros(2 * PAGE, dtype=torch.uint8))
    file, into = tier._direct, device_memory(2 * PAGE, torch.device("cpu"))

    def refused(data: memoryview) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    tier._direct = SimpleNamespace(seek=file.seek, readinto=refused)  # type: ignore[assignment]
    with pytest.raises(OSError, match="Cannot allocate memory"):
        tier.wait(tier.start(0, into))
    tier._direct = file
    tier.wait(tier.start(0, into))
    assert not into.any()


class _Copied:
    """In the place of an event of a card, on which a copy is made at once."""

    def synchronize(self) -> None:
        return

    def wait(self, stream: object) -> None:
        return


def test_rows_are_looked_up_while_pieces_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tied matrix below a card, whose tiles come through pinned buffers: a file has one position."""

    def copied(stream: object, source: Tensor, target: Tensor, *, after: object) -> _Copied:
        target.copy_(source)
        return _Copied()

    stand_ins = {"_own_stream": lambda *_: None, "_now": lambda _: None, "_pin": lambda *_: None, "_copy": copied}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    readers = set()
    fill = DiskTier._fill

    def watched(self: DiskTier, into: Tensor, start: int) -> None:
        readers.add(threading.get_ident())
        fill(self, into, start)

    monkeypatch.setattr(DiskTier, "_fill", watched)
    tier = StagedDiskTier(tmp_path, [4 * PAGE] * 4, torch.device("cpu"))
    content = torch.randint(0, 255, (4, 4 * PAGE), dtype=torch.uint8)
    for block, piece in enumerate(content):
        tier.write(block, 0, piece)
    slots = [device_memory(4 * PAGE, torch.device("cpu")) for _ in content]
    copies = [tier.start(block, slot) for block, slot in enumerate(slots)]
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(tier.rows(rows, 2 * PAGE), content.view(8, -1)[rows])
    for copy, slot, piece in zip(copies, slots, content, strict=True):
        tier.wait(copy)
        assert torch.equal(slot, piece)
    assert len(readers) == 1


@pytest.mark.parametrize("said", ["out of memory", "invalid argument", "OS call failed or operation not supported"])
def test_what_cannot_be_pinned_is_a_lack_of_memory(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the driver calls it; and the next launch is not told of it."""
    launches: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    driver = SimpleNamespace(
        cudaHostRegister=lambda *_: 1, cudaError=SimpleNamespace(success=0), cudaGetErrorString=lambda code: said
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)

    def launch(*_: Any, **__: Any) -> None:
        launches.append(True)
        raise RuntimeError(f"CUDA error: {said}")

    monkeypatch.setattr(torch, "ones", launch)
    with pytest.raises(MemoryError, match=said) as caught:
        module._pin(object(), torch.zeros(PAGE, dtype=torch.uint8), torch.device("cpu"))
    assert is_out_of_memory(caught.value)
    assert launches == [True]
