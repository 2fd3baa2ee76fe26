"""Checkpoints that are already quantized: bitsandbytes as stored, FP8 and MXFP4 dequantized and quantized again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lowmem_ft.quant.loader as loader_module
from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear, get_base_weight
from lowmem_ft.quant.loader import effective_spec
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.quant.prequantized import open_source
from tests.models import save_tiny
from tests.unit.quant.loading import (
    BF16,
    NF4,
    change_tensors,
    dequantized_reference,
    load,
    logits,
    reference,
    relative,
)  # fmt: skip

WEIGHTS = "model.safetensors"
FORMATS: dict[str, tuple[QuantSpec, dict[str, Any]]] = {
    "nf4": (QuantSpec(double_quant=False), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-double": (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "fp4": (QuantSpec(type="fp4", double_quant=False), {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "stored-bf16": (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                          "bnb_4bit_quant_storage": torch.bfloat16}),
    "int8": (QuantSpec(bits=8), {"load_in_8bit": True}),
}  # fmt: skip
ROUND = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "gpt2": {"n_embd": 64}}


def save_bitsandbytes(name: str, folder: Path, settings: dict[str, Any], **overrides: Any) -> Path:
    plain = save_tiny(name, folder / "plain", **overrides)
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder / "bnb")
    return folder / "bnb"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ROUND)
def test_bitsandbytes_is_used_as_it_is_stored(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, settings = FORMATS[kind]
    folder = save_bitsandbytes(name, tmp_path, settings, **ROUND[name])
    monkeypatch.setattr(loader_module, "quantize", lambda *_: pytest.fail("nothing is to be quantized"))
    asked = QuantSpec(bits=8) if spec.bits == 4 else NF4  # another format is asked for, and not given
    model, report = load(folder, asked)
    assert report.spec == effective_spec(Checkpoint.open(folder), asked) == spec
    stored = load_file(folder / WEIGHTS)
    assert len(report.quantized) == sum(key.endswith((".absmax", ".SCB")) and "nested" not in key for key in stored)
    for path in report.quantized:
        module = model.get_submodule(path)
        assert isinstance(module, QuantLinear)
        assert module.spec == spec
        assert torch.equal(
            module.qweight.flatten().view(torch.uint8), stored[f"{path}.weight"].flatten().view(torch.uint8)
        )
        scales = stored[f"{path}.SCB" if spec.bits == 8 else f"{path}.weight.absmax"]
        assert torch.equal(module.scale if spec.bits == 8 else module.absmax, scales)
    # quantizing is deterministic, so the same as from the full-precision checkpoint
    monkeypatch.undo()
    assert torch.equal(logits(model), logits(load(tmp_path / "plain", spec)[0]))


@pytest.mark.parametrize("name", ["falcon", "mixtral"])
def test_what_bitsandbytes_left_is_quantized_in_its_format(name: str, tmp_path: Path) -> None:
    spec, settings = FORMATS["nf4"]
    model, report = load(save_bitsandbytes(name, tmp_path, settings), NF4)
    straight, expected = load(tmp_path / "plain", spec)
    assert report.quantized == expected.quantized
    assert torch.equal(logits(model), logits(straight))


def test_a_quantized_head_is_dequantized(tmp_path: Path) -> None:
    folder = save_bitsandbytes("llama", tmp_path, {**FORMATS["nf4"][1], "llm_int8_skip_modules": []}, **ROUND["llama"])
    assert "lm_head.weight.absmax" in load_file(folder / WEIGHTS)
    model, _ = load(folder)
    head, plain = model.get_output_embeddings().weight, reference(tmp_path / "plain").get_output_embeddings().weight
    assert head.dtype == torch.bfloat16
    assert 0.05 < relative(head, plain) < 0.12  # NF4's error on normal weights is 0.09


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 128}, "blocksize 128"),
        ({"nested_blocksize": 512}, "nested_blocksize 512"),
        ({"quant_type": "fp4"}, "quant_type fp4"),
    ],
)
def test_other_variants_of_bitsandbytes_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_bitsandbytes("llama", tmp_path, FORMATS["nf4-double"][1], **ROUND["llama"])
    key = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(load_file(folder / WEIGHTS)[key].numpy())) | changes
    change_tensors(folder / WEIGHTS, {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)})
    with pytest.raises(UnsupportedError, match=message):
        load(folder)


def test_an_incomplete_quantized_weight_is_refused(tmp_path: Path) -> None:
    folder = save_bitsandbytes("llama", tmp_path, FORMATS["nf4-double"][1], **ROUND["llama"])
    change_tensors(folder / WEIGHTS, {"model.layers.0.mlp.up_proj.weight.nested_absmax": None})
    with pytest.raises(CheckpointError, match="nested_absmax"):
        load(folder)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("", torch.zeros(3, 1, dtype=torch.uint8), "another size"),  # kernels would read beyond its end
        (".absmax", torch.zeros(3, dtype=torch.uint8), "another size"),
        (".nested_absmax", torch.zeros(0), "another size"),
        (".quant_map", None, "variant that cannot be read"),
        (".quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "cannot be read"),
        (".quant_state.bitsandbytes__nf4", torch.tensor([*b"[1]"], dtype=torch.uint8), "cannot be read"),
        (".quant_state.bitsandbytes__nf4", torch.tensor([*b'{"shape": 3}'], dtype=torch.uint8), "cannot be read"),
    ],
)
def test_a_damaged_quantized_weight_is_refused(part: str, value: Tensor | None, said: str, tmp_path: Path) -> None:
    folder = save_bitsandbytes("llama", tmp_path, FORMATS["nf4-double"][1], **ROUND["llama"])
    change_tensors(folder / WEIGHTS, {f"model.layers.0.mlp.up_proj.weight{part}": value})
    with pytest.raises((CheckpointError, UnsupportedError), match=said):
        load(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "hqq"])
def test_other_methods_are_refused(method: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    _set_quantization(folder, {"quant_method": method})
    with pytest.raises(UnsupportedError, match=f"{method}(.|\n)*full-precision checkpoint"):
        load(folder)


# FP8


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(..., R, C) -> e4m3 codes and (..., ceil(R/M), ceil(C/N)) scales, as DeepSeek-V3 publishes them."""
    rows, cols = weight.shape[-2:]
    grid = -(-rows // block[0]), -(-cols // block[1])
    scales = torch.empty(*weight.shape[:-2], *grid)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[..., i, j] = weight[part].float().abs().amax((-2, -1)) / 448
            codes[part] = (weight[part].float() / scales[..., i, j, None, None]).to(torch.float8_e4m3fn)
    return codes, scales


def save_fp8(name: str, folder: Path, block: tuple[int, int], suffix: str = "weight_scale_inv") -> dict[str, Tensor]:
    """Rewrite the layers' matrices of a tiny checkpoint in FP8; returns what they dequantize to."""
    tensors = load_file(save_tiny(name, folder) / WEIGHTS)
    expected = {}
    for key in [key for key in tensors if "layers" in key and key.endswith("proj.weight")]:
        codes, scales = to_fp8(tensors[key], block)
        tensors[key], tensors[f"{key.removesuffix('weight')}{suffix}"] = codes, scales
        wide = scales.repeat_interleave(block[0], 0)[: codes.shape[0]].repeat_interleave(block[1], 1)
        expected[key] = (codes.float() * wide[:, : codes.shape[1]]).bfloat16()
    tensors["model.layers.0.self_attn.q_proj.activation_scale"] = torch.ones(())
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _set_quantization(folder, {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"})
    return expected


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "scale"])
@pytest.mark.parametrize("block", [(16, 16), (8, 4), (32, 32)], ids=str)  # 32: the last blocks are cut off
def test_fp8_is_dequantized(block: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    expected = save_fp8("llama", tmp_path, block, suffix)
    source = open_source(Checkpoint.open(tmp_path))
    model, report = load(tmp_path, BF16)
    assert not report.unexpected
    assert len(expected) == 14
    for key, value in expected.items():
        assert torch.equal(model.get_parameter(key), value)
        out = torch.empty(source.tensors[key].shape)
        source.read_into(key, out)
        assert relative(out, value) < 3e-3  # bf16 rounding: at most 2^-8
    stored = load_file(tmp_path / WEIGHTS)
    whole = [key for key, v in expected.items() if v.shape[0] % block[0] == 0 and v.shape[1] % block[1] == 0]
    assert bool(whole) == (block != (32, 32))
    for key in whole:  # transformers takes a last block that is cut off for a smaller block size
        scales = stored[f"{key.removesuffix('weight')}{suffix}"]
        theirs = Fp8Dequantize(None)._dequantize_one(stored[key], scales, output_dtype=torch.bfloat16)
        assert torch.equal(expected[key], theirs)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_fp8_is_quantized_again(name: str, tmp_path: Path) -> None:
    expected = save_fp8(name, tmp_path, (16, 16))
    plain, _ = load(tmp_path, BF16)
    plain.save_pretrained(tmp_path / "dequantized")
    assert (len(expected) == 14) == (name == "llama")
    model, report = load(tmp_path, NF4)
    straight, straight_report = load(tmp_path / "dequantized", NF4)
    assert report.quantized == straight_report.quantized
    assert any("experts" in path for path in report.quantized) == (name == "qwen3_moe")
    assert torch.equal(logits(model), logits(straight))


def test_fp8_stacks_and_per_tensor_and_exponent_scales(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 24, 40, generator=generator)
    codes, scales = to_fp8(stack, (8, 8))
    one = torch.randn(6, 10, generator=generator).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 135, (3, 5), generator=generator, dtype=torch.uint8)
    matrix = torch.randn(24, 40, generator=generator).to(torch.float8_e4m3fn)
    folder = save_tiny("llama", tmp_path)
    extra = {
        "experts.w": codes,
        "experts.w_scale_inv": scales,
        "one.weight": one,
        "one.weight_scale_inv": torch.tensor(0.5),
        "e8m0.weight": matrix,
        "e8m0.weight_scale_inv": exponents,
    }
    change_tensors(folder / WEIGHTS, extra)
    _set_quantization(folder, {"quant_method": "fp8", "weight_block_size": [8, 8]})
    source = open_source(Checkpoint.open(folder))
    op = Fp8Dequantize(None)
    for name, scale, index in [
        ("experts.w", scales, None), ("experts.w", scales[1], 1), ("one.weight", torch.tensor([[0.5]]), None),
        ("e8m0.weight", exponents, None),
    ]:  # fmt: skip
        code = extra[name] if index is None else extra[name][index]
        out = torch.empty(code.shape)
        source.read_into(name, out, index)
        assert torch.equal(out, op._dequantize_one(code, scale, output_dtype=torch.float32))


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    save_fp8("llama", tmp_path, (16, 16))
    change_tensors(tmp_path / WEIGHTS, {"model.layers.0.mlp.up_proj.weight_scale_inv": None})
    with pytest.raises(UnsupportedError, match="up_proj"):
        load(tmp_path)


def test_fp8_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_fp8("llama", tmp_path, (16, 16))
    change_tensors(tmp_path / WEIGHTS, {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(7, 3)})
    with pytest.raises(CheckpointError, match="up_proj"):
        load(tmp_path)


# MXFP4


def save_mxfp4(folder: Path) -> dict[str, Tensor]:
    """A tiny gpt-oss with random MXFP4 experts; returns what transformers dequantizes them to."""
    save_tiny("gpt_oss", folder, hidden_size=64, intermediate_size=32)
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, Tensor | None] = {}
    expected = {}
    for key, value in load_file(folder / WEIGHTS).items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, cols, rows = value.shape
            blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, rows, cols // 32), generator=generator, dtype=torch.uint8)
            changes |= {key: None, f"{key}_blocks": blocks, f"{key}_scales": scales}
            expected[key] = convert_moe_packed_tensors(blocks, scales)
    change_tensors(folder / WEIGHTS, changes)
    _set_quantization(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]})
    return expected


def test_mxfp4_is_dequantized_as_transformers_does(tmp_path: Path) -> None:
    expected = save_mxfp4(tmp_path)
    model, report = load(tmp_path, BF16)
    assert not report.unexpected
    assert len(expected) == 4
    for key, value in expected.items():
        assert torch.equal(model.get_parameter(key), value)


def test_mxfp4_is_quantized_again(tmp_path: Path) -> None:
    expected = save_mxfp4(tmp_path)
    model, _ = load(tmp_path, NF4)
    for key, value in expected.items():
        stack = model.get_submodule(key)
        assert isinstance(stack, QuantStack)
        for e in range(len(stack)):
            assert relative(get_base_weight(stack, index=e), value[e]) < 0.12  # measured 0.08
    plain, _ = load(tmp_path, BF16)
    plain.save_pretrained(tmp_path / "dequantized")
    assert torch.equal(logits(model), logits(load(tmp_path / "dequantized", NF4)[0]))
    assert relative(logits(model), logits(dequantized_reference(tmp_path / "dequantized", model))) < 1e-3


def test_incomplete_mxfp4_is_refused(tmp_path: Path) -> None:
    save_mxfp4(tmp_path)
    change_tensors(tmp_path / WEIGHTS, {"model.layers.0.mlp.experts.down_proj_scales": None})
    with pytest.raises(CheckpointError, match="down_proj_scales missing"):
        load(tmp_path)


def _set_quantization(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
