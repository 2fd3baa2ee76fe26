"""Models by hub id: what is downloaded, what the hub's cache has, and what is said where neither gives one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.quant.checkpoint import Checkpoint
from tests.models import save_tiny
from tests.unit.quant.test_checkpoint import remove_shard


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a local folder nor a hub repository") as caught:
        Checkpoint.open("nobody/no-such-model")
    assert f"no folder in {tmp_path}" in str(caught.value.given)


@pytest.mark.parametrize("commit", ["0123456789abcdef0123456789abcdef01234567", "abc"])
def test_a_hub_id_of_which_only_the_small_files_are_there(
    commit: str, llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository = tmp_path / "models--somebody--tiny"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    shutil.copy(llama / "config.json", folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert Checkpoint.open("somebody/tiny", weights=False).folder == folder
    with pytest.raises(CheckpointError, match="weights can be neither reached nor found"):
        Checkpoint.open("somebody/tiny")
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").touch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="only a part of this model"):
        Checkpoint.open("somebody/tiny", weights=False)


def test_a_hub_id_is_taken_from_the_hubs_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--tiny"
    folder = save_tiny("llama", repository / "snapshots" / commit, max_shard_size="50KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = Checkpoint.open("somebody/tiny")
    assert checkpoint.folder == folder
    assert checkpoint.name == "somebody/tiny"
    assert Checkpoint.open("somebody/tiny", weights=False).tensors == checkpoint.tensors
    remove_shard(folder)
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.open("somebody/tiny")


class _ConnectError(Exception):
    """As of httpx, which is no OSError."""


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a network a model in the cache needs none; of one that is there in part that is said."""
    folder = save_tiny("llama", tmp_path / "0123456789abcdef0123456789abcdef01234567", max_shard_size="50KB")

    def download(repo: str, *, revision: str | None = None, **_: Any) -> str:
        if revision is not None:
            raise _ConnectError("no network")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Checkpoint.open("somebody/tiny").folder == folder
    remove_shard(folder)
    with pytest.raises(CheckpointError, match="weights can be neither reached nor found") as caught:
        Checkpoint.open("somebody/tiny")
    assert "_ConnectError" in str(caught.value.fix)


@pytest.mark.parametrize(("weights", "trusted"), [(False, False), (False, True), (True, True)])
def test_of_a_hub_repository_only_what_is_needed_is_downloaded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool, trusted: bool
) -> None:
    there = [*(file.name for file in llama.iterdir()), "pytorch_model.bin", "model.py", "original/model.safetensors"]
    there += ["additional_chat_templates/tool_use.jinja", "spiece.model", "onnx/config.json"]

    def download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        for name in filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes((llama / name).read_bytes() if (llama / name).exists() else b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = Checkpoint.open("somebody/tiny", weights=weights, trust_remote_code=trusted)
    names = {file.name for file in tmp_path.iterdir()}
    assert ("model.py" in names) == trusted
    assert {name for name in names if name.endswith(".safetensors")} == {file.name for file in checkpoint.files}
    assert bool(checkpoint.tensors) == weights
    assert not any(name.endswith(".bin") for name in names)
    assert {"spiece.model", "additional_chat_templates"} <= names
    assert not names & {"original", "onnx"}
