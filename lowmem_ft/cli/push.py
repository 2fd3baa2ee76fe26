"""`lowmem-ft push`: a run's adapter, with its model card, to the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from lowmem_ft.core.errors import CheckpointError, ConfigError

CONFIG = "adapter_config.json"


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
) -> None:
    """Upload a run's adapter and its model card to the Hugging Face hub, with the token of `hf auth login`."""
    adapter = run / "adapter"
    if not all(os.path.isfile(adapter / name) for name in (CONFIG, "adapter_model.safetensors")):
        raise ConfigError(
            "There is no adapter to upload.",
            given=str(run),
            allowed="the folder of a finished run",
            fix="finish it with `lowmem-ft train ... --resume`",
        )

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    from lowmem_ft.adapters.peft_format import read_adapter_config
    from lowmem_ft.report.card import without_places

    settings = without_places(read_adapter_config(adapter))  # where the base lies here is nobody's business
    files: dict[str, Path | bytes] = {it.name: it for it in sorted(adapter.iterdir()) if it.is_file()}
    files[CONFIG] = f"{json.dumps(settings, indent=2, sort_keys=True)}\n".encode()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=private, exist_ok=True)
        hub.create_commit(address.repo_id, operations, commit_message=f"Adapter of {run.resolve().name}")
    except HFValidationError as error:
        raise ConfigError("That is no name for a repository.", given=repo, allowed="OWNER/NAME") from error
    except (HTTPError, OSError) as error:  # of httpx or httpx2, by the version of huggingface_hub
        raise CheckpointError(
            "The hub does not take the adapter.",
            given=f"{repo}: {error}",
            fix="log in with `hf auth login` (a token that may write), and check the name and the network",
        ) from error
    typer.echo(f"{address}")
