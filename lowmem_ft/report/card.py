"""README.md of an adapter: the model card that the hub shows, with plan, data and metrics."""

from __future__ import annotations

import os
from typing import Any, get_args

import yaml

from lowmem_ft.core.checks import PACKAGE, installed_version
from lowmem_ft.core.config import BESIDE_INIT, Init
from lowmem_ft.core.run import Run
from lowmem_ft.report.tables import measured_rows

SHOWN = {"quant", "adapter", "train", "preference", "policy"}  # the other sections have places of their own here


def model_card(run: Run) -> str:
    """Markdown with the front matter of a PEFT adapter. Of places of this machine names alone are told."""
    config = run.plan.run_config
    model = without_places(config.model)
    front = {
        "base_model": model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [
            "lowmem-ft",
            "lora" if config.adapter.method == "lora" else str((config.adapter.peft or {})["peft_type"]),
        ],
    }
    settings = config.model_dump(mode="json", include=SHOWN)
    if config.adapter.init not in get_args(Init):  # its rank and such are in the adapter's own config
        settings["adapter"] = {name: it for name, it in settings["adapter"].items() if name in BESIDE_INIT}
    tool = [PACKAGE, *filter(None, [installed_version(PACKAGE)])]
    lines = [
        f"# {run.folder.name}",
        f"An adapter for `{model}`, trained with {' '.join(tool)} in {run.step} steps.",
        "## Results",
        _table(("", ""), _results(run)),
        "## Data",
        _table(("", ""), _data(config.data.model_dump(mode="json", exclude_none=True))),
        "## Plan",
        _table(("", ""), run.plan.rows()),
        _table(("", "planned", "measured", "of plan"), measured_rows(run)),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(without_places(settings), sort_keys=False)}```",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(lines) + "\n"


def _results(run: Run) -> list[tuple[str, str]]:
    tokens, first, last = 0, None, None
    for line in run.read_metrics():
        tokens += line.get("tokens", 0)
        if line.get("loss") is not None:  # None is what was not finite
            first, last = line["loss"] if first is None else first, line["loss"]
    rows = [("tokens trained on", f"{tokens:,}")] if tokens else []
    if last is not None:
        rows.append(("training loss, first and last step", f"{first:.4f}, {last:.4f}"))
    held_out = run.evaluations
    if held_out:
        when = f"at step {held_out[0]['step']}" if held_out[0]["step"] else "before"
        rows.append((f"held-out loss {when}", f"{held_out[0]['eval_loss']:.4f}"))
    if run.eval_loss is not None:
        rows.append(("held-out loss of this adapter", f"{run.eval_loss:.4f}"))
        its = next((it for it in held_out if it["eval_loss"] == run.eval_loss), {})
        shares = {
            "eval_accuracy": "share of held-out tokens that it takes for the likeliest",
            "eval_rewards/accuracies": "share of held-out pairs that it wins",
        }
        rows += [(words, f"{its[name]:.1%}") for name, words in shares.items() if its.get(name) is not None]
    return rows


def _data(data: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {key: value for key, value in data.items() if value not in ({}, []) and key != "cache"}
    return [(f"`{key}`", str(_name(value))) for key, value in shown.items()]


def _name(value: Any) -> Any:
    """Of a source its path, of several all; all else as it is."""
    if isinstance(value, list):
        return ", ".join(str(_name(it)) for it in value)
    return without_places(value["path"] if isinstance(value, dict) and "path" in value else value)


def without_places(value: Any) -> Any:
    """The same, in which local paths have lost their folders."""
    if isinstance(value, dict):
        return {key: without_places(it) for key, it in value.items()}
    if isinstance(value, list):
        return [without_places(it) for it in value]
    return os.path.basename(os.path.abspath(value)) if isinstance(value, str) and _is_local(value) else value


def _is_local(text: str) -> bool:
    return os.path.isabs(text) or text.startswith(("~", "./", "../")) or (text != "" and os.path.exists(text))


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
