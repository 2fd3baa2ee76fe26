from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as bnb_functional
from torch._subclasses import FakeTensorMode

from lowmem_ft.core.errors import CheckpointError, ConfigError, UnsupportedError
from lowmem_ft.quant.ops import QuantSpec, dequantize, layout, quantize, reference_4bit, reference_int8
from tests.unit.quant import random_matrix

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FOUR_BIT = [QuantSpec(type=kind, double_quant=double) for kind in ("nf4", "fp4") for double in (True, False)]
SHAPES = [
    (1, 1),
    (1, 48),  # one row, less than a block
    (1, 4097),  # a gate of one row, odd
    (3, 5),  # odd count: the last byte is half used
    (5, 80),  # rows a multiple of 16 but not of 64: bitsandbytes' CPU kernel is wrong here
    (131, 77),
    (64, 64),
    (256, 192),
    (1025, 512),  # several chunks, the last one short
    (701, 513),  # several chunks and an odd count
]
STRANGE = {
    "zeros": torch.zeros(4, 48),
    "zero tail": torch.cat([torch.ones(1, 128), torch.zeros(1, 40)], dim=1),
    "one outlier": torch.zeros(4, 64).index_fill_(1, torch.tensor(3), 1e4),
    "tiny": torch.full((3, 50), 1e-30),
    "constant": torch.full((3, 50), -0.5),
}


@pytest.mark.parametrize("spec", FOUR_BIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_4bit_storage_is_that_of_bitsandbytes(shape: tuple[int, int], spec: QuantSpec) -> None:
    for dtype in DTYPES:
        assert_same_storage(random_matrix(*shape, dtype=dtype), spec)


@pytest.mark.parametrize("spec", FOUR_BIT, ids=str)
@pytest.mark.parametrize("name", STRANGE)
def test_4bit_storage_of_strange_values(name: str, spec: QuantSpec) -> None:
    assert_same_storage(STRANGE[name], spec)


def assert_same_storage(weight: torch.Tensor, spec: QuantSpec) -> None:
    codes, state = bnb_functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=spec.double_quant, quant_type=spec.type
    )
    expected = {"qweight": codes, "absmax": state.absmax}
    if spec.double_quant:
        expected |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        expected |= {"nested_offset": state.offset}
    storage = quantize(weight, spec)
    assert storage.keys() == expected.keys()
    for name, tensor in storage.items():
        assert torch.equal(tensor, expected[name]), name
    assert {name: (tuple(t.shape), t.dtype) for name, t in storage.items()} == layout(weight.shape, spec)


@pytest.mark.parametrize("shape", [(48, 80), (513, 701), (512, 1025)], ids=str)
def test_a_transposed_view_quantizes_like_its_copy(shape: tuple[int, int]) -> None:
    view = random_matrix(*shape, dtype=torch.bfloat16).t()
    for spec in (QuantSpec(), QuantSpec(bits=8)):
        of_view, of_copy = quantize(view, spec), quantize(view.contiguous(), spec)
        assert all(torch.equal(of_view[name], of_copy[name]) for name in of_copy)


@pytest.mark.parametrize("spec", FOUR_BIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_4bit_values_are_code_times_absmax(shape: tuple[int, int], spec: QuantSpec) -> None:
    storage = quantize(random_matrix(*shape), spec)
    absmax_B = storage["absmax"]
    if spec.double_quant:
        scale_B = storage["nested_absmax"].repeat_interleave(256)[: absmax_B.numel()]
        absmax_B = storage["nested_code"][absmax_B.long()] * scale_B + storage["nested_offset"]
    for dtype in DTYPES:
        values = dequantize(storage, kind=spec.kind, shape=shape, dtype=dtype)
        assert values.dtype == dtype
        assert values.is_contiguous()
        assert torch.equal(values, reference_4bit(storage["qweight"], absmax_B, spec.type, shape, dtype))


@pytest.mark.parametrize("spec", FOUR_BIT, ids=str)
def test_4bit_values_are_those_of_bitsandbytes(spec: QuantSpec) -> None:
    weight = random_matrix(96, 128, dtype=torch.bfloat16)  # a shape that its CPU kernel gets right
    codes, state = bnb_functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=spec.double_quant, quant_type=spec.type
    )
    values = dequantize(quantize(weight, spec), kind=spec.kind, shape=weight.shape, dtype=weight.dtype)
    assert torch.equal(values, bnb_functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_matrix(*shape, dtype=dtype)
    weight[0, : shape[1] // 2] = 0
    storage = quantize(weight, QuantSpec(bits=8))
    theirs = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    assert torch.equal(storage["qweight"], theirs.CB)
    assert torch.equal(storage["scale"], theirs.SCB)
    assert {name: (tuple(t.shape), t.dtype) for name, t in storage.items()} == layout(shape, QuantSpec(bits=8))
    values = dequantize(storage, kind="int8", shape=shape, dtype=torch.float32)
    # bitsandbytes multiplies by a rounded 1/127: two roundings of float32 apart
    torch.testing.assert_close(values, bnb_functional.int8_vectorwise_dequant(theirs.CB, theirs.SCB), rtol=3e-7, atol=0)
    for out in DTYPES:
        values = dequantize(storage, kind="int8", shape=shape, dtype=out)
        assert torch.equal(values, reference_int8(storage["qweight"], storage["scale"], out))


def test_int8_zero_rows_stay_zero() -> None:
    weight = random_matrix(3, 70)
    weight[1] = 0
    storage = quantize(weight, QuantSpec(bits=8))
    values = dequantize(storage, kind="int8", shape=(3, 70), dtype=torch.float32)
    assert torch.equal(values[1], torch.zeros(70))
    assert (values[[0, 2]] - weight[[0, 2]]).abs().max() <= storage["scale"].max() / 127  # half a step, and float16


def test_int8_out_of_range_of_float16_is_an_error() -> None:
    weight = random_matrix(4, 70, dtype=torch.bfloat16)
    weight[2, 5] = 1e6
    with pytest.raises(CheckpointError, match="too large"):
        quantize(weight, QuantSpec(bits=8))


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(double_quant=False), QuantSpec(bits=8)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_quantize_needs_little_scratch(spec: QuantSpec, transposed: bool) -> None:
    weight = random_matrix(2048, 1536, dtype=torch.bfloat16)
    weight = weight.t() if transposed else weight
    stored = sum(t.numel() * t.element_size() for t in quantize(weight, spec).values())
    peak = peak_bytes(lambda: quantize(weight, spec))
    assert stored < peak < stored + 6 * 2**20  # bitsandbytes' own takes 84 MiB for this matrix of 6 MiB
    if spec.bits == 4:
        assert peak_bytes(lambda: bnb_functional.quantize_4bit(weight.contiguous())) > stored + 60 * 2**20


def test_dequantize_needs_the_result_and_its_scales_only() -> None:
    storage = quantize(random_matrix(1024, 768), QuantSpec())
    values = 1024 * 768
    peak = peak_bytes(lambda: dequantize(storage, kind="nf4", shape=(1024, 768), dtype=torch.bfloat16))
    assert 2 * values <= peak <= 2 * values + 4 * values // 64 + 1024


def peak_bytes(work: object) -> int:
    """Peak of the bytes allocated while `work` runs, from the allocator's own events."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = work()  # type: ignore[operator]
    del result
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("shape", [(5, 80), (64, 64), (3, 5)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_opcheck_4bit(kind: str, shape: tuple[int, int]) -> None:
    storage = quantize(random_matrix(*shape), QuantSpec(type=kind, double_quant=False))
    args = (storage["qweight"], storage["absmax"], kind, shape, torch.bfloat16)
    torch.library.opcheck(torch.ops.lowmem_ft.dequantize_4bit.default, args)


@pytest.mark.parametrize("shape", [(5, 80), (1, 3)], ids=str)
def test_opcheck_int8(shape: tuple[int, int]) -> None:
    storage = quantize(random_matrix(*shape), QuantSpec(bits=8))
    args = (storage["qweight"], storage["scale"], torch.bfloat16)
    torch.library.opcheck(torch.ops.lowmem_ft.dequantize_int8.default, args)


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(double_quant=False), QuantSpec(bits=8)], ids=str)
def test_runs_on_fake_and_meta_tensors(spec: QuantSpec) -> None:
    expected = layout((33, 50), spec)
    meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in expected.items()}
    values = dequantize(meta, kind=spec.kind, shape=(33, 50), dtype=torch.float16)
    assert (values.device.type, values.shape, values.dtype) == ("meta", (33, 50), torch.float16)
    with FakeTensorMode():
        fake = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in expected.items()}
        values = dequantize(fake, kind=spec.kind, shape=(33, 50), dtype=torch.float16)
    assert (values.device.type, values.shape, values.dtype) == ("cpu", (33, 50), torch.float16)


def test_unknown_settings_are_errors() -> None:
    assert [QuantSpec(bits=bits).kind for bits in (4, 8, 16)] == ["nf4", "int8", "none"]
    with pytest.raises(ConfigError, match="width"):
        QuantSpec(bits=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="type"):
        QuantSpec(type="nf5")  # type: ignore[arg-type]
    storage = quantize(random_matrix(4, 70), QuantSpec())
    with pytest.raises(UnsupportedError, match="dtype"):
        dequantize(storage, kind="nf4", shape=(4, 70), dtype=torch.float64)
