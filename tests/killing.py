"""Runs that are killed at any moment and resumed, beside the same runs undisturbed: do they end alike, bit by bit?

A process of its own, which trains in children and kills them with SIGKILL:

    python -m tests.killing FOLDER --kills 4 --seed 0 [--device cuda]

On a card sums are made in a fixed order, as PyTorch can, and the runs go on side by side. FOLDER is filled with the
runs. Prints a line of JSON for each as soon as it is done.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lowmem_ft.core.config import RunConfig
from lowmem_ft.report.progress import Reporter
from lowmem_ft.runtime import state
from lowmem_ft.trainer import loop, recovery
from tests.assets import ASSETS, write_pairs, write_share

EXACT = ("step", "loss", "eval_loss", "eval_accuracy", "lr", "grad_norm", "tokens")
EXACT += ("rewards/margins", "eval_rewards/margins")
SAVE_EVERY, EVAL_EVERY = 2, 3
START_SECONDS, STEP_SECONDS = 2.0, 0.2  # of a run, about: within these a kill comes
FAILING_STEP = 3  # of the runs that run out of memory
# what differs between runs: sections of a config, and whether memory runs out on the way
RUNS: dict[str, tuple[dict[str, Any], bool]] = {
    "8-bit AdamW, packed": ({}, False),
    "32-bit AdamW, not packed": ({"train": {"optimizer": "adamw"}, "data": {"packing": False}}, False),
    "paged 8-bit AdamW, no evaluation": ({"train": {"optimizer": "paged_adamw8bit"}, "data": {"eval": None}}, False),
    "8-bit AdamW, out of memory twice": ({}, True),
    "DPO": ({"train": {"objective": "dpo"}, "data": {"train": "pairs-train.jsonl", "eval": "pairs-eval.jsonl"}}, False),
}
Disturb = Callable[[], None]


def settings(folder: Path, output: str, steps: int, sections: dict[str, Any], *, device: str = "cpu") -> RunConfig:
    keys: dict[str, Any] = {
        "model": str(ASSETS / "doclm-7m"),
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "seq_len": 64},
        "train": {
            "tokens_per_step": 256, "steps": steps, "lr": 1e-3, "eval_every": EVAL_EVERY, "save_every": SAVE_EVERY,
        },
        "adapter": {"rank": 4, "dropout": 0.1},
        "policy": {"micro_batch_tokens": 128, "loss_chunk_tokens": 64, "activations": "keep"},  # quickly planned
        "output": str(folder / output),
        "budget": {"device": device},
    }  # fmt: skip
    for name, section in sections.items():
        keys[name] = {**keys[name], **section}
    keys["data"] |= {use: str(folder / file) for use in ("train", "eval") if (file := keys["data"][use])}
    return RunConfig.from_dict(keys)


def start(config: RunConfig, *disturb: Disturb) -> BaseProcess:
    """A child that trains `config`, from its newest checkpoint on."""
    # a fork is ready at once, but it cannot use a card that was asked for before, as bitsandbytes does on its import
    kind = "fork" if config.budget.device == "cpu" else "spawn"
    child = multiprocessing.get_context(kind).Process(target=train, args=(config, disturb))
    child.start()
    return child


def train(config: RunConfig, disturb: tuple[Disturb, ...]) -> None:
    """What a child does."""
    torch.set_num_threads(1)
    if config.budget.device != "cpu":
        torch.use_deterministic_algorithms(True)  # if it only warned, attention's backward would still add in any order
        torch.utils.deterministic.fill_uninitialized_memory = False  # what nobody reads takes no time
    for prepare in disturb:
        prepare()
    loop.train(config, resume=True, reporter=Reporter(quiet=True))


def ended(child: BaseProcess) -> int | None:
    """Its exit code, negative if it was killed."""
    child.join()
    return child.exitcode


def failing_twice() -> None:
    """Let memory run out two times in step FAILING_STEP, whoever does that step."""
    one_step, gradients, now = loop._Loop._train_step, recovery.sum_gradients, {"step": 0, "failed": 0}

    def train_step(self: Any, *args: Any) -> None:
        now.update(step=self.step + 1, failed=0)
        one_step(self, *args)

    def sum_gradients(*args: Any, **kwargs: Any) -> Any:
        found = gradients(*args, **kwargs)
        if now["step"] == FAILING_STEP and now["failed"] < 2:
            now["failed"] += 1
            raise torch.OutOfMemoryError("at the end, when random numbers have been drawn")
        return found

    loop._Loop._train_step, recovery.sum_gradients = train_step, sum_gradients  # type: ignore[method-assign]


def die_while_saving() -> None:
    """Let the process die when half of its first checkpoint is written."""
    write_file = state.write_file

    def half(path: Path, tensors: Any, metadata: Any) -> None:
        write_file(path, tensors, metadata)
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    state.write_file = half


def kill_again_and_again(config: RunConfig, kills: range, generator: random.Random, *disturb: Disturb) -> Iterator[str]:
    """Kill runs of `config`, each of which goes on where the one before was killed, and let the last one finish.

    Args:
        kills: their numbers among those of all runs; each fourth comes while a checkpoint is written.

    Yields:
        of each killed one how it was.
    """
    metrics = Path(config.output) / "metrics.jsonl"
    most = 3 + (config.train.steps or 0) // max(1, len(kills))  # lines that one of them writes
    for number in kills:
        saving = number % 4 == 1
        child = start(config, *disturb, *([die_while_saving] if saving else []))
        lines, moment = generator.randrange(most), generator.random()
        if not saving:
            wait_for(lines, metrics)
            time.sleep(moment * (START_SECONDS if lines == 0 else STEP_SECONDS))
            child.kill()
        code = ended(child)
        if code == 0:
            break  # it was done before
        assert code == -signal.SIGKILL, "the run failed by itself"
        written = metrics.read_text().count("\n") if metrics.exists() else 0
        yield f"{'while saving' if saving else f'{lines} lines and {moment:.2f} of a step on'}, at line {written}"
    assert ended(start(config, *disturb)) == 0, "the resumed run failed"


def wait_for(lines: int, file: Path) -> None:
    """Until so many more have been written, or for a minute."""
    seen, last, end = 0, changed(file), time.monotonic() + 60
    while seen < lines and time.monotonic() < end:
        time.sleep(0.001)
        now = changed(file)
        seen, last = seen + (now != last), now


def changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def exact_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics that must not depend on how a run was interrupted."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in EXACT if key in line} for line in lines]


def differences(ours: Path, theirs: Path) -> list[str]:
    """What of two finished runs is not equal to the bit."""
    found = [] if exact_metrics(ours) == exact_metrics(theirs) else ["metrics"]
    both = [state.read_checkpoint(state.checkpoints(run / "checkpoints")[-1]) for run in (ours, theirs)]
    (tensors, meta), (others, other_meta) = both
    found += [] if meta == other_meta else ["checkpoint's header"]
    found += [name for name in sorted({*tensors, *others}) if not same(tensors.get(name), others.get(name))]
    adapters = [state.read_checkpoint(run / "adapter" / "adapter_model.safetensors")[0] for run in (ours, theirs)]
    return found + [name for name in adapters[1] if not same(adapters[0].get(name), adapters[1][name])]


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def compare(index: int, folder: Path, *, kills: int, steps: int, seed: int, device: str) -> dict[str, Any]:
    """One of RUNS undisturbed and with its share of `kills`."""
    name, (sections, fails) = [*RUNS.items()][index]
    disturb = (failing_twice,) if fails else ()
    whole, config = (settings(folder, f"{it}-{index}", steps, sections, device=device) for it in ("whole", "killed"))
    own = range(kills * index // len(RUNS), kills * (index + 1) // len(RUNS))
    try:
        assert ended(start(whole, *disturb)) == 0, "the undisturbed run failed"
        killed = list(kill_again_and_again(config, own, random.Random(f"{seed} {name}"), *disturb))
    except AssertionError as error:
        return {"run": name, "failed": str(error)}
    return {"run": name, "killed": killed, "differing": differences(Path(config.output), Path(whole.output))}


def main() -> None:
    parser = argparse.ArgumentParser(description="killed and resumed runs beside undisturbed ones")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork must not wait for threads that it does not have
    options.folder.mkdir(parents=True, exist_ok=True)
    write_share(options.folder, train=60, eval=8)
    write_pairs(options.folder, train=60, eval=8)
    asked = {name: getattr(options, name) for name in ("folder", "kills", "steps", "seed", "device")}
    each, runs, failed = functools.partial(compare, **asked), range(len(RUNS)), False
    for one in map(each, runs) if options.device == "cpu" else ThreadPoolExecutor(len(RUNS)).map(each, runs):
        print(json.dumps(one), flush=True)
        failed |= "failed" in one
    sys.exit(failed)


if __name__ == "__main__":
    main()
