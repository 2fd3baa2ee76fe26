"""The closed-form planner: stored bytes are exact, the budget is kept, pins are followed, and nothing fits is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import BudgetError, UnsupportedError
from lowmem_ft.core.plan import Plan
from lowmem_ft.planner.device import Device, find_device
from lowmem_ft.planner.footprint import Footprint
from lowmem_ft.planner.solver import make_plan, require_fit
from lowmem_ft.trainer import loop
from tests.models import save_tiny

GIB = 2**30
BUDGETS = (600 * 2**20, 800 * 2**20, 50 * 2**20)
DEVICE = Device(
    name="test", kind="cpu", index=0, memory_bytes=16 * GIB, free_bytes=12 * GIB, process_bytes=GIB // 2,
    compute_dtype="bfloat16", flops=1e11,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny(name, folder / name) for name in ("llama", "mixtral", "gpt2")}


def config(model: Path, **sections: Any) -> RunConfig:
    keys: dict[str, Any] = {"data": {"seq_len": 64}, "train": {"tokens_per_step": 512}}
    for name, value in sections.items():
        keys[name] = {**keys.get(name, {}), **value}
    return RunConfig.from_dict({"model": str(model), **keys})


def with_budget(settings: RunConfig) -> Callable[[int], Plan]:
    """Plans `settings` for other budgets."""
    return lambda size: make_plan(
        settings.model_copy(update={"budget": settings.budget.model_copy(update={"memory": size})}), device=DEVICE
    )


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize(
    "sections",
    [{}, {"quant": {"bits": 8}}, {"quant": {"bits": 16}}, {"train": {"optimizer": "adamw"}},
     {"adapter": {"method": "peft", "peft": {"peft_type": "IA3", "target_modules": ".*(o_proj|c_proj)"}}}],
    ids=["nf4", "int8", "bf16", "adamw", "ia3"],
)  # fmt: skip
def test_stored_bytes_are_those_of_the_real_model(models: dict[str, Path], name: str, sections: dict[str, Any]) -> None:
    if name == "mixtral" and "adapter" in sections:
        sections = {"adapter": {"method": "peft", "peft": {"peft_type": "IA3", "target_modules": ".*o_proj"}}}
    settings = config(models[name], **sections)
    policy = make_plan(settings, device=DEVICE).policy
    real = assemble(settings, policy, torch.device("cpu"))
    assert real.optimizer is not None
    planned = Footprint.of(assemble(settings, policy, torch.device("meta")))
    trainable = set(real.trainable.values())
    held = {*real.model.parameters(), *real.model.buffers()}
    assert planned.base_weights == sum(t.nbytes for t in held if t not in trainable)
    assert planned.adapter == sum(p.nbytes for p in trainable)
    assert planned.optimizer == sum(t.nbytes for t in real.optimizer.state_tensors().values())


def test_the_budget_decides_between_keep_and_recompute(models: dict[str, Path]) -> None:
    settings = config(models["llama"], data={"seq_len": 1024}, train={"tokens_per_step": 8192})
    roomy = make_plan(settings, device=DEVICE)
    assert roomy.fits
    assert roomy.policy.recompute_blocks == 0
    assert roomy.policy.micro_batch_tokens == 8192
    by_memory = sorted(p.predicted.process_peak_bytes for p in map(with_budget(settings), range(*BUDGETS)))
    tight = with_budget(settings)(by_memory[0])
    assert tight.fits
    assert tight.predicted.process_peak_bytes <= by_memory[0] < roomy.predicted.process_peak_bytes
    assert tight.policy.micro_batch_tokens < 8192
    assert tight.policy.micro_batch_tokens * tight.policy.accumulation == 8192
    assert [p.keep_blocks + p.recompute_blocks for p in roomy.alternatives] == [2] * len(roomy.alternatives)


def test_nothing_fits_says_the_smallest_budget_that_does(models: dict[str, Path]) -> None:
    plan = make_plan(config(models["llama"], budget={"memory": "500MiB"}), device=DEVICE)
    assert not plan.fits
    with pytest.raises(BudgetError) as caught:
        require_fit(plan)
    assert caught.value.exit_code == 3
    again = make_plan(config(models["llama"], budget={"memory": plan.predicted.process_peak_bytes}), device=DEVICE)
    assert again.fits


def test_pins_are_followed(models: dict[str, Path]) -> None:
    pins = {"activations": "recompute", "micro_batch_tokens": 128, "loss_chunk_tokens": 32, "compute_dtype": "float32"}
    policy = make_plan(config(models["llama"], policy=pins), device=DEVICE).policy
    assert (policy.keep_blocks, policy.micro_batch_tokens, policy.accumulation) == (0, 128, 4)
    assert (policy.loss_chunk_tokens, policy.compute_dtype) == (32, "float32")


def test_auto_bits_takes_the_most_that_fit(models: dict[str, Path]) -> None:
    assert make_plan(config(models["llama"], quant={"bits": "auto"}), device=DEVICE).policy.bits == 16
    nothing = make_plan(config(models["llama"], quant={"bits": "auto"}, budget={"memory": "1MiB"}), device=DEVICE)
    assert nothing.policy.bits == 4


@pytest.mark.parametrize(
    "pins", [{"activations": "offload"}, {"optimizer_on": "host"}, {"stream_from": "disk"}, {"resident_blocks": 0}]
)
def test_what_cannot_run_yet_is_refused(models: dict[str, Path], pins: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="needs streaming"):
        make_plan(config(models["llama"], policy=pins), device=DEVICE)


def test_devices() -> None:
    cpu = find_device("cpu")
    assert cpu.kind == "cpu"
    assert 0 < cpu.process_bytes < cpu.free_bytes <= cpu.memory_bytes + cpu.process_bytes
    assert cpu.flops > 1e9
    assert find_device("cpu").torch_device == torch.device("cpu")
    for name in ("cuda:99", "tpu", "cpu:1", "cuda:x"):
        with pytest.raises(UnsupportedError, match="No such device"):
            find_device(name)


def test_a_plan_for_a_card_that_is_not_here(models: dict[str, Path]) -> None:
    plan = make_plan(config(models["llama"], budget={"device": "colab-t4-16gb"}))
    assert plan.fits
    assert plan.device["kind"] == "cuda"
    assert plan.policy.compute_dtype == "float16", "a T4 has no bf16"
    assert plan.budget["device_bytes"] < 16 * GIB
    with pytest.raises(UnsupportedError, match="known from its profile only"):
        loop.device_of(plan)
    with pytest.raises(UnsupportedError, match="did you mean 'rtx-3060-12gb'"):
        find_device("rtx-3060-12g")
