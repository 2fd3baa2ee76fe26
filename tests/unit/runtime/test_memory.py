"""What the process takes, as the system counts it."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.runtime.memory import (
    cgroup_bytes,
    cuda_process_bytes,
    device_peak_bytes,
    process_bytes,
    process_peak_bytes,
)


def test_the_peak_follows_what_was_taken_and_freed() -> None:
    before = process_peak_bytes()
    block = torch.ones(before // 4 + (64 << 20))  # fp32: at least the peak again
    taken = process_bytes()
    assert taken >= block.nbytes
    del block
    release_freed_memory()
    assert process_bytes() < taken
    assert process_peak_bytes() >= taken - (1 << 20)  # the kernel counts pages per thread, and sums them now and then
    assert device_peak_bytes(torch.device("cpu")) == process_peak_bytes()


def test_limits_of_containers(tmp_path: Path) -> None:
    assert cgroup_bytes((tmp_path,)) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_bytes((tmp_path,)) is None
    (tmp_path / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert cgroup_bytes((tmp_path,)) is None
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    assert cgroup_bytes((tmp_path,)) == 1 << 30
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "memory.max").write_text(f"{1 << 31}\n")
    assert cgroup_bytes((tmp_path / "inner", tmp_path)) == 1 << 30, "the group above allows less"


class NVMLError(Exception):
    """As pynvml's own."""


@pytest.mark.parametrize("listed", [True, False])
def test_cuda_process_bytes_are_this_process_s(monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    nvml: Any = ModuleType("pynvml")
    nvml.NVMLError = NVMLError
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-abc": "card"}[uuid]
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda card: [
        SimpleNamespace(pid=0, usedGpuMemory=1),
        SimpleNamespace(pid=os.getpid() if listed else -1, usedGpuMemory=12345),
    ]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    assert cuda_process_bytes(0) == (12345 if listed else None)


def test_a_driver_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = ModuleType("pynvml")

    def refused() -> None:
        raise NVMLError

    nvml.NVMLError, nvml.nvmlInit = NVMLError, refused
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert cuda_process_bytes(0) is None


def test_without_nvml_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cuda_process_bytes(0) is None
