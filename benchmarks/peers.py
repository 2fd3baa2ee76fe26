"""lowmem-ft beside transformers + peft + bitsandbytes: the same model, batches and first adapter, on the CPU.

The peer uses gradient checkpointing, as its documentation has it. Ours trains once with activations recomputed in
backward and once with activations kept; for comparison the peer runs with activations kept too, which has no target.
All train in alternating fresh processes. Each ratio is the median over the rounds of ours / peer, taken of processes
that ran one after the other, so that a slow drift of the machine cancels out.

Loss curves are held against the peer's own code in float32 throughout. How far stock ways to compute in bfloat16 stray
from that is the bf16 noise: the peer's, and that of a model in which nothing but the adapter is float32. Where the CPU
does not multiply bf16 both run in float32, and the noise is that of the peer with the output of each of its modules
rounded to bfloat16, which is where a bf16 model rounds. Ours may stray NOISE_FACTOR times as far.

    python benchmarks/peers.py --out benchmarks/results/peers.json
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import psutil

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Mode: TypeAlias = Literal["recompute", "keep"]
Train: TypeAlias = "Callable[[Tensor], float]"  # token ids (sequences, length) -> loss before this step's update
Result: TypeAlias = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
SEED, SEQUENCES, LR, RANK, ALPHA, GRAD_CLIP = 0, 4, 1e-3, 16, 32, 1.0
MICRO_BATCHES = 2  # ours, as the planner would choose to save memory: the step's result is the same
NOISE_FACTOR = 2.0  # the noise itself is known from one curve only
TARGETS: dict[Mode, dict[str, float]] = {  # largest ours / peer
    "recompute": {"memory_ratio": 0.20, "time_ratio": 1.05},
    "keep": {"memory_ratio": 0.50, "time_ratio": 1 / 1.3},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama in the words of its config: 134.1M parameters, with the adapter 136.9M."""

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 32000
    max_position_embeddings: int = 512  # as long is every sequence


FULL = Shape()
# bitsandbytes on the CPU dequantizes rows wrongly whose length is no multiple of 64, so the peer needs such
QUICK = Shape(hidden_size=192, intermediate_size=256, num_hidden_layers=2, vocab_size=512, max_position_embeddings=32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What one process does. `folder` holds the `model` and the first `adapter`."""

    side: str
    mode: Mode
    folder: Path
    shape: Shape
    steps: int


def write_model(task: Task) -> Result:
    """Write random bf16 weights, and a fresh adapter in peft's format whose values bf16 holds exactly."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**asdict(task.shape), tie_word_embeddings=False)).to(torch.bfloat16)
    model.save_pretrained(task.folder / "model")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).to(torch.bfloat16)
    adapted.save_pretrained(task.folder / "adapter")
    trainable, total = adapted.get_nb_trainable_parameters()
    return {"parameters": total - trainable, "trainable_parameters": trainable}


def ours(task: Task) -> Callable[[], Train]:
    """lowmem-ft: plan, assemble, step."""
    from lowmem_ft.core.host import prefer_huge_pages

    prefer_huge_pages()  # as the command line does
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  otherwise imported when the model is built

    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.data.examples import Example
    from lowmem_ft.data.packing import collate
    from lowmem_ft.planner.solver import make_plan, require_fit
    from lowmem_ft.step import train_step

    seq_len = task.shape.max_position_embeddings
    tokens = SEQUENCES * seq_len
    config = RunConfig.from_dict(
        {
            "model": str(task.folder / "model"),
            "adapter": {"rank": RANK, "alpha": ALPHA, "init": str(task.folder / "adapter")},
            "budget": {"device": "cpu"},
            "data": {"seq_len": seq_len},
            "train": {"tokens_per_step": tokens, "lr": LR, "optimizer": "adamw8bit", "grad_clip": GRAD_CLIP},
            "policy": {
                "activations": task.mode,
                "micro_batch_tokens": tokens // MICRO_BATCHES,
                "compute_dtype": "bfloat16",
            },
        }
    )

    def build() -> Train:
        policy = require_fit(make_plan(config)).policy
        ready = assemble(config, policy, torch.device("cpu"))

        def train(tokens_BT: Tensor) -> float:
            rows = [[Example(row, row)] for row in tokens_BT.tolist()]
            size = max(1, policy.micro_batch_tokens // seq_len)
            batches = [collate(rows[at : at + size], pad_id=0) for at in range(0, len(rows), size)]
            return train_step(ready, batches, lr=LR).loss

        return train

    return build


def peer(task: Task) -> Callable[[], Train]:
    """transformers + peft + bitsandbytes, as their documentation shows it.

    Three sides are references for the losses: `float32` reads and computes everything in float32; `bfloat16` leaves out
    `prepare_model_for_kbit_training`, which casts embeddings, norms and head (and so all hidden states) to float32;
    `rounded` is the peer, every module of which hands on bfloat16 values.

    The peer's 4-bit layers compute in bfloat16 where the CPU multiplies it. Elsewhere (AVX2) bitsandbytes would run
    into PyTorch's own loops, up to 200 times slower, so there they compute in float32, the faster choice for the peer.
    """
    import torch
    import transformers.integrations.bitsandbytes
    import transformers.models.llama.modeling_llama
    import transformers.quantizers.quantizer_bnb_4bit  # noqa: F401  otherwise imported when the model is loaded
    from bitsandbytes.optim import AdamW8bit
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lowmem_ft.quant.products import multiplies

    dtype = torch.float32 if task.side == "float32" else torch.bfloat16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if multiplies(dtype) else torch.float32,
    )  # fmt: skip

    def build() -> Train:
        model = AutoModelForCausalLM.from_pretrained(task.folder / "model", quantization_config=nf4, dtype=dtype)
        model.config.use_cache = False
        if task.side != "bfloat16":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=task.mode == "recompute")
        model = PeftModel.from_pretrained(model, task.folder / "adapter", is_trainable=True).train()
        if task.side == "rounded":
            for module in model.modules():
                module.register_forward_hook(round_output)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AdamW8bit(trained, lr=LR, weight_decay=0.0)

        def train(tokens_BT: Tensor) -> float:
            loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return train

    return build


def round_output(module: Module, args: tuple[Any, ...], output: Any) -> Any:
    """A forward hook: the values that bfloat16 would hold, in the dtype that they came in."""
    import torch

    if isinstance(output, torch.Tensor) and output.is_floating_point():
        return output.to(torch.bfloat16).to(output.dtype)
    return output


def measure(task: Task) -> Result:
    """Train in this process. Sizes in bytes above what the imports take, times in seconds without the first step's."""
    build = ours(task) if task.side == "ours" else peer(task)  # imports everything that the side uses
    import torch

    from lowmem_ft.runtime.memory import process_bytes, process_peak_bytes

    # words in text are about as frequent as the inverse of their rank, so there is something to learn
    frequency_V = 1.0 / torch.arange(1, task.shape.vocab_size + 1)
    shape = torch.Size((task.steps, SEQUENCES, task.shape.max_position_embeddings))
    tokens_N = torch.multinomial(frequency_V, shape.numel(), True, generator=torch.Generator().manual_seed(SEED))
    baseline = process_bytes()
    train = build()
    loaded = process_bytes()
    losses, seconds = [], []
    for tokens_BT in tokens_N.view(shape):
        start = time.perf_counter()
        losses.append(train(tokens_BT))
        seconds.append(time.perf_counter() - start)
    return {
        "step_seconds": statistics.median(seconds[1:]),
        "peak_bytes": process_peak_bytes() - baseline,
        "loaded_bytes": loaded - baseline,
        "baseline_bytes": baseline,
        "seconds": seconds[1:],
        "losses": losses,
    }


def run(side: str, mode: Mode, folder: Path, options: argparse.Namespace) -> Result:
    """What a fresh process prints as its last line."""
    command = [sys.executable, __file__, "--child", side, "--mode", mode, "--folder", str(folder)]
    command += ["--steps", str(options.steps), *(["--quick"] if options.quick else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    limits = {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env={**os.environ, **limits, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{side} ({mode}) failed:\n{done.stderr[-4000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    if "losses" in result:
        figures = f"{result['step_seconds']:8.3f} s/step {result['peak_bytes'] / 2**20:9.1f} MiB"
        losses = f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
        print(f"{mode:9} {side:8} {figures}  {losses}", file=sys.stderr, flush=True)
    return result


def compare(ours: list[Result], peer: list[Result], targets: dict[str, float]) -> Result:
    """Medians of both sides, ours / peer, and which targets are reached."""
    result: Result = {
        side: {name: statistics.median(one[name] for one in done) for name in ("step_seconds", "peak_bytes")}
        for side, done in (("ours", ours), ("peer", peer))
    }
    for name, figure in (("memory_ratio", "peak_bytes"), ("time_ratio", "step_seconds")):
        result[name] = statistics.median(one[figure] / other[figure] for one, other in zip(ours, peer, strict=True))
    result["speedup"] = 1 / result["time_ratio"]
    result["targets"] = {name: {"at_most": most, "reached": result[name] <= most} for name, most in targets.items()}
    return result


def compare_losses(curves: dict[str, list[float]], float32: list[float], stock: dict[str, list[float]]) -> Result:
    """How far each curve strays from the float32 one (nats), and whether ours stays within the noise of the others."""

    def distance(curve: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(curve, float32, strict=True))

    distances = {name: distance(curve) for name, curve in (curves | stock).items()}
    furthest = max(far for name, far in distances.items() if name.startswith("ours"))
    noise = max(far for name, far in distances.items() if not name.startswith("ours"))
    return {
        "method": f"max over steps of |loss - float32 loss|; ours at most {NOISE_FACTOR:g} x the largest of the others",
        "float32": float32,
        **stock,
        "distance_to_float32": distances,
        "noise": noise,
        "limit": NOISE_FACTOR * noise,
        "ours": furthest,
        "within_noise": furthest <= NOISE_FACTOR * noise,
    }


def benchmark(options: argparse.Namespace) -> Result:
    """Everything that the JSON file says."""
    sides: list[tuple[str, Mode]] = [("ours", "recompute"), ("peer", "recompute"), ("ours", "keep"), ("peer", "keep")]
    runs: dict[str, list[Result]] = {f"{side}, {mode}": [] for side, mode in sides}
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-peers-") as name:
        folder = Path(name)
        parameters = run("write", "keep", folder, options)
        for _ in range(options.rounds):
            for side, mode in sides:
                runs[f"{side}, {mode}"].append(run(side, mode, folder, options))
        float32, noise = references(folder, options)
    modes: dict[str, Result] = {
        mode: compare(runs[f"ours, {mode}"], runs["peer, recompute"], TARGETS[mode]) for mode in TARGETS
    }
    modes["keep, peer too"] = compare(runs["ours, keep"], runs["peer, keep"], {})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    peers = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_name(),
            "cores": psutil.cpu_count(logical=False),
            "memory_bytes": psutil.virtual_memory().total,
            "system": platform.platform(),
        },
        "versions": {
            "lowmem_ft": project["version"],
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in peers},
        },
        "settings": {
            **{name: getattr(options, name) for name in ("rounds", "steps", "threads", "quick")},
            **{
                "seed": SEED,
                "sequences": SEQUENCES,
                "micro_batches": MICRO_BATCHES,
                "lr": LR,
                "grad_clip": GRAD_CLIP,
                "optimizer": "adamw8bit",
            },
            **{"rank": RANK, "alpha": ALPHA},
            **asdict(options.shape),
            **parameters,
        },
        "modes": modes,
        "losses": compare_losses(curves_of(runs), float32, noise),
        "runs": runs,
    }


def references(folder: Path, options: argparse.Namespace) -> tuple[list[float], dict[str, list[float]]]:
    """The float32 curve, and the one whose distance from it is the noise."""
    # a stock bf16 model would run for hours where the CPU does not multiply bf16
    stock = "bfloat16" if multiplies_bfloat16() else "rounded"
    float32, noisy = (run(side, "keep", folder, options)["losses"] for side in ("float32", stock))
    return float32, {stock: noisy}


def curves_of(runs: dict[str, list[Result]]) -> dict[str, list[float]]:
    return {f"{name}, round {at}": one["losses"] for name, done in runs.items() for at, one in enumerate(done, 1)}


def compare_losses_again(file: Path, options: argparse.Namespace) -> Result:
    """What `file` holds, its curves held against references that run now (on the same kind of machine)."""
    before: Result = json.loads(file.read_text(encoding="utf-8"))
    options.steps = before["settings"]["steps"]
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-peers-") as name:
        run("write", "keep", Path(name), options)
        float32, noise = references(Path(name), options)
    losses = compare_losses(curves_of(before["runs"]), float32, noise)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**before, "losses": {"date": date, **losses}}


def multiplies_bfloat16() -> bool:
    import torch

    from lowmem_ft.quant.products import multiplies

    return multiplies(torch.bfloat16)


def cpu_name() -> str:
    """The processor's model, which `platform` does not tell on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description="lowmem-ft beside transformers + peft + bitsandbytes, on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side and mode")
    parser.add_argument("--steps", type=int, default=8, help="of each process; the first one warms up and has no time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument(
        "--losses", type=Path, help="measure the noise of the losses in this result again, nothing else"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it runs")
    for internal in ("--child", "--mode", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2 or options.rounds < 1:
        parser.error("at least 2 steps, of which the first warms up, and 1 round are needed")
    options.shape = QUICK if options.quick else FULL
    if options.child:
        folder, shape = Path(options.folder), options.shape
        task = Task(side=options.child, mode=options.mode, folder=folder, shape=shape, steps=options.steps)
        print(json.dumps(write_model(task) if task.side == "write" else measure(task)))
        return
    result = benchmark(options) if options.losses is None else compare_losses_again(options.losses, options)
    from common import leave  # beside this file, where scripts are run

    leave(result, options.out)


if __name__ == "__main__":
    main()
