"""Every phase and tier of a plan against what a real run takes on a CPU.

Bytes in tensors come from PyTorch's own allocator events, bytes on the disk from the files' sizes, locked pages from
Linux. Models are a few MB large, so that the shares below mean something.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_ft.adapters.peft_format import save_adapter
from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Plan, Policy
from lowmem_ft.data.examples import Example
from lowmem_ft.data.loader import BatchLoader
from lowmem_ft.data.packing import Batch
from lowmem_ft.export.merge import write_merged
from lowmem_ft.export.weights import MergedWeights
from lowmem_ft.planner import verify
from lowmem_ft.planner.choices import first_policy
from lowmem_ft.planner.device import HOST_PROCESS_BYTES, cost_of
from lowmem_ft.planner.phases import OF_A_RUN, Aside
from lowmem_ft.planner.reserve import process_estimate
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.planner.verify import FullBatches, allocator_events
from lowmem_ft.planner.weigh import Scales
from lowmem_ft.report.progress import Reporter
from lowmem_ft.runtime import state, vocabulary
from lowmem_ft.step import eval_step, train_step
from lowmem_ft.trainer import loop
from lowmem_ft.trainer.recovery import Recovery
from tests.assets import ASSETS
from tests.models import save_tiny
from tests.unit.planner.test_solver import DEVICE

WIDE = {"vocab_size": 1999, "hidden_size": 256, "intermediate_size": 640}
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE, "gemma2": {**WIDE, "head_dim": 64}, "mixtral": WIDE, "gpt2": {"vocab_size": 1999, "n_embd": 256},
}  # fmt: skip
QUANT: dict[int | str, dict[str, Any]] = {
    4: {"bits": 4}, 8: {"bits": 8}, 16: {"bits": 16}, "nf4": {"bits": 4, "double_quant": False},
}  # fmt: skip
STEPS = [("llama", 4), ("gemma2", 8), ("mixtral", 4), ("gpt2", 16)]  # whose steps are measured, too
# Predicted over measured: 0.03% to 0.1% on these models, nearly all of it the 4 KiB that every simulation adds; the
# check of packing, where it is the peak, up to 2% of what it takes. Never under.
CLOSE = 1.01


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny(name, folder / name, **sizes) for name, sizes in MODELS.items()}


def config(model: Path, **sections: Any) -> RunConfig:
    keys: dict[str, Any] = {
        "data": {"seq_len": 64},
        "train": {"tokens_per_step": 64, "steps": 4, "save_every": 1, "eval_every": 1},
        "policy": {"activations": "recompute", "micro_batch_tokens": 64, "loss_chunk_tokens": 32},
        "output": str(model.parent / f"run-{model.name}"),
    }
    for name, value in sections.items():
        keys[name] = {**keys.get(name, {}), **value} if isinstance(value, dict) else value
    return RunConfig.from_dict({"model": str(model), **keys})


def prepared(settings: RunConfig) -> tuple[Policy, Scales, Aside]:
    assert settings.quant.bits != "auto"
    policy = first_policy(settings, DEVICE, settings.quant.bits)
    policy = replace(policy, resident_blocks=2, recompute_blocks=2, loss_chunk_tokens=32)
    scales = Scales(settings, policy, kind="cpu", cost=cost_of(DEVICE))
    return policy, scales, Aside.of(settings, policy, scales)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_loading_with_streamed_blocks(name: str, bits: int, tmp_path: Path) -> None:
    settings = config(save_tiny(name, tmp_path / name, num_hidden_layers=6, hidden_size=96), quant={"bits": bits})
    policy, scales, aside = prepared(settings)
    peaks = []
    for streamed in (4, 6):
        policy = replace(policy, streamed_blocks=streamed, stream_from="disk")
        taken = peak(lambda policy=policy: assemble(settings, policy, torch.device("cpu")))
        assert taken <= aside.load(policy).device <= CLOSE * taken
        peaks.append(taken)
        assert aside.load(policy).disk == scales.moved(policy).stored
    assert peaks[1] < peaks[0] < aside.load(replace(policy, streamed_blocks=0)).device


@pytest.mark.parametrize("tied", [True, False])
def test_loading_with_streamed_embeddings(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "TILE_BYTES", 2**16)
    sizes = {"vocab_size": 4000, "hidden_size": 96, "tie_word_embeddings": tied}
    settings = config(save_tiny("llama", tmp_path / "model", **sizes), cache=str(tmp_path / "cache"))
    policy, scales, aside = prepared(settings)
    resident = peak(lambda: assemble(settings, replace(policy), torch.device("cpu")))
    policy = replace(policy, stream_embeddings="both", stream_from="disk")
    for _ in ("cold", "cached"):
        taken = peak(lambda: assemble(settings, policy, torch.device("cpu")))
        assert taken <= aside.load(policy).device <= 1.03 * CLOSE * taken
        assert taken < resident
    assert aside.load(policy).disk == aside.cache + scales.moved(policy).stored
    assert scales.moved(policy).stored >= 4000 * 96 * 2 * (1 if tied else 2)


def peak(function: Callable[[], object]) -> int:
    return max(accumulate(allocator_events(function)))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("name", "quant"), [*((name, bits) for name in MODELS for bits in (4, 8, 16)), ("llama", "nf4")]
)
def test_phases_in_tensors(models: dict[str, Path], name: str, quant: int | str, tmp_path: Path) -> None:
    settings = config(models[name], quant=QUANT[quant], cache=str(tmp_path / "cache"))
    policy, scales, aside = prepared(settings)
    found: list[Assembled] = []
    events = allocator_events(lambda: found.append(assemble(settings, policy, torch.device("cpu"))))
    cold, held, (ready,) = max(accumulate(events)), sum(events), found
    assert cold <= aside.load(policy).device <= CLOSE * cold
    if (name, quant) in STEPS:
        check_steps(ready, scales, settings, policy, held)
    # measured: 3.1 to 3.8 KB over, for what JSON says of the model in a length that is not known beforehand
    assert size(tmp_path / "cache") <= aside.load(policy).disk <= size(tmp_path / "cache") + 2**14
    assert (aside.load(policy).disk == 0) == (quant == 16), "nothing is cached where nothing is quantized"
    if (name, quant) in (("llama", 4), ("mixtral", 8)):
        warm = peak(lambda: assemble(settings, policy, torch.device("cpu")))
        assert warm <= cold, "so the plan holds whatever is in the cache"
    save_adapter(ready.model, tmp_path / "adapter", base_model=settings.model)
    weights = MergedWeights(settings, policy, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    taken = peak(lambda: write_merged(weights, tmp_path / "merged"))
    # measured: equal, to the byte
    assert taken <= aside.merge.device <= 1.001 * taken
    # measured: up to 0.004% over
    written = size(tmp_path / "merged")
    assert written <= aside.merge.disk <= 1.002 * written


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merge_that_unties(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    method = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    settings = config(tmp_path / "base", adapter={"method": "peft", "peft": method}, data={"packing": False})
    policy, _, aside = prepared(settings)
    ready = assemble(settings, policy, torch.device("cpu"))
    save_adapter(ready.model, tmp_path / "adapter", base_model=settings.model)
    (tmp_path / "merged").mkdir()
    write_merged(MergedWeights(settings, policy, tmp_path / "adapter"), tmp_path / "merged")
    written = size(tmp_path / "merged")
    assert written <= aside.merge.disk <= written + 2**14


def check_steps(ready: Assembled, scales: Scales, settings: RunConfig, policy: Policy, held: int) -> None:
    batch = FullBatches(settings, policy, vocabulary=100)[0]
    held += batch_bytes(batch)
    train = held + peak(lambda: train_step(ready, [batch], lr=1e-4))
    evaluation = held + peak(lambda: eval_step(ready, batch))
    # As in `test_simulate`, and so of a plan. How few tokens are routed moves the peak of experts by more: measured
    # -0.8% to 2.2% on three mixtures at 64 to 512 tokens.
    assert train <= scales.weigh(policy, timed=False).allocated <= 1.02 * train
    assert evaluation <= scales.evaluation_peak(policy) <= 1.02 * evaluation


def batch_bytes(batch: Batch) -> int:
    tensors = batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, batch.bounds
    return sum(it.untyped_storage().nbytes() for it in tensors)


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("llama", {"data": {"packing": False}, "quant": {"bits": 8}}),  # without the check of packing
        ("llama", {"adapter": {"rank": 1, "targets": ["q_proj"]}, "quant": {"bits": 8}}),  # the check is the peak
        ("mixtral", {"adapter": {"rank": 1, "targets": ["q_proj"]}, "quant": {"bits": 8}}),
        ("gpt2", {"adapter": {"dora": True}, "quant": {"bits": 16}, "data": {"packing": False}}),
        ("llama", {"train": {"optimizer": "adamw"}, "adapter": {"rank": 64}}),  # what training holds is the peak
        ("llama", {"policy": {"compute_dtype": "float32"}}),  # the checkpoint is cast while it is read
    ],
    ids=["unpacked", "checked", "routed", "dora", "held", "cast"],
)
def test_what_decides_the_peak_of_loading(models: dict[str, Path], name: str, sections: dict[str, Any]) -> None:
    settings = config(models[name], **sections)
    policy, _, aside = prepared(settings)
    measured = peak(lambda: assemble(settings, policy, torch.device("cpu")))
    assert measured <= aside.load(policy).device <= CLOSE * measured


def test_loading_looks_at_the_head(tmp_path: Path) -> None:
    """Which takes eighteen fp32 numbers for each token that it knows, and they were not planned."""
    settings = config(
        save_tiny("llama", tmp_path, vocab_size=30011, hidden_size=16, tie_word_embeddings=True),
        quant={"bits": 16},
        data={"packing": False},
    )
    policy, scales, aside = prepared(settings)
    measured = peak(lambda: assemble(settings, policy, torch.device("cpu")))
    assert measured > scales.held + 64 * 30011
    assert measured <= aside.load(policy).device <= CLOSE * measured


def test_a_step_that_could_be_repeated(models: dict[str, Path]) -> None:
    """A run keeps the random state for that, and no more than is planned."""
    settings = config(models["llama"], data={"packing": True}, policy={"activations": "keep"})
    policy, scales, _ = prepared(settings)
    policy = replace(policy, keep_blocks=2, recompute_blocks=0)
    ready, held = verify._loaded(settings, policy)
    examples = [Example([5] * 64, [5] * 64)] * 2
    loader = BatchLoader(
        examples, seq_len=64, packing=True, micro_batch_tokens=64, tokens_per_step=64, seed=0, pad_id=0
    )
    recovery, batches = Recovery(ready, policy), next(loader)
    train = held + peak(lambda: recovery.step(batches, lr=1e-4))
    assert train <= scales.weigh(policy, timed=False).allocated <= 1.02 * train


def test_loading_is_planned_without_weights(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(models["mixtral"] / "config.json", tmp_path)
    _, _, alone = prepared(config(tmp_path))
    policy, _, known = prepared(config(models["mixtral"]))
    # which tensors are read together is not known then: measured 4% over
    assert known.load(policy).device <= alone.load(policy).device <= 1.06 * known.load(policy).device
    assert known.merge.disk <= 1.001 * alone.merge.disk
    assert alone.merge.disk <= 1.001 * known.merge.disk


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "adamw8bit") for name in MODELS), ("llama", "adamw")])
def test_saving(models: dict[str, Path], name: str, optimizer: str, tmp_path: Path) -> None:
    settings = config(models[name], train={"optimizer": optimizer}, data={"eval": "eval.jsonl"})
    policy, scales, aside = prepared(settings)
    ready = assemble(settings, policy, torch.device("cpu"))
    weights = {f"weights/{key}": parameter.data for key, parameter in ready.trainable.items()}

    def save() -> None:
        save_all(ready, tmp_path)
        state.write_tensors(tmp_path / "best.safetensors", weights)
        for name in ("best", "step-00000003"):  # as at the end of a run, and where one is gone on with
            read = [*state.read_checkpoint(tmp_path / f"{name}.safetensors")[0].values()]  # stays mapped, being small
            del read

    taken = peak(save)
    checkpoint = (tmp_path / "step-00000003.safetensors").stat().st_size
    work = aside.save.device - scales.held
    # What is written is not copied; what is read is held once more. Measured: 7 KB over.
    assert taken <= work <= taken + 2**14
    # where the device is not the host, all of a checkpoint is copied there; measured: 2 KB over
    assert checkpoint <= aside.save.host <= checkpoint + 2**14


def save_all(ready: Assembled, folder: Path) -> None:
    assert ready.optimizer is not None
    for step in (1, 2, 3):
        state.save_checkpoint(
            folder,
            step=step,
            weights=ready.trainable,
            optimizer_tensors=ready.optimizer.state_tensors(),
            meta={"optimizer": ready.optimizer.state_meta()},
            device=ready.device,
        )
    save_adapter(ready.model, folder / "adapter", base_model="base")


@pytest.mark.parametrize(("name", "bits"), [("llama", 4), ("mixtral", 8), ("gpt2", 16)])
def test_a_whole_run(models: dict[str, Path], name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"train": str(ASSETS / "whatis-train.jsonl"), "eval": str(ASSETS / "whatis-eval.jsonl")}
    settings = config(models[name], data=files, quant={"bits": bits})
    plan = make_plan(settings, device=DEVICE)
    assert list(plan.phases) == [*OF_A_RUN, "merge"]
    assert all(list(it) == ["device_bytes", "pinned_bytes", "disk_bytes"] for it in plan.phases.values())
    allocated, train = plan.predicted.allocated_peak_bytes, plan.phases["train"]["device_bytes"]
    assert process_estimate(DEVICE, allocated) < train <= process_estimate(DEVICE, allocated, allocated, 64 << 20)
    assert plan.predicted.process_peak_bytes == max(plan.phases[phase]["device_bytes"] for phase in OF_A_RUN)
    most = run(settings, plan, monkeypatch)
    # measured: 5.5 KB over (0.07% to 0.21%), the room that is left for JSON
    assert most <= plan.phases["save"]["disk_bytes"] <= most + 2**14
    assert plan.predicted.disk_bytes == plan.phases["save"]["disk_bytes"]
    assert not any(plan.phases[phase]["disk_bytes"] for phase in ("load", "train", "eval"))


def run(settings: RunConfig, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train as planned; the most bytes in files of tensors at any time. No page is locked meanwhile."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 100, (64,), generator=generator).tolist() for _ in range(8)]
    examples = [Example(row, row) for row in tokens]
    monkeypatch.setattr(loop, "load_examples", lambda *_: (examples, examples[:1]))
    folder, sizes, replaced = Path(settings.output), [0], os.replace

    def replacing(*args: Any) -> None:  # each file is largest, with all others there, just before it gets its name
        sizes.append(size(folder / "checkpoints") + size(folder / "adapter"))
        replaced(*args)

    before = locked_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        loop.train(settings, plan=plan, reporter=Reporter(quiet=True))
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    assert locked_bytes() - before == max(sizes["pinned_bytes"] for sizes in plan.phases.values())
    return max(sizes)


def locked_bytes() -> int:
    """Bytes of this process that the system may not move or swap, as pinned memory is."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("VmLck:", "VmPin:")))


def test_a_plan_fits_only_if_all_its_phases_do(models: dict[str, Path]) -> None:
    pins = {"adapter": {"rank": 1, "targets": ["q_proj"]}, "data": {"seq_len": 8}, "train": {"tokens_per_step": 8}}
    policy = {"micro_batch_tokens": 8, "loss_chunk_tokens": 8, "stream_embeddings": "none"}
    settings = config(models["mixtral"], **pins, policy=policy)
    roomy = make_plan(settings, device=DEVICE)
    load, train = (roomy.phases[phase]["device_bytes"] for phase in ("load", "train"))
    assert train < load == roomy.predicted.process_peak_bytes
    assert sum(roomy.breakdown.values()) == load

    less = settings.budget.model_copy(update={"memory": (load + train) // 2})
    between = make_plan(settings.model_copy(update={"budget": less}), device=DEVICE)
    assert not between.fits
    assert between.predicted.process_peak_bytes == load
    assert between.changes == (), "none of them makes loading take less"


def test_on_a_card_the_host_is_a_tier_of_its_own(models: dict[str, Path]) -> None:
    settings = config(models["llama"], budget={"device": "colab-t4-16gb"}, data={"eval": "eval.jsonl"})
    plan = make_plan(settings)
    assert all(
        list(sizes) == ["device_bytes", "host_bytes", "pinned_bytes", "disk_bytes"] for sizes in plan.phases.values()
    )
    assert plan.phases["train"]["host_bytes"] == HOST_PROCESS_BYTES, "the process there, not its share of the card"
    base, sizes = plan.phases["train"]["host_bytes"], {name: it["host_bytes"] for name, it in plan.phases.items()}
    copied = plan.breakdown["adapter"] + plan.breakdown["optimizer"]
    assert base + copied <= sizes["save"] <= base + copied + 2**16, "a checkpoint is copied to the host"
    assert sizes["load"] >= base + 2**20, "weights come in pieces"
    assert plan.predicted.host_peak_bytes == max(sizes[name] for name in OF_A_RUN)
