"""What a plan finds of devices: the machine here and its memory, cards that are here or not, and their hosts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_ft.core.errors import BudgetError, ConfigError, UnsupportedError
from lowmem_ft.core.plan import Plan
from lowmem_ft.planner import device as device_facts
from lowmem_ft.planner.device import Device, cost_of, find_device
from lowmem_ft.planner.profile import load_profile, write_profile
from lowmem_ft.planner.solver import make_plan, require_fit
from lowmem_ft.trainer import loop
from tests.unit.planner.test_solver import CARD, DEVICE, GIB, config, models  # noqa: F401 - a fixture


def test_devices() -> None:
    cpu = find_device("cpu")
    assert cpu.kind == "cpu"
    assert 0 < cpu.process_bytes < cpu.free_bytes <= cpu.memory_bytes + cpu.process_bytes
    assert cpu.flops > 1e9
    assert find_device("cpu").torch_device == torch.device("cpu")
    for name, fix in (
        ("cuda:99", "lowmem-ft doctor"), ("tpu", "given:   tpu"), ("cpu:1", "'cpu'"), ("gpu", "lowmem-ft doctor"),
        ("RTX 4090", "'rtx-4090-24gb'"), ("t4", "'colab-t4-16gb'"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=rf"No such device\.[\s\S]*{fix}"):
            find_device(name)


# a checkpoint of it takes more of the host than the pieces in which weights come
LARGE_ADAPTER: dict[str, dict[str, Any]] = {"train": {"optimizer": "adamw"}, "adapter": {"rank": 128}}


def on_card(model: Path, device: Device, **budget: Any) -> Plan:
    return make_plan(config(model, **LARGE_ADAPTER, budget=budget), device=device)


def test_the_host_s_budget_binds_too(models: dict[str, Path]) -> None:  # noqa: F811
    model = models["wide"]
    unknown = on_card(model, CARD)
    taken = unknown.predicted.host_peak_bytes
    assert unknown.fits
    assert unknown.budget["host_bytes"] == 0
    assert on_card(model, CARD, host=taken).fits

    plan = on_card(model, CARD, host=taken - 1)
    assert not plan.fits
    assert plan.predicted.process_peak_bytes < plan.budget["device_bytes"]
    assert plan.reason.startswith("The host binds")
    assert plan.alternatives == ()
    assert plan.changes
    for change in plan.changes:
        section, _, key = change.key.partition(".")
        changed = {**LARGE_ADAPTER, section: {**LARGE_ADAPTER.get(section, {}), key: change.value}}
        assert make_plan(config(model, **changed, budget={"host": taken - 1}), device=CARD).fits, change
    with pytest.raises(BudgetError, match="what binds most is the host"):
        require_fit(plan)

    neither = on_card(model, CARD, host=1, memory=1)
    assert neither.reason.startswith("None of ")
    assert "The host binds" in neither.reason
    with pytest.raises(BudgetError, match=r"1 B of the host[^~]*raise budget\.memory and budget\.host"):
        require_fit(neither)


def test_what_is_free_of_the_host_is_its_budget(models: dict[str, Path]) -> None:  # noqa: F811
    here = replace(CARD, present=True, host_free_bytes=9 * GIB, host_process_bytes=GIB // 4)
    assert on_card(models["llama"], here).budget["host_bytes"] == 9 * GIB
    assert on_card(models["llama"], here, host=8 * GIB).budget["host_bytes"] == 8 * GIB
    assert on_card(models["llama"], here, host=10 * GIB).budget["host_bytes"] == 9 * GIB
    assert not on_card(models["llama"], replace(here, host_free_bytes=GIB // 4)).fits
    # on a CPU both are the same memory
    size = 700 * 2**20
    for budget in ({"memory": size, "host": 2 * size}, {"memory": 2 * size, "host": size}, {"host": size}):
        plan = make_plan(config(models["llama"], budget=budget), device=DEVICE)
        assert plan.budget == {"device_bytes": size, "host_bytes": size}
        assert plan.fits == (plan.predicted.host_peak_bytes <= size)
    for budget, binds in (({"memory": size, "host": 2**20}, "host"), ({"memory": 2**20, "host": size}, "memory")):
        with pytest.raises(BudgetError, match=rf"fix: .*raise budget\.{binds}"):
            require_fit(make_plan(config(models["llama"], budget=budget), device=DEVICE))


def test_a_device_that_is_here_with_the_rates_of_a_profile(models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """Those that were measured on it, so that what runs on it is planned by them, too."""
    slow = tmp_path / "here.yaml"
    profile = load_profile("cpu-bf16")
    rate = profile.flops["bfloat16"]
    slower = {**profile.flops, "bfloat16": rate.model_copy(update={"value": rate.value / 64})}
    write_profile(profile.model_copy(update={"flops": slower}), slow)
    plans = [
        make_plan(config(models["llama"], budget={"device": "cpu", "profile": it})) for it in ("cpu-bf16", str(slow))
    ]
    assert [plan.device["profile"] for plan in plans] == ["cpu-bf16", str(slow)]
    assert all(Device(**plan.device).torch_device == torch.device("cpu") for plan in plans), "it runs on it"
    seconds = [plan.predicted.step_seconds for plan in plans]
    assert seconds[1] > 1.2 * seconds[0]
    kept = config(models["llama"], budget={"profile": str(slow)}).rooted()
    assert kept.budget.profile == str(slow.absolute())
    for budget, words in (
        ({"device": "cpu", "profile": "rtx-3090-24gb"}, "another kind of device"),
        ({"device": "rtx-3090-24gb", "profile": "cpu"}, "is of a device that is here"),
        ({"device": "cpu", "profile": "cqu"}, "No such device profile"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_plan(config(models["llama"], budget=budget))


def test_the_host_of_a_card_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {
        "device_count": 1, "mem_get_info": (10, 40), "get_device_capability": (8, 6), "get_device_name": "card",
        "memory_reserved": 2, "empty_cache": None, "get_device_properties": SimpleNamespace(multi_processor_count=28),
    }  # fmt: skip
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(device_facts, "_matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(device_facts, "cuda_process_bytes", lambda _: 7)
    monkeypatch.setattr(device_facts, "load_kernels", lambda *_: None)
    monkeypatch.setattr(device_facts, "measured_workspaces", lambda _: {"forward": 3, "bias": 0, "backward": 4})
    cpu, card = find_device("cpu"), find_device("cuda:0")  # in this order, as the first gives unused memory back
    assert card.free_bytes == 10 + 7, "what it has already is its own"
    assert card.process_bytes == 5 + device_facts.LATER_BYTES
    assert (card.compute_capability, card.sm_count) == ("8.6", 28)
    assert (card.forward_workspace, card.bias_workspace, card.backward_workspace) == (3, 0, 4)
    assert card.host_process_bytes - device_facts.LATER_HOST_BYTES == pytest.approx(cpu.process_bytes, rel=0.1)
    assert card.host_free_bytes == pytest.approx(cpu.free_bytes, rel=0.2), "other processes run beside this one"


def test_times_on_a_card_are_those_of_its_profile() -> None:
    """Of which a card that is here is told by its chip and its memory; products count as fast as they were measured."""
    known = find_device("h200-141gb")
    here = replace(known, name="NVIDIA H200", present=True, profile=None, memory_bytes=150109880320)
    factor = torch.empty(2048, 2048, device="meta")

    def seconds(device: Device, operation: Any) -> float:
        return cost_of(device)(operation, (factor, factor), {}, torch.empty_like(factor), 1.0).real

    mm, add = torch.ops.aten.mm.default, torch.ops.aten.add.Tensor
    assert seconds(here, add) == seconds(known, add)
    assert seconds(replace(here, flops=here.flops / 2), mm) == pytest.approx(2 * seconds(known, mm))
    assert seconds(replace(here, sm_count=131), add) > 2 * seconds(here, add), "no profile has such a chip"


@pytest.mark.parametrize(("units", "name"), [(True, "cpu-bf16"), (False, "cpu")])
def test_times_on_a_cpu_are_those_of_one_with_the_same_units(
    units: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products and attention count as fast as products were measured: a processor of twice the cores does both twice as
    fast, but calls as many operations."""
    monkeypatch.setattr(device_facts, "multiplies", lambda dtype: units)
    known = find_device(name)
    here = replace(known, present=True, profile=None, flops=known.flops * 2)
    factor, heads = torch.empty(2048, 2048, device="meta"), torch.empty(1, 4, 256, 64, device="meta")
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def seconds(device: Device, operation: Any, *args: Any) -> float:
        return cost_of(device)(operation, args, {}, torch.empty_like(args[0]), 1.0).real

    call = 1 / load_profile(name).measured.calls.value  # type: ignore[union-attr]
    for operation, args in ((torch.ops.aten.mm.default, (factor, factor)), (flash, (heads, heads, heads, 0.0, True))):
        work = seconds(known, operation, *args) - call
        assert seconds(here, operation, *args) == pytest.approx(call + work / 2), operation
    add = torch.ops.aten.add.Tensor
    assert seconds(here, add, factor, factor) == seconds(known, add, factor, factor) > call


def test_a_plan_for_a_card_that_is_not_here(models: dict[str, Path]) -> None:  # noqa: F811
    plan = make_plan(config(models["llama"], budget={"device": "colab-t4-16gb"}))
    assert plan.fits
    assert plan.device["kind"] == "cuda"
    assert plan.policy.compute_dtype == "float16", "a T4 has no bf16"
    assert plan.budget["device_bytes"] < 16 * GIB
    with pytest.raises(UnsupportedError, match="known from its profile only"):
        loop.device_of(plan)
    with pytest.raises(UnsupportedError, match="did you mean 'rtx-3060-12gb'"):
        find_device("rtx-3060-12g")
