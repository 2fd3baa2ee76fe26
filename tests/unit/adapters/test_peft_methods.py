"""Other methods of the peft library on a quantized model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lowmem_ft.adapters.inject import adapters_disabled, parameter_groups, trainable_parameters
from lowmem_ft.adapters.peft_format import load_adapter, save_adapter
from lowmem_ft.adapters.peft_methods import ON_CONV1D, SERVED, inject_peft, is_prompt_learning
from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import CheckpointError, ConfigError, LowMemError, UnsupportedError
from lowmem_ft.data.examples import Example
from lowmem_ft.data.packing import collate
from lowmem_ft.generate import complete
from lowmem_ft.runtime.hidden import decoder_inputs, hidden_states
from tests.models import save_tiny
from tests.unit.adapters.helpers import dequantized_model, error, logits, plain_model, quantized_model, shake, tokens
from tests.unit.export.runs import policy_of, trained

PROMPT = {"num_virtual_tokens": 4}
METHODS: dict[str, dict[str, Any]] = {
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "vera": {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj", "o_proj"]},
    "loha": {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    "lokr": {"peft_type": "LOKR", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["q_proj", "v_proj"]},
    "boft": {"peft_type": "BOFT", "boft_block_size": 4, "target_modules": ["q_proj"]},
    "ln_tuning": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "norm"]},
    "lora_bias": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "lora_bias": True},  # a variant of LoRA
    "beft": {"peft_type": "BEFT", "target_modules": ["v_proj"]},
    "c3a": {"peft_type": "C3A", "block_size": 12, "target_modules": ["q_proj", "v_proj"]},
    "deft": {"peft_type": "DEFT", "r": 4, "target_modules": ["q_proj"]},
    "delora": {"peft_type": "DELORA", "r": 4, "target_modules": ["q_proj"]},
    "fourierft": {"peft_type": "FOURIERFT", "n_frequency": 20, "target_modules": ["q_proj"]},
    "gralora": {"peft_type": "GRALORA", "r": 4, "gralora_k": 2, "target_modules": ["q_proj"]},
    "hira": {"peft_type": "HIRA", "r": 4, "target_modules": ["q_proj"]},
    "hra": {"peft_type": "HRA", "r": 4, "target_modules": ["q_proj"]},
    "lily": {"peft_type": "LILY", "r": 4, "target_modules": ["q_proj"]},
    "miss": {"peft_type": "MISS", "r": 4, "target_modules": ["q_proj"]},
    "osf": {"peft_type": "OSF", "target_modules": ["q_proj"]},
    "peanut": {"peft_type": "PEANUT", "r": 4, "target_modules": ["q_proj"]},
    "psoft": {"peft_type": "PSOFT", "r": 4, "target_modules": ["q_proj"]},
    "pvera": {"peft_type": "PVERA", "r": 4, "target_modules": ["q_proj"]},
    "randlora": {"peft_type": "RANDLORA", "r": 4, "target_modules": ["q_proj"]},
    "road": {"peft_type": "ROAD", "group_size": 8, "target_modules": ["q_proj"]},
    "supertuning": {"peft_type": "SUPERTUNING", "target_modules": ["q_proj"]},
    "tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": list(range(131))},
    "unilora": {"peft_type": "UNILORA", "r": 4, "theta_d_length": 64, "target_modules": ["q_proj"]},
    "prompt": {"peft_type": "PROMPT_TUNING", **PROMPT},
    "prefix": {"peft_type": "PREFIX_TUNING", **PROMPT},
    "p_tuning": {"peft_type": "p_tuning", "encoder_hidden_size": 16, **PROMPT},
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_trains_it_and_it_survives_saving(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = METHODS[method]
    base = quantized_model("qwen2", dtype=dtype)  # with biases, for the variant that needs them
    base.config.use_cache = False  # as in training
    torch.manual_seed(0)
    model = inject_peft(base, config).train()
    before = [parameter.detach().clone() for _, parameter in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    for _ in range(2):  # some start with a factor of zero, which keeps the others from moving in the first step
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        for _, parameter in trainable_parameters(model):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
        optimizer.step()
    after = trainable_parameters(model)
    assert after
    assert all(not torch.equal(old, new) for old, (_, new) in zip(before, after, strict=True))
    expected = logits(model.eval())
    save_adapter(model, tmp_path, base_model="base")
    again = load_adapter(quantized_model("qwen2", dtype=dtype), tmp_path)
    assert isinstance(again, peft.PeftModel)
    assert trainable_parameters(again)
    assert torch.equal(logits(again.eval()), expected)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_same_method_as_on_the_plain_model(method: str, tmp_path: Path) -> None:
    quantized = quantized_model("qwen2")
    plain = dequantized_model("qwen2", quantized)
    model = inject_peft(quantized, METHODS[method])
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model.eval(), tmp_path, base_model="base")
    base = logits(quantized_model("qwen2"))
    assert error(logits(model)[:, -base.shape[1] :], base) > 1e-3  # prompts add positions before the text
    reference = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert error(logits(reference), logits(model)) < 1e-5  # float32; measured 0
    with adapters_disabled(model):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("method", METHODS)
def test_planning_on_meta_counts_the_same_parameters(method: str, tmp_path: Path) -> None:
    model = inject_peft(quantized_model("qwen2"), METHODS[method])
    save_adapter(model, tmp_path, base_model="base")
    shapes = {name: parameter.shape for name, parameter in trainable_parameters(model)}
    planned = inject_peft(quantized_model("qwen2").to("meta"), METHODS[method])
    assert {name: parameter.shape for name, parameter in trainable_parameters(planned)} == shapes
    loaded = load_adapter(quantized_model("qwen2").to("meta"), tmp_path)
    assert all(parameter.is_meta for _, parameter in trainable_parameters(loaded))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])  # the first returns a cache, whatever it is told
@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning", "ia3"])
def test_generated_tokens_are_those_of_whole_passes(method: str, name: str) -> None:
    model = inject_peft(quantized_model(name), METHODS[method]).eval()
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(8 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=2, decode=lambda ids, **_: str(ids.tolist()))
    ids_1T = tokens()[:1]
    (said,) = complete(model, tokenizer, ids_1T.tolist(), max_new_tokens=8)
    with adapters_disabled(model):
        assert complete(model, tokenizer, ids_1T.tolist(), max_new_tokens=8) != [said]
    whole_1T = ids_1T
    for _ in range(8):
        whole_1T = torch.cat((whole_1T, logits(model, whole_1T)[:, -1:].argmax(-1)), dim=1)
    assert said == str(whole_1T[0, ids_1T.shape[1] :].tolist())


def test_those_that_were_tried_are_served_and_others_refused_by_name() -> None:
    tried = {str(config["peft_type"]).upper() for config in METHODS.values()}
    assert {*tried, "GLORA"} == SERVED
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        if kind.value not in SERVED:
            with pytest.raises(ConfigError, match=rf"peft's {kind.value} cannot be trained here[\s\S]*VERA"):
                inject_peft(plain_model("llama"), {"peft_type": kind.value})


def test_training_does_not_go_on_from_those_that_are_not_served(tmp_path: Path) -> None:
    run = trained("llama", tmp_path)
    file = run.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "VBLORA"}))
    config = RunConfig.from_dict({"model": run.config.model, "adapter": {"init": str(run.adapter)}})
    with pytest.raises(ConfigError, match="peft's VBLORA cannot be trained here"):
        assemble(config, run.policy, torch.device("meta"))


def test_one_takes_unquantized_layers_alone() -> None:
    config = {"peft_type": "GLORA", "r": 4, "target_modules": ["q_proj"]}
    assert trainable_parameters(inject_peft(plain_model("llama"), config))
    with pytest.raises(ConfigError, match="cannot put GLORA into this model"):
        inject_peft(quantized_model("llama"), config)


def on_conv1d(method: str) -> dict[str, Any]:
    """For the layers of GPT-2."""
    names = {"q_proj": "c_attn", "k_proj": "c_attn", "v_proj": "c_attn", "o_proj": "attn.c_proj"}
    names |= {"down_proj": "mlp.c_proj", "input_layernorm": "ln_1", "norm": "ln_f"}
    return {key: sorted({names[it] for it in value}) if key.endswith("_modules") else value
            for key, value in METHODS[method].items()}  # fmt: skip


TARGETED = [name for name, config in METHODS.items() if "target_modules" in config]


@pytest.mark.parametrize("method", TARGETED)
def test_what_is_trained_on_conv1d_peft_loads_on_the_plain_model(method: str, tmp_path: Path) -> None:
    """Or it is refused: a quantized layer is an nn.Linear, which more methods take."""
    quantized, config = quantized_model("gpt2"), on_conv1d(method)
    plain = dequantized_model("gpt2", quantized)
    if str(config["peft_type"]) not in ON_CONV1D | {"LN_TUNING"}:
        message = r"plain model, whose layers are transformers' Conv1D\n[\s\S]*transformer\.h\.0[\s\S]*method: lora"
        with pytest.raises(ConfigError, match=message):
            inject_peft(quantized, config)
        return
    model = inject_peft(quantized, config)
    shake(model)
    save_adapter(model.eval(), tmp_path, base_model="base")
    assert error(logits(model), logits(quantized_model("gpt2"))) > 1e-4
    assert error(logits(peft.PeftModel.from_pretrained(plain, tmp_path).eval()), logits(model)) < 1e-5


@pytest.mark.parametrize("bits", [4, 16])
def test_a_method_without_conv1d_is_refused_while_planning(bits: int, tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    adapter = {"method": "peft", "peft": on_conv1d("lokr")}
    config = RunConfig.from_dict({"model": str(tmp_path), "quant": {"bits": bits}, "adapter": adapter})
    with pytest.raises(ConfigError, match=r"Conv1D[\s\S]*fix: +set adapter.method: lora, or another peft_type$"):
        assemble(config, policy_of(bits), torch.device("meta"))


def test_one_takes_conv1d_where_it_is_not_quantized(tmp_path: Path) -> None:
    """Its factors of the (I, O) matrix are not those of the (O, I) one, which a quantized layer shows."""
    model = inject_peft(plain_model("gpt2"), on_conv1d("osf"))
    shake(model)
    save_adapter(model.eval(), tmp_path, base_model="base")
    assert torch.equal(logits(load_adapter(plain_model("gpt2"), tmp_path).eval()), logits(model))
    for begin in (lambda it: inject_peft(it, on_conv1d("osf")), lambda it: load_adapter(it, tmp_path)):
        with pytest.raises(LowMemError, match=r"peft (cannot load the adapter|could not load OSF)"):
            begin(quantized_model("gpt2"))


def test_options_of_lora_that_are_not_served() -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]}
    with pytest.raises(ConfigError, match="layer_replication cannot be used here"):
        inject_peft(plain_model("llama"), config)


def test_prompt_learning_is_told_apart() -> None:
    prompt = {"prompt", "prefix", "p_tuning"}
    assert {method for method, config in METHODS.items() if is_prompt_learning(config)} == prompt


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs peft_type"),
        ({"peft_type": "IA4"}, "did you mean IA3"),
        ({"peft_type": "IA3", "target_module": ["q_proj"]}, "did you mean target_modules"),
        ({"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", **PROMPT}, "refuses its values"),
        ({"peft_type": "IA3", "target_modules": ["q_porj"], "feedforward_modules": []}, "cannot put IA3"),
        ({"peft_type": "XLORA"}, "XLORA cannot be trained here"),
    ],
)
def test_bad_configs_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inject_peft(plain_model("llama"), config)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_lora_that_changes_the_base_is_refused(init: str) -> None:
    with pytest.raises(UnsupportedError, match="changed base weights"):
        inject_peft(quantized_model("llama"), {"peft_type": "LORA", "init_lora_weights": init})


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},  # transformers 4 had them one by one
    ],
    ids=["by parameter", "by names of old"],
)
def test_experts_are_left_to_method_lora(targets: dict[str, Any], quantized: bool) -> None:
    model = quantized_model("qwen3_moe") if quantized else plain_model("qwen3_moe")
    with pytest.raises(ConfigError, match=r"^peft cannot adapt stacked experts here\n.*\n.*use method: lora"):
        inject_peft(model, {"peft_type": "LORA", "r": 4, **targets})
    assert trainable_parameters(inject_peft(model, {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))


def test_the_weight_of_a_quantized_layer_is_no_parameter() -> None:
    config = {"peft_type": "LORA", "target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}
    with pytest.raises(ConfigError, match="name linear layers in target_modules"):
        inject_peft(quantized_model("llama"), config)


def test_a_damaged_file_of_another_method_is_refused(tmp_path: Path) -> None:
    save_adapter(inject_peft(plain_model("llama"), METHODS["ia3"]), tmp_path, base_model="base")
    with pytest.raises(CheckpointError, match="peft cannot load the adapter"):
        load_adapter(plain_model("gpt2"), tmp_path)
    with pytest.raises(CheckpointError, match="not those that its config calls for"):
        load_adapter(plain_model("llama", num_hidden_layers=1), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="a weight file is broken: it is truncated"):
        load_adapter(plain_model("llama"), tmp_path)


def test_memory_that_runs_out_is_not_the_configs_fault() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        inject_peft(quantized_model("llama"), {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1 << 50})


@pytest.mark.parametrize("name", ["llama", "phi", "starcoder2"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning"])
def test_learnt_prompts_ask_for_hidden_states_alone(method: str, name: str) -> None:
    """The model's head, of one position even, had its matrix copied for each row on a CPU."""
    model = inject_peft(quantized_model(name), METHODS[method])
    batch = collate([[Example([5, 6, 7], [5, 6, 7])], [Example([8, 9], [8, 9])]], pad_id=0)
    whole = model(input_ids=batch.input_ids, attention_mask=(batch.segment_ids != 0).long(), output_hidden_states=True)
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda *_: pytest.fail("the head was asked"))
    found = hidden_states(model, batch, decoder_inputs(model, batch, dtype=torch.float32))
    expected = whole.hidden_states[-1][:, -batch.input_ids.shape[1] :]
    assert torch.equal(found, expected.reshape(found.shape))
    found.sum().backward()
    assert all(it.grad is not None for _, it in trainable_parameters(model))
