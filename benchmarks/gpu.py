"""On a CUDA card: what streaming costs, what experts gain that work together, and how peers do on the same model,
tokens and rank.

Weights are random, in the shape of Llama-3.1-8B, written once; the driver (NVML) says what the whole process took.

    python benchmarks/gpu.py --folder /tmp/lowmem-ft --out benchmarks/results/gpu_h200.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from common import keep, leave, stamp  # beside this file
from gpu_steps import LR, our_step, peaks_of, timed, watched
from limits import SHAPES
from random_weights import write_model

MODEL = "Llama-3.1-8B"
QUICK = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 3, "vocab_size": 8192,
}  # fmt: skip
TIMED_BLOCKS = 8  # of the slowdown by streaming
RANK, ALPHA = 16, 32
PARTS = ("peers", "streaming", "experts", "steps")
MIXTURE = "Qwen3-30B-A3B"
PEERS = ("ours, recompute", "ours, fastest", "peer", "peer with Liger", "TRL", "TRL with Liger", "Unsloth")
PEER_STEPS = 4  # after the first
CEILING = 8192  # of the square matrices whose product says what the card can do
BATCHES = ((2, 2048), (1, 8192))  # rows and positions of the comparison with peers
STREAMED_TOKENS = (512, 2048, 4096, 16384)
DRAWN_TOKENS = 2048  # whose streamed step is recorded for timeline_plot.py
GAP_US = 5  # busy times of a stream that are closer are one
Keep = Callable[[Any], None]  # told what a part has found by now


def configured(model: Path, rows: int, length: int, *, device: str, packing: bool = False, **sections: Any) -> Any:
    from lowmem_ft.core.config import RunConfig

    return RunConfig.from_dict(
        {
            "model": str(model), "output": str(model.parent / "run"), "adapter": {"rank": RANK, "alpha": ALPHA},
            "data": {"seq_len": length, "packing": packing}, "train": {"tokens_per_step": rows * length, "lr": LR},
            **sections, "budget": {"device": device, **sections.get("budget", {})},
        }
    )  # fmt: skip


def busy_times(step: Callable[[], float]) -> list[list[Any]]:
    """When the card's streams are at work in a step: [what, stream, begin, end], in microseconds; on a CPU none."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds, acc_events=True) as watching:
        step()
    found: list[list[Any]] = []
    newest: dict[tuple[str, int], list[Any]] = {}
    on_card = [it for it in watching.events() if str(it.device_type).endswith("CUDA")]
    for it in sorted(on_card, key=lambda it: it.time_range.start):
        what = "copy" if it.name.startswith("Memcpy") else "compute"
        begin, end = it.time_range.start, it.time_range.end
        last = newest.get((what, it.device_resource_id))
        if last is not None and begin - last[3] < GAP_US:
            last[3] = max(last[3], end)
        else:
            found.append([what, it.device_resource_id, begin, end])
            newest[what, it.device_resource_id] = found[-1]
    return found


def streaming(folder: Path, device: Any, options: argparse.Namespace, kept: Keep) -> None:
    """A step of a few blocks with all of them streamed from the host, beside a resident one."""
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.plan import Policy
    from lowmem_ft.planner.verify import FullBatches

    changes = {"num_hidden_layers": TIMED_BLOCKS, "vocab_size": 8192}
    model, found = write_model(folder / "blocks", {**SHAPES[MODEL], **changes}, device=device.type), []
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
        batches = list(FullBatches(config, policy, vocabulary=options.vocabulary))
        runs = [timed(our_step(ready, batches), device, steps=5) for ready in readies]
        resident, streamed_seconds = (run["step_seconds"] for run in runs)
        found.append(
            {
                "tokens": count, "resident_seconds": resident, "streamed_seconds": streamed_seconds,
                "slowdown": streamed_seconds / resident, "equal": runs[0]["losses"] == runs[1]["losses"],
            }
        )  # fmt: skip
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        if count == DRAWN_TOKENS:
            found[-1]["timeline"] = busy_times(our_step(readies[-1], batches))
        kept(found)
        del readies
        gc.collect()


def experts(folder: Path, device: Any, options: argparse.Namespace, kept: Keep) -> None:
    """Steps of a few blocks of a mixture whose experts work one by one, and several at once, beside their plans."""
    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.planner.verify import FullBatches

    quick = {**QUICK, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4} if options.quick else {}
    shape = {**SHAPES[MIXTURE], "num_hidden_layers": TIMED_BLOCKS, "vocab_size": 8192, **quick}
    model, found = write_model(folder / "mixture", shape, device=device.type), []
    for length, together in itertools.product((2048, 16384), (1, None)):
        rows = -(-length // 4096)
        pins = {"micro_batch_tokens": length, **({"experts_together": together} if together else {})}
        config = configured(model, rows, length // rows, device=str(device), policy=pins)
        plan = make_plan(config)
        with watched(device) as peaks:
            ready = assemble(config, plan.policy, device)
            batches = list(FullBatches(config, plan.policy, vocabulary=options.vocabulary))
            times = timed(our_step(ready, batches), device, steps=3)
        found.append(
            {
                "tokens": length, "policy": plan.policy.describe(), **times,
                "tokens_per_second": length / times["step_seconds"],
                "planned_tokens_per_second": plan.predicted.tokens_per_second,
                "peaks": peaks, "planned": peaks_of(plan.predicted),
            }
        )  # fmt: skip
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        kept(found)
        del ready
        gc.collect()


def steps(folder: Path, device: Any, options: argparse.Namespace, kept: Keep) -> None:
    """Where a step's time goes, as PyTorch's profiler tells it."""
    from torch.profiler import ProfilerActivity, profile

    from lowmem_ft.assemble import assemble
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.planner.verify import FullBatches

    model, found = write_model(folder / MODEL, SHAPES[MODEL], device=device.type), []
    for length in (2048, 8192):
        config = configured(model, 1, length, device=str(device))
        plan = make_plan(config)
        ready = assemble(config, plan.policy, device)
        step = our_step(ready, list(FullBatches(config, plan.policy, vocabulary=options.vocabulary)))
        times = timed(step, device, steps=3)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=kinds, acc_events=True) as watching:
            step()
        averages = watching.key_averages()
        on_card = [it for it in averages if str(it.device_type).endswith("CUDA")]
        kernels = [it for it in on_card if not it.is_user_annotation]  # such as the span of an update
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
        kept(found)
        del ready, step
        gc.collect()


def peer_model(folder: Path, device: Any) -> Any:
    """What peers train: NF4 with double quantization, quantized by transformers as it loads."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": str(device)}
    )


def peer_step(model_folder: Path, device: Any, *, liger: bool) -> Any:
    """transformers + peft + bitsandbytes with gradient checkpointing, in bf16 autocast as their Trainer does it."""
    import torch
    from bitsandbytes.optim import PagedAdamW8bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = peer_model(model_folder, device)
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


def trainer_peer(side: str, model_folder: Path, device: Any, tokens_BT: Any) -> dict[str, Any]:
    """TRL's SFTTrainer or Unsloth's, as documented: seconds of the first step and of later ones, and losses."""
    import tempfile

    import torch

    if side == "Unsloth":
        from unsloth import FastLanguageModel  # before TRL, which it patches

        model, tokenizer = FastLanguageModel.from_pretrained(
            str(model_folder), max_seq_length=tokens_BT.shape[1], load_in_4bit=True, dtype=torch.bfloat16
        )
        model = FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )  # fmt: skip
        adapter = None
    else:
        from peft import LoraConfig
        from transformers import AutoTokenizer

        model = peer_model(model_folder, device)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not marks:
                marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.append(time.perf_counter())

    rows = len(tokens_BT)
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output, per_device_train_batch_size=rows, max_steps=PEER_STEPS + 1, learning_rate=LR,
            lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, bf16=True, optim="paged_adamw_8bit",
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, packing=False,
            max_length=tokens_BT.shape[1], use_liger_kernel=side.endswith("Liger"), logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=device.type == "cpu", dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        ids = tokens_BT.tolist() * (PEER_STEPS + 1)
        data = Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]})
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "step_seconds": statistics.median(seconds[1:]),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def matmul_flops(device: Any) -> float:
    """Floating-point operations per second of a large bf16 product, as the card does it in this run."""
    import torch

    size = CEILING if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplied = timed(lambda: 0.0 * len(left @ right), device, steps=20)
    return float(2 * size**3 / multiplied["step_seconds"])


def peer_child(side: str, folder: Path, device: Any, options: argparse.Namespace) -> None:
    """One side of the comparison: loads, says so, and runs when it is told to, so that nobody else is at work then."""
    import torch

    def wait() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    found: list[dict[str, Any]] = []
    if side.startswith("ours"):
        from lowmem_ft.assemble import assemble
        from lowmem_ft.planner.solver import make_plan
        from lowmem_ft.planner.verify import FullBatches

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
                batches = list(FullBatches(config, plan.policy, vocabulary=options.vocabulary))
                one = timed(our_step(ready, batches), device, steps=PEER_STEPS)
            planned = {**peaks_of(plan.predicted), "seconds": plan.predicted.step_seconds}
            one |= {"policy": plan.policy.describe(), "planned": planned}
            found.append({"rows": rows, "length": length, "packing": packing, "peaks": peaks, **one})
            del ready
    else:
        if side == "Unsloth":  # before transformers and peft, which it patches, or it is slower, as it says itself
            with redirect_stdout(sys.stderr):
                import unsloth  # noqa: F401
        by_hand = side.startswith("peer")
        step = peer_step(folder / MODEL, device, liger=side.endswith("Liger")) if by_hand else None
        wait()
        for rows, length in options.batches:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(3, options.vocabulary, (rows, length), generator=generator)
            gc.collect()
            with watched(device) as peaks:
                if step is None:
                    one = trainer_peer(side, folder / MODEL, device, tokens)
                else:
                    there = tokens.to(device)
                    one = timed(functools.partial(step, there), device, steps=PEER_STEPS)
            found.append({"rows": rows, "length": length, "packing": False, "peaks": peaks, **one})
    for one in found:
        one["tokens_per_second"] = one["rows"] * one["length"] / one["step_seconds"]
    print(json.dumps(found), flush=True)


def peers(folder: Path, device: Any, options: argparse.Namespace, kept: Keep) -> None:
    """All sides: they load side by side, and run one after the other."""
    write_model(folder / MODEL, SHAPES[MODEL], device=device.type)
    command = [sys.executable, __file__, "--folder", str(folder), "--device", str(device)]
    command += ["--vocabulary", str(options.vocabulary), *["--quick"] * options.quick]
    command += ["--batches", *(f"{rows}x{length}" for rows, length in options.batches)]

    def begin(side: str) -> subprocess.Popen[str]:
        given = os.environ.get("PYTHONPATH")  # by which what this project needs may be found; TRL lies beside Unsloth
        places = (options.unsloth, given) if side == "Unsloth" else (given, options.unsloth)
        with (folder / f"{side}.log").open("w") as log:
            return subprocess.Popen(
                [*command, "--child", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(str(it) for it in places if it)},
            )  # fmt: skip

    children = {side: begin(side) for side in options.sides if side != "Unsloth" or options.unsloth is not None}
    waiting = {
        side: child.stdout is not None and child.stdout.readline().strip() == "ready"
        for side, child in children.items()
    }
    found: dict[str, Any] = {"matmul_flops": matmul_flops(device)}  # now that nobody is at work
    for side, child in children.items():
        try:
            out, _ = child.communicate("go\n" if waiting[side] else None, timeout=options.seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        found[side] = (
            json.loads(out.splitlines()[-1])
            if child.returncode == 0
            else {"failed": (folder / f"{side}.log").read_text()[-1500:]}
        )
        print(side, json.dumps(found[side])[:1500], file=sys.stderr, flush=True)
        kept(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="peers, streaming and where a step's time goes, on a CUDA card")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=Path, required=True, help="where models and runs go: 20 GB")
    parser.add_argument("--streamed", type=int, nargs="*", default=STREAMED_TOKENS, help="tokens of a micro-batch")
    parser.add_argument("--batches", nargs="*", type=lambda text: tuple(map(int, text.split("x"))), default=BATCHES)
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens are drawn of so many")
    parser.add_argument("--sides", nargs="*", choices=PEERS, default=PEERS, help="who is compared")
    parser.add_argument("--seconds", type=float, default=120.0, help="a peer that takes more is ended")
    parser.add_argument("--unsloth", type=Path, help="the folder in which Unsloth and what it needs are installed")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it runs")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")

    from lowmem_ft.planner.alloc_conf import prefer_expandable_segments

    prefer_expandable_segments()  # as the command line does
    import torch

    device = torch.device(options.device)
    if options.quick:
        SHAPES[MODEL] |= QUICK
    if options.child:
        peer_child(options.child, options.folder, device, options)
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {**stamp(torch.get_num_threads()), "card": name}

    def kept(part: str, found: Any) -> None:
        result[part] = found
        keep(result, options.out)

    todo: Mapping[str, Callable[..., None]] = {
        "peers": peers,
        "streaming": streaming,
        "experts": experts,
        "steps": steps,
    }
    for part in options.parts:
        start = time.perf_counter()
        todo[part](options.folder, device, options, functools.partial(kept, part))
        print(f"{part}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    leave(result, options.out)


if __name__ == "__main__":
    main()
