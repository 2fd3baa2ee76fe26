"""Measuring this machine gives a profile that plans are made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lowmem_ft.cli.app import app
from lowmem_ft.planner import measure as module
from lowmem_ft.planner.cost import Rates
from lowmem_ft.planner.device import cost_of, find_device
from lowmem_ft.planner.profile import load_profile
from lowmem_ft.quant.products import multiplies


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"product": (64, 64, 128), "attention": (1, 2, 32, 16), "stream": 1 << 12}
    monkeypatch.setitem(module.SHAPES, "cpu", small)
    monkeypatch.setattr(module, "FEW_ROWS", (64, 32, 64))
    monkeypatch.setattr(module, "DISK_BYTES", 16 << 20)
    monkeypatch.setattr(module, "SECONDS", 0.01)
    file = tmp_path / "this.yaml"
    result = CliRunner().invoke(app, ["profiles", "measure", "--device", "cpu", "--out", str(file)])
    assert result.exit_code == 0, result.output
    profile = load_profile(file)
    assert all(figure.how == "measured" for figure in profile.figures().values())
    assert profile.measured is not None
    rates = Rates.of(profile)
    assert rates.call == 1 / profile.measured.calls.value
    assert (profile.measured.packing is None) == (not multiplies(torch.bfloat16)) == (rates.loops is not None)
    assert 0 < rates.packing < 1e12
    assert rates.products.keys() == {getattr(module.torch, name) for name in ("bfloat16", "float16", "float32")}
    device = find_device(str(file))
    assert device.kind == "cpu"
    assert not device.present
    assert cost_of(device)
    shown = CliRunner().invoke(app, ["profiles", "show", str(file)])
    assert "measured.dequantize_4bit" in shown.output


def test_what_a_card_keeps_besides_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    card = replace(find_device("h100-80gb"), process_bytes=400, forward_workspace=32, bias_workspace=1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30)
    monkeypatch.setattr(module, "cuda_process_bytes", lambda _: 530)
    assert module._context_bytes(card) == 500, "kernels were loaded since the device was found"
    monkeypatch.setattr(module, "cuda_process_bytes", lambda _: None)
    assert module._context_bytes(card) == 400
    kept = module._workspaces(card)
    assert kept is not None
    assert (kept.forward.value, kept.bias.value, kept.backward.value) == (32, 1, card.backward_workspace)
    assert {figure.how for _, figure in kept} == {"measured"}
    assert module._workspaces(find_device("cpu")) is None
