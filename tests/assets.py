"""The embedded model and data, and shares of them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

ASSETS = Path(str(files("lowmem_ft") / "assets"))


def write_share(folder: Path, *, train: int, eval: int) -> Path:
    """The first records of the embedded data, as train.jsonl and eval.jsonl in `folder`."""
    for name, count in (("train", train), ("eval", eval)):
        lines = (ASSETS / f"whatis-{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return folder


def write_pairs(folder: Path, *, train: int, eval: int) -> Path:
    """The first embedded preferences, as pairs-train.jsonl and pairs-eval.jsonl in `folder`."""
    for name, count in (("train", train), ("eval", eval)):
        lines = (ASSETS / f"whatis-pairs-{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"pairs-{name}.jsonl").write_text("".join(lines[:count]))
    return folder
