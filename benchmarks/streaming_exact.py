"""Every combination of weights, adapter, activations, packing and streamed blocks beside the resident run: bit-equal?

The tests run a part of this table in which every pair of values is met (tests/unit/runtime/test_streaming.py).

    python benchmarks/streaming_exact.py --out benchmarks/results/streaming_exact.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description="streamed runs beside resident ones, bit by bit")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    from lowmem_ft.core.host import prefer_short_waits

    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    prefer_short_waits()
    warnings.simplefilter("ignore")

    import torch

    from tests.models import save_tiny
    from tests.unit.runtime.test_streaming import DEPTH, TABLE, exact

    rows = []
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-exact-") as name:
        for architecture in ("llama", "mixtral"):
            model = save_tiny(architecture, Path(name) / architecture, num_hidden_layers=DEPTH)
            for entry in TABLE:
                rows.append({"architecture": architecture, "row": entry, "equal": exact(model, *entry)})
                if not rows[-1]["equal"]:
                    print(f"differs: {rows[-1]}", file=sys.stderr, flush=True)
            print(f"{architecture}: {len(rows)} rows done", file=sys.stderr, flush=True)
    differing = [row for row in rows if not row["equal"]]
    from common import leave, stamp  # beside this file, where scripts are run

    result = {
        **stamp(torch.get_num_threads()),
        "columns": ["quant", "adapter", "activations", "streamed", "packing", "embeddings"],
        "rows": len(rows),
        "equal": len(rows) - len(differing),
        "differing": differing,
    }
    leave(result, options.out)


if __name__ == "__main__":
    main()
