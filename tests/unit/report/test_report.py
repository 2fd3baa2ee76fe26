"""Progress, tables and the run page."""

import dataclasses
import io
import json
import re
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_ft.core.run import Run
from lowmem_ft.report import progress
from lowmem_ft.report.card import model_card
from lowmem_ft.report.page import run_page
from lowmem_ft.report.progress import Reporter
from lowmem_ft.report.tables import measured_table, plan_table
from tests.unit.core.test_plan import PLAN


def console(*, terminal: bool, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def text(reporter: Reporter) -> str:
    assert isinstance(reporter.console.file, io.StringIO)
    return reporter.console.file.getvalue()


def test_piped_progress_is_lines_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    reporter = Reporter(console=console(terminal=False))
    with reporter.task("Training", unit="steps") as update:
        for done in range(1, 31):
            now += 1.0
            update(done, 30, f"loss {done}")
    lines = text(reporter).splitlines()
    assert lines[0] == "Training: 1/30 steps, 1.0/s, 29 s left loss 1"
    assert lines[1] == "Training: 11/30 steps, 1.0/s, 19 s left loss 11"
    assert len(lines) == 3


def test_what_was_done_before_says_nothing_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    reporter = Reporter(console=console(terminal=False))
    with reporter.task("Training", unit="steps", done=500) as update:
        update(500, 600)
        now += 2.0
        update(501, 600)
    assert text(reporter) == "Training: 501/600 steps, 0.5/s, 198 s left\n"


def test_a_terminal_tells_the_rate_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed steps take minutes each."""
    now = 100.0
    screen = console(terminal=True)
    monkeypatch.setattr(screen, "get_time", lambda: now)
    with Reporter(console=screen).task("Training", unit="steps", done=7) as update:
        for done in range(7, 10):
            update(done, 10)
            now += 50.0
    assert "9/10 steps, 0.02/s 0:00:50" in text(Reporter(console=screen)), "the time that is left, too"


def test_a_task_under_a_second_prints_no_line() -> None:
    reporter = Reporter(console=console(terminal=False))
    with reporter.task("Loading", unit="B") as update:
        update(5, 10)
    assert text(reporter) == ""


def test_terminal_progress_shows_amounts() -> None:
    reporter = Reporter(console=console(terminal=True))
    with reporter.task("Loading", unit="B") as update:
        update(2**20, 2**21)
    assert "1.00 MiB/2.00 MiB" in text(reporter)


def test_quiet_says_nothing() -> None:
    reporter = Reporter(console=console(terminal=False), quiet=True)
    reporter.say("hello")
    with reporter.task("Loading", unit="B") as update:
        update(1, 1)
    assert text(reporter) == ""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    lines = [
        {"step": 0, "eval_loss": 4.5},
        {"step": 1, "loss": 5.0, "tokens_per_second": 100.0},
        {"step": 2, "loss": 4.0, "tokens_per_second": 2920.0},
        {"step": 2, "eval_loss": 3.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run(folder=tmp_path, plan=PLAN, status="finished", step=2, eval_loss=3.5, measured={"process_peak_bytes": 2})


def test_tables_hold_planned_and_measured(run: Run) -> None:
    reporter = Reporter(console=console(terminal=False))
    reporter.say(plan_table(PLAN))
    reporter.say(measured_table(run))
    for words in ("6 keep + 2 recompute", "process peak", "67%", "1,510"):
        assert words in text(reporter)


@pytest.mark.parametrize(
    ("kind", "packing", "late"), [("cpu", False, True), ("cpu", True, False), ("cuda", False, False)]
)
def test_tables_say_when_a_process_takes_what_is_planned(run: Run, kind: str, packing: bool, late: bool) -> None:
    """Three steps of short rows took 38% less than a plan that counts what a CPU compiles for every length."""
    measured = {"allocated_peak_bytes": 1, "process_peak_bytes": 2}
    plan = dataclasses.replace(
        PLAN, device=PLAN.device | {"kind": kind}, config={"data": {"packing": packing}}, measured=measured
    )
    reporter = Reporter(console=console(terminal=False))
    reporter.say(plan_table(plan))
    reporter.say(measured_table(dataclasses.replace(run, plan=plan)))
    assert text(reporter).count("process peak, once rows had every length") == (2 if late else 0)
    assert text(reporter).count("once") == (2 if late else 0)


def test_piped_rows_of_tables_are_lines_of_any_length() -> None:
    reporter = Reporter(console=console(terminal=False, width=80))
    reporter.say(plan_table(PLAN))
    lines = text(reporter).splitlines()
    assert f" policy   {PLAN.policy.describe()}" in lines
    assert all(line == line.rstrip() for line in lines)
    terminal = Reporter(console=console(terminal=True, width=80))
    terminal.say(plan_table(PLAN))
    assert max(map(len, text(terminal).splitlines())) == 80
    narrow = Reporter(console=console(terminal=True, width=32))
    narrow.say(plan_table(PLAN))
    assert "…" not in text(narrow), "nothing is cut"


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_are_drawn_with_what_the_encoding_has(run: Run, terminal: bool) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    reporter = Reporter(console=Console(file=file, force_terminal=terminal, width=100, color_system=None))
    reporter.say(plan_table(PLAN))
    reporter.say(measured_table(run))
    file.seek(0)
    assert "\\u" not in file.read()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_told_is_shown_as_it_is(terminal: bool) -> None:
    reporter = Reporter(console=console(terminal=terminal))
    reporter.say("written to runs/[bold]/:cat:")
    assert text(reporter) == "written to runs/[bold]/:cat:\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_names_tell_a_terminal_to_do_is_written_out(terminal: bool) -> None:
    reporter = Reporter(console=console(terminal=terminal))
    table = Table("column")
    table.add_row(Text("a\x1b]0;title\x07"))
    reporter.say("file \x1b[31m\x9b5n\tb")
    reporter.say(table)
    with reporter.task("Reading \x1b[2J.jsonl", unit="B") as update:
        update(1, 2)
    assert "file \\x1b[31m\\x9b5n" in text(reporter)
    assert "a\\x1b]0;title" in text(reporter)
    assert not re.search(r"\x1b(\]|\[31m|\[2J)", text(reporter))  # the bar's own are others


def test_the_page_is_self_contained_and_escapes(run: Run) -> None:
    page = run_page(run)
    assert page.count("<polyline") == 2
    assert "http" not in page
    assert "finished" in page
    (run.folder / "metrics.jsonl").write_text("")
    assert "No step was recorded" in run_page(run)


@pytest.mark.parametrize("tell", [run_page, model_card, lambda run: measured_table(run).row_count])
def test_what_tells_of_a_run_takes_no_memory_for_each_step(run: Run, tell: Callable[[Run], object]) -> None:
    """It is made while the model is in memory, and a plan knows of no number of steps."""
    tell(run)  # what it loads and looks up once
    line = {"loss": 4.0, "tokens": 256, "lr": 2e-4, "tokens_per_second": 100.0, "device_peak_bytes": 2**30}
    with (run.folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": step, **line}) + "\n" for step in range(1, 5001))
    size = (run.folder / "metrics.jsonl").stat().st_size
    tracemalloc.start()
    try:
        tell(dataclasses.replace(run, step=5000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size


def test_the_plot_of_a_long_run_keeps_its_highest_and_lowest_points(run: Run) -> None:
    losses = [2.0] * 5000
    losses[1234], losses[4321] = 9.5, 0.25
    with (run.folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": at + 1, "loss": loss}) + "\n" for at, loss in enumerate(losses))
    page = run_page(dataclasses.replace(run, step=5000))
    assert "9.500" in page
    assert "0.250" in page
    assert len(page) < 30_000


def test_where_nobody_reads_the_log_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    reporter = Reporter()
    with reporter.task("Training", unit="steps") as update:
        monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
        update(1, 2)
    reporter.say("done")
    assert reporter.quiet
