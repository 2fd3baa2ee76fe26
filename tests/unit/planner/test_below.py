"""Plans with weights, inputs or the optimizer below the device: chosen by need, and counted where they lie."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.core.plan import Plan
from lowmem_ft.planner import choices
from lowmem_ft.planner import search as search_module
from lowmem_ft.planner.answer import write_plan
from lowmem_ft.planner.choices import LOSS_CHUNKS, STREAMED_CHUNKS
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.reserve import process_peak
from lowmem_ft.planner.search import Search
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.runtime import optim, vocabulary
from lowmem_ft.runtime.optim import HOST_WORK_BYTES
from lowmem_ft.runtime.shelf import SLOTS
from tests.models import save_tiny
from tests.unit.planner.test_devices import LARGE_ADAPTER
from tests.unit.planner.test_solver import CARD, DEEP, DEVICE, config

LEVELS = ("none", "input", "both")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    return save_tiny("llama", folder, hidden_size=128, intermediate_size=384, num_hidden_layers=DEEP)


@pytest.mark.parametrize("pins", [{}, {"resident_blocks": DEEP, "keep_blocks": 1}], ids=["streamed", "resident"])
def test_what_lies_below_fills_the_gap(deep: Path, pins: dict[str, Any]) -> None:
    """Below what resident blocks that keep or recompute need the plan streams or offloads, and of all numbers of blocks
    it takes the fastest that fits."""
    # of a small rank, since otherwise a checkpoint that is read would take more than a step
    sections = {"adapter": {"rank": 2}, "policy": {"loss_chunk_tokens": 32, "micro_batch_tokens": 128, **pins}}
    settings = config(deep, **sections)
    search, exact = Search(settings, DEVICE, 4), []
    policy, streams = search.least, (0,) if pins else (0, *range(3, DEEP + 1))
    for keep in search.scales.keep:
        for offload in {0, DEEP - keep if DEEP - keep > SLOTS else 0}:
            weighed = search.scales.weigh(search.choices.blocks(policy, keep, streamed=0, offload=offload))
            for streamed in streams:
                other = search.choices.blocks(policy, keep, streamed=streamed, offload=offload)
                changed = search.scales._weighed(other, weighed.places)
                exact.append((process_peak(DEVICE, search.scales, changed).process, changed.seconds, other))
    plain = [size for size, _, other in exact if not other.streamed_blocks + other.offload_blocks]
    least, needed = min(size for size, _, _ in exact), min(plain)
    assert least < needed - 2**16
    for budget in (least, (least + needed) // 2):
        plan = write_plan(search.best(budget))
        assert plan.fits
        assert plan.predicted.step_seconds <= 1.05 * min(seconds for size, seconds, _ in exact if size <= budget)
        assert plan.policy.streamed_blocks >= 3 or plan.policy.offload_blocks
        assert plan.policy.stream_from == "disk" or not plan.policy.streamed_blocks
        assert plan.predicted.disk_bytes > 0
    refused = write_plan(search.best(least - 2**12))
    assert not refused.fits
    assert refused.predicted.process_peak_bytes == least
    assert refused.policy.streamed_blocks == (0 if pins else DEEP)
    assert refused.policy.offload_blocks > 0
    roomy = search.best(max(plain) + 2**20).weighed.policy
    assert roomy.streamed_blocks == roomy.offload_blocks == 0


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_go_below_before_anything_is_refused(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all places for embeddings and numbers of streamed blocks the plan takes the fastest that fits."""
    monkeypatch.setattr(vocabulary, "TILE_BYTES", 2**16)
    save_tiny("llama", tmp_path, hidden_size=128, vocab_size=6000, num_hidden_layers=DEEP, tie_word_embeddings=tied)
    settings = config(tmp_path, policy={"micro_batch_tokens": 128, "activations": "recompute"})
    search, exact = Search(settings, DEVICE, 4), []
    for level in ("none", "both") if tied else ("none", "input", "both"):
        for chunk in {*LOSS_CHUNKS, *STREAMED_CHUNKS}:
            one = replace(search.least, loss_chunk_tokens=min(chunk, 128), stream_embeddings=level)
            for streamed in (0, *range(3, DEEP + 1)):
                policy = search.choices.blocks(one, 0, streamed=streamed)
                weighed = search.scales.weigh(policy)
                exact.append((process_peak(DEVICE, search.scales, weighed).process, weighed.seconds, policy))
    whole = 6000 * 128 * 2
    least, plain = (min(it[0] for it in exact if it[2].stream_embeddings in levels) for levels in (LEVELS, LEVELS[:1]))
    assert least < plain - (1 if tied else 2) * whole + 2**19
    for budget in (least, (least + plain) // 2, plain - 2**12):
        answer = search.best(budget)
        assert answer.fits
        assert answer.weighed.policy.stream_embeddings != "none"
        assert answer.weighed.seconds <= 1.05 * min(seconds for size, seconds, _ in exact if size <= budget)
        assert write_plan(answer).predicted.disk_bytes >= whole
    refused = search.best(least - 2**12)
    assert not refused.fits
    assert refused.process == least
    assert search.best(2 * plain).weighed.policy.stream_embeddings == "none"


def test_embeddings_that_are_pinned(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path, tie_word_embeddings=True)
    pinned = config(tmp_path, policy={"stream_embeddings": "both"})
    plan = make_plan(pinned, device=DEVICE)
    assert "embedding and head streamed from disk" in plan.policy.describe()
    assert plan.fits
    assert pinned_for(CARD, pinned).policy.stream_from == "host"
    with pytest.warns(UserWarning, match="stream_embeddings: input has no effect"):
        plan = make_plan(config(tmp_path, policy={"stream_embeddings": "input"}), device=DEVICE)
    assert plan.policy.stream_embeddings == "none"
    trained = config(tmp_path, policy={"stream_embeddings": "both"}, adapter={"train_modules": ["embed_tokens"]})
    with pytest.raises(UnsupportedError, match="stream_embeddings: none"):
        make_plan(trained, device=DEVICE)


def pinned_for(device: Device, settings: RunConfig) -> Plan:
    """What is streamed lies in pinned memory of the host, all of it, and comes up in two tiles."""
    plan = make_plan(settings, device=device)
    ready = Search(settings, device, 4).scales.stage.ready
    (matrix,) = ready.below.matrices
    assert plan.predicted.pinned_bytes == sum(matrix.tiles)
    resident = make_plan(
        settings.model_copy(update={"policy": settings.policy.model_copy(update={"stream_embeddings": "none"})}),
        device=device,
    )
    more = plan.phases["load"]["host_bytes"] - resident.phases["load"]["host_bytes"]
    assert more == plan.predicted.pinned_bytes
    return plan


def test_offloading_is_pinned_and_counted_where_inputs_lie(deep: Path) -> None:
    def planned(device: Device, **pins: Any) -> Plan:
        small = {"micro_batch_tokens": 128, "loss_chunk_tokens": 32, "resident_blocks": DEEP}
        return make_plan(config(deep, policy={**small, **pins}), device=device)

    one = 128 * 128 * 2  # tokens x features, in 16 bits
    offload, plain = planned(DEVICE, activations="offload", keep_blocks=2), planned(DEVICE, keep_blocks=2)
    assert (offload.policy.keep_blocks, offload.policy.recompute_blocks) == (2, 0)
    assert offload.to_dict()["policy"]["offload_blocks"] == DEEP - 2
    assert f"{DEEP - 2} offload" in offload.policy.describe()
    assert offload.predicted.disk_bytes - plain.predicted.disk_bytes == (DEEP - 3) * one
    assert offload.predicted.allocated_peak_bytes < plain.predicted.allocated_peak_bytes - one
    card = planned(CARD, activations="offload")
    below = (DEEP - 1) * one
    assert [it["pinned_bytes"] for it in card.phases.values()] == [0, below, below, below, 0]
    assert card.predicted.pinned_bytes == below
    taken = [plan.phases["train"]["host_bytes"] for plan in (card, planned(CARD, activations="recompute"))]
    assert taken[0] - taken[1] == below


def test_nothing_is_offloaded_to_a_host_without_room(deep: Path) -> None:
    small = {"micro_batch_tokens": 128, "loss_chunk_tokens": 32, "resident_blocks": DEEP}
    roomy = make_plan(config(deep, policy=small, budget={"memory": 1}), device=CARD)
    assert roomy.policy.offload_blocks >= DEEP - 1
    bare = make_plan(config(deep, policy={**small, "activations": "recompute"}), device=CARD)
    tight = {"memory": 1, "host": bare.predicted.host_peak_bytes}
    plan = make_plan(config(deep, policy=small, budget=tight), device=CARD)
    assert plan.policy.offload_blocks == 0
    assert not plan.host_binds


def test_streaming_from_the_host_while_it_has_room(deep: Path) -> None:
    """Beside a card blocks lie in host RAM if its budget allows it, else on disk; either is counted where it lies."""

    def planned(**sections: Any) -> Plan:
        pinned = {"resident_blocks": 0, "micro_batch_tokens": 128, "loss_chunk_tokens": 32, "activations": "keep"}
        sections["policy"] = {**pinned, **sections.get("policy", {})}
        return make_plan(config(deep, **sections), device=CARD)

    host, disk = planned(), planned(budget={"host": CARD.host_process_bytes + 2**18})
    pinned = planned(policy={"stream_from": "disk"})
    assert (host.policy.stream_from, disk.policy.stream_from, pinned.policy.stream_from) == ("host", "disk", "disk")
    stored = host.predicted.pinned_bytes
    assert host.predicted.host_peak_bytes - pinned.predicted.host_peak_bytes == stored - pinned.predicted.pinned_bytes
    assert pinned.predicted.disk_bytes - host.predicted.disk_bytes == stored
    assert 0 < pinned.predicted.pinned_bytes < stored
    assert host.predicted.allocated_peak_bytes == pinned.predicted.allocated_peak_bytes


def test_an_optimizer_on_the_host_where_nothing_else_fits(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it is pinned; the plan counts its state on the host then, and is slower."""
    monkeypatch.setattr(optim, "SLICE_ON_CARD", 1 << 14)  # or it would be the update that takes the most
    small = {"micro_batch_tokens": 128, "loss_chunk_tokens": 32, "activations": "recompute", "resident_blocks": DEEP}

    def search(pins: dict[str, Any], **budget: int) -> Search:
        settings = config(deep, **LARGE_ADAPTER, policy={**small, **pins}, budget=budget)
        return Search(settings, CARD, 4)

    device, host = (write_plan(search({"optimizer_on": place}).best(CARD.free_bytes)) for place in ("device", "host"))
    needed, least = (plan.predicted.process_peak_bytes for plan in (device, host))
    state = device.breakdown["optimizer"]
    assert host.breakdown["optimizer"] == 0
    assert sum(host.breakdown.values()) == least
    assert 0.9 * state <= device.predicted.allocated_peak_bytes - host.predicted.allocated_peak_bytes <= state
    for name in ("load", "train", "eval"):
        more = host.phases[name]["host_bytes"] - device.phases[name]["host_bytes"]
        assert state <= more <= state + HOST_WORK_BYTES
    assert host.phases["save"]["host_bytes"] == device.phases["save"]["host_bytes"], "what is copied is no more"
    assert device.predicted.step_seconds < host.predicted.step_seconds

    free = search({})
    assert free.best(needed).weighed.policy == device.policy
    for budget in (least, needed - 1):
        answer = free.best(budget)
        assert answer.fits
        assert answer.weighed.policy == host.policy
        assert answer.process == least
    assert "adamw on the host" in host.policy.describe()
    nothing = free.best(least - 1)
    assert not nothing.fits
    assert nothing.process == least
    bound = search({}, host=device.predicted.host_peak_bytes).best(needed - 1)
    assert not bound.fits
    assert bound.weighed.policy.optimizer_on == "device", "the host has no room for it"


def test_tiles_come_where_nothing_else_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tiles and numbers of keeping and streamed blocks the plan takes the best that fits, by brute force."""
    for module in (choices, search_module):
        monkeypatch.setattr(module, "MLP_TILES", (64, 32))
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 4, "max_position_embeddings": 512}
    save_tiny("llama", tmp_path, **sizes)
    pins = {"micro_batch_tokens": 512, "loss_chunk_tokens": 32, "stream_embeddings": "none", "resident_blocks": 4}

    def search_for(objective: str) -> Search:
        return Search(config(tmp_path, data={"seq_len": 256}, policy={**pins, "objective": objective}), DEVICE, 4)

    search, smallest, exact = search_for("speed"), search_for("memory"), []
    for tile in (0, 64, 32):
        for keep in range(5):
            for offload in {0, 4 - keep if 4 - keep > SLOTS else 0}:
                base = replace(search.least, mlp_tile_tokens=tile)
                weighed = search.scales.weigh(search.choices.blocks(base, keep, streamed=0, offload=offload))
                size = process_peak(DEVICE, search.scales, weighed).process
                exact.append((size, weighed.seconds, weighed.policy))
    least, plain, most = min(it[0] for it in exact), min(it[0] for it in exact if not it[2].mlp_tile_tokens), max(exact)
    assert least < plain - 3 * 512 * 1024 * 2 // 2, "half of three tensors of the hidden layer"
    for budget in (least, (least + plain) // 2, plain - 2**12, most[0] + 2**20):
        answer = search.best(budget)
        fitting = [it for it in exact if it[0] <= budget]
        assert answer.fits
        assert answer.process <= budget
        assert answer.weighed.seconds <= 1.05 * min(seconds for _, seconds, _ in fitting)
        assert (answer.weighed.policy.mlp_tile_tokens > 0) == (budget < plain)
        assert smallest.best(budget).process <= least
    refused = search.best(least - 2**12)
    assert not refused.fits
    assert refused.process == least
    assert "MLPs in tiles of" in write_plan(refused).policy.describe()


def test_tiles_that_are_pinned_or_have_no_effect(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    save_tiny("mixtral", tmp_path / "mixtral")
    pinned = {"mlp_tile_tokens": 48, "micro_batch_tokens": 128}
    plan = make_plan(config(tmp_path / "llama", policy=pinned), device=DEVICE)
    assert plan.policy.mlp_tile_tokens == 48
    assert Plan.from_dict(plan.to_dict()).policy == plan.policy
    with pytest.warns(UserWarning, match="mlp_tile_tokens has no effect"):
        plan = make_plan(config(tmp_path / "mixtral", policy=pinned), device=DEVICE)
    assert plan.policy.mlp_tile_tokens == 0


def test_what_lies_behind_a_model_s_positions_is_told_once(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, max_position_embeddings=64)
    with pytest.warns(UserWarning, match="data.seq_len: 128 is more than the 64 positions") as told:
        plan = make_plan(config(tmp_path, data={"seq_len": 128}, budget={"memory": 1}), device=DEVICE)
    assert not plan.fits
    assert len(told) == 1


def test_keeping_an_attention_that_is_not_ours_is_said_to_have_no_effect(tmp_path: Path) -> None:
    save_tiny("gpt_neo", tmp_path)  # which computes its scores itself
    for budget, fits in (({}, True), ({"budget": {"memory": 1}}, False)):
        pinned = config(tmp_path, policy={"keep_attention": True, "activations": "recompute"}, **budget)
        with pytest.warns(UserWarning, match="keep_attention has no effect"):
            plan = make_plan(pinned, device=DEVICE)
        assert (plan.fits, plan.policy.keep_attention) == (fits, False)
