"""Every notebook runs from top to bottom without a network and without a warning, and shows what its prose says."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from typer.testing import CliRunner

from lowmem_ft.cli.app import app
from lowmem_ft.planner.profile import load_profile
from tests.unit.core.test_plan import PLAN

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def notebook(stem: str) -> Path:
    (path,) = (path for path in NOTEBOOKS if path.stem == stem)
    return path


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The outputs of the notebook's cells by the cells' ids, run in `folder` by the Python that runs this test, on the
    model that comes with the package."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # as the workers of the test run, which share the cores
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where Jupyter's widgets are not installed
        "HF_HOME": str(folder / "hub"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # for `lowmem-ft`
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = read(path)
    for cell in notebook.cells:
        cell.source = cell.source.replace("DEMO = False", "DEMO = True")
    # without folders to look in, `python3` is the kernel of this environment, not one that the user has registered
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    assert manager.kernel_spec is not None
    assert manager.kernel_spec.argv[0] == sys.executable
    resources = {"metadata": {"path": str(folder)}}
    # what a busy machine is late to send would be left out
    NotebookClient(notebook, km=manager, timeout=600, iopub_timeout=600, resources=resources).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for name, shown in outputs.items():
        assert not [out for out in shown if out.output_type == "error" or out.get("name") == "stderr"], name
    return outputs


def text_of(outputs: list[Any]) -> str:
    """What a reader sees of a cell's outputs: streams, and the text inside HTML, a space between any two tags."""
    # a kernel sends what was printed whenever it comes to it, also in the middle of a line
    shown = [out.get("text") or "\n" + (out.data.get("text/html") or out.data["text/plain"]) + "\n" for out in outputs]
    return re.sub(r"\s*(<[^>]*>\s*)+", " ", "".join(shown))


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "dry_run", "finetune_7b_colab_t4", "merge_and_export", "preference_tuning",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert not cell.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_installs_only_where_it_is_missing(path: Path) -> None:
    """What is written for Colab begins with it; the dry run is read where the package is."""
    first = next(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert ("%pip install" in first) == (path.stem != "dry_run")
    assert ("DEMO = False" in first) == (path.stem != "dry_run")


def test_the_memory_of_a_t4_is_that_of_its_profile() -> None:
    memory = load_profile("colab-t4-16gb").memory_bytes.value
    assert f"A T4 has {memory / 2**30:.1f} GiB of memory" in read(notebook("finetune_7b_colab_t4")).cells[0].source


def test_command_lines_are_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commands in the prose of the dry run pass the command line and the config; their plan is made in the cells.
    Others have theirs in cells."""
    monkeypatch.setattr("lowmem_ft.planner.solver.make_plan", lambda config: PLAN)
    monkeypatch.chdir(tmp_path)
    path = notebook("dry_run")
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    commands = re.findall(r"^lowmem-ft (.*)$", prose, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, command + done.output


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = execute(notebook("dry_run"), tmp_path, monkeypatch)
    html = outputs["table"][0].data["text/html"]
    rows = [[cell.strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in html.split("<tr>")[2:]]
    answers = {(row[0], row[1][:8]): row[2] for row in rows}
    assert answers == {
        ("Qwen3-0.6B", "1.35 GB "): "fits", ("Qwen3-0.6B", "RTX 3060"): "fits", ("Qwen3-0.6B", "RTX 4090"): "fits",
        ("Mistral-7B", "1.35 GB "): "does not fit", ("Mistral-7B", "RTX 3060"): "fits",
        ("Mistral-7B", "RTX 4090"): "fits",
        ("Llama-3.1-8B", "1.35 GB "): "does not fit", ("Llama-3.1-8B", "RTX 3060"): "fits",
        ("Llama-3.1-8B", "RTX 4090"): "fits",
    }  # fmt: skip
    assert [row[-1] for row in rows if row[1].startswith("RTX 4090")] == ["28 of 28", "32 of 32", "32 of 32"]
    peaks = {row[0]: float(row[3].split()[0]) for row in rows if row[2] == "does not fit"}
    assert peaks["Llama-3.1-8B"] == pytest.approx(peaks["Mistral-7B"], rel=0.01), "as the prose has it"

    assert "fits rtx-3060-12gb: peak" in text_of(outputs["one-plan"])
    refused = text_of(outputs["refused"])
    assert "does not fit rtx-3060-12gb: peak" in refused
    assert "What would make it fit change peak tokens/s data.seq_len=1024" in refused
    changed = text_of(outputs["changed"])
    assert changed.startswith("data.seq_len=1024")
    assert " fits rtx-3060-12gb: peak" in changed
    assert "Nothing fits the budget." in text_of(outputs["error"])
    assert "at least 1." in text_of(outputs["error"])
    assert "any one of these fits: data.seq_len=1024" in text_of(outputs["error"])
    hours = re.findall(r"(\S+) +RTX (?:3060|4090).* ([\d.]+) hours +([\d.]+)", text_of(outputs["hours"]))
    assert [name for name, *_ in hours] == ["Qwen3-0.6B"] * 2 + ["Mistral-7B"] * 2 + ["Llama-3.1-8B"] * 2
    assert all(float(cost) > 0 for *_, cost in hours)
    assert "What fills the memory" in outputs["page"][0].data["text/html"]


def test_finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = execute(notebook("finetune_7b_colab_t4"), tmp_path, monkeypatch)
    assert text_of(outputs["plan"]).startswith("float16 fits")
    assert "colab-t4-16gb" in text_of(outputs["plan"])
    lines = re.findall(r"step (\d+): held-out loss ([\d.]+), token accuracy ([\d.]+)%", text_of(outputs["results"]))
    assert [step for step, *_ in lines] == ["0", "2", "4"]
    assert float(lines[-1][1]) < float(lines[0][1])
    assert "Answers to held-out prompts" in text_of(outputs["results"])
    assert text_of(outputs["ask"]).strip()
    assert text_of(outputs["resume"]).strip().endswith("finished 4 runs/t4/adapter")
    assert '"compute_dtype": "float16"' in (tmp_path / "runs" / "t4" / "plan.json").read_text()


def test_merge_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = execute(notebook("merge_and_export"), tmp_path, monkeypatch)
    for name in ("merge", "gguf", "vllm"):
        assert "KL" in text_of(outputs[name]), name
    assert text_of(outputs["use"]).strip()
    for name in ("merged", "model.safetensors", "tokenizer.json", "Modelfile", "adapter_config.json"):
        assert name in text_of(outputs["files"])


def test_preference_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = execute(notebook("preference_tuning"), tmp_path, monkeypatch)
    preview = text_of(outputs["preview"])
    assert re.search(r"format +preference \(400\)", preview)
    assert all(f":1 {answer} (what is not in the loss" in preview for answer in ("chosen", "rejected"))
    assert text_of(outputs["plan"]).startswith("float16 fits")
    assert "colab-t4-16gb" in text_of(outputs["plan"])
    form = r"step (\d+): held-out loss ([\d.]+), accuracy ([\d.]+)%, rewards (\S+) and (\S+), margin (\S+)"
    lines = re.findall(form, text_of(outputs["rewards"]))
    assert [step for step, *_ in lines] == ["0", "4", "8"]
    assert lines[0][1:] == ("0.693", "0.0", "+0.000", "+0.000", "+0.000"), "as the prose has it"
    assert float(lines[-1][1]) < 0.69
    assert float(lines[-1][-1]) > 0
    evaluated = re.search(r"^eval_loss ([\d.]+)", text_of(outputs["evaluate"]), re.MULTILINE)
    assert evaluated
    assert float(evaluated[1]) == pytest.approx(min(float(loss) for _, loss, *_ in lines), abs=0.001)
    # where <file> may stand, which is no tag; on a slow machine the bar of loading is shown beside it
    said = "".join(out.text for out in outputs["ask"] if out.output_type == "stream")
    answers = re.search(r"^before: (.*)^after: (.*)", said, re.MULTILINE | re.DOTALL)
    assert answers
    assert answers[1].strip() != answers[2].strip()
    others = re.findall(r"(\w+): held-out loss [\d.]+, margin [+-][\d.]+", text_of(outputs["others"]))
    assert others == ["orpo", "kto"]
