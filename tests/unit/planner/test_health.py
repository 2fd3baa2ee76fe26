"""Checks of the machine: each must see what it is there to see."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner import device, health, probes
from lowmem_ft.planner.device import find_device
from lowmem_ft.planner.profile import load_profile, write_profile
from tests.models import save_tiny

CPU = torch.device("cpu")


def test_kernels_work_here() -> None:
    found = list(probes.check_kernels(CPU, torch.bfloat16))
    assert [check.status for check in found] == ["ok"] * 6, found
    assert {check.name.removeprefix("kernel: ") for check in found} > {"nf4", "int8", "8-bit optimizer", "attention"}


def _slightly_wrong(function: Any) -> Any:
    """The same function, wrong by 5% in half of its numbers."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return out * (1 + 0.05 * (torch.arange(out.shape[-1]) % 2))

    return wrong


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("dequantize", ["kernel: nf4", "kernel: fp4", "kernel: int8"]),
        ("attention", ["kernel: attention"]),
        ("mm", ["kernel: matrix product"]),
    ],
)
def test_a_kernel_with_wrong_numbers_is_a_problem(
    function: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, function, _slightly_wrong(getattr(probes, function)))
    found = [check for check in probes.check_kernels(CPU, torch.bfloat16) if check.status == "problem"]
    assert [check.name for check in found] == names
    assert all("wrong numbers" in check.found and check.fix for check in found)


def test_a_kernel_that_quantizes_badly_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = probes.quantize
    monkeypatch.setattr(probes, "quantize", lambda weight, spec: quantize(weight * 1.25, spec))
    found = [check for check in probes.check_kernels(CPU, torch.bfloat16) if check.status == "problem"]
    assert [check.name for check in found] == ["kernel: nf4", "kernel: fp4", "kernel: int8"]


def test_a_kernel_that_fails_or_gives_nan_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(probes, "AdamW", fails)
    monkeypatch.setattr(probes, "mm", lambda a, b: a @ b * float("nan"))
    found = {it.name: it for it in probes.check_kernels(CPU, torch.bfloat16) if it.status == "problem"}
    assert found.keys() == {"kernel: matrix product", "kernel: 8-bit optimizer"}
    assert found["kernel: 8-bit optimizer"].found == "RuntimeError: no kernel image"
    assert "inf" in found["kernel: matrix product"].found


def test_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.check_streaming(tmp_path / "not" / "there").status == "ok"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(probes, "DiskTier", lambda *_: SimpleNamespace(**tier(direct=False)))
    assert "page cache" in probes.check_streaming(tmp_path).found
    monkeypatch.setattr(probes, "DiskTier", lambda *_: SimpleNamespace(**tier(direct=True, right=False)))
    assert "not what was written" in probes.check_streaming(tmp_path).found
    monkeypatch.undo()
    assert probes.check_streaming(Path("/proc/nowhere")).status == "warning"


def tier(*, direct: bool, right: bool = True) -> dict[str, Any]:
    held: list[torch.Tensor] = []
    return {
        "write": lambda block, offset, tensor: held.append(tensor),
        "start": lambda block, slot: slot.copy_(held[0]) if right else slot.zero_(),
        "wait": lambda copy: None,
        "direct": direct,
    }


def test_limits_of_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "cgroup_bytes", lambda: 1 << 30)
    (limit,) = [check for check in health.check_memory() if check.name == "RAM limit"]
    assert (limit.status, "1.00 GiB" in limit.found) == ("ok", True)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = health.check_folder("disk: runs", tmp_path / "a" / "b", "output")
    assert found.status == "ok"
    assert str(tmp_path) in found.found
    assert list(tmp_path.iterdir()) == []
    assert health.check_folder("disk: runs", Path("/proc/nowhere"), "output").status == "problem"
    assert health.check_folder("disk: tokenized data", Path("/proc/nowhere"), "data.cache").status == "warning"
    monkeypatch.setattr(health, "FEW_BYTES", 1 << 60)
    assert health.check_folder("disk: runs", tmp_path, "output").status == "warning"


def test_build_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(health, "_has_driver", lambda: False)
    assert health.check_build().status == "ok"
    monkeypatch.setattr(health, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert (health.check_build().status, "CUDA build" in health.check_build().fix) == ("warning", True)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert "update the driver" in health.check_build().fix


def test_cards_as_pytorch_describes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((1 + 13 * index) << 30, 15 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7 + index, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    first, second, *_ = health.check_cards()
    assert (first.status, second.status) == ("warning", "ok")
    assert "float16 with loss scaling" in first.found
    assert "14.00 GiB of 15.00 GiB free, compute capability 8.5, native bfloat16" in second.found


def test_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in health.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "not set" in health.check_allocator().found
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert (health.check_allocator().status, "segments grow" in health.check_allocator().found) == ("ok", True)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert (health.check_allocator().status, "max_split_size_mb" in health.check_allocator().found) == ("warning", True)


def test_a_measured_profile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("model: x\n")
    assert "none in this folder" in health.check_profile("cpu").found
    write_profile(load_profile("cpu"), tmp_path / "mine.yaml")
    measured = any(figure.how == "measured" for figure in load_profile("cpu").figures().values())
    assert ("mine.yaml" in health.check_profile("cpu").found) == measured
    assert "none in this folder" in health.check_profile("cuda").found


def test_what_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = find_device("cpu")
    given = {"model": str(save_tiny("llama", tmp_path / "model")), "data": {"seq_len": 64}, "output": str(tmp_path)}
    config = RunConfig.from_dict({**given, "train": {"tokens_per_step": 64}})
    found = health.what_limits(config, device)
    assert found.fits
    assert "with sequences of 64 tokens fits; RAM would bind first" in found.sentence
    small = RunConfig.from_dict({**given, "budget": {"memory": "10MiB"}})
    found = health.what_limits(small, device)
    assert not found.fits
    assert "does not fit; RAM binds" in found.sentence
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    found = health.what_limits(config, device)
    assert not found.fits
    assert "the disk binds" in found.sentence


def test_plans_stay_within_the_limit_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cgroup_bytes", lambda: 1 << 30)
    assert find_device("cpu").free_bytes == 1 << 30
