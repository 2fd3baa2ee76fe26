"""What benchmarks have in common: how they begin on a CPU, and what they leave."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # what is measured is the package beside this folder, which need not be installed


def on_cpu(threads: int) -> None:
    """Let this process and its children compute on so many threads of the CPU, as runs do; before torch is imported."""
    os.environ.update({"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    warnings.simplefilter("ignore")

    from lowmem_ft.core.host import prefer_huge_pages, prefer_short_waits

    prefer_huge_pages()
    prefer_short_waits()


def stamp(threads: int) -> dict[str, Any]:
    """When and where a result was measured, and with what."""
    import torch
    import transformers

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "threads": threads},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def leave(result: Mapping[str, Any], out: Path | None) -> None:
    """Print `result` as JSON, and write it to `out` if that is given."""
    print(json.dumps(result, indent=1))
    keep(result, out)


def keep(result: Mapping[str, Any], out: Path | None) -> None:
    """Write what is known by now, so that it is there if no more comes."""
    from lowmem_ft.core.files import write_text

    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")
