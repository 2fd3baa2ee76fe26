"""What cuBLAS keeps of the pool: by architecture, version and environment, from a profile, and in the replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_ft.core.errors import ConfigError
from lowmem_ft.planner.alloc_conf import expandable_segments, prefer_expandable_segments
from lowmem_ft.planner.compose import Turn
from lowmem_ft.planner.device import find_device, load_kernels
from lowmem_ft.planner.profile import Workspaces, load_profile, write_profile
from lowmem_ft.planner.reserve import replayed
from lowmem_ft.planner.trace import Event
from lowmem_ft.planner.workspaces import architecture_of, derived_workspaces, measured_workspaces

MIB = 1 << 20
SMALL = 8 * MIB + 128 * 1024


def sizes(kept: Workspaces) -> tuple[int, int, int]:
    return kept.forward.value, kept.bias.value, kept.backward.value


def test_workspaces_by_architecture_version_and_environment() -> None:
    assert sizes(derived_workspaces("ada", environ={}, version="2.13.0+cu130")) == (SMALL, 0, SMALL)
    assert sizes(derived_workspaces("hopper", environ={}, version="2.13.0")) == (32 * MIB, 0, 32 * MIB)
    assert sizes(derived_workspaces("turing", environ={}, version="2.12.1")) == (SMALL, MIB, SMALL)
    chosen = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}
    assert sizes(derived_workspaces("hopper", environ=chosen, version="2.13.0")) == (SMALL, 0, SMALL)


def test_architectures() -> None:
    cards = {(7, 0): "volta", (7, 5): "turing", (8, 0): "ampere", (8, 6): "ampere", (8, 9): "ada"}
    cards |= {(9, 0): "hopper", (10, 3): "blackwell", (12, 0): "blackwell", (13, 0): "blackwell"}
    assert {capability: architecture_of(capability) for capability in cards} == cards


def test_a_profile_that_measured_them_is_planned_with(tmp_path: Path) -> None:
    profile = load_profile("rtx-3060-12gb")
    known = find_device("rtx-3060-12gb")
    assert (known.forward_workspace, known.backward_workspace) == (SMALL, SMALL)
    kept = profile.memory_bytes.model_copy(update={"how": "measured", "value": 5 * MIB})
    nothing = kept.model_copy(update={"value": 0})
    measured = profile.model_copy(update={"workspaces": Workspaces(forward=kept, bias=nothing, backward=nothing)})
    write_profile(measured, tmp_path / "own.yaml")
    assert load_profile(tmp_path / "own.yaml") == measured
    device = find_device(str(tmp_path / "own.yaml"))
    assert (device.forward_workspace, device.bias_workspace, device.backward_workspace) == (5 * MIB, 0, 0)
    assert "workspaces.forward" in measured.figures()


def test_measuring_takes_the_difference_that_each_first_product_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([100, 108, 108, 109, 109, 117, 117, 118])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(counted))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    assert measured_workspaces(torch.device("cpu")) == {"forward": 8, "bias": 1, "backward": 8}


class _Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.masks: set[torch.dtype | None] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().split("::")[1])
        if func is torch.ops.lowmem_ft.attention.default:
            self.masks.add(None if args[3] is None else args[3].dtype)
        return func(*args, **(kwargs or {}))


def test_kernels_are_loaded_before_the_context_is_measured() -> None:
    with _Called() as called:
        load_kernels(torch.device("cpu"), torch.bfloat16)
    step = {"attention", "attention_backward", "dequantize_4bit", "dequantize_blockwise", "dequantize_int8"}
    assert called.names >= step | {"adam_8bit", "optimizer_update_32bit"}
    assert called.masks == {None, torch.bool, torch.int32}, "causal, with a mask, and of packed documents"


def test_a_cpu_has_none(tmp_path: Path) -> None:
    profile = load_profile("cpu")
    size = profile.memory_bytes
    wrong = profile.model_copy(update={"workspaces": Workspaces(forward=size, bias=size, backward=size)})
    write_profile(wrong, tmp_path / "wrong.yaml")
    with pytest.raises(ConfigError, match="workspaces concern CUDA"):
        load_profile(tmp_path / "wrong.yaml")


def test_the_replay_has_them_from_the_start() -> None:
    card = find_device("h100-80gb")
    events = [Event(2, sign * 30 * MIB, "device", "", "forward", None) for sign in (1, -1)]
    step = [Turn([(event, None) for event in events], [(0, 2)] * 2, [0])]
    # of a Hopper with PyTorch 2.13; and 256 numbers of bitsandbytes, and 1 KiB
    bias = [nbytes for nbytes in (card.bias_workspace,) * 2 if nbytes]
    taken = replayed(card, [(1, 40 * MIB)], step, expandable=False)
    assert taken.allocated == (32 + 32 + 40 + 30) * MIB + sum(bias) + 2 * 1024


def test_the_command_line_prefers_segments_that_grow() -> None:
    def preferred(environ: dict[str, str], platform: str = "linux") -> bool:
        prefer_expandable_segments(environ, platform)
        return expandable_segments(environ, platform)

    assert preferred({}), "without a driver plans are for a card elsewhere"
    assert not preferred({"PYTORCH_ALLOC_CONF": "expandable_segments:False"})
    assert not preferred({"PYTORCH_CUDA_ALLOC_CONF": ""})
    assert not preferred({}, "win32")


def test_expandable_segments_as_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    assert not expandable_segments({}, "linux")
    assert expandable_segments({new: "expandable_segments:True"}, "linux")
    assert expandable_segments({old: " expandable_segments : true , pinned_use_background_threads:True"}, "linux")
    assert not expandable_segments({old: "expandable_segments:False", new: "expandable_segments:True"}, "linux")
    with pytest.warns(UserWarning, match="do not exist on Windows"):
        assert not expandable_segments({new: "expandable_segments:True"}, "win32")
    several = "roundup_power2_divisions:[256:1,>:2],expandable_segments:True,max_split_size_mb:128"
    with pytest.warns(UserWarning, match="do not model max_split_size_mb, roundup_power2_divisions"):
        assert expandable_segments({new: several}, "linux")
    with pytest.warns(UserWarning, match="backend:cudaMallocAsync"):
        expandable_segments({new: "backend:cudaMallocAsync"}, "linux")


def test_segments_that_grow_and_those_that_do_not() -> None:
    card = replace(find_device("rtx-3060-12gb"), bias_workspace=0)  # as of PyTorch 2.13
    made = [(key, 7 * MIB) for key in range(1, 9)]
    # two pieces and no third go into a segment of 20 MiB; one that grows has room left at its end alone. What is small
    # has 2 MiB of its own
    assert [replayed(card, made, [], expandable=it).reserved for it in (True, False)] == [82 * MIB, 102 * MIB]
