"""Predicted memory beside real memory, over configurations that a seed draws: the record of the planner.

Each configuration is simulated without data, then one real training step and one real evaluation step are run on the
CPU and measured by PyTorch's own allocator events. For a share of them a fresh process plans and trains as users do,
and its resident set is held against the planned process peak.

    python benchmarks/plan_accuracy.py --count 300 --out benchmarks/results/plan_accuracy_seed0.json

With `--preferences` each of them learns from preferences, under an objective that is drawn, too.

On a GPU the same configurations, in larger models, are measured in two steps: peaks of what is allocated, reserved and
taken by the process, and every single event of PyTorch's allocator. Plans for that card are held against it there, or
later on any machine:

    python benchmarks/plan_accuracy.py --device cuda --count 300 --jobs 8 --record recorded.jsonl
    python benchmarks/plan_accuracy.py --judge recorded.jsonl --out benchmarks/results/plan_accuracy_cuda.json
"""

from __future__ import annotations

import argparse
import datetime
import gc
import gzip
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# hidden size, inner size, blocks, vocabulary: 0.3M to 500M parameters, most of them small
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (96, 160, 3, 199), "small": (192, 512, 4, 2048), "medium": (384, 1024, 6, 8192),
    "large": (768, 2048, 12, 32000), "half a billion": (1280, 3456, 20, 50304),
}  # fmt: skip
SHARES = {"tiny": 40, "small": 35, "medium": 19, "large": 5, "half a billion": 1}
# 40M to 1.3B parameters: on a GPU smaller ones would measure the allocator's granularity of 20 MiB
CUDA_SHAPES: dict[str, tuple[int, int, int, int]] = {
    "small": (512, 1376, 8, 32000), "medium": (1024, 2816, 16, 32000), "large": (2048, 5632, 22, 32000),
}  # fmt: skip
CUDA_SHARES, CUDA_LENGTHS = {"small": 45, "medium": 45, "large": 10}, (512, 1000, 2048)
CUDA_TOGETHERS = (1, 4, 16)  # experts


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted memory beside real memory")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--count", type=int, default=300, help="configurations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=24, help="how many of them also in a fresh process")
    parser.add_argument("--preferences", action="store_true", help="objectives that learn from preferences (on a CPU)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--jobs", type=int, default=1, help="on a GPU: processes that measure side by side")
    parser.add_argument("--seconds", type=float, default=1e9, help="on a GPU: no configuration is begun after these")
    parser.add_argument("--record", type=Path, help="on a GPU: only measure, into this file")
    parser.add_argument("--known", type=Path, help="on a GPU: such a file, whose configurations are not measured again")
    parser.add_argument("--judge", type=Path, help="anywhere: hold plans against such a file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if options.preferences and not on_cpu:
        parser.error("--preferences is for a CPU")
    from lowmem_ft.core.host import prefer_short_waits

    os.environ.update({"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"})
    os.environ.update({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    prefer_short_waits()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    warnings.simplefilter("ignore")
    if options.child:
        print(json.dumps(train_here(json.loads(options.child.read_text()))))
        return
    if options.share:
        record_share(options, options.record)
        return
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-accuracy-") as name:
        recorded = options.judge or options.record or Path(name) / "recorded.jsonl"
        if not on_cpu and not options.judge:
            record_cuda(options, recorded)
        if options.record:
            return
        result = benchmark(options) if on_cpu and not options.judge else judge_cuda(recorded, options.threads)
    from common import leave  # beside this file, where scripts are run

    leave(result, options.out)


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tests.unit.planner.sampler import compare, draw, preferring

    generator, found, processes = random.Random(options.seed), [], []
    every = max(1, options.count // max(1, options.processes))
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-accuracy-") as name:
        for index in range(options.count):
            size = generator.choices(list(SHARES), list(SHARES.values()))[0]
            drawn = draw(generator, SHAPES[size])
            drawn = preferring(drawn, generator) if options.preferences else drawn
            gc.collect()
            gc.freeze()  # imports are never garbage, and each measurement begins with a collection
            start = time.perf_counter()
            one = {"size": size, **compare(drawn, Path(name))}
            found.append(one)
            if index % every == 0 and len(processes) < options.processes:
                one["process"] = in_process(one["config"], Path(name))
                processes.append(one["process"])
            print(
                f"{index:4} {one['train_error']:+8.3%} {one['eval_error']:+8.3%} "
                f"{one.get('process', {}).get('error', float('nan')):+8.2%} {time.perf_counter() - start:5.1f} s "
                f"{size:15} {one['architecture']:12} {json.dumps(one['sections'])}",
                file=sys.stderr,
                flush=True,
            )
    for one in found:
        one["config"]["model"] = one["architecture"]  # and not a folder of this machine
        one["config"].pop("output", None)
    worst = sorted(found, key=lambda one: min(one["train_error"], 0.0) or -one["train_error"])[:10]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "threads": options.threads, "torch": torch.__version__},
        "settings": {name: getattr(options, name) for name in ("count", "seed", "processes", "preferences")},
        "train": distribution([one["train_error"] for one in found]),
        "eval": distribution([one["eval_error"] for one in found]),
        "process": distribution([one["error"] for one in processes]),
        "process_over_bytes": [one["planned"] - one["measured"] for one in processes],
        "worst": worst,
        "configurations": found,
    }


def record_cuda(options: argparse.Namespace, out: Path) -> None:
    """Write a line of JSON to `out` for each configuration: what was drawn, and what the card took for it.

    Further processes share the configurations, each with models and an allocator of its own.
    """
    parts = [out.with_name(f"{out.name}.{job}") for job in range(options.jobs)]
    command = [sys.executable, __file__, "--device", options.device, "--count", str(options.count)]
    command += ["--known", str(options.known)] if options.known else []
    command += ["--seed", str(options.seed), "--seconds", str(options.seconds), "--threads", str(options.threads)]
    children = [
        subprocess.Popen([*command, "--record", str(part), "--share", f"{job}/{options.jobs}"])
        for job, part in enumerate(parts)
    ]
    failed = [child.args for child in children if child.wait() != 0]
    with out.open("w", encoding="utf-8") as file:
        for part in parts:
            if part.exists():
                file.write(part.read_text(encoding="utf-8"))
                part.unlink()
    if failed:
        raise SystemExit(f"failed: {failed}")


def cuda_configurations(
    seed: int, shapes: Mapping[str, tuple[int, int, int, int]] = CUDA_SHAPES
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Without end: the name of a shape, and what is drawn for it."""
    from tests.unit.planner.sampler import draw

    generator = random.Random(seed)
    while True:
        size = generator.choices(list(CUDA_SHARES), list(CUDA_SHARES.values()))[0]
        yield size, draw(generator, shapes[size], CUDA_LENGTHS, CUDA_TOGETHERS)


def record_share(options: argparse.Namespace, out: Path) -> None:
    """What `record_cuda` says, of one process's share."""
    import torch
    import transformers

    from lowmem_ft.core.errors import LowMemError
    from lowmem_ft.planner.alloc_conf import expandable_segments
    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.verify import FullBatches
    from tests.unit.planner.on_cuda import measure, packed
    from tests.unit.planner.sampler import prepared

    begin, (own, jobs) = time.monotonic(), map(int, options.share.split("/"))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    known = {json.loads(line)["index"] for line in recorded_lines(options.known)} if options.known else set()
    with out.open("w", encoding="utf-8") as file:
        for index, (size, drawn) in enumerate(itertools.islice(cuda_configurations(options.seed), options.count)):
            if index % jobs != own or index in known:
                continue
            if time.monotonic() - begin > options.seconds:
                return
            folder = Path(tempfile.mkdtemp(prefix="lowmem-ft-accuracy-"))
            # as in a process of its own, but that kernels stay that others loaded: so the device is asked each time
            gc.collect()
            torch.cuda.empty_cache()
            torch._C._cuda_clearCublasWorkspaces()
            device = find_device(options.device)
            one: dict[str, Any] = {"index": index, "size": size, "device": device.to_dict(), **drawn}
            one |= {"expandable_segments": expandable_segments(), "versions": versions}
            try:
                config, policy = prepared(drawn, folder, device=options.device)
                batches = FullBatches(config, policy, vocabulary=100)
                parts = zip(("first", "later", "before"), measure(config, policy, device, batches), strict=True)
                one |= {"loss_tokens": batches[0].loss_tokens, **{name: packed(part) for name, part in parts}}
            except (RuntimeError, LowMemError) as error:  # memory that ran out is a RuntimeError, too
                one["failed"] = str(error)[:1000]
            finally:
                shutil.rmtree(folder)
            file.write(json.dumps(one) + "\n")
            file.flush()
            print(f"{index:4} {time.monotonic() - begin:6.1f} s {size:8} {drawn['architecture']}", file=sys.stderr)


def judge_cuda(recorded: Path, threads: int) -> dict[str, Any]:
    """What `summary` says of all that was recorded. It needs no card: plans are for the one that `recorded` names."""
    from concurrent.futures import ProcessPoolExecutor

    lines = recorded_lines(recorded)
    wanted, found = json.loads(lines[0])["versions"]["transformers"], importlib.metadata.version("transformers")
    if wanted != found:
        print(f"recorded with transformers {wanted}, judged with {found}: models may differ", file=sys.stderr)
    with ProcessPoolExecutor(threads) as pool:
        judged = list(pool.map(judged_cuda, lines))
    judged.sort(key=lambda one: one["index"])
    device = json.loads(lines[0])["device"]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "device": device},
        **summary(judged),
    }


def recorded_lines(file: Path) -> list[str]:
    """One for each configuration; the file may be compressed (`.gz`)."""
    content = file.read_bytes()
    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8").splitlines()


def judged_cuda(line: str) -> dict[str, Any]:
    """A recorded configuration beside its plan."""
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.planner.device import Device
    from tests.models import tiny_config
    from tests.unit.planner.on_cuda import judge, predict, unpacked
    from tests.unit.planner.sampler import policy_of, settings_of

    one = json.loads(line)
    device = Device(**one.pop("device"))
    one.pop("before", None)
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    os.environ["PYTORCH_ALLOC_CONF"] = f"expandable_segments:{one.pop('expandable_segments')}"  # as recorded
    if "failed" not in one:
        with tempfile.TemporaryDirectory(prefix="lowmem-ft-accuracy-") as name:
            tiny_config(one["architecture"], **settings_of(one)).save_pretrained(name)
            config = RunConfig.from_dict({"model": name, **one["sections"]})
            policy = policy_of(config, one["shape"][2])
            predicted = predict(config, policy, device, loss_tokens=one.pop("loss_tokens"))
            one |= judge(predicted, unpacked(one.pop("first")), unpacked(one.pop("later")))
    print(f"{one['index']:4} {describe_cuda(one)}", file=sys.stderr, flush=True)
    return one


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Distributions of the errors, and what the scratch table lacks most."""
    judged = [one for one in found if "events" in one]
    by_op: Counter[str] = Counter()
    scratch: Counter[str] = Counter()
    for one in judged:
        by_op.update({op: missing + surplus for op, (missing, surplus) in one["by_op"].items()})
        scratch.update({f"{op} {pieces}": times for op, pieces, times in one["scratch"]})
    return {
        **{
            name: distribution([one[f"{name}_error"] for one in judged if f"{name}_error" in one])
            for name in ("allocated", "reserved", "process")
        },
        "failed": len(found) - len(judged),
        "differing_events": [one["events"]["differing"] for one in judged],
        "same_events": [one["events"]["equal"] for one in judged],
        "bytes_by_op": dict(by_op.most_common(20)),
        "scratch": dict(scratch.most_common(40)),
        "configurations": list(found),
    }


def describe_cuda(one: dict[str, Any]) -> str:
    """One line of the table."""
    names = ("allocated_error", "reserved_error", "process_error")
    errors = " ".join(f"{one.get(name, float('nan')):+8.2%}" for name in names)
    events = one.get("events", {"differing": "-", "equal": "-"})
    differing = f"{events['differing']:>6} events differ, {events['equal']:>6} do not"
    return f"{errors} {differing} {one['architecture']:12} {one['size']}"


def distribution(errors: list[float]) -> dict[str, Any]:
    """Of predicted / measured - 1."""
    ordered = sorted(errors)
    if not ordered:
        return {"count": 0}

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return {
        "count": len(ordered),
        "under": sum(error < 0 for error in ordered),
        **{f"{share:.0%}": at(share) for share in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)},
        "median": statistics.median(ordered),
    }


def in_process(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Planned and measured bytes of a process that does nothing else."""
    file = folder / "config.json.part"
    file.write_text(json.dumps(config))
    done = subprocess.run([sys.executable, __file__, "--child", str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train_here(data: dict[str, Any]) -> dict[str, Any]:
    """Plan and train, as `lowmem-ft train` does: two full steps, and then with rows of all lengths, of other tokens."""
    from lowmem_ft.core.host import prefer_huge_pages, release_freed_memory

    prefer_huge_pages()
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.planner.simulate import mismatched_of
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.planner.verify import FullBatches
    from lowmem_ft.runtime.memory import process_peak_bytes
    from lowmem_ft.step import train_step
    from tests.unit.planner.sampler import of_every_length

    config = RunConfig.from_dict(data)
    plan = make_plan(config)
    ready = assemble(config, plan.policy, torch.device("cpu"))
    batches = FullBatches(config, plan.policy, vocabulary=100)
    for step in itertools.chain([batches, batches], of_every_length(config, plan.policy)):
        release_freed_memory()  # as a run does
        train_step(ready, step, lr=1e-4, mismatched=mismatched_of(config, step))
    planned, measured = plan.predicted.process_peak_bytes, process_peak_bytes()
    base = plan.device["process_bytes"]
    return {
        "planned": planned, "measured": measured, "error": planned / measured - 1, "baseline": base,
        "allocated": plan.predicted.allocated_peak_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
