"""On a CUDA card: what budgets cost, what streaming costs, and how peers do on the same model, tokens and rank.

Weights are random, in the shape of Llama-3.1-8B, written once. Smaller cards are played by the allocator's cap, which
is what a run's budget is; the driver (NVML) says what the whole process took.

    python benchmarks/gpu.py --folder /tmp/lowmem-ft --out benchmarks/results/gpu_h200.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MODEL = "Llama-3.1-8B"
QUICK = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TIMED_BLOCKS = 8  # of the slowdown by streaming
RANK, ALPHA, LR = 16, 32, 1e-4
SHARD = 2 << 30
PARTS = ("peers", "streaming", "budgets", "steps")
PEERS = ("ours, recompute", "ours, fastest", "peer", "peer with Liger")
BATCHES = ((2, 2048), (1, 8192))  # rows and positions of the comparison with peers
STREAMED_TOKENS = (512, 2048, 4096, 16384)
BUDGETS_GIB, BUDGET_TOKENS = (2, 3, 4, 6, 8, 12, 16, 24), 512


def write_model(folder: Path, device: str, **changes: Any) -> Path:
    """A checkpoint with random bf16 weights and the packaged tokenizer, if it is not there yet."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    import torch
    from fit import ASSETS, TOKENIZER
    from limits import SHAPES
    from safetensors.torch import save_file
    from transformers import AutoConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    shape = {**SHAPES[MODEL], **changes}
    config = AutoConfig.for_model(**shape, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: it.shape for name, it in LlamaForCausalLM(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += 2 * shape.numel()
        if size > SHARD and shards[-1]:
            shards.append([])
            size = 2 * shape.numel()
        shards[-1].append(name)

    def write(at: int) -> dict[str, str]:
        tensors = {}
        for name in shards[at]:
            drawn = torch.randn(shapes[name], device=device, dtype=torch.bfloat16).mul_(0.02)
            tensors[name] = (drawn + 1 if name.endswith("norm.weight") else drawn).cpu()
        file = f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return dict.fromkeys(tensors, file)

    with ThreadPoolExecutor(8) as pool:
        where = {name: file for part in pool.map(write, range(len(shards))) for name, file in part.items()}
    for name in TOKENIZER:
        if (ASSETS / "doclm-7m" / name).exists():
            shutil.copy(ASSETS / "doclm-7m" / name, folder)
    index = {"metadata": {"total_size": sum(2 * it.numel() for it in shapes.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def configured(model: Path, rows: int, length: int, *, device: str, packing: bool = False, **sections: Any) -> Any:
    from lowmem_ft.core.config import RunConfig

    return RunConfig.from_dict(
        {
            "model": str(model), "output": str(model.parent / "run"), "adapter": {"rank": RANK, "alpha": ALPHA},
            "data": {"seq_len": length, "packing": packing}, "train": {"tokens_per_step": rows * length, "lr": LR},
            **sections, "budget": {"device": device, **sections.get("budget", {})},
        }
    )  # fmt: skip


@contextmanager
def watched(device: Any) -> Iterator[dict[str, int]]:
    """Peaks of the allocator and of the process while it lasts, in bytes; on a CPU of nothing."""
    import torch

    from lowmem_ft.runtime.memory import cuda_process_bytes

    peaks: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield peaks
    if device.type == "cuda":
        peaks["allocated"], peaks["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        # the pool never shrinks within it, so what is taken at the end is the most
        peaks["process"] = cuda_process_bytes(device.index or 0) or 0


def timed(step: Callable[[], float], device: Any, *, steps: int) -> dict[str, Any]:
    """Seconds of each step after the first, and its losses."""
    import torch

    seconds, losses = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        losses.append(step())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "step_seconds": statistics.median(seconds[1:]),
        "losses": losses,
    }


def our_step(ready: Any, batches: Any) -> Callable[[], float]:
    from lowmem_ft.step import train_step

    return lambda: train_step(ready, batches, lr=LR).loss


def peaks_of(predicted: Any) -> dict[str, int]:
    """What is planned beside what `watched` measures, in bytes."""
    return {name: getattr(predicted, f"{name}_peak_bytes") for name in ("allocated", "reserved", "process", "host")}


def planned_run(config: Any, device: Any, *, steps: int, vocabulary: int) -> dict[str, Any]:
    """Plan, assemble and step as `lowmem-ft train` does, the allocator capped alike."""
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.planner.verify import full_batches
    from lowmem_ft.runtime.budget import capped_allocator

    gc.collect()
    start = time.perf_counter()
    plan = make_plan(config)
    planning = time.perf_counter() - start
    said: dict[str, Any] = {
        "planning_seconds": planning,
        "fits": plan.fits,
        "policy": plan.policy.describe(),
        "budget_bytes": plan.budget["device_bytes"],
        "planned": peaks_of(plan.predicted),
        "planned_seconds": plan.predicted.step_seconds,
    }
    if not plan.fits:
        return said
    try:
        with (
            capped_allocator(device, plan.budget["device_bytes"], beside=plan.device["process_bytes"]),
            watched(device) as peaks,
        ):
            torch.manual_seed(0)
            start = time.perf_counter()
            ready = assemble(config, plan.policy, device)
            said["loading_seconds"] = time.perf_counter() - start
            batches = full_batches(config, plan.policy, vocabulary=vocabulary)
            said |= timed(our_step(ready, batches), device, steps=steps)
        said["peaks"] = peaks
    except torch.OutOfMemoryError as error:
        said["out_of_memory"] = str(error)[:300]
    tokens = config.train.tokens_per_step
    if "step_seconds" in said:
        said["tokens_per_second"] = tokens / said["step_seconds"]
    return said


def budgets(folder: Path, device: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """8B at 512 tokens in each budget, from the smallest on."""
    model, found = write_model(folder / MODEL, device.type), []
    for gib in options.budgets:
        config = configured(model, 1, BUDGET_TOKENS, device=str(device), budget={"memory": int(gib * 2**30)})
        found.append(
            {
                "budget_gib": gib,
                "tokens": BUDGET_TOKENS,
                **planned_run(config, device, steps=4, vocabulary=options.vocabulary),
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def streaming(folder: Path, device: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A step of a few blocks with all of them streamed from the host, beside a resident one."""
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.plan import Policy
    from lowmem_ft.planner.verify import full_batches

    changes = {"num_hidden_layers": TIMED_BLOCKS, "vocab_size": 8192}
    model, found = write_model(folder / "blocks", device.type, **changes), []
    tier: Any = "host" if device.type == "cuda" else "disk"
    for count in options.streamed:
        rows = max(1, count // 4096)
        config, readies = configured(model, rows, count // rows, device=str(device)), []
        for streamed in (0, TIMED_BLOCKS):
            policy = Policy(
                bits=4, quant="nf4", double_quant=True, compute_dtype="bfloat16", micro_batch_tokens=count,
                accumulation=1, resident_blocks=TIMED_BLOCKS - streamed, streamed_blocks=streamed, stream_from=tier,
                keep_blocks=0, recompute_blocks=TIMED_BLOCKS, offload_blocks=0, optimizer="adamw8bit",
                loss_chunk_tokens=512,
            )  # fmt: skip
            torch.manual_seed(0)
            readies.append(assemble(config, policy, device))
        batches = full_batches(config, policy, vocabulary=options.vocabulary)
        runs = [timed(our_step(ready, batches), device, steps=5) for ready in readies]
        resident, streamed_seconds = (run["step_seconds"] for run in runs)
        found.append(
            {
                "tokens": count, "resident_seconds": resident, "streamed_seconds": streamed_seconds,
                "slowdown": streamed_seconds / resident, "equal": runs[0]["losses"] == runs[1]["losses"],
            }
        )  # fmt: skip
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        del readies
        gc.collect()
    return found


def steps(folder: Path, device: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Where a step's time goes, as PyTorch's profiler tells it."""
    from torch.profiler import ProfilerActivity, profile

    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.planner.verify import full_batches

    model, found = write_model(folder / MODEL, device.type), []
    for length in (2048, 8192):
        config = configured(model, 1, length, device=str(device))
        plan = make_plan(config)
        ready = assemble(config, plan.policy, device)
        step = our_step(ready, full_batches(config, plan.policy, vocabulary=options.vocabulary))
        times = timed(step, device, steps=3)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=kinds, acc_events=True) as watching:
            step()
        averages = watching.key_averages()
        kernels = [it for it in averages if str(it.device_type).endswith("CUDA")]
        calls = [it for it in averages if not str(it.device_type).endswith("CUDA")]
        found.append(
            {
                "rows": 1, "length": length, "policy": plan.policy.describe(), **times,
                "kernel_seconds": sum(it.self_device_time_total for it in kernels) / 1e6,
                "kernels": sum(it.count for it in kernels),
                "largest_kernels": [
                    [it.key[:120], it.count, round(it.self_device_time_total / 1e3, 2)]
                    for it in sorted(kernels, key=lambda it: -it.self_device_time_total)[:25]
                ],
                "largest_calls": [
                    [it.key[:80], it.count, round(it.self_cpu_time_total / 1e3, 2)]
                    for it in sorted(calls, key=lambda it: -it.self_cpu_time_total)[:25]
                ],
            }
        )  # fmt: skip
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        del ready, step
        gc.collect()
    return found


def peer_step(model_folder: Path, device: Any, *, liger: bool) -> Any:
    """transformers + peft + bitsandbytes with gradient checkpointing, in bf16 autocast as their Trainer does it."""
    import torch
    from bitsandbytes.optim import PagedAdamW8bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": str(device)}
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    trained = [it for it in model.parameters() if it.requires_grad]
    optimizer = PagedAdamW8bit(trained, lr=LR, weight_decay=0.0)

    def step(tokens_BT: Any) -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peer_child(side: str, folder: Path, device: Any, options: argparse.Namespace) -> None:
    """One side of the comparison: loads, says so, and runs when it is told to, so that nobody else is at work then."""
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.planner.verify import full_batches

    def wait() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    found: list[dict[str, Any]] = []
    if side.startswith("ours"):
        pins = {"policy": {"activations": "recompute"}} if side.endswith("recompute") else {}
        todo = []
        for (rows, length), packing in [*((it, False) for it in options.batches), (options.batches[-1], True)]:
            config = configured(folder / MODEL, rows, length, device=str(device), packing=packing, **pins)
            plan = make_plan(config)
            todo.append((rows, length, packing, config, plan))
        wait()
        for rows, length, packing, config, plan in todo:
            gc.collect()
            with watched(device) as peaks:
                ready = assemble(config, plan.policy, device)
                batches = full_batches(config, plan.policy, vocabulary=options.vocabulary)
                one = timed(our_step(ready, batches), device, steps=4)
            planned = {**peaks_of(plan.predicted), "seconds": plan.predicted.step_seconds}
            one |= {"policy": plan.policy.describe(), "planned": planned}
            found.append({"rows": rows, "length": length, "packing": packing, "peaks": peaks, **one})
            del ready
    else:
        step = peer_step(folder / MODEL, device, liger=side.endswith("Liger"))
        wait()
        for rows, length in options.batches:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(3, options.vocabulary, (rows, length), generator=generator).to(device)
            with watched(device) as peaks:
                one = timed(lambda tokens=tokens: step(tokens), device, steps=4)
            found.append({"rows": rows, "length": length, "packing": False, "peaks": peaks, **one})
    for one in found:
        one["tokens_per_second"] = one["rows"] * one["length"] / one["step_seconds"]
    print(json.dumps(found), flush=True)


def peers(folder: Path, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All sides: they load side by side, and run one after the other."""
    write_model(folder / MODEL, device.type)
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--device",
        str(device),
        "--vocabulary",
        str(options.vocabulary),
    ]
    command += ["--quick"] * options.quick + ["--batches", *(f"{rows}x{length}" for rows, length in options.batches)]
    children = {
        side: subprocess.Popen(
            [*command, "--child", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{side}.log").open("w"),
            text=True,
        )
        for side in PEERS
    }
    found: dict[str, Any] = {}
    waiting = {side: child.stdout.readline().strip() == "ready" for side, child in children.items() if child.stdout}
    for side, child in children.items():
        out, _ = child.communicate("go\n" if waiting[side] else None)
        found[side] = (
            json.loads(out.splitlines()[-1])
            if child.returncode == 0
            else {"failed": (folder / f"{side}.log").read_text()[-1500:]}
        )
        print(side, json.dumps(found[side])[:1500], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="budgets, streaming and peers on a CUDA card")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=Path, required=True, help="where models and runs go: 20 GB")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS_GIB, help="GiB")
    parser.add_argument("--streamed", type=int, nargs="*", default=STREAMED_TOKENS, help="tokens of a micro-batch")
    parser.add_argument("--batches", nargs="*", type=lambda text: tuple(map(int, text.split("x"))), default=BATCHES)
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens are drawn of so many")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it runs")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")

    from lowmem_ft.planner.alloc_conf import prefer_expandable_segments

    prefer_expandable_segments()  # as the command line does
    import limits  # beside this file, where scripts are run
    import torch
    from common import leave, stamp

    device = torch.device(options.device)
    if options.quick:
        limits.SHAPES[MODEL] |= QUICK
    if options.child:
        peer_child(options.child, options.folder, device, options)
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {**stamp(torch.get_num_threads()), "card": name}
    todo: Mapping[str, Callable[..., Any]] = {
        "peers": peers,
        "streaming": streaming,
        "budgets": budgets,
        "steps": steps,
    }
    for part in options.parts:
        start = time.perf_counter()
        try:
            result[part] = todo[part](options.folder, device, options)
        finally:
            print(f"{part}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1))
    leave(result, options.out)


if __name__ == "__main__":
    main()
