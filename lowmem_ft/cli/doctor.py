"""`lowmem-ft doctor`: what works on this machine, what does not and how to fix it, and what would limit a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_ft.core.checks import Check, check_versions
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import LowMemError
from lowmem_ft.core.positions import positions_of
from lowmem_ft.core.printable import printable
from lowmem_ft.report.columns import columns
from lowmem_ft.report.progress import Printable

if TYPE_CHECKING:
    from lowmem_ft.planner.health import Limit

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
HUB_SECONDS = 10.0
REINSTALL = "install again what fails (`pip install --force-reinstall lowmem-ft`); a new environment is the surest"


def doctor(
    model: Annotated[str | None, typer.Option(help="What to plan for; default: the embedded model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    hub: Annotated[bool, typer.Option("--hub", help="Ask the Hugging Face hub for an answer, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")] = False,
) -> None:
    """Check versions, device, kernels, memory and disks, and say what would limit you. Writes temporary files only."""
    checks, limit, failed = list(check_versions()), None, None
    with as_file(files("lowmem_ft") / "assets" / "doclm-7m") as embedded:
        config = RunConfig.from_dict({"model": model or str(embedded), "trust_remote_code": trust_remote_code})
        try:
            for check in _machine(config):
                checks.append(check)  # one by one: those before a failure are shown
            limit = _limit(config)
        except LowMemError as error:  # of the model
            failed = error
        except Exception as error:  # of a library that is there and does not load, or of a driver: anything
            found = f"{type(error).__name__}: {error}".splitlines()[0]
            checks.append(Check(name="libraries", status="problem", found=found, fix=REINSTALL))
    if hub:
        checks.append(check_hub())
    problem = any(check.status == "problem" for check in checks)
    if as_json:
        told = {"sentence": limit.sentence, "fits": limit.fits} if limit else None
        answer = {"ok": not problem and failed is None, "checks": [check.to_dict() for check in checks], "limit": told}
        print(json.dumps(answer))
    else:
        _show(checks, limit, Console(highlight=False, markup=False))
    if failed is not None:
        raise failed
    if problem:
        raise typer.Exit(2)


def _machine(config: RunConfig) -> Iterator[Check]:
    from lowmem_ft.planner.health import check_machine

    yield from check_machine(config)


def _limit(config: RunConfig) -> Limit:
    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.health import what_limits

    return what_limits(_within_positions(config), find_device(config.budget.device, config.budget.profile))


def _within_positions(config: RunConfig) -> RunConfig:
    """With sequences that the model has positions for."""
    from lowmem_ft.quant.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(config.model, trust_remote_code=config.trust_remote_code, weights=False)
    positions = positions_of(checkpoint.config)
    if positions is None or positions >= config.data.seq_len:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"seq_len": positions})})


def check_hub() -> Check:
    """Whether the hub answers, as `huggingface_hub` would ask it."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        found = f"not asked: HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '1')}"
        return Check(name="hub", status="ok", found=found)
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # whatever the HTTP library of this version of huggingface_hub raises
        found = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        fix = "look at the network and at HTTPS_PROXY, or give models and data as local folders"
        return Check(name="hub", status="warning", found=found, fix=fix)
    return Check(name="hub", status="ok", found=f"{constants.ENDPOINT} answers ({answer.status_code})")


def _show(checks: list[Check], limit: Limit | None, console: Console) -> None:
    if console.is_terminal:
        table = Table(*columns("", "check", "found", "how to fix it"), box=box.SIMPLE, pad_edge=False)
        for check in checks:
            status = Text(check.status, style=STYLES[check.status])
            table.add_row(status, Text(check.name), Text(check.found), Text(check.fix))
        console.print(Printable(table))
    else:
        for check in checks:
            print(printable("\t".join(filter(None, (check.status, check.name, check.found, check.fix)))))
    if limit is not None:
        console.print(Text(f"What would limit you: {limit.sentence}"), soft_wrap=not console.is_terminal)
