"""`lowmem-ft init`: a commented config for a model and data, by asking or by flags."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lowmem_ft.core.commented import commented_yaml
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError, LowMemError
from lowmem_ft.core.files import check_writable, write_text
from lowmem_ft.core.positions import positions_of
from lowmem_ft.core.sizes import parse_size
from lowmem_ft.report.progress import Reporter

METHODS = ("lora", "dora", "rslora")
RANK = 16
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asker:
    """Takes what a flag gave, asks for it on a terminal, or takes what is suggested."""

    asks: bool

    def __call__(self, given: T | None, question: str, suggested: T | None, parse: Callable[[str], T]) -> T:
        if given is not None:
            return given
        if not self.asks:
            assert suggested is not None, "what has no suggestion was asked for or refused before"
            return suggested

        def read(text: str) -> T:
            try:
                return parse(text)
            except (LowMemError, ValueError) as error:  # typer asks again
                raise typer.BadParameter(str(error)) from None

        try:
            answer: T = typer.prompt(question, default=suggested, value_proc=read, err=True)
        except typer.Abort:  # Ctrl-C, or the end of input
            raise typer.Exit(130) from None
        return answer


def init(
    out: Annotated[Path, typer.Argument(metavar="OUT.yaml", help="The file to write.")] = Path("config.yaml"),
    model: Annotated[str | None, typer.Option(help="A model folder or hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Records to train on.")] = None,
    held_out: Annotated[
        str | None, typer.Option("--eval", help="Records to evaluate on, or a share of the others.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Memory of the device, such as 8GiB.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=8, help="Tokens of a sequence.")] = None,
    method: Annotated[str | None, typer.Option(help=" | ".join(METHODS))] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the adapter.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Take what is suggested, ask nothing.")] = False,
) -> None:
    """Write a config in which every key is explained: asks for what no flag says, and suggests from what it sees."""
    _refuse_to_overwrite(out)
    check_writable(out)
    ask = Asker(asks=not yes and _is_terminal())
    if not ask.asks:
        needed: dict[str, Any] = {"--model": model, "--data": data}
        needed |= {} if yes else {"--budget": budget, "--seq-len": seq_len}
        missing = [flag for flag, value in needed.items() if value is None]
        if missing:
            rest = "" if yes else "; --yes takes what is suggested for all but --model and --data"
            raise ConfigError(
                "Flags are missing.", allowed=", ".join(needed), fix=f"give {' and '.join(missing)}{rest}"
            )
    if method is not None:
        _method(method)
    if budget is not None:
        parse_size(budget)

    from lowmem_ft.assemble import require_tokenizer
    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.suggest import free_words, suggest_budget, suggest_data, suggest_every, suggest_step
    from lowmem_ft.quant.checkpoint import Checkpoint

    reporter = Reporter()
    model = ask(model, "Model (a folder or a hub id)", None, _text)
    checkpoint = Checkpoint.open(model, trust_remote_code=trust_remote_code, weights=False)
    positions = positions_of(checkpoint.config)
    tokenizer = require_tokenizer(checkpoint)
    data = ask(data, "Data to train on", None, _text)
    if held_out is None and ask.asks:
        held_out = ask(None, "Data to evaluate on (empty: none)", "", str.strip) or None
    with reporter.task(f"Reading {Path(data).name}", unit="B") as update:
        found = suggest_data(data, tokenizer, positions, progress=update)
    for note in found.notes:
        reporter.say(note)
    if isinstance(RunConfig.from_dict({"model": model, "data": {"eval": held_out}}).data.eval, str):
        suggest_data(str(held_out), tokenizer, positions)  # so that what is wrong with it shows now

    def length(text: str | int) -> int:
        if int(text) < 8:
            raise ConfigError("Too few tokens.", given=text, allowed="at least 8")
        if positions and int(text) > positions:
            raise ConfigError("The model has fewer positions.", given=text, allowed=f"at most {positions}")
        return int(text)

    seq_len = length(ask(seq_len, "Tokens of a sequence", found.seq_len, length))
    if budget is None:
        device = find_device("auto")
        reporter.say(free_words(device))
        budget = ask(None, "Memory that the run may take", suggest_budget(device), _size)
    method = ask(method, f"Method ({', '.join(METHODS)})", METHODS[0], _method)
    rank = ask(rank, "Rank of the adapter", RANK, _rank)

    step = suggest_step(found.tokens, seq_len)
    updates = -(-found.tokens // step)
    every = suggest_every(updates)
    looks = f"evaluated and saved every {every}" if held_out else f"saved every {every}"
    reporter.say(f"Updates of {step} tokens (train.tokens_per_step): about {updates} in an epoch, {looks}")
    adapter: dict[str, Any] = {"rank": rank, "alpha": 2 * rank, **({} if method == "lora" else {method: True})}
    config = RunConfig.from_dict(
        {
            "model": model,
            "adapter": adapter,
            "budget": {"memory": budget},
            "data": {"train": data, "eval": held_out, "format": found.format, "seq_len": seq_len},
            "train": {"tokens_per_step": step, "eval_every": every, "save_every": every},
            "output": f"runs/{out.stem}",
            "trust_remote_code": trust_remote_code,
        }
    )
    _refuse_to_overwrite(out)  # it may have come while questions were answered
    write_text(out, commented_yaml(config))
    print(f"{out} is written. Next:")
    print(f"  {_plan_command(config, budget)}")
    print(f"  lowmem-ft train {shlex.quote(str(out))}")


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _refuse_to_overwrite(out: Path) -> None:
    if os.path.exists(out):
        raise ConfigError(
            "The file is there already.", given=str(out), allowed="a new file", fix="name another, or remove it"
        )


def _plan_command(config: RunConfig, budget: str) -> str:
    """Plans the same run as the file says."""
    words = ["lowmem-ft", "plan", config.model, "--budget", budget, "--seq-len", str(config.data.seq_len)]
    default = RunConfig(model=config.model)
    if config.train.tokens_per_step != default.train.tokens_per_step:
        words += ["--tokens-per-step", str(config.train.tokens_per_step)]
    if config.trust_remote_code:
        words.append("trust_remote_code=true")
    for name, value in config.adapter:
        if value != getattr(default.adapter, name):
            words.append(f"adapter.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return shlex.join(words)


def _text(text: str) -> str:
    if not text.strip():
        raise ConfigError("Nothing was given.")
    return text.strip()


def _size(text: str) -> str:
    parse_size(text)
    return text.strip()


def _method(text: str) -> str:
    if text not in METHODS:
        raise ConfigError("No such method.", given=text, allowed=", ".join(METHODS))
    return text


def _rank(text: str | int) -> int:
    if int(text) < 1:
        raise ConfigError("The rank is too small.", given=text, allowed="at least 1")
    return int(text)
