"""`lowmem-ft chat TARGET`: a conversation with a run's model; answers appear as they are generated."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowmem_ft.cli.runs import DeviceOption, assemble_run, on_device, open_run
from lowmem_ft.core.errors import DataError
from lowmem_ft.core.interrupt import first_interrupt
from lowmem_ft.core.printable import for_output
from lowmem_ft.report.progress import Reporter

if TYPE_CHECKING:
    from lowmem_ft.generate import Answer

HELP = "/reset begins anew, /system TEXT sets the system message and begins anew, /exit or end of input ends"
COMMAND = re.compile(r"/[A-Za-z]+")  # a path goes on behind that
NOTES = {
    "length": "cut by --max-new-tokens",
    "positions": "cut: the model has no further positions; /reset begins anew",
    "stopped": "stopped",
}


def chat(
    target: Annotated[Path, typer.Argument(help="A run folder, or a config file.")],
    adapter: Annotated[str | None, typer.Option(help="An adapter folder, or `none`.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of the first answer; each further one takes the next.")
    ] = 0,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per turn on stdout.")] = False,
) -> None:
    """Talk to a run's model: turns from the terminal, or one per line of stdin. Ctrl-C stops an answer."""
    from lowmem_ft.generate import Sampling, converse

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config, made, chosen = open_run(target, on_device(device), adapter)
    reporter = Reporter(quiet=as_json)
    ready = assemble_run(config, made, chosen, reporter)
    ask = sys.stdin.isatty() and not as_json
    if ask:
        reporter.say(HELP)

    def answer(messages: list[dict[str, str]], turn: int) -> Answer:
        with first_interrupt() as stopped:
            return converse(
                ready.model,
                ready.tokenizer,
                messages,
                say=lambda text: None if as_json else print(for_output(text), end="", flush=True),
                stop=lambda: bool(stopped),
                **asdict(replace(sampling, seed=seed + turn) if temperature else sampling),
            )

    start = [{"role": "system", "content": system}] if system else []
    messages, turn = list(start), 0
    for line in _lines(ask):
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            if command == "/system":
                start = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        try:
            if COMMAND.fullmatch(command):
                raise DataError("There is no such command.", given=command, allowed=HELP)
            said = answer(messages, turn)
        except DataError as error:
            if not ask:
                raise
            messages.pop()
            reporter.say(str(error))
            continue
        turn += 1
        messages.append({"role": "assistant", "content": said.text})
        if as_json:
            print(json.dumps({"prompt": line, **_renamed(said)}), flush=True)
            continue
        print(flush=True)
        if said.ended in NOTES:
            reporter.say(f"({NOTES[said.ended]})")


def _renamed(said: Answer) -> dict[str, Any]:
    found = asdict(said)
    return {"answer": found.pop("text"), **found}


def piped_lines() -> Iterator[str]:
    """Lines of stdin that are not empty.

    Raises:
        DataError: they are not UTF-8.
    """
    try:
        for number, raw in enumerate(sys.stdin):
            line = (raw if number else raw.removeprefix("\ufeff")).strip()  # a byte order mark, as some shells send it
            line.encode()  # in some locales Python reads bytes that are no text as halves of surrogate pairs
            if line:
                yield line
    except UnicodeError as error:
        raise DataError("The input is no text.", given=str(error), allowed="UTF-8, one per line") from None


def _lines(ask: bool) -> Iterator[str]:
    """Turns that are not empty, until the input ends."""
    if not ask:
        yield from piped_lines()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and the keys of a line editor
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit ends")
            continue
        except UnicodeDecodeError:
            print("That is no UTF-8.")
            continue
        if line:
            yield line
