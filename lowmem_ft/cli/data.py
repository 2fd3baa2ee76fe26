"""`lowmem-ft data FILE`: what a data file holds, and what training would see of it."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError, DataError
from lowmem_ft.core.sources import DataSource
from lowmem_ft.report.progress import Printable, Reporter, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_ft.data.preview import Preview, Segments

EMBEDDED = ""  # in place of a model: the embedded one
BAR = 40  # characters of the longest bar
SHOWN = 2000  # characters of an example


def data_preview(
    file: Annotated[str, typer.Argument(help="A data file, a saved dataset's folder, or a hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config keys, such as data.format=alpaca.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer; default: the embedded model.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Records to look at; 0 for all.")] = 10_000,
    examples: Annotated[int, typer.Option(min=0, help="Records to show.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")] = False,
) -> None:
    """Show a data file as training would see it: format, columns, lengths, and the first examples with their loss."""
    given = [] if seq_len is None else [f"data.seq_len={seq_len}"]
    config = RunConfig.from_dict(
        {"model": model or EMBEDDED, "data": {"train": {"path": file}}}, [*given, *(overrides or [])]
    )

    from lowmem_ft.data.preview import preview
    from lowmem_ft.data.sources import list_sources

    reporter = Reporter(quiet=as_json)
    sources = list_sources(config.data.train or [], config.data)
    named = [source.path for source in sources]
    if named != [DataSource(path=file).path]:
        given_too = f"{file} and data.train: {', '.join(named) or 'null'}"
        raise ConfigError("The data to show is named twice.", given=given_too, fix="remove data.train")
    tokenizer = _tokenizer(config.model, config.trust_remote_code)
    objective = config.train.objective if "objective" in config.train.model_fields_set else None
    with reporter.task(f"Reading {Path(file).name}", unit="B") as update:
        found = preview(
            sources[0],
            config.data,
            tokenizer,
            objective=objective,
            rows=rows or None,
            samples=examples,
            progress=update,
        )
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _show(found, Console(highlight=False, markup=False))
    if found.unusable and config.data.invalid == "error":
        raise DataError(
            f"{found.unusable} of {found.records} records cannot be used.",
            given=found.wrong[0].splitlines()[0],
            fix="correct them, or set data.invalid: skip",
        )
    if not found.records:
        raise DataError("The data file has no records.", given=file)
    if found.overlong == "error" and found.truncated:
        raise DataError(
            f"{found.truncated} of {len(found.lengths)} {found.unit} are longer than data.seq_len, which is an error.",
            given=f"up to {max(found.lengths)} tokens",
            allowed=found.seq_len,
            fix="raise data.seq_len, or set data.overlong to truncate or drop",
        )
    if found.complete and not found.used:
        raise DataError(
            "Nothing is left to train on: all records are skipped or dropped, or have no token in the loss.",
            given=file,
            allowed="examples with an answer inside their first data.seq_len tokens",
            fix="correct them, raise data.seq_len, or set data.assistant_only: false",
        )


def _tokenizer(model: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from lowmem_ft.assemble import require_tokenizer
    from lowmem_ft.quant.checkpoint import Checkpoint

    if model == EMBEDDED:
        with as_file(files("lowmem_ft") / "assets" / "doclm-7m") as folder:
            return require_tokenizer(Checkpoint.open(folder))
    return require_tokenizer(Checkpoint.open(model, trust_remote_code=trust_remote_code, weights=False))


def _show(found: Preview, console: Console) -> None:
    show(console, _facts(found))
    table = _table("column", "holds", title="Columns")
    for name, types in found.columns.items():
        table.add_row(Text(name), Text(", ".join(types)))
    show(console, table)
    if found.lengths:
        show(console, _histogram(found))
    for line in found.wrong:
        show(console, line)
    if found.unusable > len(found.wrong):
        show(console, f"... and {found.unusable - len(found.wrong)} more records that cannot be used")
    for name, runs in found.samples:
        how = "dimmed" if console.is_terminal else "in [brackets]"
        console.print(Printable(Text(f"\n{name} (what is not in the loss: {how})", style="bold")), soft_wrap=True)
        console.print(Printable(_marked(runs, plain=not console.is_terminal)), soft_wrap=True)


def _table(*header: str, title: str) -> Table:
    table = Table(*header, title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.show_header = bool(header)
    return table


def _facts(found: Preview) -> Table:
    facts = found.to_dict()
    count, length = len(found.lengths), facts["length"]
    table = _table(title=found.name)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("records", f"{found.records}" + ("" if found.complete else ", the first of more (--rows 0 for all)"))
    if found.unusable:
        table.add_row("cannot be used", f"{found.unusable}")
    table.add_row("format", ", ".join(f"{kind} ({number})" for kind, number in found.formats.items()) or "none known")
    if not count:
        return table
    if found.pairs:
        table.add_row("pairs", f"{found.pairs}")
    table.add_row(found.unit, f"{count}")
    table.add_row("tokens", f"{sum(found.lengths)}, of which {found.tokens} are used")
    table.add_row("length", ", ".join(f"{name} {value}" for name, value in length.items()))
    done = {"truncate": "truncated", "drop": "dropped", "error": "too long, an error"}[found.overlong]
    those = f"{found.truncated} {found.unit} ({found.truncated / count:.1%})"
    pairs = ", or of a pair that is" if found.pairs and found.overlong != "truncate" else ""
    table.add_row(done, f"{those} longer than {found.seq_len} tokens{pairs}")
    table.add_row("in the loss", f"{found.loss_tokens} tokens ({facts['loss_share']:.1%})")
    if found.masked:
        table.add_row("without loss", f"{found.masked} {found.unit}, which training leaves out")
    if found.unshown:
        table.add_row("left out", f"the reasoning of {found.unshown} messages, which the chat template does not show")
    table.add_row("answers end", ", ".join(f"{text!r} ({number})" for text, number in found.endings.most_common(4)))
    if found.used:
        full = f"{facts['packed_share']:.1%} full"
        table.add_row("if packed", f"{facts['packed_rows']} rows of {found.seq_len} tokens, {full}")
    return table


def _histogram(found: Preview) -> Table:
    table = _table("tokens", found.unit, "", title="Lengths")
    ranges = found.histogram()
    most = max(count for _, _, count in ranges)
    for low, high, count in ranges:
        beyond = " longer than data.seq_len" if low > found.seq_len else ""
        bar = "#" * max(round(BAR * count / most), int(count > 0))
        table.add_row(f"{low}-{high}" if high > low else f"{low}", f"{count}", Text(bar + beyond))
    return table


def _marked(runs: Segments, *, plain: bool) -> Text:
    text = Text()
    for part, loss in runs:
        room = SHOWN - len(text)
        shown = part if len(part) <= room else part[:room] + "..."
        if loss:
            text.append(shown)
        else:
            text.append(f"[{shown}]" if plain else shown, style="" if plain else "dim")
        if len(part) > room:
            break
    return text
