"""Checkpoints: whole or not there, exact, rotated, and refused when they are broken or another run's."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.runtime import state
from lowmem_ft.runtime.memory import process_bytes, process_peak_bytes, reset_process_peak

CPU = torch.device("cpu")


def save(folder: Path, step: int, value: float = 1.0, **meta: object) -> Path:
    weights = {"a": nn.Parameter(torch.full((3,), value, dtype=torch.bfloat16))}
    tensors = {"0.m": torch.arange(3)}
    return state.save_checkpoint(folder, step=step, weights=weights, optimizer_tensors=tensors, meta=meta, device=CPU)


def test_round_trip_restores_weights_and_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = save(tmp_path, 7, 2.5, cursor={"epoch": 1})
    expected = torch.rand(4)
    tensors, meta = state.read_checkpoint(path)
    target = {"a": nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))}
    state.restore_weights(target, tensors)
    state.restore_random(tensors, CPU)
    assert torch.equal(target["a"], torch.full((3,), 2.5, dtype=torch.bfloat16))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(state.below(tensors, "optimizer")["0.m"], torch.arange(3))
    assert meta == {"step": 7, "cursor": {"epoch": 1}}


def test_files_are_as_open_as_any_new_one(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    assert save(tmp_path, 7).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_random_numbers_are_those_of_the_card_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of the current one: a run may be on another."""
    generators = {0: torch.tensor([10]), 1: torch.tensor([11])}

    def set_state(new: torch.Tensor, device: torch.device) -> None:
        generators[device.index] = new

    of_cards = SimpleNamespace(get_rng_state=lambda device: generators[device.index], set_rng_state=set_state)
    monkeypatch.setattr(torch, "get_device_module", lambda device: of_cards)
    monkeypatch.setattr(torch, "cuda", of_cards)
    card = torch.device("cuda", 1)
    before = state.random_state(card)
    assert before["random/cuda"].item() == 11
    generators[1] = torch.tensor([12])
    state.restore_random(before, card)
    assert [it.item() for it in generators.values()] == [10, 11]
    assert state.random_state(CPU).keys() == {"random/cpu"}
    state.restore_random({**before, "random/cuda": torch.tensor([13])}, CPU)
    assert generators[1].item() == 11, "a run on the CPU leaves cards alone"


def test_old_checkpoints_go_and_order_is_by_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert [path.name for path in state.checkpoints(tmp_path)] == [
        "step-00000010.safetensors",
        "step-00000100.safetensors",
    ]


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file that something else has open on Windows. It goes with the next one that is saved."""

    def in_use(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as windows:
        windows.setattr(Path, "unlink", in_use)
        save(tmp_path, 3)
    assert len(state.checkpoints(tmp_path)) == 3
    save(tmp_path, 4)
    assert [path.name[-13:-12] for path in state.checkpoints(tmp_path)] == ["3", "4"]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path, 1)
    before = good.read_bytes()

    def full(path: Path, tensors: object, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert good.read_bytes() == before


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    tensors, _ = state.read_checkpoint(path)
    with pytest.raises(CheckpointError, match="other trainable weights"):
        state.restore_weights({"b": nn.Parameter(torch.zeros(3))}, tensors)
    with pytest.raises(CheckpointError, match="another shape"):
        state.restore_weights({"a": nn.Parameter(torch.zeros(4))}, tensors)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cannot be read"):
        state.read_checkpoint(path)
    state.write_tensors(path, {}, {"state": "[1]"})
    with pytest.raises(CheckpointError, match="no JSON object"):
        state.read_checkpoint(path)


def test_what_is_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "step-00000002.safetensors").mkdir()
    (tmp_path / "step-00000003.safetensors").symlink_to("step-00000003.safetensors")
    assert state.checkpoints(tmp_path) == [path]


def test_a_checkpoint_that_is_read_takes_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is gone on with has no more memory than one that begins."""
    monkeypatch.setattr(state, "MAPPED", 1 << 20)
    sizes = [(8 << 20, 1), (999, 1001), (1 << 20, 7), (100, 3), (1 << 22,)]
    weights = {str(at): nn.Parameter(torch.full(size, float(at))) for at, size in enumerate(sizes)}
    path = save(tmp_path, 1)
    state.write_tensors(path, {f"weights/{name}": weight.data for name, weight in weights.items()})
    for weight in weights.values():
        weight.data.zero_()
    if not reset_process_peak():
        pytest.skip("peaks of the process cannot be counted anew")
    before = process_bytes()
    state.restore_weights(weights, state.read_checkpoint(path)[0])
    assert process_peak_bytes() - before < 8 << 20
    assert all(bool((weight == at).all()) for at, weight in enumerate(weights.values()))


def test_metadata_is_json_in_the_header(tmp_path: Path) -> None:
    path = save(tmp_path, 3, scale=2.0)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert json.loads(header["__metadata__"]["state"]) == {"step": 3, "scale": 2.0}


@pytest.mark.parametrize("part", ["weights", "optimizer", "step"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, part: str) -> None:
    path = save(tmp_path, 3, 2.5)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if part == "step":
        at = content.index(b"3", content.index(b"step"))  # reads as 2 then
    else:
        at = start + next(it["data_offsets"][0] for name, it in header.items() if name.startswith(part))
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not what was written"):
        state.read_checkpoint(path)


def test_a_file_without_a_checksum_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors", {"state": '{"step": 2}'})
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        state.read_checkpoint(tmp_path / "other.safetensors")
