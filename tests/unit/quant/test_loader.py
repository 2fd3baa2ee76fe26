"""Loading: names and layouts that are converted, multimodal checkpoints, what is refused, and the bound on memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.initialization import no_init_weights

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant import conversion
from lowmem_ft.quant.architecture import conversion_plan, template_of
from lowmem_ft.quant.checkpoint import SINGLE, Checkpoint
from lowmem_ft.quant.conversion import convert, plan_conversion
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.loader import load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec, quantize
from lowmem_ft.quant.swap import swap_quantized
from tests.models import MOE_ARCHITECTURES, save_tiny, tiny_config, tiny_model
from tests.unit.quant.loading import (
    BF16,
    NF4,
    TOKENS,
    change_tensors,
    load,
    logits,
    reference,
    relative,
    save_gemma3,
    save_mistral3,
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(MOE_ARCHITECTURES))
def test_stacks_of_experts_are_read_slice_by_slice(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny(name, tmp_path))
    template = template_of(checkpoint, meta_model(checkpoint).config, dtype=torch.bfloat16)
    steps = [step for step in conversion_plan(checkpoint, template).steps if step.slices]
    expected = reference(tmp_path)
    stacks = {key for key, value in expected.named_parameters() if "experts" in key and value.ndim == 3}
    assert {step.only_target for step in steps} == stacks
    assert stacks
    for step in steps:
        for e in range(step.slices or 0):
            (tensor,) = convert(
                step, checkpoint, template.model, dtype=torch.bfloat16, device=torch.device("cpu"), index=e
            ).values()
            assert torch.equal(tensor, expected.get_parameter(step.only_target)[e])
            # gate and up lie one behind the other as they are read: nothing was copied to join them
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_stored_stacks_that_a_rule_transposes_are_read_slice_by_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen3-VL's mixture of experts is stored: the rule looks at the whole parameter's shape, and sees a slice."""
    expected = reference(save_tiny("mixtral", tmp_path / "plain"))
    key = "model.layers.0.mlp.experts.gate_up_proj"
    stack = expected.get_parameter(key).detach()
    for stored in (stack, stack.transpose(1, 2).contiguous()):
        folder = save_tiny("mixtral", tmp_path / str(stored.shape[1]))
        save_file({key: stored}, folder / SINGLE)
        rule = WeightConverter("experts.gate_up_proj", "experts.gate_up_proj", [Transpose(1, 2, check_dims=True)])
        monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda _, rule=rule: [rule])
        checkpoint = Checkpoint.open(folder)
        (step,) = plan_conversion(expected, checkpoint, rename=str, wanted={key: tuple(stack.shape)}).steps
        assert step.slices == len(stack)
        for e, matrix in enumerate(stack):
            result = convert(step, checkpoint, expected, dtype=stack.dtype, device=torch.device("cpu"), index=e)
            assert torch.equal(result[key], matrix)


@pytest.mark.parametrize("name", ["hrm_text", "minimax_m2"])
def test_other_layouts_are_converted_by_transformers_rules(name: str, tmp_path: Path) -> None:
    """One matrix that is split into several (hrm_text), and renamed experts (minimax_m2)."""
    settings = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 12,
                "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored, own = set(load_file(tmp_path / SINGLE)), set(model.state_dict())
    assert len(stored - own) >= 4, "the checkpoint must be laid out in another way than the model"
    expected = reference(tmp_path)
    assert {k: v.shape for k, v in expected.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    plain, report = load(tmp_path, BF16)
    assert not report.unexpected
    for key, value in expected.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value), key
    quantized, report = load(tmp_path, NF4)
    for path in report.quantized:
        module = quantized.get_submodule(path)
        if isinstance(module, QuantLinear):
            direct = quantize(expected.get_submodule(path).weight, NF4)
            assert all(torch.equal(module.storage()[key], value) for key, value in direct.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_stored_types_are_cast_as_transformers_casts_them(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llama").to(dtype).save_pretrained(tmp_path)
    model, _ = load(tmp_path, BF16)
    expected = reference(tmp_path)
    assert all(torch.equal(value, expected.get_parameter(key)) for key, value in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_compute_types(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny("gpt_oss", tmp_path))  # it keeps norms in float32 when it runs in float16
    model = meta_model(checkpoint, dtype=dtype)
    load_weights(model, checkpoint, spec=BF16, dtype=dtype, place=lambda name, tensor: tensor)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for key, value in model.named_parameters():
        assert value.dtype == expected.get_parameter(key).dtype, key
        assert torch.equal(value, expected.get_parameter(key))
    assert model.get_parameter("model.norm.weight").dtype == torch.float32


@pytest.mark.parametrize("save", [save_gemma3, save_mistral3])
def test_only_the_language_model_of_a_multimodal_checkpoint_is_loaded(save: object, tmp_path: Path) -> None:
    assert callable(save)
    whole = save(tmp_path)
    model, report = load(tmp_path, BF16)
    assert "ForCausalLM" in type(model).__name__
    assert not any("vision" in key or "projector" in key for key, _ in model.named_parameters())
    assert any("vision" in key for key in report.skipped)
    assert not report.unexpected
    assert torch.equal(logits(model), logits(whole))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (save is save_gemma3)
    quantized, report = load(tmp_path, NF4)
    assert len(report.quantized) == 7 * model.config.num_hidden_layers
    assert 1e-3 < relative(logits(quantized), logits(whole)) < 0.5


def test_a_stored_head_that_differs_is_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, _ = load(folder)
    assert not model.all_tied_weights_keys
    stored = load_file(folder / SINGLE)
    assert torch.equal(model.get_output_embeddings().weight, stored["lm_head.weight"])
    change_tensors(folder / SINGLE, {"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    same, _ = load(folder)
    assert same.get_output_embeddings().weight is same.get_input_embeddings().weight
    change_tensors(folder / SINGLE, {"model.embed_tokens.weight": None})
    from_head, _ = load(folder)
    assert torch.equal(logits(from_head), logits(same))


def test_place_sees_each_tensor_once_and_the_model_holds_what_it_returns(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny("qwen3_moe", tmp_path))
    model = meta_model(checkpoint)
    placed: dict[str, Tensor] = {}

    def place(name: str, tensor: Tensor) -> Tensor:
        assert name not in placed
        assert not tensor.is_meta
        placed[name] = tensor.clone()
        return placed[name]

    report = load_weights(model, checkpoint, spec=NF4, place=place)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(placed) == set(held)
    for name, tensor in held.items():
        assert tensor.data_ptr() == placed[name].data_ptr()
        assert not tensor.requires_grad
    assert report.nbytes == sum(tensor.nbytes for tensor in held.values())


def test_a_model_that_is_swapped_already_is_filled(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny("mixtral", tmp_path))
    model = meta_model(checkpoint)
    swap_quantized(model, spec=NF4, skip=["lm_head"])
    load_weights(model, checkpoint, spec=NF4, place=lambda name, tensor: tensor)
    assert torch.equal(logits(model), logits(load(tmp_path)[0]))


def test_progress_ends_with_everything(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    folder = save_tiny("mixtral", tmp_path)
    load(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == sum(info.nbytes for info in Checkpoint.open(folder).tensors.values())
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_the_generation_settings_come_along(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[2, 9]).save_pretrained(folder)
    model, _ = load(folder)
    assert model.generation_config.temperature == 0.25
    assert model.generation_config.eos_token_id == [2, 9]
    assert model.generate(TOKENS, max_new_tokens=2).shape == (2, 26)


def test_what_the_model_has_no_place_for_is_ignored_and_reported(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    change_tensors(folder / SINGLE, {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)})
    with pytest.warns(UserWarning, match=r"no place .* left out: model\.layers\.7\.mlp\.up_proj\.weight$"):
        assert load(folder)[1].unexpected == ["model.layers.7.mlp.up_proj.weight"]


def test_buffers_of_older_checkpoints_are_ignored_in_silence(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = save_tiny("llama", tmp_path)
    change_tensors(folder / SINGLE, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    load(folder)
    assert not [it for it in recwarn if "no place" in str(it.message)]


def test_weights_that_are_integers_are_refused(tmp_path: Path) -> None:
    """As of a quantized checkpoint whose config.json lost its quantization_config."""
    folder = save_tiny("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = load_file(folder / SINGLE)[name].shape
    change_tensors(folder / SINGLE, {name: torch.ones(shape, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=f"stored as integers(?s:.*){name}: int8"):
        load(folder)


def test_missing_tensors_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    change_tensors(folder / SINGLE, {"model.layers.1.mlp.up_proj.weight": None, "lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks tensors(.|\n)*lm_head.weight|up_proj"):
        _load_nothing(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_wrong_shapes_are_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path)
    key = next(
        key
        for key in sorted(load_file(folder / SINGLE))
        if key.endswith(("up_proj.weight", "c_fc.weight", "0.w2.weight"))
    )
    change_tensors(folder / SINGLE, {key: torch.ones(7, 9, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"shape is not the one|do not fit together") as caught:
        _load_nothing(folder)
    assert key in str(caught.value)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path)
    key = next(key for key in load_file(folder / SINGLE) if key.endswith("experts.2.w1.weight"))
    change_tensors(folder / SINGLE, {key: None})
    with pytest.raises(CheckpointError, match=r"gate_up_proj"):
        _load_nothing(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("name", "part"), [("llama", "norm.weight"), ("llama", "down_proj"), ("mixtral", "1.w3"),
                                            ("gpt_oss", "experts.down_proj")])  # fmt: skip
def test_nan_and_inf_are_refused(name: str, part: str, bad: float, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path)
    tensors = load_file(folder / SINGLE)
    key = next(key for key in sorted(tensors) if part in key)
    tensors[key].view(-1)[-3] = bad
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or Inf") as caught:
        load(folder)
    assert key in str(caught.value)


def test_an_attention_implementation_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny("gpt_oss", tmp_path))
    with pytest.raises(UnsupportedError, match="attention implementation 'sdpa'"):
        meta_model(checkpoint, attn_implementation="sdpa")
    assert meta_model(checkpoint, attn_implementation="eager").config._attn_implementation == "eager"


def test_the_model_is_on_meta_before_it_is_loaded(tmp_path: Path) -> None:
    model = meta_model(Checkpoint.open(save_tiny("llama", tmp_path)))
    assert isinstance(model, LlamaForCausalLM)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


MEASURE = """
import json, os, sys, torch
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.loader import load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec
from pathlib import Path

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def load(folder, bits, cache):
    checkpoint = Checkpoint.open(folder)
    model = meta_model(checkpoint)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    report = load_weights(model, checkpoint, spec=QuantSpec(bits=bits), place=lambda name, tensor: tensor, cache=cache)
    return {"peak": status("VmHWM") - before, "held": report.nbytes, "from_cache": report.from_cache}

torch.set_num_threads(1)
large, small, cache = map(Path, sys.argv[1:4])
load(small, 4, None)  # what libraries allocate once is not the load's
for bits in map(int, sys.argv[4:]):
    if os.fork() == 0:  # every load in a process of its own, for memory that an earlier one has freed would be reused
        print(json.dumps(load(large, bits, cache)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
LARGE = {
    "llama": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 4000},
    "mixtral": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_local_experts": 16},
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
@pytest.mark.parametrize(("name", "bits"), [("llama", ("4", "4", "8")), ("mixtral", ("4", "4", "16"))])
def test_memory_stays_within_the_bound(name: str, bits: tuple[str, ...], tmp_path: Path) -> None:
    """Peak RSS above the start <= what the model holds + the largest tensor (of experts: one slice) + 64 MiB."""
    large, small = _save_repeated(name, tmp_path / "large"), save_tiny("llama", tmp_path / "small")
    command = [sys.executable, "-c", MEASURE, str(large), str(small), str(tmp_path / "cache"), *bits]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    tensors = Checkpoint.open(large).tensors
    total, largest = sum(i.nbytes for i in tensors.values()), max(i.nbytes for i in tensors.values())
    assert total > 120 << 20, "large enough that reading all of it would break the bound"
    assert [result["from_cache"] for result in results] == [False, True, False]
    for result in results:
        # Measured on 155 to 304 MiB (llama, mixtral, gpt2): 1 to 14 MiB over held + largest, from the cache below it
        assert result["peak"] < result["held"] + largest + (64 << 20)


def _save_repeated(name: str, folder: Path) -> Path:
    """A large checkpoint whose layers are all the same: drawing all the numbers would take longer than the test."""
    sizes = {**LARGE[name], "num_attention_heads": 8, "num_key_value_heads": 8}
    state = tiny_model(name, **{**sizes, "num_hidden_layers": 1}).state_dict()
    with no_init_weights():
        big = AutoModelForCausalLM.from_config(tiny_config(name, **sizes), dtype=torch.bfloat16)
    big.load_state_dict({key: state[re.sub(r"layers\.\d+", "layers.0", key)] for key in big.state_dict()})
    big.save_pretrained(folder)
    return folder


def _load_nothing(folder: Path) -> None:
    """Load with a `place` that must never be reached."""
    checkpoint = Checkpoint.open(folder)
    load_weights(meta_model(checkpoint), checkpoint, spec=QuantSpec(), place=lambda name, _: pytest.fail(name))
