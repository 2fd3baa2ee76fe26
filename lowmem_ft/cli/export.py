"""`lowmem-ft merge` and `lowmem-ft export`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowmem_ft.cli.runs import DeviceOption, on_device, open_run
from lowmem_ft.core.errors import ConfigError, nearest
from lowmem_ft.core.printable import printable
from lowmem_ft.report.progress import Reporter

if TYPE_CHECKING:
    from lowmem_ft.export.models import TrainedRun

Target = Annotated[Path, typer.Argument(help="A run folder, or a config file with --adapter.")]
Adapter = Annotated[Path | None, typer.Option(help="An adapter folder. Default: the run's.")]
BaseOption = Annotated[
    str | None, typer.Option(help="dequantized (what was trained against, the default) or original.")
]
Text = Annotated[Path | None, typer.Option(help="What to check on, text or records. Default: data.eval.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


def merge(
    target: Target,
    out: Annotated[
        Path | None, typer.Option(help="A new folder. Default: `merged` in the run folder (a config's `output`).")
    ] = None,
    adapter: Adapter = None,
    base: BaseOption = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 (the default), float16 or float32.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Quantize again: nf4, fp4 or int8.")] = None,
    text: Text = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Merge a run's adapter into its base model, and check that the result computes what was trained.

    The folder loads with transformers alone: weights, tokenizer, chat template. It appears complete or not at all.
    """
    # four bits rounded twice lose what training added: the grid's own values go back to where they were
    chosen = _one_of(base or ("original" if quantize else "dequantized"), ("dequantized", "original"), "--base")
    if dtype is not None and quantize is not None:
        raise ConfigError(
            "--dtype has no effect on weights that are quantized again.",
            given=f"--dtype {dtype} --quantize {quantize}",
            fix="leave one of them out",
        )
    named = _one_of(dtype or "bfloat16", ("bfloat16", "float16", "float32"), "--dtype")
    kind = None if quantize is None else _one_of(quantize, ("nf4", "fp4", "int8"), "--quantize")
    reporter = Reporter(quiet=as_json)
    run, folder = _trained_run(target, adapter, out, "merged", device)

    import torch

    from lowmem_ft.export.merge import merge as merge_run
    from lowmem_ft.quant.ops import QuantSpec

    spec = None
    if kind is not None:
        spec = QuantSpec(bits=8) if kind == "int8" else QuantSpec(type="fp4" if kind == "fp4" else "nf4")
    done = merge_run(
        run,
        folder,
        base="original" if chosen == "original" else "dequantized",
        dtype=getattr(torch, named),
        quantize_to=spec,
        text=text,
        reporter=reporter,
    )
    _show(done.to_dict(), done.lines(), as_json)


def export(
    target: Target,
    gguf: Annotated[
        str | None,
        typer.Option(help="The merged model in one file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0."),
    ] = None,
    gguf_adapter: Annotated[bool, typer.Option("--gguf-adapter", help="The adapter alone, for llama.cpp.")] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="The adapter alone, as a folder for vLLM.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="A new folder. Default: a name in the run folder (a config's `output`).")
    ] = None,
    adapter: Adapter = None,
    base: BaseOption = None,
    text: Text = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Export a run for llama.cpp, Ollama or vLLM, and check that what was written computes what was trained."""
    if (gguf is not None) + gguf_adapter + vllm != 1:
        raise ConfigError("One export at a time.", allowed="one of --gguf TYPE, --gguf-adapter, --vllm")
    if base is not None and gguf is None:
        raise ConfigError("--base concerns merged models.", given=base, fix="leave it out, or export --gguf TYPE")
    chosen = _one_of(base or "dequantized", ("dequantized", "original"), "--base")
    reporter = Reporter(quiet=as_json)
    run, folder = _trained_run(target, adapter, out, "gguf" if gguf else "vllm" if vllm else "gguf-adapter", device)

    from lowmem_ft.export.exports import export_gguf, export_gguf_adapter, export_vllm
    from lowmem_ft.export.gguf_file import TYPES

    if gguf is not None:
        done = export_gguf(
            run,
            folder,
            kind=_one_of(gguf.lower(), TYPES, "--gguf"),
            base="original" if chosen == "original" else "dequantized",
            text=text,
            reporter=reporter,
        )
    elif vllm:
        done = export_vllm(run, folder, text=text, reporter=reporter)
    else:
        done = export_gguf_adapter(run, folder, text=text, reporter=reporter)
    _show(done.to_dict(), done.lines(), as_json)


def _show(found: dict[str, object], lines: list[str], as_json: bool) -> None:
    print(json.dumps(found) if as_json else printable("\n".join(lines)))


def _trained_run(
    target: Path, adapter: Path | None, out: Path | None, name: str, device: str | None
) -> tuple[TrainedRun, Path]:
    """What to export, and the folder for it: `out`, or `name` in the run folder."""
    named = None if adapter is None else str(adapter)
    config, plan, chosen = open_run(target, on_device(device), named, need_adapter=True)
    assert isinstance(chosen, Path), "refused"

    from transformers.utils import logging

    from lowmem_ft.export.models import TrainedRun
    from lowmem_ft.planner.device import find_device

    logging.disable_progress_bar()  # of loading what was written, beside the reporter's own

    run = os.path.isdir(target)
    folder = out or (target if run else Path(config.output)) / name
    scratch = target if run else folder.absolute().parent
    where = find_device(config.budget.device).torch_device
    return TrainedRun(config=config, policy=plan.policy, adapter=chosen, device=where, scratch=scratch), folder


def _one_of(value: str, allowed: tuple[str, ...], option: str) -> str:
    if value not in allowed:
        close = nearest(value, allowed)
        raise ConfigError(
            f"{option} has a value that is not allowed.",
            given=value,
            allowed=" | ".join(allowed),
            fix=f"did you mean {close}?" if close else None,
        )
    return value
