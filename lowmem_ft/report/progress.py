"""How a run tells what it is doing: bars on a terminal, plain lines when piped, nothing when asked to be quiet."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from lowmem_ft.core.printable import printable
from lowmem_ft.core.sizes import format_size

LINE_SECONDS = 10.0  # between two lines of one task when there is no terminal
RATE_SECONDS = 1800.0  # over which a terminal's rate is taken: rich's own 30 s show none of longer steps
WIDE = 10_000  # characters of a line of no terminal, more than any row has


@dataclass(frozen=True, slots=True)
class Printable:
    """What is to be shown, without control characters but rich's own: it may hold text of others."""

    shown: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.shown, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def show(console: Console, text: RenderableType) -> None:
    """Print a message or rich renderable. Without a terminal a row of a table is one line, however long.

    Neither markup nor emoji: what is told may quote a user's data and paths, where [/INST] is no tag of rich.
    """
    shown = Printable(Text(printable(text)) if isinstance(text, str) else text)
    if console.is_terminal:
        console.print(shown, highlight=False)
        return
    file = io.TextIOWrapper(io.BytesIO(), encoding=console.encoding)  # which decides what tables are drawn with
    wide = Console(file=file, width=WIDE, color_system=None, force_jupyter=False)
    with wide.capture() as captured:
        wide.print(shown, highlight=False, soft_wrap=True)
    lines = "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))
    console.print(lines, highlight=False, markup=False, emoji=False, soft_wrap=True)


class Update(Protocol):
    """Tells how far a task is: `done` of `total`, with a short note such as the loss."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


class Log(Console):
    """Standard error. Rich's own would lead standard output nowhere, and end, when whoever reads it goes away."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        raise  # what it is called for


class Reporter:
    """Prints what a run tells. Everything goes to `console`; with `quiet` nothing does."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Log()
        self.quiet = quiet

    def say(self, text: RenderableType) -> None:
        """One message or rich renderable. Where nobody reads the log any more, the work goes on without."""
        if self.quiet:
            return
        try:
            show(self.console, text)
        except OSError:
            if not isinstance(self.console, Log):
                raise
            self.quiet = True

    @contextmanager
    def task(self, name: str, *, unit: str, done: int = 0) -> Iterator[Update]:
        """A piece of work with rate and time left. `unit` is `B` for bytes, else a word in the plural; `done` is what
        was done before, which says nothing of the rate."""
        if self.quiet:
            yield lambda done, total, note="": None
        elif self.console.is_terminal:
            with Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                _Amount(unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
                speed_estimate_period=RATE_SECONDS,
            ) as progress:
                task = progress.add_task(printable(name), total=None, completed=done, note="")
                yield lambda done, total, note="": progress.update(task, completed=done, total=total, note=note)
        else:
            yield _Lines(self.say, name, unit, done)


class _Amount(ProgressColumn):
    """`1.2 GiB/4.5 GiB, 310 MiB/s` or `12/300 steps, 5.2/s`."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(_amount(int(task.completed), int(task.total or 0), task.finished_speed or task.speed, self.unit))


class _Lines:
    """A task told in lines: the first when it has taken a second, then every `LINE_SECONDS`."""

    def __init__(self, say: Callable[[str], None], name: str, unit: str, before: int) -> None:
        self.say, self.name, self.unit, self.before = say, name, unit, before
        self.start = time.monotonic()
        self.next_line = self.start + 1.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if now < self.next_line:
            return
        self.next_line = now + LINE_SECONDS
        rate = (done - self.before) / (now - self.start)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        amount = _amount(done, total, rate, self.unit)
        self.say(f"{self.name}: {amount}{left} {note}".rstrip())


def _amount(done: int, total: int, rate: float | None, unit: str) -> str:
    if unit == "B":
        return f"{format_size(done)}/{format_size(total)}" + (f", {format_size(rate)}/s" if rate else "")
    # steps of minutes have a rate, too
    return f"{done}/{total} {unit}" + (f", {rate:{'.1f' if rate >= 1 else '.2g'}}/s" if rate else "")
