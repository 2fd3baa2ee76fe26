"""On a CUDA card: how little is enough for models of 8B to 70B parameters, how fast they are in it, and how long a
sequence fits, each beside what was planned.

Weights are random and written in NF4, so that those of 70B take 38 GB of the disk. Smaller cards are played by the
allocator's cap, which is what a run's budget is; the driver (NVML) says what the whole process took. Each case is a
process of its own, which plans while others still run.

    python benchmarks/gpu_limits.py --folder /dev/shm/lowmem-ft --seconds 400 --out benchmarks/results/gpu_limits.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from common import keep, leave, stamp  # beside this file
from gpu import QUICK
from gpu_steps import our_step, peaks_of, timed, watched
from limits import SHAPES
from random_weights import write_model

CONTEXT_RANK = 32  # of the figures to beat
AHEAD = 3  # processes that plan meanwhile: to begin one and to plan took longer than a run (20 s beside an H200)
LEAST = "least"
# The most telling ones come first, for when time is short; one model's stand together, and it is removed after them.
CASES = (
    "Llama-3.1-8B:512:least", "Llama-3.1-8B:256:least", "Llama-3.1-8B:512:6GiB", "Llama-3.1-8B:512:8GiB",
    "Llama-3.1-8B:longest:8GB", "Llama-3.1-8B:512:12GiB", "Llama-3.1-8B:512:4GiB", "Llama-3.1-8B:512:3GiB",
    "Llama-3-70B:512:least", "Llama-3-70B:512:6GiB", "Llama-3-70B:512:24GiB",
    "Qwen3-14B:512:least", "Qwen3-14B:512:4GiB", "Qwen3-14B:512:8GiB", "Qwen3-14B:512:12GiB", "Qwen3-14B:512:16GiB",
    "Qwen3-32B:512:least", "Qwen3-32B:512:4GiB", "Qwen3-32B:512:12GiB", "Qwen3-32B:512:24GiB",
    "Llama-3.1-8B:longest:12GB", "Llama-3.1-8B:longest:24GB",
)  # fmt: skip


class Case(NamedTuple):
    """MODEL:TOKENS:BUDGET, where TOKENS may be `longest` and BUDGET `least`."""

    model: str
    tokens: str
    budget: str

    @classmethod
    def of(cls, text: str) -> Case:
        return cls(*text.split(":"))


def planned(case: Case, folder: Path, device: str) -> Any:
    """The plan of a case; where the least is asked for, that of the smallest budget which a refused one names."""
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.solver import make_plan

    found = find_device(device)  # once: asked again the process takes a little more, and the least would not suffice
    longest = case.tokens == "longest"
    length = 2048 if longest else int(case.tokens)

    def with_budget(memory: int | str) -> Any:
        keys: dict[str, Any] = {
            "model": str(folder / case.model), "output": str(folder / "run"),
            "budget": {"device": device, "memory": memory}, "data": {"seq_len": length},
            "train": {"tokens_per_step": length},
        }  # fmt: skip
        if longest:
            keys |= {"adapter": {"rank": CONTEXT_RANK}, "policy": {"objective": "context"}}
        return make_plan(RunConfig.from_dict(keys), device=found)

    if case.budget != LEAST:
        return with_budget(case.budget)
    refused = with_budget(1 << 20)
    assert not refused.fits, "a budget of 1 MiB"
    return with_budget(refused.predicted.process_peak_bytes)


def taken(plan: Any, device: Any, *, steps: int, vocabulary: int) -> dict[str, Any]:
    """Load and step as `lowmem-ft train` does, the allocator capped alike: peaks in bytes, and seconds."""
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.verify import FullBatches
    from lowmem_ft.runtime.budget import capped_allocator

    said: dict[str, Any] = {}
    gc.collect()
    try:
        with (
            capped_allocator(device, plan.budget["device_bytes"], beside=plan.device["process_bytes"]),
            watched(device) as peaks,
        ):
            torch.manual_seed(0)
            start = time.perf_counter()
            ready = assemble(plan.run_config, plan.policy, device)
            said["loading_seconds"] = time.perf_counter() - start
            batches = list(FullBatches(plan.run_config, plan.policy, vocabulary=vocabulary))
            said |= timed(our_step(ready, batches), device, steps=steps)
        said["peaks"] = peaks
    except torch.OutOfMemoryError as error:
        return said | {"out_of_memory": str(error)[:300]}
    return said | {"tokens_per_second": plan.run_config.train.tokens_per_step / said["step_seconds"]}


def child(case: Case, options: argparse.Namespace) -> None:
    """Plans a case, says so, and runs it when it is told to."""
    import torch

    start = time.perf_counter()
    plan = planned(case, options.folder, options.device)
    said = {
        "planning_seconds": time.perf_counter() - start,
        "fits": plan.fits,
        "policy": plan.policy.describe(),
        "seq_len": plan.run_config.data.seq_len,
        "budget_bytes": plan.budget["device_bytes"],
        "planned": peaks_of(plan.predicted),
        "planned_tokens_per_second": plan.predicted.tokens_per_second,
    }
    print("ready", flush=True)
    sys.stdin.readline()
    if plan.fits:
        # a step of the longest sequence takes a minute, and the first is as long as any
        steps = 0 if case.tokens == "longest" else options.steps
        said |= taken(plan, torch.device(options.device), steps=steps, vocabulary=options.vocabulary)
    print(json.dumps(said), flush=True)


def begin(case: Case, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that plans the case; its model is written first."""
    start = time.perf_counter()
    kind = options.device.partition(":")[0]
    shape = SHAPES[case.model] | (QUICK if options.quick else {})
    write_model(options.folder / case.model, shape, device=kind, quantized=True)
    print(f"{case.model}: {time.perf_counter() - start:.1f} s to write", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--folder", str(options.folder), "--device", options.device]
    command += ["--steps", str(options.steps), "--vocabulary", str(options.vocabulary), "--child", ":".join(case)]
    with log_of(case, options).open("w") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def log_of(case: Case, options: argparse.Namespace) -> Path:
    """Where a child's complaints go."""
    folder: Path = options.folder
    return folder / f"{'-'.join(case)}.log"


def main() -> None:
    parser = argparse.ArgumentParser(description="the smallest budgets, speeds in budgets, and the longest sequences")
    parser.add_argument("--cases", nargs="*", default=CASES, help="MODEL:TOKENS:BUDGET, in this order")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=Path, required=True, help="where models go: 46 GB at a time")
    parser.add_argument("--seconds", type=float, default=3600.0, help="nothing goes on after these")
    parser.add_argument("--steps", type=int, default=4, help="after the first")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens are drawn of so many")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    begun = time.perf_counter()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")

    from lowmem_ft.planner.alloc_conf import prefer_expandable_segments

    prefer_expandable_segments()  # as the command line does
    if options.child:
        child(Case.of(options.child), options)
        return
    import torch

    on_card = options.device.startswith("cuda")
    card = torch.cuda.get_device_name(options.device) if on_card else "cpu"
    result: dict[str, Any] = {**stamp(torch.get_num_threads()), "card": card, "cases": []}
    left = [Case.of(text) for text in options.cases]
    waiting: list[tuple[Case, subprocess.Popen[str]]] = []

    def begin_more(model: str) -> None:
        # all of one model: another one would take too much of the disk beside it
        while left and left[0].model == model and len(waiting) < AHEAD:
            case = left.pop(0)
            waiting.append((case, begin(case, options)))

    while waiting or left:
        if not waiting:
            begin_more(left[0].model)
        case, process = waiting.pop(0)
        begin_more(case.model)
        assert process.stdout is not None
        assert process.stdin is not None
        if process.stdout.readline().strip() == "ready":
            process.stdin.write("go\n")
            process.stdin.flush()
        try:
            out, _ = process.communicate(timeout=max(1.0, options.seconds - (time.perf_counter() - begun)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            out = ""
        said = json.loads(out.splitlines()[-1]) if process.returncode == 0 else {"failed": process.returncode}
        if "failed" in said:
            said["log"] = log_of(case, options).read_text()[-1500:]
        result["cases"].append({"case": ":".join(case), **said})
        print(json.dumps(result["cases"][-1]), file=sys.stderr, flush=True)
        keep(result, options.out)
        if time.perf_counter() - begun > options.seconds:
            break
        if not any(other.model == case.model for other in [*left, *(other for other, _ in waiting)]):
            shutil.rmtree(options.folder / case.model)
    for _, process in waiting:
        process.kill()
        process.wait()
    leave(result, options.out)


if __name__ == "__main__":
    main()
