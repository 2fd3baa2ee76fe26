"""Adapters written for peft and read from peft, and what is done with files that are not right."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowmem_ft.adapters import peft_format
from lowmem_ft.adapters.inject import inject_lora, is_injected, trainable_parameters
from lowmem_ft.adapters.peft_format import (
    adapter_tensors,
    is_native,
    load_adapter,
    read_adapter_config,
    save_adapter,
    warn_of_other_base,
)
from lowmem_ft.core.errors import CheckpointError, ConfigError, LowMemError, UnsupportedError
from tests.models import ARCHITECTURES
from tests.unit.adapters.helpers import dequantized_model, error, logits, plain_model, quantized_model, shake

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# name -> (architecture, options of inject_lora, settings of the model)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in ARCHITECTURES},
    "rslora": ("llama", {"rslora": True}, {}),
    "gaussian": ("llama", {"init": "gaussian"}, {}),
    "dora": ("llama", {"dora": True}, {}),
    "dora conv1d": ("gpt2", {"dora": True, "rslora": True}, {}),
    "expression": ("qwen2", {"targets": r".*\.1\..*(q|up)_proj"}, {}),
    "layers": ("llama", {"layers": [1]}, {}),
    "patterns": (
        "phi3",
        {"rank_pattern": {"qkv_proj": 8, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"o_proj": 3}},
        {},
    ),
    "bias all": ("gpt2", {"bias": "all"}, {}),
    "bias lora_only": ("opt", {"bias": "lora_only", "targets": ["fc1", "v_proj"]}, {}),
    "bias and whole": ("opt", {"bias": "all", "train_modules": ["final_layer_norm"]}, {}),
    "head and norm": ("llama", {"train_modules": ["lm_head", "model.norm"]}, {}),
    "embeddings": ("llama", {"train_modules": ["embed_tokens"]}, {}),
    "tied embeddings": ("gpt2", {"train_modules": ["wte"]}, {}),
    "tied head": ("llama", {"train_modules": ["lm_head"]}, {"tie_word_embeddings": True}),
    "one of two stacks": ("mixtral", {"targets": ["down_proj", "q_proj"]}, {}),
    "one stack of one layer": ("gpt_oss", {"targets": ["gate_up_proj"], "layers": [1]}, {}),
    "experts, biases": ("gpt_oss", {"bias": "all"}, {}),
    "experts, rslora, dropout": ("qwen3_moe", {"rslora": True, "dropout": 0.1}, {}),
    "experts, patterns": ("deepseek_v3", {"rank_pattern": {"gate_proj": 2, "gate_up_proj": 3}}, {}),
    "shared experts only": ("deepseek_v3", {"targets": ["shared_experts.gate_proj"], "layers": [1]}, {}),
    "dense layer beside experts": ("deepseek_v3", {"targets": ["mlp.down_proj", "o_proj"]}, {}),
    "mixers whose kernels read matrices": ("falcon_h1", {}, {}),
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's and ours on tying


def trained(model: nn.Module, **options: Any) -> nn.Module:
    inject_lora(model, **{"rank": 4, "alpha": 8, "dtype": torch.float32, **options})
    shake(model)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_same_logits_and_what_it_saves_loads_here(case: str, tmp_path: Path) -> None:
    name, options, settings = CASES[case]
    ours = trained(plain_model(name, **settings), **options)
    expected = logits(ours)
    save_adapter(ours, tmp_path / "ours", base_model="base")
    theirs = peft.PeftModel.from_pretrained(plain_model(name, **settings), tmp_path / "ours").eval()
    assert error(logits(theirs), expected) < 1e-5  # float32; measured at most 4e-7
    assert error(logits(plain_model(name, **settings)), expected) > 1e-2  # so an adapter that is ignored cannot pass
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert (tmp_path / "ours" / WEIGHTS).stat().st_size > 0
    for folder in ("ours", "theirs"):
        again = plain_model(name, **settings)
        assert load_adapter(again, tmp_path / folder, dtype=torch.float32) is again
        assert torch.equal(logits(again.eval()), expected)
        assert [n for n, _ in trainable_parameters(again)] == [n for n, _ in trainable_parameters(ours)]


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_peft_gives_the_same_logits_in_bfloat16(options: dict[str, Any], tmp_path: Path) -> None:
    ours = trained(plain_model("llama", dtype=torch.bfloat16), dtype=torch.bfloat16, **options)
    save_adapter(ours, tmp_path, base_model="base")
    theirs = peft.PeftModel.from_pretrained(plain_model("llama", dtype=torch.bfloat16), tmp_path).eval()
    # peft keeps the adapter in float32 and rounds elsewhere; measured 0.6-1.2%
    assert error(logits(theirs), logits(ours)) < 3e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon", "mixtral", "gpt_oss", "deepseek_v3"])
def test_an_adapter_trained_on_a_quantized_model_fits_the_plain_one(name: str, tmp_path: Path) -> None:
    ours = trained(quantized_model(name))
    save_adapter(ours, tmp_path, base_model="base")
    plain = dequantized_model(name, quantized_model(name))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert error(logits(theirs), logits(ours)) < 1e-5  # the same weights in float32; measured at most 5e-7
    again = load_adapter(quantized_model(name), tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(ours))


def test_a_quantized_model_names_its_targets_as_clearly_as_a_plain_one(tmp_path: Path) -> None:
    """Quantized layers have no parameter `weight`, by which peft tells apart what it takes for experts."""
    for i, model in enumerate((plain_model("deepseek_v3"), quantized_model("deepseek_v3"))):
        save_adapter(trained(model, layers=[0], targets=["gate_proj"]), tmp_path / str(i), base_model="base")
    configs = [read_adapter_config(tmp_path / str(i)) for i in range(2)]
    assert configs[0] == configs[1]
    assert configs[0]["target_parameters"] == ["model.layers.0.mlp.gate_proj.weight"]


def test_names_are_short_where_that_is_clear(tmp_path: Path) -> None:
    save_adapter(trained(plain_model("llama"), targets=["q_proj"]), tmp_path / "all", base_model="some/base")
    save_adapter(trained(plain_model("llama"), layers=[1], targets=["q_proj"]), tmp_path / "one", base_model="b")
    config = read_adapter_config(tmp_path / "all")
    assert config["target_modules"] == ["q_proj"]
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert read_adapter_config(tmp_path / "one")["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    keys = load_file(tmp_path / "all" / WEIGHTS)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_on_embeddings_load_as_peft_writes_them(target: str, tmp_path: Path) -> None:
    """Beside such an adapter peft writes the base's own matrix."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(plain_model("llama"), peft.LoraConfig(target_modules=["q_proj", target], **options))
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    assert any(key.endswith(f"{target}.base_layer.weight") for key in load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(load_adapter(plain_model("llama"), tmp_path).eval()), logits(theirs.eval()))
    load_adapter(quantized_model("llama"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "base_model.model.model.norm.weight": torch.ones(48)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        load_adapter(plain_model("llama"), tmp_path)


def test_training_goes_on_from_a_saved_adapter(tmp_path: Path) -> None:
    save_adapter(trained(quantized_model("llama"), dtype=torch.bfloat16), tmp_path, base_model="base")
    fresh = load_adapter(quantized_model("llama"), tmp_path, dropout=0.1)
    filled = quantized_model("llama")
    inject_lora(filled, rank=4, alpha=8)
    load_adapter(filled, tmp_path)
    assert torch.equal(logits(fresh.eval()), logits(filled.eval()))
    assert {p.dtype for _, p in trainable_parameters(fresh)} == {torch.bfloat16}
    before = {key: tensor.clone() for key, tensor in adapter_tensors(fresh).items()}
    fresh.train()(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    torch.optim.SGD(fresh.parameters(), lr=1.0).step()
    save_adapter(fresh, tmp_path, base_model="base")  # over the old one
    saved = load_file(tmp_path / WEIGHTS)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in adapter_tensors(fresh).items())
    assert any(not torch.equal(saved[key], before[key]) for key in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]  # nothing of the writing is left


def test_saving_that_fails_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(trained(plain_model("llama")), tmp_path, base_model="base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowmem_ft.adapters.peft_format.write_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_adapter(trained(plain_model("llama"), rank=2), tmp_path, base_model="base")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(settings | values))

    return edit


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    (folder / WEIGHTS).unlink()


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


A_KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
PUT_R = "fix: +put r and rank_pattern in adapter_config.json back"
BAD_FILES: dict[str, tuple[Callable[[Path], object], type[LowMemError], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), CheckpointError, "config cannot be read"),
    "no json": (lambda f: (f / CONFIG).write_bytes(b"\xff{"), CheckpointError, "config cannot be read"),
    "nested": (lambda f: (f / CONFIG).write_text("[" * 100_000), CheckpointError, "config cannot be read"),
    "not a mapping": (lambda f: (f / CONFIG).write_text("[1]"), CheckpointError, "names no peft method"),
    "no method": (edit_config(peft_type="LORRA"), CheckpointError, "names no peft method"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), CheckpointError, "weights are missing"),
    "pickle": (only_a_pickle, CheckpointError, "a pickle, which could run code"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]),
        CheckpointError,
        "weights cannot be read",
    ),
    "flipped bit": (flip_a_bit, CheckpointError, "weights are damaged"),
    "missing": (edit_tensors(lambda t: t.pop(A_KEY)), CheckpointError, "lacks 1 tensors"),
    "unexpected": (edit_tensors(lambda t: t.update({"x.y": torch.zeros(1)})), CheckpointError, "1 tensors for which"),
    "shape": (edit_tensors(lambda t: t.update({A_KEY: torch.zeros(4, 47)})), CheckpointError, "another shape"),
    "nan": (edit_tensors(lambda t: t[A_KEY].fill_(torch.nan)), CheckpointError, "NaN or Inf"),
    "inf": (edit_tensors(lambda t: t[A_KEY][0].fill_(torch.inf)), CheckpointError, "NaN or Inf"),
    "rank": (edit_config(r=5), CheckpointError, rf"q_proj another rank than[\s\S]*\(4, 48\)[\s\S]*{PUT_R}"),
    "rank of some": (edit_config(rank_pattern={"q_proj": 2}), CheckpointError, "q_proj another rank than its tensors"),
    "half a rank": (
        edit_config(r=4.5),
        CheckpointError,
        r"r: 4\.5 in[\s\S]*allowed: a whole number > 0 and <= 65536\n.*put adapt",
    ),
    "absurd rank": (edit_config(r=10**9), CheckpointError, r"not valid\n.*r: 1000000000 in"),
    "rank as text": (edit_config(r="4"), CheckpointError, r'not valid\n.*r: "4" in'),
    "ranks": (edit_config(rank_pattern={"q_proj": "a"}), CheckpointError, r'rank_pattern: \{"q_proj": "a"\} in'),
    "targets": (edit_config(target_modules=5), CheckpointError, r"target_modules: 5[\s\S]*text \| a list of text"),
    "layers": (edit_config(layers_to_transform="x"), CheckpointError, 'layers_to_transform: "x" in'),
    "biases": (edit_config(bias="foo"), CheckpointError, r'bias: "foo"[\s\S]*none \| all \| lora_only'),
    "flag": (edit_config(use_dora="yes"), CheckpointError, r'use_dora: "yes"[\s\S]*true \| false'),
    "rank zero": (edit_config(r=0), CheckpointError, "config is not valid"),
    "no alpha": (edit_config(lora_alpha=None), CheckpointError, "lora_alpha: null in"),
    "endless alpha": (edit_config(lora_alpha=math.inf), CheckpointError, r"lora_alpha: Infinity in[\s\S]*> 0 and < 1"),
    "no such token": (edit_config(trainable_token_indices=[10**9]), CheckpointError, "peft cannot load the adapter"),
    "another package": (edit_config(megatron_config={"a": 1}), CheckpointError, "peft cannot load the adapter"),
    "broken pattern": (edit_config(rank_pattern={"(": 3}), CheckpointError, "config is not valid"),
    "no such layers": (edit_config(target_modules=["c_attn"]), CheckpointError, "made for another model"),
    "more layers": (edit_config(target_modules=["q_proj", "v_proj"]), CheckpointError, "lacks 4 tensors"),
    "changed base": (edit_config(init_lora_weights="pissa"), UnsupportedError, "changed base weights"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_and_change_nothing(case: str, tmp_path: Path) -> None:
    damage, kind, message = BAD_FILES[case]
    save_adapter(trained(plain_model("llama"), targets=["q_proj"]), tmp_path, base_model="base")
    damage(tmp_path)
    model = plain_model("llama")
    base = logits(model)
    with pytest.raises(kind, match=message):
        load_adapter(model, tmp_path)
    assert not is_injected(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("options", [{"rank": 2}, {"alpha": 9}, {"rslora": True}, {"targets": ["q_proj", "k_proj"]}])
def test_an_adapter_with_other_settings_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(trained(plain_model("llama"), targets=["q_proj"]), tmp_path, base_model="base")
    model = trained(plain_model("llama"), **{"targets": ["q_proj"], **options})
    before = logits(model)
    with pytest.raises(CheckpointError, match="does not fit the one in the model at"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_an_adapter_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(plain_model("llama", num_hidden_layers=3)), tmp_path, base_model="base")
    with pytest.raises(CheckpointError, match="for which this model has no place"):
        load_adapter(plain_model("llama"), tmp_path)
    save_adapter(trained(plain_model("llama", intermediate_size=96)), tmp_path, base_model="base")
    with pytest.raises(CheckpointError, match="another shape"):
        load_adapter(plain_model("llama"), tmp_path)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_of_another_model_says_of_which(layers: int, tmp_path: Path) -> None:
    save_adapter(trained(plain_model("llama", num_hidden_layers=layers)), tmp_path, base_model="models/one")
    model = plain_model("llama")
    model.config._name_or_path = "models/other"
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, tmp_path)
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("it was trained on models/one, and this is models/other")


@pytest.mark.parametrize(
    ("base", "same"),
    [
        ("meta-llama/Llama-3", True),
        ("/models/llama-3/", True),
        ("/cache/models--meta-llama--Llama-3/snapshots/0123", True),
        ("/models/latest", True),
        ("/models/Llama-2", False),
        ("meta-llama/Llama-3.1", False),
    ],
)
def test_another_base_is_warned_of_by_name(
    base: str, same: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "Llama-3").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "Llama-3")
    save_adapter(trained(plain_model("llama"), targets=["q_proj"]), tmp_path / "adapter", base_model="hub/Llama-3")
    recwarn.clear()
    settings = read_adapter_config(tmp_path / "adapter")
    warn_of_other_base(settings, tmp_path / "adapter", base.replace("/models/latest", str(tmp_path / "latest")))
    assert len(recwarn) == (0 if same else 1)
    assert same or "trained on hub/Llama-3" in str(recwarn[0].message)


def test_a_base_that_has_no_name_is_not_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for named in ("a\0b", "\x1b[2Jb", 5, None, ""):
        warn_of_other_base({"base_model_name_or_path": named}, tmp_path, "meta-llama/Llama-3")
    assert not len(recwarn)


def test_two_values_for_one_tied_tensor_are_refused(tmp_path: Path) -> None:
    options = {"train_modules": ["wte"], "targets": ["c_attn"]}
    save_adapter(trained(plain_model("gpt2"), **options), tmp_path, base_model="base")
    edit_tensors(lambda t: t["base_model.model.lm_head.weight"].add_(1))(tmp_path)
    with pytest.raises(CheckpointError, match="two values for what is one tied tensor"):
        load_adapter(plain_model("gpt2"), tmp_path)
    edit_config(ensure_weight_tying=False)(tmp_path)
    settings = read_adapter_config(tmp_path)
    assert not is_native(plain_model("gpt2"), tmp_path, settings), "peft keeps two copies apart if nothing ties them"
    edit_config(ensure_weight_tying=True)(tmp_path)
    edit_tensors(lambda t: t.pop("base_model.model.lm_head.weight"))(tmp_path)
    load_adapter(plain_model("gpt2"), tmp_path)  # the file says that they are tied
    edit_config(ensure_weight_tying=False)(tmp_path)
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):  # peft would have trained one without the other
        load_adapter(plain_model("gpt2"), tmp_path)


@pytest.mark.parametrize("native", [True, False])
def test_the_config_is_read_once(native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(trained(plain_model("llama")), tmp_path, base_model="base")
    if not native:
        edit_config(use_dora=False, lora_bias=True)(tmp_path)
    read: list[Path] = []
    monkeypatch.setattr(peft_format, "read_adapter_config", lambda it: read.append(it) or read_adapter_config(it))
    with contextlib.suppress(CheckpointError):  # of the biases that are not there
        load_adapter(plain_model("llama"), tmp_path)
    assert len(read) == 1


def test_a_model_without_an_adapter_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LoRA adapters"):
        save_adapter(plain_model("llama"), tmp_path, base_model="base")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_adapter(trained(plain_model("llama")), file, base_model="base")


def test_loading_on_meta_only_counts(tmp_path: Path) -> None:
    save_adapter(trained(plain_model("mixtral")), tmp_path, base_model="base")
    model = load_adapter(plain_model("mixtral").to("meta"), tmp_path)
    assert {name for name, _ in trainable_parameters(model)} == {
        name for name, _ in trainable_parameters(load_adapter(plain_model("mixtral"), tmp_path))
    }
