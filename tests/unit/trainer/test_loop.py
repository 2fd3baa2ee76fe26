"""The loop on the embedded model: what a run leaves, that stopping and resuming change nothing, what is refused."""

import dataclasses
import errno
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lowmem_ft.cli.runs import open_run
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import BudgetError, CheckpointError, ConfigError, DataError, LowMemError
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.report.progress import Reporter
from lowmem_ft.runtime import state
from lowmem_ft.trainer import loop, recovery
from lowmem_ft.trainer.folder import RunFolder
from lowmem_ft.trainer.recovery import NoSaferPolicyError
from tests.assets import ASSETS, write_share
from tests.unit.trainer.runs import QUIET, at_step, config, exact


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_into_one_folder_do_not_meet(data: Path, resume: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"steps": 2, "save_every": 1}
    whole = loop.train(config(data, "whole", train=few), reporter=QUIET)
    settings, refused = config(data, train=few), []

    def second() -> None:
        if not resume:  # as if it had begun before the first wrote a line
            monkeypatch.setattr(RunFolder, "refuse_another", lambda self: None)
        with pytest.raises(ConfigError, match="Another process is training") as caught:
            loop.train(settings, resume=resume, reporter=QUIET)
        refused.append(caught.value)

    at_step(monkeypatch, 2, second)
    assert exact(loop.train(settings, reporter=QUIET)) == exact(whole)
    assert len(refused) == 1


def test_the_perplexity_of_a_model_that_diverged(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none, since JSON has no number for it."""
    monkeypatch.setattr(recovery.Recovery, "evaluate", lambda *_: (800.0, {"accuracy": 0.0}))
    run = loop.train(config(data, train={"steps": 1}), reporter=QUIET)
    assert run.evaluations
    assert all(line["eval_loss"] == 800.0 and "eval_perplexity" not in line for line in run.evaluations)


def test_a_run_whose_base_has_changed_is_told_of(data: Path, recwarn: pytest.WarningsRecorder) -> None:
    """As where a repository on the hub has a newer version."""
    model = shutil.copytree(ASSETS / "doclm-7m", data / "model")
    loop.train(config(data, model=str(model), train={"steps": 1}), reporter=QUIET)
    open_run(data / "run", [], None)
    assert not [it for it in recwarn if "other weights" in str(it.message)]
    weights = {name: tensor * 2 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors")
    with pytest.warns(UserWarning, match="trained on other weights than its model has now"):
        open_run(data / "run", [], None)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has a plan and nothing else."""
    data = write_share(tmp_path_factory.mktemp("planned"), train=4, eval=4)
    settings = config(data, budget={"memory": "4GiB"})
    folder = RunFolder(data / "run")
    folder.start(settings, make_plan(settings))
    return folder.path


def test_a_run_is_opened_under_its_own_plan(planned: Path) -> None:
    plan = RunFolder(planned).plan()
    for overrides in ([], ["eval.samples=1", "eval.max_new_tokens=4"], ["quant.bits=4"], ["budget.memory=4GiB"]):
        assert open_run(planned, overrides, "none")[1:] == (plan, False)


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["quant.bits=16"], {"bits": 16, "quant": "none", "micro_batch_tokens": 128}),
        (["policy.micro_batch_tokens=64"], {"micro_batch_tokens": 64}),
        (["budget.memory=2GiB"], {}),
        (["data.seq_len=128", "policy.micro_batch_tokens=256"], {"micro_batch_tokens": 256}),
    ],
)
def test_overrides_are_planned_for(planned: Path, overrides: list[str], changes: dict[str, Any]) -> None:
    before = RunFolder(planned).plan()
    made = open_run(planned, overrides, "none")[1]
    assert before is not None
    assert made != before
    assert {name: getattr(made.policy, name) for name in changes} == changes


def test_overrides_that_cannot_be(planned: Path) -> None:
    with pytest.raises(BudgetError):
        open_run(planned, ["budget.memory=100MB"], "none")
    for override in ("train.lr=5", "adapter.rank=64", "train={lr: 5}", "data.order=longest_first", "output=x"):
        with pytest.raises(ConfigError, match="no effect on a model that is trained"):
            open_run(planned, [override], "none")
    with pytest.raises(ConfigError, match=r"(?s)no such run.*allowed: .*fix: "):
        open_run(planned.with_name("typo"), [], None)
    with pytest.raises(ConfigError, match="no adapter yet") as caught:
        open_run(planned, [], None)
    assert "--resume" in str(caught.value.fix)


def test_out_of_time_stops_with_a_checkpoint(data: Path) -> None:
    run = loop.train(config(data, train={"max_time": 0.001}), reporter=QUIET)
    assert (run.status, run.step) == ("out_of_time", 1)
    assert state.checkpoints(run.folder / "checkpoints")
    assert not run.adapter.exists()


def test_what_a_run_leaves(data: Path) -> None:
    run = loop.train(config(data, train={"steps": 2}), reporter=QUIET)
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "report.html",
        "result.json",
    }
    assert RunConfig.load(run.folder / "config.yaml") == config(data, train={"steps": 2})
    assert json.loads((run.folder / "plan.json").read_text())["fits"] is True
    step = next(line for line in run.metrics if "loss" in line)
    assert set(step) == {
        *("step", "loss", "tokens", "lr", "grad_norm", "seconds"),
        *("tokens_per_second", "device_peak_bytes", "host_peak_bytes"),
    }
    assert run.measured["process_peak_bytes"] > 0


def test_what_is_not_finite_is_null_in_the_metrics(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the norm of gradients that overflow in fp16, which JSON has no word for."""
    original, calls = recovery.sum_gradients, itertools.count(1)

    def gradients(*args: Any, **kwargs: Any) -> Any:
        found, first = original(*args, **kwargs), next(calls) == 1
        return dataclasses.replace(found, loss=math.nan, grad_norm=math.inf, skipped=True) if first else found

    monkeypatch.setattr(recovery, "sum_gradients", gradients)
    run = loop.train(config(data, train={"steps": 2}), reporter=QUIET)
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", (run.folder / "metrics.jsonl").read_text()))
    first, second = (line for line in run.metrics if "loss" in line)
    assert (first["loss"], first["grad_norm"], first["skipped"]) == (None, None, True)
    assert math.isfinite(second["loss"])
    assert "training loss" in (run.adapter / "README.md").read_text()


def test_nothing_comes_on_top_of_freed_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an evaluation before the first step, of reading a checkpoint, of a step before an evaluation."""
    done: list[str] = []
    evaluate, step = loop.evaluate, recovery.Recovery.step

    def told(name: str, work: Any) -> Any:
        return lambda *args, **options: done.append(name) or work(*args, **options)

    monkeypatch.setattr(loop, "release_freed_memory", lambda: done.append("release"))
    monkeypatch.setattr(loop, "evaluate", told("evaluate", evaluate))
    monkeypatch.setattr(recovery.Recovery, "step", told("step", step))
    loop.train(config(data, train={"steps": 2, "eval_every": 1}), reporter=QUIET)
    assert done == ["release", "evaluate"] + 2 * ["release", "step", "release", "evaluate"]


def test_keep_best_restores_the_best_evaluation(data: Path) -> None:
    # the second half is wrecked by a rate that no model survives
    settings = config(data, train={"steps": 4, "eval_every": 2, "lr": 0.5, "warmup": 0, "schedule": "constant"})
    run = loop.train(settings, reporter=QUIET)
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line][1:]
    assert run.eval_loss == min(losses)
    saved = load_file(run.adapter / "adapter_model.safetensors")
    best = load_file(run.folder / "checkpoints" / "best.safetensors")
    name = next(name for name in best if name.endswith("lora_B"))
    path = name.removeprefix("weights/").removesuffix("lora_B")
    assert torch.equal(saved[f"base_model.model.{path}lora_B.weight"], best[name])


def test_without_keep_best_the_last_weights_are_saved(data: Path) -> None:
    wrecked = {"steps": 4, "eval_every": 2, "lr": 0.5, "warmup": 0, "schedule": "constant", "keep_best": False}
    run = loop.train(config(data, train=wrecked), reporter=QUIET)
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert run.eval_loss == losses[-1] > min(losses)
    assert not (run.folder / "checkpoints" / "best.safetensors").exists()


def test_a_budget_too_small_stops_before_anything_is_written(data: Path) -> None:
    with pytest.raises(BudgetError):
        loop.train(config(data, budget={"memory": "10MB"}), reporter=QUIET)
    assert not (data / "run").exists()


def test_a_run_without_data_stops_before_it_is_planned(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "make_plan", lambda _: pytest.fail("planned"))
    with pytest.raises(ConfigError, match=r"'data.train' is missing"):
        loop.train(config(data, "run", data={"train": None}), reporter=QUIET)


def test_what_needs_no_plan_is_told_before_it_is_made(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of a large model takes seconds."""
    monkeypatch.setattr(loop, "make_plan", lambda _: pytest.fail("planned"))
    (data / "other.jsonl").write_text('{"question": "?"}\n')
    (data / "file").write_text("mine")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for output, sections, said in (
        ("run", {"data": {"train": str(data / "gone.jsonl")}}, "No such file"),
        ("run", {"data": {"eval": str(data / "gone.jsonl")}}, "No such file"),
        ("run", {"data": {"eval": str(data / "other.jsonl")}}, "other.jsonl:1: the record lacks the keys"),
        ("run", {"data": {"eval": str(data / "eval.jsonl"), "columns": {"text": "body"}}}, "lacks the column"),
        ("run", {"data": {"cache": str(data / "file")}}, "data.cache cannot be written"),
        ("run", {"train": {"track": ["wandb"]}}, "wandb is not installed"),
        ("file/run", {}, "could not be written"),
    ):
        with pytest.raises(LowMemError, match=said):
            loop.train(config(data, output, **sections), reporter=QUIET)
    assert not (data / "run").exists()


def test_bad_data_stops_before_anything_is_written(data: Path) -> None:
    (data / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "only a question"}]}\n')
    with pytest.raises(DataError):
        loop.train(config(data), reporter=QUIET)
    with pytest.raises(ConfigError, match=r"data\.train"):
        loop.train(config(data, data={"train": None}), reporter=QUIET)
    assert not (data / "run").exists()


@pytest.mark.parametrize("output", ["file", "file/run", "r" * 300])
def test_an_output_folder_that_cannot_be_is_told(data: Path, output: str) -> None:
    (data / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="could not be written"):
        loop.train(config(data, output), reporter=QUIET)
    assert (data / "file").read_text() == "mine"


def test_checkpoints_alone_are_a_run_too(tmp_path: Path) -> None:
    """Those of a run that began anew beside them would be removed as older ones."""
    folder = RunFolder(tmp_path)
    folder.refuse_another()
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step-00005000.safetensors").touch()
    with pytest.raises(ConfigError, match="holds a run already"):
        folder.refuse_another()


def test_a_folder_that_is_gone_is_not_told_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a share of the network that is lost in the middle of a run."""
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"see that .*run is there and can be written, and go on"):
        folder.log({"step": 1})

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match="free disk space, and go on"):
        folder.log({"step": 1})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="free disk space, or set output"):  # where it would start over
        folder.write("plan.json", "")


def test_a_loss_that_is_not_finite_in_fp16_leaves_no_checkpoint_and_no_adapter(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"policy": {"compute_dtype": "float16"}, "train": {"lr": 1e30, "steps": 3, "save_every": 1}}
    for resume in (False, True):
        with pytest.raises(LowMemError, match="diverged"):
            loop.train(config(data, **broken), resume=resume, reporter=QUIET)
    saved = [path.stem for path in state.checkpoints(data / "run" / "checkpoints")]
    assert saved[0] == "step-00000001"
    assert not (data / "run" / "result.json").exists()
    assert not (data / "run" / "adapter").exists()


def test_a_config_has_no_adapter_which_is_told(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever trained by it might take the base model's answers for those of the run."""
    monkeypatch.setattr("lowmem_ft.planner.solver.make_plan", lambda config: RunFolder(planned).plan())
    with pytest.warns(UserWarning, match="this is the base model.*give its folder, or --adapter"):
        assert open_run(planned / "config.yaml", [], None)[2] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_run(planned / "config.yaml", [], "none")


def test_training_goes_on_from_a_saved_adapter(data: Path) -> None:
    first = loop.train(config(data, "first"), reporter=QUIET)
    second = loop.train(config(data, "second", adapter={"init": str(first.adapter)}), reporter=QUIET)
    assert exact(second)[0]["eval_loss"] == first.eval_loss


def test_fields_of_a_run_survive_its_result_file(data: Path) -> None:
    run = loop.train(config(data, train={"steps": 1}), reporter=QUIET)
    console = Console(file=io.StringIO(), width=400)
    again = loop.train(config(data, train={"steps": 9}), resume=True, reporter=Reporter(console=console))
    assert "nothing to do; `adapter.init=" in console.file.getvalue()  # type: ignore[attr-defined]
    assert dataclasses.asdict(again) == dataclasses.asdict(run)


@pytest.mark.parametrize("content", [None, "{\n", "[" * 9999])
def test_metrics_that_cannot_be_read_are_told(data: Path, content: str | None) -> None:
    run = loop.train(config(data, train={"steps": 1}), reporter=QUIET)
    (run.folder / "metrics.jsonl").unlink()
    if content is None:
        (run.folder / "metrics.jsonl").mkdir()
    else:
        (run.folder / "metrics.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be read[\s\S]*metrics\.jsonl"):
        list(run.metrics)


def test_a_run_that_memory_stops_leaves_a_checkpoint_and_loses_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory once in step 2, and in step 3 always, until more of it is there."""
    # nothing to retreat to that sums in another order
    smallest = {"micro_batch_tokens": 64, "loss_chunk_tokens": 32, "activations": "recompute"}
    settings = {"policy": smallest, "train": {"steps": 3, "tokens_per_step": 128}, "data": {"eval": None}}
    whole = loop.train(config(data, "whole", **settings), reporter=QUIET)
    original, calls = recovery.sum_gradients, itertools.count(1)

    def gradients(*args: Any) -> Any:
        found = original(*args)
        if (call := next(calls)) == 2 or call > 3:
            raise torch.OutOfMemoryError("at the end, when random numbers have been drawn")
        return found

    monkeypatch.setattr(recovery, "sum_gradients", gradients)
    with pytest.raises(BudgetError, match="no safer policy left") as raised:
        loop.train(config(data, "stopped", **settings), reporter=QUIET)
    wanted = "raise budget.memory, and go on from the checkpoint of step 2 with --resume; or lower data.seq_len"
    assert f"{wanted} or adapter.rank, and start over in another output folder" in str(raised.value)
    assert [path.stem for path in state.checkpoints(data / "stopped" / "checkpoints")][-1] == "step-00000002"
    monkeypatch.undo()
    resumed = loop.train(config(data, "stopped", **settings), resume=True, reporter=QUIET)
    assert exact(resumed) == exact(whole)
    assert [line["step"] for line in resumed.metrics if "repeated" in line] == [2]
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_a_full_disk_stops_leaves_a_checkpoint_and_loses_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of a step with longer rows than any before want more room than there is."""
    texts = ["short"] * 7 + ["long " * 40]
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings: dict[str, Any] = {
        "policy": {"micro_batch_tokens": 64, "activations": "offload"},
        "train": {"steps": 8, "tokens_per_step": 8, "save_every": 8},
        "data": {"eval": None, "packing": False},
    }
    whole = loop.train(config(data, "whole", **settings), reporter=QUIET)
    longer = next(line["step"] for line in whole.metrics if line["tokens"] > 10)
    assert longer > 1, "else this test shows nothing"

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: patch.setattr("os.posix_fallocate", full))
        with pytest.raises(LowMemError, match="No space left for inputs of blocks") as raised:
            loop.train(config(data, "stopped", **settings), reporter=QUIET)
    assert f"recompute, and go on from the checkpoint of step {longer - 1} with --resume" in str(raised.value)
    resumed = loop.train(config(data, "stopped", **settings), resume=True, reporter=QUIET)
    assert exact(resumed) == exact(whole)


def test_an_evaluation_that_memory_stopped_is_done_when_the_run_goes_on(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.evaluate, itertools.count()

    def evaluate(*args: Any) -> Any:
        if next(calls) == 1:
            raise NoSaferPolicyError("no safer policy left", fix="raise it")
        return original(*args)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    settings = config(data, train={"steps": 2, "eval_every": 1})
    with pytest.raises(NoSaferPolicyError, match="checkpoint of step 1"):
        loop.train(settings, reporter=QUIET)
    run = loop.train(settings, resume=True, reporter=QUIET)
    assert [line["step"] for line in run.metrics if "eval_loss" in line] == [0, 1, 2]


@pytest.mark.parametrize("times", [1, 2, 9])
def test_memory_that_runs_out_while_files_are_written(data: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best weights of step 1 are written again; where that does not help, too, when the run goes on."""
    settings = {"train": {"steps": 2, "eval_every": 1, "save_every": 1}}
    whole = loop.train(config(data, "whole", **settings), reporter=QUIET)
    write_file, calls = state.write_file, itertools.count(1)

    def failing(*args: Any) -> None:
        if next(calls) <= times:
            raise OSError(errno.ENOMEM, "no memory")
        write_file(*args)

    monkeypatch.setattr(state, "write_file", failing)
    run = config(data, "run", **settings)
    if times == 1:
        assert exact(loop.train(run, reporter=QUIET)) == exact(whole)
    else:
        newest = "the last checkpoint" if times == 9 else "the checkpoint of step 1"
        with pytest.raises(NoSaferPolicyError, match=f"go on from {newest} with --resume"):
            loop.train(run, reporter=QUIET)
        monkeypatch.undo()
        assert exact(loop.train(run, resume=True, reporter=QUIET)) == exact(whole)
    folders = [RunFolder(data / name) for name in ("run", "whole")]
    best, expected = (load_file(folder.best) for folder in folders)
    assert all(torch.equal(best[name], expected[name]) for name in expected)
    assert len(list(folders[0].checkpoints.iterdir())) == 3
