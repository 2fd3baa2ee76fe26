"""From how many tokens on streaming weights costs nothing: predicted on the machine's measured profile, and measured.

A few blocks of TinyLlama's shape are trained resident, and with every block read past the page cache, in alternation.
Slower disks than the machine's are played: a read returns no sooner than it would on them. The break-even is the fewest
tokens of those tried from which on a streamed step takes at most `FREE` times as long as a resident one.

    python benchmarks/break_even.py --out benchmarks/results/break_even.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FREE = 1.1
SWEEPS = [(16, 500e6), (4, 150e6), (4, None)]  # bits; bytes per second of a SATA SSD, of a hard disk, of what is here
TOKENS = [64, 128, 192, 256, 384, 512, 768, 1024]
SECONDS = 6.0  # of steps of each kind at least


def play(rate: float) -> None:
    """Let reads of streamed weights take as long as on a disk of so many bytes per second."""
    from lowmem_ft.runtime.tiers import DiskTier

    read = DiskTier._fill

    def slower(self: Any, into: Any, start: int) -> None:
        end = time.perf_counter() + into.numel() / rate
        read(self, into, start)
        time.sleep(max(0.0, end - time.perf_counter()))

    DiskTier._fill = slower  # type: ignore[method-assign]


def compare(model: Path, profile: Path, bits: int, tokens: int) -> dict[str, Any]:
    """Predicted and measured seconds of a step, resident and streamed."""
    import torch
    from fit import TIMED  # beside this file

    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.solver import make_plan
    from lowmem_ft.planner.verify import FullBatches
    from lowmem_ft.step import train_step

    predicted, readies, times = [], [], ([], [])  # type: ignore[var-annotated]
    for resident in (TIMED["num_hidden_layers"], 0):
        config = RunConfig.from_dict(
            {
                "model": str(model), "output": str(model.parent / "run"), "quant": {"bits": bits},
                "data": {"seq_len": tokens}, "train": {"tokens_per_step": tokens},
                "policy": {
                    "activations": "recompute", "micro_batch_tokens": tokens, "resident_blocks": resident,
                    "stream_embeddings": "none", "mlp_tile_tokens": 0,
                },
            }
        )  # fmt: skip
        plan = make_plan(config, device=find_device(str(profile)))
        predicted.append(plan.predicted.step_seconds)
        torch.manual_seed(0)
        batches = list(FullBatches(config, plan.policy, vocabulary=TIMED["vocab_size"]))
        readies.append((assemble(config, plan.policy, torch.device("cpu")), batches))
    end = time.perf_counter() + 2 * SECONDS
    while len(times[1]) < 4 or time.perf_counter() < end:
        for (ready, batches), seconds in zip(readies, times, strict=True):
            start = time.perf_counter()
            train_step(ready, batches, lr=1e-4)
            seconds.append(time.perf_counter() - start)
    measured = [min(seconds[1:]) for seconds in times]
    return {
        "tokens": tokens,
        "predicted": predicted, "seconds": measured,
        "predicted_slowdown": predicted[1] / predicted[0], "slowdown": measured[1] / measured[0],
    }  # fmt: skip


def break_even(found: list[dict[str, Any]], key: str) -> int | None:
    """The fewest tokens from which on all of `key` are at most `FREE`; None where the most tokens cost more."""
    free = None
    for one in reversed(found):
        if one[key] > FREE:
            break
        free = one["tokens"]
    return free


def main() -> None:
    parser = argparse.ArgumentParser(description="from how many tokens on streaming costs nothing, on the CPU")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="per step")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    from common import leave, on_cpu, stamp  # beside this file, where scripts are run
    from fit import MODELS, TIMED
    from random_weights import write_model

    on_cpu(options.threads)

    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.measure import measure
    from lowmem_ft.planner.profile import write_profile
    from lowmem_ft.runtime.tiers import DiskTier

    sweeps, own = [], DiskTier._fill
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-break-even-") as name:
        model = write_model(Path(name) / "blocks", {**MODELS["TinyLlama-1.1B"][0], **TIMED}, device="cpu")
        for at, (bits, rate) in enumerate(SWEEPS):
            profile, path = measure(find_device("cpu")), Path(name) / f"{at}.yaml"
            DiskTier._fill = own  # type: ignore[method-assign]
            if rate is not None:
                play(rate)
                disk = profile.disk_read.model_copy(update={"value": rate, "how": "estimated", "source": "played"})
                profile = profile.model_copy(update={"disk_read": disk})
            write_profile(profile, path)
            found = []
            for tokens in options.tokens:
                found.append(compare(model, path, bits, tokens))
                print(found[-1], file=sys.stderr, flush=True)
            keys = {"predicted_break_even": "predicted_slowdown", "break_even": "slowdown"}
            even = {name: break_even(found, key) for name, key in keys.items()}
            disk_rate = profile.disk_read.value
            sweeps.append({"bits": bits, "disk_bytes_per_second": disk_rate, "played": rate is not None, **even,
                           "steps": found})  # fmt: skip
    leave({**stamp(options.threads), "settings": {"free": FREE, "timed": TIMED}, "sweeps": sweeps}, options.out)


if __name__ == "__main__":
    main()
