"""What a config decides before the solver does: pins, an adapter to go on from, a base that is quantized already."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_weights import write_model
from lowmem_ft.adapters.inject import inject_lora
from lowmem_ft.adapters.peft_format import save_adapter
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.planner.reserve import PROCESS_SLACK
from lowmem_ft.planner.solver import make_plan
from tests.models import tiny_model
from tests.unit.planner.test_solver import DEVICE, QUANTIZED, config, models, with_budget  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"resident_blocks": 9}, "not so many blocks"),
        ({"keep_blocks": 9}, "not so many blocks"),
        ({"stream_from": "host"}, "streamed from disk"),
        ({"activations": "keep", "keep_blocks": 0}, "keep_blocks: 6"),
        ({"micro_batch_tokens": 1}, "allowed: 64"),
    ],
)
def test_pins_that_cannot_be(models: dict[str, Path], pins: dict[str, Any], words: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=words):
        make_plan(config(models["deep"], policy=pins), device=DEVICE)


def test_what_an_adapter_to_go_on_from_decides(models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    model = tiny_model("llama")
    inject_lora(model, targets="all-linear", rank=4, alpha=8)
    save_adapter(model, tmp_path / "adapter", base_model="base")  # of a run, whose folder is named
    given = config(models["llama"], adapter={"init": str(tmp_path), "rank": 64, "dropout": 0.1})
    with pytest.warns(UserWarning, match=r"adapter\.rank: ignored, as .* has its own"):
        plan = make_plan(given, device=DEVICE)
    for explicit, told in (({"rank": 16, "alpha": 8}, "rank"), ({"alpha": 32.0}, "alpha"), ({"rank": 4}, None)):
        with warnings.catch_warnings(record=True) as caught_ones:
            warnings.simplefilter("always")
            make_plan(config(models["llama"], adapter={"init": str(tmp_path), **explicit}), device=DEVICE)
        said = [str(it.message) for it in caught_ones if "has its own" in str(it.message)]
        assert [it.partition(": ignored")[0] for it in said] == ([f"adapter.{told}"] if told else []), "defaults, too"
    assert plan.model["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="neither a way to begin nor a folder") as caught:
        make_plan(config(models["llama"], adapter={"init": "pissa"}), device=DEVICE)
    assert "default, gaussian" in str(caught.value.allowed)


def test_a_reference_without_the_adapter_to_go_on_from_is_told_once(models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """By the plan, and not by each command that reads the config."""
    model = tiny_model("llama")
    inject_lora(model, targets="all-linear", rank=4, alpha=8)
    save_adapter(model, tmp_path, base_model="base")
    for objective, expected in (("dpo", 1), ("simpo", 0)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            given = config(models["llama"], adapter={"init": str(tmp_path)}, train={"objective": objective})
            assert not told
            assert make_plan(given, device=DEVICE).fits
        assert sum("without the adapter that adapter.init names" in str(it.message) for it in told) == expected


def test_a_micro_batch_is_of_whole_rows(models: dict[str, Path]) -> None:  # noqa: F811
    with pytest.warns(UserWarning, match="micro_batch_tokens: 200 is taken for 192"):
        plan = make_plan(config(models["llama"], policy={"micro_batch_tokens": 200}), device=DEVICE)
    assert plan.policy.micro_batch_tokens == 192


def test_sequences_that_the_model_has_no_positions_for(models: dict[str, Path]) -> None:  # noqa: F811
    """Of a table; rotary positions go on behind those that the model was made for."""
    longer = {"data": {"seq_len": 136}, "train": {"tokens_per_step": 136}}
    with pytest.raises(ConfigError, match="no positions") as caught:
        make_plan(config(models["gpt2"], **longer), device=DEVICE)
    assert caught.value.fix == "set data.seq_len: 128"
    assert make_plan(config(models["llama"], **longer), device=DEVICE).fits


def test_what_is_trained_whole_stays_on_the_device(models: dict[str, Path]) -> None:  # noqa: F811
    sections = {"quant": {"bits": 16}, "adapter": {"train_modules": ["up_proj"]}}
    plan = with_budget(config(models["deep"], **sections))(DEVICE.process_bytes + PROCESS_SLACK)
    assert not plan.fits
    assert plan.policy.streamed_blocks == 0


def test_pins_are_followed(models: dict[str, Path]) -> None:  # noqa: F811
    pins = {"activations": "recompute", "micro_batch_tokens": 128, "loss_chunk_tokens": 32, "compute_dtype": "float32"}
    policy = make_plan(config(models["llama"], policy=pins), device=DEVICE).policy
    assert (policy.keep_blocks, policy.micro_batch_tokens, policy.accumulation) == (0, 128, 4)
    assert (policy.loss_chunk_tokens, policy.compute_dtype) == (32, "float32")


@pytest.mark.parametrize("activations", ["recompute", "offload"])
def test_some_blocks_keep_and_the_others_do_as_they_are_told(models: dict[str, Path], activations: str) -> None:  # noqa: F811
    pins = {"activations": activations, "keep_blocks": 2}
    policy = make_plan(config(models["deep"], policy=pins), device=DEVICE).policy
    counts = (policy.keep_blocks, policy.recompute_blocks, policy.offload_blocks)
    assert counts == ((2, 4, 0) if activations == "recompute" else (2, 0, 4))


def test_auto_bits_takes_the_most_that_fit(models: dict[str, Path]) -> None:  # noqa: F811
    assert make_plan(config(models["llama"], quant={"bits": "auto"}), device=DEVICE).policy.bits == 16
    nothing = make_plan(config(models["llama"], quant={"bits": "auto"}, budget={"memory": "1MiB"}), device=DEVICE)
    assert nothing.policy.bits == 4


@pytest.mark.parametrize(
    ("quant", "ignored"), [({"bits": 8}, "quant.bits: 8"), ({"bits": "auto", "type": "fp4"}, "fp4")]
)
def test_a_checkpoint_that_is_quantized_keeps_its_precision(
    tmp_path: Path, quant: dict[str, Any], ignored: str
) -> None:
    model = write_model(tmp_path / "model", QUANTIZED, device="cpu", quantized=True)
    with pytest.warns(UserWarning, match=f"{ignored} has no effect on a checkpoint that is quantized already"):
        policy = make_plan(config(model, quant=quant), device=DEVICE).policy
    assert (policy.bits, policy.quant, policy.double_quant) == (4, "nf4", True)
    assert policy.describe().startswith("nf4 double-quantized weights")


def test_an_optimizer_on_the_host_of_a_cpu_is_a_warning(models: dict[str, Path]) -> None:  # noqa: F811
    with pytest.warns(UserWarning, match="no effect on a CPU"):
        plan = make_plan(config(models["llama"], policy={"optimizer_on": "host"}), device=DEVICE)
    assert plan.policy == make_plan(config(models["llama"]), device=DEVICE).policy
