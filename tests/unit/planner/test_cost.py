"""The cost model: arithmetic and bytes of known operations, views for nothing, a whole step in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner import cost
from lowmem_ft.planner.cost import CostModel, Rates
from lowmem_ft.planner.profile import load_profile
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.trace import Tracer
from tests.models import tiny_config
from tests.unit.planner.policies import policy

ENDLESS = 1e30
FREE: dict[str, Any] = {
    "products": {torch.bfloat16: ENDLESS, torch.float32: ENDLESS}, "loops": None, "attention_forward": ENDLESS,
    "attention_backward": ENDLESS, "elementwise": ENDLESS, "fresh": ENDLESS,
    "exponentials": None, "packing": ENDLESS, "dequantize": {4: ENDLESS, 8: ENDLESS}, "updates": ENDLESS,
    "draws": ENDLESS, "call": 0.0, "update_call": 0.0,
}  # fmt: skip


def seconds(func: Any, *args: Any, kind: str = "cuda", **rates: Any) -> complex:
    """Of one operation, when all takes no time but what `rates` names."""
    out = func(*args)
    return CostModel(Rates(**{**FREE, **rates}), kind=kind).seconds(func, args, {}, out)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_arithmetic_of_known_operations() -> None:
    aten, ours = torch.ops.aten, torch.ops.lowmem_ft
    one = {"products": {torch.bfloat16: 1.0}}
    assert seconds(aten.mm.default, meta(3, 5), meta(5, 7), **one) == 2 * 3 * 5 * 7
    assert seconds(aten.bmm.default, meta(2, 3, 5), meta(2, 5, 7), **one) == 2 * 2 * 3 * 5 * 7
    assert seconds(aten.addmm.default, meta(7), meta(3, 5), meta(5, 7), **one) == 2 * 3 * 5 * 7
    low_rank = (meta(3, 7), meta(3, 5), meta(5, 7), None, meta(3, 2), meta(5, 2), meta(2, 7), 1.0)
    assert seconds(ours.product.default, *low_rank, **one) == 2 * 3 * 5 * 7 + 2 * 3 * 2 * (5 + 7)
    qkv = (meta(2, 4, 16, 8), meta(2, 2, 16, 8), meta(2, 2, 16, 8))
    causal = 2 * 2 * 4 * 16 * 16 * 8
    flash, efficient = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention
    mask = meta(2, 4, 16, 16)
    assert seconds(flash.default, *qkv, 0.0, True, attention_forward=1.0) == causal
    assert seconds(efficient.default, *qkv, None, True, 0.0, True, attention_forward=1.0) == causal
    assert seconds(efficient.default, *qkv, mask, True, attention_forward=1.0) == 2 * causal
    saved = (qkv[0], meta(2, 4, 16, dtype=torch.float32))
    seed = meta(2, dtype=torch.int64)
    back = aten._scaled_dot_product_flash_attention_backward.default
    rest = (*saved, None, None, 16, 16, 0.0, True, seed, seed)
    assert seconds(back, qkv[0], *qkv, *rest, attention_backward=1.0) == 2.5 * causal
    flat = [it.transpose(1, 2).flatten(0, 1) for it in qkv]
    begins = meta(3, dtype=torch.int32)
    told = (begins, begins, 16, 16, 0.0, True)
    assert seconds(aten._flash_attention_forward.default, *flat, *told, False, attention_forward=1.0) == causal
    back = aten._flash_attention_backward.default
    rest = (flat[0], meta(4, 32, dtype=torch.float32), *told, seed, seed)
    assert seconds(back, flat[0], *flat, *rest, attention_backward=1.0) == 2.5 * causal
    back = aten._scaled_dot_product_efficient_attention_backward.default
    rest = (*saved, seed, seed, 0.0, [True, True, True, False])
    assert seconds(back, qkv[0], *qkv, None, *rest, attention_backward=1.0) == 2.5 * causal
    assert seconds(back, qkv[0], *qkv, mask, *rest, attention_backward=1.0) == 5 * causal
    assert seconds(aten.bernoulli_.float, meta(6), 0.5, draws=2.0) == 3


def test_bytes_calls_and_views() -> None:
    aten = torch.ops.aten
    two = meta(10), meta(10)
    assert seconds(aten.add.Tensor, *two, elementwise=1.0, fresh=0.5) == 2 * 20 + 2 * 20
    assert seconds(aten.add_.Tensor, *two, elementwise=1.0, fresh=0.5) == 3 * 20, "there is memory already"
    assert seconds(aten.copy_.default, *two, elementwise=1.0) == 2 * 20, "what is written over is not read"
    assert seconds(aten.zero_.default, two[0], elementwise=1.0) == 20
    assert seconds(aten.add.Tensor, *two, call=0.5, kind="cpu") == 0.5
    assert seconds(aten.add.Tensor, *two, elementwise=1.0, call=7.0, kind="cpu") == 2 * 20 + 7
    assert seconds(aten.add.Tensor, *two, elementwise=1.0, call=7.0) == 2 * 20 + 7j, "called meanwhile"
    for func, args in (
        (aten.view.default, (meta(4, 4), [16])),
        (aten.transpose.int, (meta(4, 4), 0, 1)),
        (aten.slice.Tensor, (meta(4, 4),)),
        (aten.new_empty.default, (meta(4), [1 << 20])),
    ):
        assert seconds(func, *args, elementwise=1e-9, call=1.0) == 0, func


def test_elements_that_are_picked_by_index() -> None:
    """All others are neither read nor written, however large the matrix: a loss picks one logit of 128256 in a row."""
    aten = torch.ops.aten
    table, index, rows = meta(7, 1000), meta(7, 1, dtype=torch.int64), meta(3, dtype=torch.int64)
    assert seconds(aten.gather.default, table, 1, index, elementwise=1.0) == 7 * (2 + 8)
    assert seconds(aten.gather.default, table, 1, index, fresh=1.0) == 7 * 2
    assert seconds(aten.index_select.default, table, 0, rows, elementwise=1.0) == 3 * (1000 * 2 + 8)
    assert seconds(aten.embedding.default, table, rows, elementwise=1.0) == 3 * (1000 * 2 + 8)
    assert seconds(aten.scatter_add_.default, table, 1, index, meta(7, 1), elementwise=1.0) == 7 * (3 * 2 + 8)
    assert seconds(aten.index_copy_.default, table, 0, rows, meta(3, 1000), elementwise=1.0) == 3 * (3 * 1000 * 2 + 8)


def test_exponentials_take_arithmetic_where_memory_is_fast() -> None:
    exp, x = torch.ops.aten.exp_.default, meta(10)
    assert seconds(exp, x, elementwise=1.0) == 2 * 20
    assert seconds(exp, x, elementwise=1.0, exponentials=0.1) == 10 / 0.1
    assert seconds(exp, x, elementwise=1.0, exponentials=10.0) == 2 * 20, "the longer of the two"


def test_new_memory_of_a_measured_profile() -> None:
    """What a product of two tensors takes beyond the reading of both is for writing; at most as fast as reading."""
    profile = load_profile("cpu-bf16")
    rates = Rates.of(profile)
    assert profile.measured is not None
    assert rates.fresh < rates.elementwise == profile.memory_bandwidth.value
    assert 2 / rates.elementwise + 1 / rates.fresh == pytest.approx(3 / profile.measured.elementwise.value)
    faster = profile.measured.elementwise.model_copy(update={"value": 1e12})
    measured = profile.measured.model_copy(update={"elementwise": faster})
    assert Rates.of(profile.model_copy(update={"measured": measured})).fresh == rates.elementwise


def test_updates_of_small_tensors() -> None:
    update = torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default
    rates = {"updates": 4.0, "update_call": 7.0, "call": 2.0}
    for kind, expected in (("cpu", 7 + 10 / 4), ("cuda", 10 / 4 + 2j)):
        model = CostModel(Rates(**{**FREE, **rates}), kind=kind)
        assert model.seconds(update, ("adam", meta(10)), {}, None) == expected


def test_products_that_a_processor_does_in_fp32_tiles() -> None:
    """Two tiles of rows and three of columns, whose parts are converted, with a product of low rank."""
    n, k, m, r = 2048, 512, 3072, 4
    operands = (meta(n, m), meta(n, k), meta(k, m), None, meta(n, r), meta(k, r), meta(r, m), 1.0)

    def of(**rates: Any) -> complex:
        model = CostModel(Rates(**{**FREE, "loops": ENDLESS, **rates}), kind="cpu")
        return model.seconds(torch.ops.lowmem_ft.product.default, operands, {}, None)

    work = 2 * n * k * m + 2 * n * r * (k + m)
    assert of(products={torch.float32: 1.0}) == pytest.approx(work)
    assert of(elementwise=1.0) == pytest.approx(2 * (3 * n * k + 2 * k * m) + 6 * n * m + 8 * (n * m + n * k))
    assert of(fresh=1.0) == pytest.approx(4 * (3 * n * k + 2 * k * m))
    assert of(call=1.0) == pytest.approx(1 + 4 * 6 + 2 * (3 + 1 + 1))
    mm = torch.ops.aten.mm.default
    slow = {"products": {torch.bfloat16: 4.0, torch.float32: 2.0}, "loops": 1.0, "kind": "cpu"}
    operands_of = {
        dtype: (meta(3, 5, dtype=dtype), meta(5, 7, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)
    }
    assert seconds(mm, *operands_of[torch.bfloat16], **slow) == 2 * 3 * 5 * 7, "by PyTorch itself"
    assert seconds(mm, *operands_of[torch.float32], **slow) == 3 * 5 * 7


def test_a_card_reads_and_writes_while_it_multiplies() -> None:
    """The longer of the two counts, for each product by itself; tiles have a matrix each."""
    n, k, m, r = 3, 5, 7, 2
    low_rank = (meta(n, m), meta(n, k), meta(k, m), None, meta(n, r), meta(k, r), meta(r, m), 1.0)
    product = torch.ops.lowmem_ft.product.default
    read = 2 * (n * k + k * m + n * m), 2 * (n * k + k * r + n * r), 2 * (n * r + r * m + 2 * n * m)
    assert seconds(product, *low_rank, elementwise=1.0) == sum(read)
    work = 2 * n * k * m
    assert seconds(
        product, *low_rank[:4], None, None, None, 0.0, elementwise=1.0, products={torch.bfloat16: 1.0}
    ) == max(work, read[0])
    model = CostModel(Rates(**{**FREE, "elementwise": 1.0}), kind="cuda")
    four = model.seconds(product, (*low_rank[:4], None, None, None, 0.0), {}, None, 4.0)
    assert four == read[0] + 3 * 2 * k * m


@pytest.mark.parametrize(("rows", "multiplied", "times"), [(3, 64, 1), (64, 64, 1), (192, 192, 1), (200, 256, 3)])
def test_a_cpu_with_units_multiplies_in_few_shapes(rows: int, multiplied: int, times: int) -> None:
    """And packs the second operand for each of them; fp32 it multiplies as it is."""
    product = torch.ops.lowmem_ft.product.default
    rest = (None, None, None, None, 0.0)
    operands = (meta(rows, 7), meta(rows, 5), meta(5, 7), *rest)
    assert seconds(product, *operands, kind="cpu", products={torch.bfloat16: 1.0}) == 2 * multiplied * 5 * 7
    assert seconds(product, *operands, kind="cpu", packing=1.0) == times * 5 * 7
    both = {"products": {torch.float32: 1.0}, "packing": 1.0}
    floats = [meta(*shape, dtype=torch.float32) for shape in ((rows, 7), (rows, 5), (5, 7))]
    assert seconds(product, *floats, *rest, kind="cpu", **both) == 2 * rows * 5 * 7 + 5 * 7
    model = CostModel(Rates(**{**FREE, "products": {torch.bfloat16: 1.0}, "packing": 1.0}), kind="cpu")
    two = model.seconds(product, (meta(2 * rows, 7), meta(2 * rows, 5), meta(5, 7), *rest), {}, None, 2.0)
    assert two == 2 * (2 * multiplied * 5 * 7 + times * 5 * 7), "two experts, each with its own matrix"


def test_gradients_of_matrices_are_summed_in_fp32_on_a_cpu() -> None:
    """Where oneDNN would compile a product for each number of rows that is summed over."""
    product, rest = torch.ops.lowmem_ft.product.default, (None, None, None, None, 0.0)
    work = {"kind": "cpu", "products": {torch.bfloat16: ENDLESS, torch.float32: 1.0}}
    for summed, expected in ((100, 2 * 3 * 100 * 7), (128, 0)):
        operands = (meta(3, 7), meta(summed, 3).t(), meta(summed, 7), *rest)
        assert seconds(product, *operands, **work) == pytest.approx(expected)


def test_products_of_a_whole_step_in_closed_form(tmp_path: Path) -> None:
    """Forward and backward of every matrix once each (the base is frozen), and the head's twice."""
    hidden, inner, vocab, layers, tokens = 64, 128, 256, 3, 128
    shape = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab, "num_hidden_layers": layers}
    tiny_config("llama", **shape).save_pretrained(tmp_path)
    config = RunConfig.from_dict(
        {"model": str(tmp_path), "data": {"seq_len": 64}, "adapter": {"rank": 1, "targets": ["q_proj"]}}
    )
    rates = Rates(**{**FREE, "products": {torch.bfloat16: 1.0}})
    stage = Stage(config, policy(keep=layers, depth=layers), kind="cuda", cost=CostModel(rates, kind="cuda").seconds)
    stage.step(policy(keep=layers, depth=layers), keep=layers)
    matrices = layers * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * inner)
    low_rank = layers * 3 * 2 * tokens * 2 * hidden
    expected = 2 * 2 * tokens * (matrices + hidden * vocab)
    # below the first adapter no gradient is needed: the first block's q, k and v have no backward
    saved = 2 * tokens * (2 * hidden * hidden)
    assert expected - saved <= sum(stage.tracer.seconds.values()) <= expected + low_rank


def test_a_host_that_calls_ahead_shows_where_it_takes_longer_than_the_work() -> None:
    """Of all operations of a phase of a block together, not of each: a queue lies between host and card."""
    model = CostModel(Rates(**{**FREE, "elementwise": 1.0, "call": 100.0}), kind="cuda")
    tracer = Tracer({}, {}, model.seconds)
    with tracer:
        for size in (10, 30):  # of 60 and of 180 seconds
            meta(size).mul_(meta(size))
        tracer.phase = "backward"
        meta(100).mul_(meta(100))
    assert tracer.seconds == {("load", None): 60 + 180, ("backward", None): 600}


@pytest.mark.parametrize("tokens", [64, 128, 1024])
def test_each_expert_dequantizes_its_own_weights(tmp_path: Path, tokens: int) -> None:
    """In forward and backward once, though memory is that of fewer, higher tiles; a call each, too."""
    hidden, inner, layers = 64, 128, 2

    def of(experts: int, **rates: Any) -> float:
        shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        tiny_config("mixtral", **shape, num_local_experts=experts).save_pretrained(tmp_path)
        settings = {"data": {"seq_len": tokens}, "adapter": {"rank": 1, "targets": ["q_proj"]}}
        config = RunConfig.from_dict({"model": str(tmp_path), **settings})
        price = CostModel(Rates(**{**FREE, **rates}), kind="cuda").seconds
        kept = policy(keep=layers, depth=layers, micro_batch_tokens=tokens)
        stage = Stage(config, kept, kind="cuda", cost=price)
        stage.step(kept, keep=layers)
        return sum(stage.tracer.seconds.values())

    more, values = 16 - 4, 3 * hidden * inner
    dequantized = of(16, dequantize={4: 1.0, 8: 1.0}) - of(4, dequantize={4: 1.0, 8: 1.0})
    assert dequantized == pytest.approx(2 * layers * more * values)
    assert of(16, call=1.0) - of(4, call=1.0) > 2 * layers * more * 4  # two that dequantize and two products


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("name", ["rtx-3060-12gb", "colab-t4-16gb", "cpu"])
def test_a_profile_that_nobody_measured_has_rates_too(name: str, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "multiplies", lambda dtype: units)
    rates = Rates.of(load_profile(name).model_copy(update={"measured": None}))
    assert (rates.loops is None) == (units or name != "cpu")
    assert all(0 < rate < 1e16 for rate in (*rates.products.values(), *rates.dequantize.values()))
    assert rates.elementwise < load_profile(name).memory_bandwidth.value


def test_a_datasheet_says_more_than_what_products_reach() -> None:
    """And what others measured of large products less than it does."""
    profile = load_profile("colab-t4-16gb")
    half, single = profile.flops["float16"], profile.flops["float32"]
    assert (half.how, single.how) == ("measured", "datasheet")
    products = Rates.of(profile).products
    assert products[torch.float16] == pytest.approx(half.value)
    assert products[torch.float32] == pytest.approx(0.8 * single.value)


@pytest.mark.parametrize(("name", "share"), [("h200-141gb", 0.28), ("rtx-3090-24gb", 0.6), ("v100-16gb", 0.4)])
def test_attention_takes_a_share_of_products(name: str, share: float) -> None:
    profile = load_profile(name)
    fastest = profile.flops[profile.fastest_dtype].value
    assert Rates.of(profile).attention_forward == pytest.approx(share * fastest)
