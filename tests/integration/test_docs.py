"""Every command, config and script of the manual, in the order of its pages, and of the README's first part, on a model
that stands for the one they name. Only `pip install` is not run: what it names must exist; nor the demo, which has a
test of its own, and what a terminal or the network has a part in."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from lowmem_ft.cli.docs import PAGES, page_text
from tests.assets import ASSETS, write_pairs, write_share
from tests.unit.cli.conftest import command  # noqa: F401 - a fixture

Command = Callable[..., tuple[int, str, str]]
MODEL = "Qwen/Qwen3-0.6B"  # in the pages
STOPS = "train.max_time=3h", "train.max_time=0.01s"  # in the pages, and here, so that a run is stopped
ALONE = ("install", "models", "plan", "profiles")  # need no run of another page
README = "README"
ASKS = ["init", "config.yaml"], ["eval", "runs/first", "--harness", "arc_easy"]  # a terminal; the hub for questions
ROOT = Path(__file__).parents[2]


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Fine-tune your model")[2]
    text = page_text(page) if page != README else readme.partition("\n## ")[0]
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_line(line: str, call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a bash block ends as its comment says."""
    words = shlex.split(line.replace(*STOPS), comments=True)
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(.*)\]", words[2])) <= set(extras), line
        return
    if words == ["lowmem-ft", "demo"] or words[1:] in ASKS:
        return
    if words[0] == "echo":
        said, words = words[1], words[3:]
        monkeypatch.setattr(sys, "stdin", io.StringIO(said + "\n"))
    elif words[:2] == ["lowmem-ft", "chat"]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("What does ls do?\n"))
    assert words[0] == "lowmem-ft", line
    expected = re.search(r"# exit code (\d+)", line)
    code, out, err = call(*words[1:])
    assert code == (int(expected[1]) if expected else 0), f"{line}\n{out}{err}"
    assert "Traceback" not in err
    if "--json" in words:
        json.loads(out)


def test_pages_are_all_listed() -> None:
    folder = Path(str(files("lowmem_ft") / "docs"))
    assert sorted(file.stem for file in folder.iterdir()) == sorted(PAGES)
    for page in PAGES:
        assert page_text(page).startswith("# ")
        assert max(map(len, page_text(page).splitlines())) <= 125, page
        assert {language for language, _ in blocks(page)} <= {"bash", "yaml", "python"}
    assert "\nlowmem-ft docs" not in "".join(text for page in PAGES for _, text in blocks(page))


def test_command(command: Command) -> None:  # noqa: F811
    code, out, _ = command("docs")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(PAGES)
    assert command("docs", "plan") == (0, page_text("plan"), "")
    code, _, err = command("docs", "plna")
    assert code == 2
    assert "did you mean plan?" in err


@pytest.mark.parametrize(
    "pages", [ALONE, [page for page in PAGES if page not in ALONE], [README]], ids=["alone", "runs", "README"]
)
def test_every_command_of_the_pages(
    pages: Sequence[str],
    tmp_path: Path,
    command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lowmem_ft.planner.measure.SECONDS", 0.01)
    write_share(tmp_path, train=60, eval=8)
    write_pairs(tmp_path, train=24, eval=8)
    model = tmp_path / MODEL  # a folder of that name comes before the hub
    shutil.copytree(ASSETS / "doclm-7m", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    for page in pages:
        for language, text in blocks(page):
            if language == "yaml":
                file = tmp_path / text.splitlines()[0].removeprefix("# ").partition(":")[0]
                assert yaml.safe_load(text), page
                file.parent.mkdir(exist_ok=True)
                file.write_text(text)
            elif language == "python":
                (tmp_path / "script.py").write_text(text)
                runpy.run_path(str(tmp_path / "script.py"))
            else:
                for line in text.splitlines():
                    run_line(line, command, monkeypatch)
    if pages == ALONE:
        return
    if pages == [README]:
        assert (tmp_path / "plan.html").exists()
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
        assert json.loads((tmp_path / "runs" / "first" / "result.json").read_text())["status"] == "finished"
        return
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "long" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3], "stopped, and gone on with"
    assert (tmp_path / "runs" / "small" / "samples.jsonl").exists()
