"""A run's metrics in TensorBoard, W&B and MLflow, read back through their own libraries; and its model card."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlflow
import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from lowmem_ft.cli.app import app
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError, LowMemError, UnsupportedError
from lowmem_ft.core.run import Run
from lowmem_ft.report.card import model_card
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer import loop
from lowmem_ft.trainer import trackers as trackers_module
from lowmem_ft.trainer.trackers import tracking
from tests.assets import ASSETS, write_share


def config(folder: Path, **train: Any) -> RunConfig:
    write_share(folder, train=16, eval=16)
    return RunConfig.from_dict(
        {
            "model": str(ASSETS / "doclm-7m"),
            "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "seq_len": 64},
            "train": {"tokens_per_step": 128, "steps": 2, "eval_every": 1, **train},
            "policy": {"micro_batch_tokens": 128, "loss_chunk_tokens": 64, "activations": "keep"},
            "output": str(folder / "run"),
        }
    )


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the small package that is installed here has no other
        mlflow.set_tracking_uri((folder / "mlflow").as_uri())
        settings = config(folder, track=["tensorboard", "wandb", "mlflow"])
        return loop.train(settings, reporter=Reporter(quiet=True))


class Gone:
    """A tracker whose server is gone after the first step."""

    name = "mlflow"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int) -> None:
        if step > 1:
            self.finish()
        self.steps.append(step)

    def finish(self) -> None:
        raise ConnectionError("the server is gone\nand more")


def test_a_run_goes_on_without_a_tracker_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, gone = r"mlflow fails: what it lacks is in metrics.jsonl \(ConnectionError: the server is gone\)$", Gone()
    monkeypatch.setattr(trackers_module, "_opened", lambda name, folder: gone)

    def three_steps() -> None:
        with tracking(config(tmp_path, track=["mlflow"]), tmp_path) as trackers:
            for step in (1, 2, 3):
                trackers.log({"step": step, "loss": 1.0})

    with pytest.warns(UserWarning, match=told) as warned:
        three_steps()
    assert gone.steps == [1]
    assert len(warned) == 2, "when it fails, and when it ends"


def series(run: Run, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in run.metrics if name in line}


def test_tensorboard_has_what_metrics_have(tracked: Run) -> None:
    events = EventAccumulator(str(tracked.folder / "tensorboard" / tracked.folder.name)).Reload()
    for name in ("train/loss", "train/lr", "train/grad_norm", "eval/eval_loss"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(series(tracked, name.split("/")[1])), name


def test_mlflow_has_what_metrics_have(tracked: Run) -> None:
    (logged,) = mlflow.search_runs(experiment_names=["lowmem-ft"], output_format="list")
    assert logged.info.status == "FINISHED"
    assert logged.data.params["train.steps"] == "2"
    history = mlflow.MlflowClient().get_metric_history(logged.info.run_id, "train/loss")
    assert {it.step: it.value for it in history} == pytest.approx(series(tracked, "loss"))


def test_wandb_leaves_a_run_to_be_synchronised(tracked: Run) -> None:
    *_, log = sorted((tracked.folder / "wandb").glob("offline-run-*/*.wandb"))  # accelerate 1.10 begins twice
    assert b"train/grad_norm" in log.read_bytes()


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lowmem-ft\[wandb\]'"):
        loop.train(config(tmp_path, track=["wandb"]), reporter=Reporter(quiet=True))
    with pytest.raises(ConfigError, match=r"train\.track"):
        config(tmp_path, track=["excel"])


def test_a_library_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_tracking_uri("nothing://here")
    with pytest.raises(UnsupportedError, match="mlflow could not be started"):
        loop.train(config(tmp_path, track=["mlflow"]), reporter=Reporter(quiet=True))


def test_the_card_tells_plan_data_and_metrics(tracked: Run) -> None:
    text = (tracked.adapter / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    settings = yaml.safe_load(front)
    assert settings["base_model"] == "doclm-7m"
    assert str(tracked.folder.parent) not in text, "where it lay is nobody's business"
    assert settings["library_name"] == "peft"
    assert tracked.eval_loss is not None
    for part in (f"{tracked.eval_loss:.4f}", "| train.jsonl |", "predicted process peak", "planned", "grad_clip"):
        assert part in body, part


def test_the_card_tells_no_place_of_this_machine(tracked: Run) -> None:
    (other := copy.deepcopy(tracked.plan.config))["adapter"]["init"] = "/gone/old-adapter"
    other["data"]["train"] = {"path": "/gone/records.jsonl", "format": "messages"}
    other["data"]["eval"] = [{"path": "~/one.jsonl"}, {"path": "owner/two"}]
    text = model_card(replace(tracked, plan=replace(tracked.plan, config=other)))
    assert "/gone" not in text
    assert "rank:" not in text, "which is the old adapter's"
    for words in ("init: old-adapter", "| records.jsonl |", "| one.jsonl, owner/two |"):
        assert words in text


def test_push_uploads_the_adapter(tracked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Address(str):
        repo_id = "me/mine"

    def create(self: HfApi, repo: str, **options: Any) -> Address:
        seen.update(repo=repo, **options)
        return Address("hub/me/mine")

    def commit(self: HfApi, repo_id: str, operations: list[CommitOperationAdd], **options: Any) -> None:
        seen.update(repo_id=repo_id, files={it.path_in_repo: it.path_or_fileobj for it in operations}, **options)

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.chdir(tracked.folder)
    (tracked.adapter / ".saving-1-x").mkdir()  # what a killed run left
    done = CliRunner().invoke(app, ["push", ".", "mine", "--private"])
    assert done.exit_code == 0, done.output
    assert "hub/me/mine" in done.output
    assert (seen["repo"], seen["private"], seen["repo_id"]) == ("mine", True, "me/mine")
    assert seen["commit_message"] == f"Adapter of {tracked.folder.name}"
    assert set(seen["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    local = json.loads((tracked.adapter / "adapter_config.json").read_text())
    assert local["base_model_name_or_path"] == str(ASSETS / "doclm-7m")
    assert json.loads(seen["files"]["adapter_config.json"]) == {**local, "base_model_name_or_path": "doclm-7m"}


def test_push_says_what_is_wrong(tracked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pushed(folder: Path, name: str) -> BaseException | None:
        return CliRunner().invoke(app, ["push", str(folder), name]).exception

    unfinished = pushed(tmp_path, "me/mine")
    assert isinstance(unfinished, ConfigError)
    assert "no adapter" in str(unfinished)
    (tmp_path / "adapter").mkdir()
    shutil.copy(tracked.adapter / "adapter_config.json", tmp_path / "adapter")
    assert "no adapter" in str(pushed(tmp_path, "me/mine")), "its weights are not there"
    assert "no name for a repository" in str(pushed(tracked.folder, "not a/name/at all"))
    for reason in (LocalTokenNotFoundError("no token"), HTTPError("no network")):
        monkeypatch.setattr(HfApi, "create_repo", Mock(side_effect=reason))
        error = pushed(tracked.folder, "me/mine")
        assert isinstance(error, LowMemError)
        assert str(reason) in str(error)
        assert "hf auth login" in str(error)
