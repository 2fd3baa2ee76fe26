"""A process of its own that prepares a hub dataset: `python -m lowmem_ft.data.hub`, a request in JSON on stdin.

The last line of stdout is JSON, `{"files": [...]}` or `{"error": {...}}`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from lowmem_ft.core.errors import DataError
from lowmem_ft.core.sources import DataSource
from lowmem_ft.data.sources import Use, pick_split, unknown_split

# what reads tables and text; datasets 4 and later run no code of a data set
BUILDERS = ("arrow", "cache", "csv", "json", "parquet", "text")


def prepare(source: DataSource, use: Use) -> list[str]:
    """Download a dataset and convert it to Arrow files, unless the cache of datasets holds it already.

    Raises:
        DataError: no such dataset, subset or split; no network; a dataset of other things than tables and text.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.path, source.subset, revision=source.revision)
        if builder.repo_id is None and not os.path.isdir(source.path):  # a reader, and all that lies in this folder
            raise DataError("There is no such file.", given=source.path, allowed="a file, a saved dataset, or a hub id")
        kind = type(builder).__module__.split(".")[-1]
        if kind not in BUILDERS:
            raise DataError("The dataset holds no tables or text.", given=kind, allowed=", ".join(BUILDERS))
        builder.download_and_prepare()
        splits = list(builder.info.splits or {})
        split = pick_split(splits, source.split, use)
        if split is None:
            raise unknown_split(source.path, splits, source.split)
        found = builder.as_dataset(split=split)
        return [file["filename"] for file in found.cache_files]
    except DataError:
        raise
    except Exception as error:  # of the network, the hub, or any reader: datasets has no class above them
        raise DataError(
            "The dataset cannot be prepared.",
            given=f"{source.path} ({type(error).__name__}: {' '.join(str(error).split())[:300]})",
            allowed="a file, a folder that datasets' save_to_disk wrote, or a hub id",
            fix="check the name; without a network, HF_HUB_OFFLINE=1 takes what was downloaded before",
        ) from error


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"files": prepare(DataSource.model_validate(request["source"]), request["use"])}
    except DataError as error:
        answer = {"error": {"what": error.what, "given": error.given, "allowed": error.allowed, "fix": error.fix}}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
