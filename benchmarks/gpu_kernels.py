"""On a CUDA card: what a process takes of it for kernels that CUDA loads after the device was asked, and for which
operators. Plans add a number of bytes for that (`lowmem_ft.planner.device.LATER_BYTES`).

Each configuration of `plan_accuracy.py --device cuda` is a process of its own here, as kernels stay that were loaded
once. After every operator of loading and of two steps the driver (NVML) is asked what the process takes.

    python benchmarks/gpu_kernels.py --jobs 3 --seconds 200 --out benchmarks/results/gpu_kernels.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import keep, leave, stamp  # beside this file
from plan_accuracy import CUDA_SHAPES, cuda_configurations

# mixtures with 4 (gpt_oss) and 16 (qwen3_moe) experts together, capped scores (gemma2), mixtral in int8 and deepseek_v3
# in fp16, of none of which anything is known; then other architectures, weights, adapters, optimizers and dtypes of
# compute, all of them early; those of 4n + 3 are preferences
INDICES = (
    133, 285, 46, 148, 212, 1, 8, 3, 28, 42, 10, 5, 7, 23, 20, 33, 40, 47, 53, 12, 21, 58, 2, 9, 13, 15, 18, 24,
)  # fmt: skip


def beside_pool(device: Any) -> Callable[[], int]:
    """What asks for the bytes of the process that PyTorch's pool has not; on a CPU there are none."""
    import torch

    from lowmem_ft.runtime.memory import cuda_process_bytes

    if device.type != "cuda":
        return lambda: 0
    import pynvml

    pynvml.nvmlInit()  # and so not each time anew
    return lambda: (cuda_process_bytes(device.index) or 0) - torch.cuda.memory_reserved(device)


def child(index: int, options: argparse.Namespace) -> None:
    """What one configuration makes CUDA load, as JSON."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.alloc_conf import prefer_expandable_segments
    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.verify import FullBatches
    from lowmem_ft.step import train_step
    from tests.unit.planner.sampler import preferring, prepared

    prefer_expandable_segments()
    shapes = dict.fromkeys(CUDA_SHAPES, (64, 160, 16, 1000)) if options.quick else CUDA_SHAPES
    _, drawn = next(itertools.islice(cuda_configurations(0, shapes), index, None))
    drawn = preferring(drawn, random.Random(index)) if index % 4 == 3 else drawn
    found = find_device(options.device)
    device = found.torch_device
    beside = beside_pool(device)
    loads: list[list[Any]] = []
    begin = last = beside()

    def look(phase: str, what: str) -> None:
        nonlocal last
        now = beside()
        if now != last:
            loads.append([phase, what, now - last])
            last = now

    class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call,misc]
        phase = "loading"

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = next((it for it in args if isinstance(it, torch.Tensor)), None)
            look(self.phase, f"{func} {None if given is None else given.dtype}")
            return out

    with tempfile.TemporaryDirectory(prefix="lowmem-ft-kernels-") as name:
        config, policy = prepared(drawn, Path(name), device="cpu")
        batches = list(FullBatches(config, policy, vocabulary=100))
        with Watching() as watching:
            ready = assemble(config, policy, device)
            for step in (1, 2):
                watching.phase = f"step {step}"
                train_step(ready, batches, lr=1e-4)
    look("end", "")
    said = {name: drawn[name] for name in ("architecture", "sections")}
    print(json.dumps({"index": index, **said, "begin": begin, "later": last - begin, "loads": loads}))


def main() -> None:
    parser = argparse.ArgumentParser(description="what CUDA loads into a process after it was asked for its device")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--indices", type=int, nargs="*", default=INDICES, help="of configurations")
    parser.add_argument("--jobs", type=int, default=3, help="processes side by side")
    parser.add_argument("--seconds", type=float, default=3600.0, help="none begins after these")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    if options.child is not None:
        child(options.child, options)
        return
    import torch

    command = [sys.executable, __file__, "--device", options.device, *["--quick"] * options.quick, "--child"]
    result: dict[str, Any] = {**stamp(torch.get_num_threads()), "configurations": []}
    begun, left = time.monotonic(), list(options.indices)
    running: list[tuple[int, subprocess.Popen[str]]] = []
    while left or running:
        while left and len(running) < options.jobs and time.monotonic() - begun < options.seconds:
            own = [*command, str(left[0])]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            running.append((left.pop(0), subprocess.Popen(own, **pipes)))
        if not running:
            break
        index, process = running.pop(0)
        out, complaints = process.communicate()
        failed = {"index": index, "failed": complaints[-800:]}
        result["configurations"].append(json.loads(out.splitlines()[-1]) if process.returncode == 0 else failed)
        keep(result, options.out)
    leave(result, options.out)


if __name__ == "__main__":
    main()
