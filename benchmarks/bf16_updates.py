"""Ways to update bf16 adapters so that small steps are not lost, each against fp32 adapters, on the embedded model.

The reference is peft (which holds and computes adapters in fp32) with torch's AdamW or bitsandbytes' AdamW8bit. All
runs start from the same adapter and see the same batches. `plain` rounds each update to bf16 (as bitsandbytes does);
`stochastic` rounds it up or down by chance; `kahan` keeps the rest of each rounding in a bf16 compensation; `master`
keeps an fp32 copy; `split` (what `lowmem_ft.runtime.optim.AdamW` does) keeps the lower 16 bits of an fp32 number whose
upper 16 are the parameter. `order` is the reference again with every micro-batch split in two: by how much rounding
alone moves the result.

    python benchmarks/bf16_updates.py            # writes benchmarks/results/bf16_updates.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_ft.adapters.inject import inject_lora, trainable_parameters
from lowmem_ft.data.examples import read_examples
from lowmem_ft.data.packing import Batch, collate
from lowmem_ft.runtime.gradients import GradientAccumulator
from lowmem_ft.runtime.head import head_of
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.step import eval_step, train_step

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "lowmem_ft" / "assets"
RANK, ROWS = 16, 8
# bytes per parameter beside the bf16 parameter itself and the two moments
EXTRA_BYTES = {"plain": 0, "stochastic": 0, "kahan": 2, "split": 2, "master": 4}


class Shadowed:
    """The package's AdamW on fp32 copies of bf16 parameters, which `load` makes and `store` rounds again."""

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, bits: Any, scheme: str) -> None:
        self.parameters, self.scheme = parameters, scheme
        self.shadows = [nn.Parameter(p.detach().float()) for p in parameters]
        self.rests = [torch.zeros_like(p) for p in parameters]
        self.inner = AdamW(self.shadows, lr=lr, bits=bits)
        self.generator = torch.Generator().manual_seed(0)

    def set_lr(self, lr: float) -> None:
        self.inner.set_lr(lr)

    @torch.no_grad()
    def step(self, *, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        if self.scheme != "master":
            for parameter, shadow, rest in zip(self.parameters, self.shadows, self.rests, strict=True):
                shadow.copy_(parameter.float() + rest.float())
        grads = {shadow: gradient(p) for p, shadow in zip(self.parameters, self.shadows, strict=True)}
        self.inner.step(gradient=grads.__getitem__)
        for parameter, shadow, rest in zip(self.parameters, self.shadows, self.rests, strict=True):
            if self.scheme == "stochastic":
                noise = torch.randint(0, 1 << 16, shadow.shape, generator=self.generator, dtype=torch.int32)
                cut = (shadow.view(torch.int32) + noise) & -(1 << 16)
                parameter.copy_(cut.view(torch.float32))
            else:
                parameter.copy_(shadow)
            if self.scheme == "kahan":
                rest.copy_(shadow - parameter.float())


class Reference:
    """torch's or bitsandbytes' own optimizer on fp32 parameters."""

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, bits: int) -> None:
        kind = torch.optim.AdamW if bits == 32 else bitsandbytes.optim.AdamW8bit
        self.parameters, self.inner = parameters, kind(parameters, lr=lr, weight_decay=0.0)

    def set_lr(self, lr: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr

    def step(self, *, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        for parameter in self.parameters:
            found = gradient(parameter)
            parameter.grad = None if found is None else found.clone()
        self.inner.step()
        self.inner.zero_grad()


def batches(file: str, tokenizer: Any, size: int, count: int) -> list[Batch]:
    examples, _ = read_examples(ASSETS / file, tokenizer, seq_len=256)
    return [collate([[e] for e in examples[i * size : (i + 1) * size]], pad_id=2) for i in range(count)]


def train(scheme: str, *, bits: Any, lr: float, steps: int, tokenizer: Any) -> dict[str, Any]:
    """Train one adapter; its held-out loss and its weights (the effective update B A of every layer)."""
    model: Any = AutoModelForCausalLM.from_pretrained(ASSETS / "doclm-7m", dtype=torch.bfloat16)
    torch.manual_seed(0)
    if scheme in ("fp32", "order"):
        start = AutoModelForCausalLM.from_pretrained(ASSETS / "doclm-7m", dtype=torch.bfloat16)
        inject_lora(start, rank=RANK, alpha=RANK)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear")
        model = peft.get_peft_model(model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter, (_, own) in zip(parameters, trainable_parameters(start), strict=True):
            parameter.data.copy_(own)
    else:
        inject_lora(model, rank=RANK, alpha=RANK)
        parameters = [p for _, p in trainable_parameters(model)]
    optimizer: Any
    if scheme in ("fp32", "order"):
        optimizer = Reference(parameters, lr=lr, bits=bits)
    elif scheme == "split":
        optimizer = AdamW(parameters, lr=lr, bits=bits)
    else:
        optimizer = Shadowed(parameters, lr=lr, bits=bits, scheme=scheme)
    ready = SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
        head=head_of(model),
        optimizer=optimizer,
        accumulator=GradientAccumulator(parameters),
        scaler=None,
        grad_clip=1.0,
        loss_chunk_tokens=256,
    )
    rows = ROWS // 2 if scheme == "order" else ROWS
    micro = batches("whatis-train.jsonl", tokenizer, rows, steps * ROWS // rows)
    per_step = ROWS // rows
    began = time.perf_counter()
    for step in range(steps):
        train_step(ready, micro[step * per_step : (step + 1) * per_step], lr=lr)
    seconds = time.perf_counter() - began
    sums = [eval_step(ready, batch) for batch in batches("whatis-eval.jsonl", tokenizer, 50, 6)]
    weights = [p.detach().float() for p in parameters]
    updates = [b @ a for a, b in zip(weights[::2], weights[1::2], strict=True)]
    return {
        "loss": sum(it.loss for it in sums) / sum(it.loss_tokens for it in sums),
        "seconds_per_step": seconds / steps,
        "updates": updates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bf16_updates.json")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "doclm-7m")
    rows = []
    for bits, lr in ((8, 2e-3), (8, 2e-4), (32, 2e-3), (32, 2e-4)):
        settings = {"bits": bits, "lr": lr, "steps": arguments.steps, "tokenizer": tokenizer}
        reference = train("fp32", **settings)
        size = torch.stack([u.norm() for u in reference["updates"]]).norm()
        for scheme in ("order", *EXTRA_BYTES):
            result = train(scheme, **settings)
            apart = torch.stack([(a - b).norm() for a, b in zip(result["updates"], reference["updates"], strict=True)])
            rows.append(
                {
                    "scheme": scheme,
                    "optimizer_bits": bits,
                    "lr": lr,
                    "extra_bytes_per_parameter": EXTRA_BYTES.get(scheme),
                    "held_out_loss": result["loss"],
                    "held_out_loss_fp32": reference["loss"],
                    "loss_difference_percent": 100 * (result["loss"] / reference["loss"] - 1),
                    "update_distance_percent": 100 * float(apart.norm() / size),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "what": "held-out answer loss after training bf16 adapters, against fp32 adapters (peft)",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU thread(s)",
        "versions": {m.__name__: m.__version__ for m in (torch, bitsandbytes, peft)},
        "model": "doclm-7m",
        "steps": arguments.steps,
        "rows_per_step": ROWS,
        "rank": RANK,
        "results": rows,
    }
    from common import leave  # beside this file, where scripts are run

    leave(record, arguments.out)


if __name__ == "__main__":
    main()
