"""`lowmem-ft docs [PAGE]`: the manual, a page for each task. A test runs every command in it."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from lowmem_ft.core.errors import ConfigError, nearest

PAGES = (
    *("install", "models", "plan", "train", "resume", "data", "evaluate", "preferences", "merge", "chat", "profiles"),
    "memory",
)


def page_text(name: str) -> str:
    """A page as Markdown."""
    return (files("lowmem_ft") / "docs" / f"{name}.md").read_text(encoding="utf-8")


def docs(page: Annotated[str | None, typer.Argument(help="Default: a list of the pages.")] = None) -> None:
    """The manual, a page for each task."""
    if page is None:
        for name in PAGES:
            print(f"{name.ljust(max(map(len, PAGES)))}  {page_text(name).splitlines()[0].removeprefix('# ')}")
        return
    if page not in PAGES:
        close = nearest(page, PAGES)
        fix = f"did you mean {close}?" if close else None
        raise ConfigError("There is no such page.", given=page, allowed=", ".join(PAGES), fix=fix)
    console = Console()
    if console.is_terminal:
        console.print(Markdown(page_text(page)))
    else:
        print(page_text(page), end="")
