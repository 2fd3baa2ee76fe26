"""That stopping and resuming change nothing, and what a run does not go on with."""

import io
import json
import os
import shutil
import signal
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lowmem_ft.assemble import load_tokenizer
from lowmem_ft.cli.runs import open_run
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import CheckpointError, ConfigError, LowMemError
from lowmem_ft.core.files import writing_prefix
from lowmem_ft.core.run import Run
from lowmem_ft.data.store import writes_date
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.report.progress import Reporter
from lowmem_ft.runtime import state
from lowmem_ft.trainer import loop
from lowmem_ft.trainer.folder import RunFolder
from lowmem_ft.trainer.identity import held_out_identity, same_held_out
from tests.assets import ASSETS, write_pairs, write_share
from tests.unit.trainer.runs import QUIET, at_step, config, exact


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing has stopped, on what `data` has, too."""
    folder = tmp_path_factory.mktemp("whole")
    write_share(folder, train=60, eval=8)
    return loop.train(config(folder), reporter=QUIET)


def test_a_resumed_run_equals_an_uninterrupted_one(data: Path, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole.status == "finished"
    assert exact(whole)[0].keys() == {"step", "eval_loss", "eval_accuracy"}
    assert exact(whole)[0]["eval_loss"] == pytest.approx(5.0, abs=0.5)
    assert exact(whole)[0]["eval_accuracy"] < exact(whole)[-1]["eval_accuracy"] < 1
    assert [line["step"] for line in whole.metrics if "eval_loss" in line] == [0, 3, 6]
    assert whole.eval_loss is not None
    assert whole.eval_loss < exact(whole)[0]["eval_loss"]

    at_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGINT))
    settings = config(data, "stopped")
    stopped = loop.train(settings, reporter=QUIET)
    assert (stopped.status, stopped.step) == ("interrupted", 4)
    torch.manual_seed(999)  # whatever a new process would start from
    resumed = loop.train(settings, resume=True, reporter=QUIET)
    assert resumed.status == "finished"
    assert exact(resumed) == exact(whole)
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    last = [state.read_checkpoint(state.checkpoints(run.folder / "checkpoints")[-1]) for run in (resumed, whole)]
    assert all(torch.equal(last[0][0][name], last[1][0][name]) for name in last[1][0])
    assert last[0][1] == last[1][1]


def test_a_run_resumes_under_another_plan(data: Path, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a smaller budget, with its blocks streamed and recomputed: to the same bits, as micro-batches are the same."""
    at_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGINT))
    stopped = loop.train(config(data, "stopped"), reporter=QUIET)
    assert stopped.status == "interrupted"
    below = {"activations": "recompute", "resident_blocks": 0, "stream_embeddings": "both"}
    moved = config(data, "stopped", policy=below, budget={"memory": "2GiB"})
    resumed = loop.train(moved, resume=True, reporter=QUIET)
    assert (stopped.plan.policy.streamed_blocks, resumed.plan.policy.streamed_blocks) == (0, 8)
    assert exact(resumed) == exact(whole)
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_killed_between_checkpoints_resumes_from_the_last_one(
    data: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 4, sys.exit)
    with pytest.raises(SystemExit):
        loop.train(config(data, "killed"), reporter=QUIET)
    with (data / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = loop.train(config(data, "killed"), resume=True, reporter=QUIET)
    assert exact(resumed) == exact(whole)


def test_a_letter_that_a_killed_run_had_half_written_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 2}\n')
    whole = '{"step": 2, "answer": "é"}\n'.encode()
    folder.samples.write_bytes(whole + whole[: whole.index(b'"}') - 1])
    folder.forget_after(2)
    assert folder.samples.read_bytes() == whole


def test_to_forget_steps_takes_no_memory_for_each_that_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": 4.0, "answer": "word " * 20}) + "\n" for step in range(2000)]
    folder.metrics.write_text("".join(lines))
    tracemalloc.start()
    try:
        folder.forget_after(1500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert folder.metrics.read_text() == "".join(lines[:1501])
    assert peak < folder.metrics.stat().st_size / 2


def test_resume_without_a_checkpoint_starts_over_and_a_finished_run_stays(data: Path) -> None:
    settings = config(data, train={"steps": 1})
    first = loop.train(settings, resume=True, reporter=QUIET)
    before = (first.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    again = loop.train(settings, resume=True, reporter=QUIET)
    assert (again.status, again.eval_loss, again.measured) == ("finished", first.eval_loss, first.measured)
    assert (first.adapter / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds a run already"):
        loop.train(settings, reporter=QUIET)


@pytest.mark.parametrize("finishes", [False, True])
def test_a_run_goes_on_from_where_another_process_has_come_to_meanwhile(
    data: Path, finishes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler starts a job anew while the one before, which it told to end, still works on its last step."""
    few: dict[str, Any] = {"steps": 2, "save_every": 1}
    settings, load, before = config(data, train=few), loop.load_examples, []
    console = Console(file=io.StringIO(), width=200)

    def another(*args: Any) -> Any:
        monkeypatch.setattr(loop, "load_examples", load)
        own = few if finishes else {**few, "max_time": 0.001}
        before.append(loop.train(config(data, train=own), resume=True, reporter=QUIET))
        return load(*args)

    monkeypatch.setattr(loop, "load_examples", another)
    run = loop.train(settings, resume=True, reporter=Reporter(console=console))
    assert [it.status for it in (*before, run)] == ["finished" if finishes else "out_of_time", "finished"]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("is finished: nothing to do" if finishes else "Going on from step 1.") in said
    assert [line["step"] for line in run.metrics if "loss" in line] == [1, 2]


def test_a_run_goes_on_from_another_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "model").symlink_to(ASSETS / "doclm-7m")
    paths = {"train": "train.jsonl", "eval": "eval.jsonl", "cache": "tokens"}
    monkeypatch.chdir(data)
    begun = config(Path(), "run", model="model", data=paths, train={"max_time": 0.001})
    assert loop.train(begun, reporter=QUIET).status == "out_of_time"
    (data / "elsewhere").mkdir()
    monkeypatch.chdir(data / "elsewhere")
    again = RunConfig.load("../run/config.yaml", ["train.max_time=null", "train.steps=2"])
    assert loop.train(again, resume=True, reporter=QUIET).status == "finished"
    assert open_run(Path("../run"), [], None)[0].model == str(data / "model")
    assert not any((data / "elsewhere").iterdir())


DEEP = pytest.param("[" * 100_000, id="nested")  # for which `json` has a RecursionError


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"plan": []}', '{"schema": 1, "policy": {}}', "3", "\\xff", DEEP])
def test_damaged_files_of_a_run_are_told(data: Path, text: str) -> None:
    """Also those of other programs, with the same names."""
    folder = RunFolder(data / "run")
    folder.write("config.yaml", config(data).to_yaml())
    folder.finished.write_text(text)
    with pytest.raises(CheckpointError, match="result cannot be read"):
        loop.train(config(data), resume=True, reporter=QUIET)
    (folder.path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match="plan cannot be read"):
        open_run(folder.path, [], "none")
    assert folder.plan() is None


def test_what_killed_processes_were_writing_goes_when_the_run_goes_on(data: Path) -> None:
    folder, dead, alive = RunFolder(data / "run"), 2**22 + 1, os.getppid()
    here = writing_prefix(".saving-").removesuffix(f"{os.getpid()}-")
    theirs = folder.checkpoints / f"{here}{alive}-x"
    for scratch in (
        theirs,
        folder.checkpoints / f"{here}{dead}-x",
        folder.checkpoints / f"{here}{os.getpid()}-x",  # in containers a new process often has the number
        folder.checkpoints / f".saving-other-{alive}-x",  # of the container before, say
        folder.adapter / f"{here}{dead}-x",
    ):
        scratch.mkdir(parents=True)
        (scratch / "half.safetensors").write_text("half")
    for text in (folder.path / f".plan.json.{dead}.tmp", folder.adapter / f".README.md.{dead}.tmp"):
        text.write_text("half")
    loop.train(config(data, train={"steps": 1}), resume=True, reporter=QUIET)
    assert list(folder.path.rglob(".*")) == [theirs]


def test_a_killed_process_leaves_nothing_beside_its_checkpoints(data: Path) -> None:
    folder = RunFolder(data / "run")
    child = os.fork()
    if not child:

        def killed(path: Path, tensors: Any, metadata: Any) -> None:
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            state.write_file = killed
            state.write_tensors(folder.checkpoints / "step-00000001.safetensors", {"a": torch.zeros(3)})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(folder.checkpoints.iterdir())
    loop.train(config(data, train={"max_time": 0.001}), resume=True, reporter=QUIET)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000001.safetensors"]


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"adapter": {"rank": 8}}, "adapter.rank 8"),
    "alpha": ({"adapter": {"alpha": 64}}, "adapter.alpha 64"),
    "rslora": ({"adapter": {"rslora": True}}, "adapter.rslora True"),
    "precision": ({"quant": {"bits": 8}}, "quant int8"),
    "data": ({"data": {"train": "eval.jsonl"}}, "with other data"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_run_with_other_settings_is_refused_and_changes_nothing(data: Path, what: str) -> None:
    stopped = config(data, train={"max_time": 0.001})
    loop.train(stopped, reporter=QUIET)
    before = {path: path.read_bytes() for path in (data / "run").rglob("*") if path.is_file()}
    sections, said = OTHER[what]
    if what == "data":
        sections = {"data": {"train": str(data / "eval.jsonl")}}
    with pytest.raises(LowMemError, match=said):
        loop.train(config(data, **sections), resume=True, reporter=QUIET)
    assert {path: path.read_bytes() for path in (data / "run").rglob("*") if path.is_file()} == before


def test_a_run_with_another_base_is_refused(data: Path) -> None:
    loop.train(config(data, train={"max_time": 0.001}), reporter=QUIET)
    other = data / "other"
    shutil.copytree(ASSETS / "doclm-7m", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: it + 1e-2 for name, it in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowMemError, match="another base"):
        loop.train(config(data, model=str(other)), resume=True, reporter=QUIET)
    shutil.copytree(ASSETS / "doclm-7m", data / "same")  # where it lies does not matter
    assert loop.train(config(data, model=str(data / "same")), resume=True, reporter=QUIET).status == "finished"


def test_another_adapter_to_begin_with_is_refused(data: Path) -> None:
    """By what it is, not by where it lies; a checkpoint of before it was told goes on."""
    for name, steps in (("first", 1), ("second", 2)):
        loop.train(config(data, name, train={"steps": steps}, data={"eval": None}), reporter=QUIET)

    def begun_with(folder: str, **train: Any) -> RunConfig:
        return config(data, adapter={"init": str(data / folder)}, data={"eval": None}, train={"steps": 2, **train})

    loop.train(begun_with("first", max_time=0.001), reporter=QUIET)
    said = "another base, adapter or objective"
    with pytest.raises(CheckpointError, match=rf"{said}[\s\S]*adapter\.init \(content\) \w{{16}}\n"):
        loop.train(begun_with("second"), resume=True, reporter=QUIET)
    with pytest.raises(CheckpointError, match=said):  # begun anew
        loop.train(config(data, data={"eval": None}), resume=True, reporter=QUIET)
    shutil.move(data / "first", data / "moved")
    settings = data / "moved" / "adapter" / "adapter_config.json"
    text = settings.read_text()
    settings.write_text(text.replace('"lora_alpha": 32', '"lora_alpha": 64'))
    assert settings.read_text() != text
    with pytest.raises(CheckpointError, match=said):
        loop.train(begun_with("moved"), resume=True, reporter=QUIET)
    settings.write_text(text)
    assert loop.train(begun_with("moved"), resume=True, reporter=QUIET).status == "finished"


def test_another_objective_is_refused(data: Path) -> None:
    write_pairs(data, train=12, eval=0)
    pairs = {"train": str(data / "pairs-train.jsonl"), "eval": None}
    loop.train(config(data, data=pairs, train={"max_time": 0.001, "objective": "dpo"}), reporter=QUIET)
    for objective, preference in (("ipo", {}), ("dpo", {"beta": 0.5})):
        other = config(data, data=pairs, train={"objective": objective}, preference=preference)
        with pytest.raises(LowMemError, match=r"objective ipo|preference.beta 0\.5"):
            loop.train(other, resume=True, reporter=QUIET)


def test_with_other_held_out_data_the_best_so_far_is_forgotten(data: Path) -> None:
    loop.train(config(data, train={"max_time": 0.001, "eval_every": 1, "lr": 1e-5}), reporter=QUIET)
    assert RunFolder(data / "run").best.exists()
    other = {"data": {"eval": str(data / "train.jsonl")}, "train": {"eval_every": 6}}
    run = loop.train(config(data, **other), resume=True, reporter=QUIET)
    assert run.eval_loss == run.metrics[-1]["eval_loss"]
    assert run.metrics[-1]["step"] == 6
    assert [line["step"] for line in run.evaluations] == [1, 6], "on the new data, from the first step that has it"
    assert "held-out loss at step 1" in (run.adapter / "README.md").read_text()


def test_held_out_data_with_as_many_tokens_but_other_ones_is_another(data: Path) -> None:
    loop.train(config(data, train={"max_time": 0.001}), reporter=QUIET)
    (newest,) = state.checkpoints(data / "run" / "checkpoints")
    before = state.read_checkpoint(newest)[1]["held_out"]
    held_out = data / "eval.jsonl"
    held_out.write_text(held_out.read_text().replace("gethostbyname(3)", "gethostbyname(5)"))
    run = loop.train(config(data, train={"steps": 2}), resume=True, reporter=QUIET)
    (*_, newest) = state.checkpoints(data / "run" / "checkpoints")
    after = state.read_checkpoint(newest)[1]["held_out"]
    assert before.split()[0] == after.split()[0], "as many tokens"
    assert before.split()[1] != after.split()[1]
    assert [line["step"] for line in run.evaluations] == [1, 2]


def test_what_is_the_same_held_out_data(data: Path) -> None:
    """In how many files it lies does not count; nor does what tells less: a checkpoint of before content was told, a
    template that writes the date."""
    lines = (data / "eval.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:3]), ("second", lines[3:])):
        (data / f"{name}.jsonl").write_text("".join(part))
    parts = [str(data / f"{name}.jsonl") for name in ("first", "second")]
    told = {}
    for name, source in (("one", str(data / "eval.jsonl")), ("two", parts)):
        settings = config(data, data={"eval": source})
        examples = loop.load_examples(settings, QUIET)[1]
        told[name] = held_out_identity(settings, examples)
        told[f"{name} dated"] = held_out_identity(settings, examples, dated=True)
    assert told["one"] == told["two"]
    assert told["one dated"] == str(told["one"]).split()[0]
    assert same_held_out(told["one dated"], told["one"])
    assert not same_held_out(None, told["one"])
    assert not same_held_out("0123456789abcdef", told["one"])


@pytest.mark.parametrize(("template", "dated"), [("{{ strftime_now('%d') }}", True), ("{{ messages }}", False)])
def test_templates_that_write_the_date(template: str, dated: bool) -> None:
    tokenizer = load_tokenizer(Checkpoint.open(ASSETS / "doclm-7m"))
    assert tokenizer is not None
    tokenizer.chat_template = template
    assert writes_date(tokenizer) is dated
    assert not writes_date(None)


def test_the_best_of_steps_that_are_done_again_is_forgotten(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are done with another learning rate, its weights are of no step of the run."""
    settings: dict[str, Any] = {"eval_every": 1, "save_every": 2, "steps": 4}
    at_step(monkeypatch, 4, sys.exit)
    with pytest.raises(SystemExit):  # with the weights of step 3 as the best, and the checkpoint of step 2
        loop.train(config(data, train=settings), reporter=QUIET)
    monkeypatch.undo()
    again = config(data, train={**settings, "lr": 10.0, "schedule": "constant"})
    run = loop.train(again, resume=True, reporter=QUIET)
    losses = {line["step"]: line["eval_loss"] for line in run.metrics if "eval_loss" in line}
    assert losses[2] < run.eval_loss == min(losses[3], losses[4])


def test_training_data_with_other_content_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths decide what a step holds. A template that writes the date changes no lengths: that is told."""
    for name, sections in (("same", {}), ("other", {"assistant_only": False})):
        loop.train(config(data, name, train={"max_time": 0.001}), reporter=QUIET)
        before = (data / name / "metrics.jsonl").read_text()
        again = config(data, name, data=sections, train={"steps": 2})
        if sections:
            with pytest.raises(CheckpointError, match="training data is not what it was"):
                loop.train(again, resume=True, reporter=QUIET)
            assert (data / name / "metrics.jsonl").read_text() == before
            monkeypatch.setattr(loop, "writes_date", lambda _: True)
        console = Console(file=io.StringIO(), width=200)
        loop.train(again, resume=True, reporter=Reporter(console=console))
        told = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("Warning: the training data is not what it was" in told) == bool(sections)


def test_a_run_without_a_checkpoint_starts_over_and_says_so(data: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    run = loop.train(config(data, train={"steps": 1}), resume=True, reporter=Reporter(console=console))
    assert run.status == "finished"
    assert "has no checkpoint to go on from: the run starts over" in console.file.getvalue()  # type: ignore[attr-defined]


def test_weights_of_another_dtype_are_no_other_optimizer(data: Path) -> None:
    loop.train(config(data, train={"max_time": 0.001}), reporter=QUIET)
    with pytest.raises(CheckpointError, match="another base, adapter or objective") as caught:
        loop.train(config(data, policy={"compute_dtype": "float32"}), resume=True, reporter=QUIET)
    assert caught.value.given == "dtype of what is trained float32"


def test_a_run_that_ends_where_it_was_stopped_is_evaluated(data: Path) -> None:
    loop.train(config(data, train={"max_time": 0.001}), reporter=QUIET)
    run = loop.train(config(data, train={"steps": 1}), resume=True, reporter=QUIET)
    assert [line["step"] for line in run.metrics if "eval_loss" in line] == [0, 1]
    assert run.eval_loss == run.metrics[-1]["eval_loss"] != run.metrics[0]["eval_loss"]


def test_how_to_learn_may_change(data: Path) -> None:
    """Weight decay, as the learning rate, is the config's."""
    losses = []
    for name, decay in (("none", 0.0), ("much", 100.0)):
        loop.train(config(data, name, train={"max_time": 0.001}), reporter=QUIET)
        run = loop.train(config(data, name, train={"weight_decay": decay, "steps": 2}), resume=True, reporter=QUIET)
        losses.append(run.metrics[-1]["eval_loss"])
    assert losses[0] != losses[1]


def test_a_checkpoint_that_is_another_file_is_told(data: Path) -> None:
    loop.train(config(data, train={"max_time": 0.001, "eval_every": 1}), reporter=QUIET)
    folder = RunFolder(data / "run")
    (newest,) = state.checkpoints(folder.checkpoints)
    shutil.copy(folder.best, newest)
    with pytest.raises(CheckpointError, match="tells nothing of its run"):
        loop.train(config(data), resume=True, reporter=QUIET)


def lose_random_numbers(tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    del tensors["random/cpu"]


def shorten_random_numbers(tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    tensors["random/cpu"] = tensors["random/cpu"][:100].clone()  # those of another PyTorch may be as long as they like


def lose_optimizer(tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    del told["optimizer"]


def list_steps(tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    told["data"]["steps"] = [1]


def say_a_negative_step(tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    told["step"] = told["data"]["steps"] = -5


def say_another_step(tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    told["step"] = told["data"]["steps"] = 10**12


def go_on_with_other_data(tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    told["data"]["steps"] += 1


SPOILT = [lose_random_numbers, shorten_random_numbers, lose_optimizer, list_steps]
SPOILT += [say_a_negative_step, say_another_step, go_on_with_other_data]


@pytest.mark.parametrize("change", SPOILT)
def test_a_checkpoint_that_lacks_something_is_told(
    data: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
) -> None:
    """One of another version, say, whose checksum is right."""
    loop.train(config(data, train={"max_time": 0.001}), reporter=QUIET)
    (newest,) = state.checkpoints(data / "run" / "checkpoints")
    found, told = state.read_checkpoint(newest)
    tensors = {name: found[name].clone() for name in found}
    change(tensors, told)
    state.write_tensors(newest, tensors, {"state": json.dumps(told)})
    with pytest.raises(CheckpointError, match=rf"does not hold what[\s\S]*{newest}[\s\S]*delete it"):
        loop.train(config(data), resume=True, reporter=QUIET)
