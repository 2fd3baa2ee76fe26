"""Architectures beyond the table that every other test goes through: each is planned, and a step of it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_ft.adapters.inject import inject_lora, injection_of
from lowmem_ft.adapters.targets import adaptable
from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.plan import Policy
from lowmem_ft.planner.served import without_gradient
from lowmem_ft.planner.simulate import Stage, simulate
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.planner.verify import FullBatches, measured_train_peak
from lowmem_ft.step import sum_gradients
from tests.models import FURTHER, SMALL, save_tiny, without_dropout
from tests.unit.adapters.helpers import plain_model, shake
from tests.unit.export.runs import policy_of
from tests.unit.quant.loading import logits, relative

# what decides of these is how they are loaded and how they attend
LOADED = {"deepseek_v32", "falcon_h1", "mamba"}
# some layers of these do not attend, so that packed documents cannot be kept apart
STATEFUL = {"falcon_h1", "mamba"}


def config_of(name: str, folder: Path) -> RunConfig:
    save_tiny(name, folder / "base")
    return RunConfig.from_dict(
        {
            "model": str(folder / "base"),
            "adapter": {"rank": 4},
            "data": {"seq_len": 64, "packing": name not in STATEFUL},
            "train": {"tokens_per_step": 128},
            "budget": {"device": "cpu", "memory": "2GiB"},
            "policy": {
                "compute_dtype": "float32",
                "micro_batch_tokens": 128,
                "loss_chunk_tokens": 64,
                "mlp_tile_tokens": 0,
                "stream_embeddings": "none",
            },
            "output": str(folder / "run"),
        }
    )


def gradients(config: RunConfig, policy: Policy) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    ready = assemble(config, policy, torch.device("cpu"))
    without_dropout(ready.model)
    shake(ready.model)
    torch.manual_seed(0)
    batch = FullBatches(config, policy, vocabulary=100)
    loss = sum_gradients(ready, batch).loss
    assert ready.accumulator is not None
    found = {name: ready.accumulator.gradient(parameter) for name, parameter in ready.trainable.items()}
    return loss, {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("name", sorted(LOADED))
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    ready = assemble(config, policy_of(16), torch.device("cpu"), adapter=False, optimizer=False)
    reference = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    assert relative(logits(ready.model.eval()), logits(reference)) < 1e-5


@pytest.mark.parametrize("name", sorted(set(FURTHER) - LOADED))
def test_a_step_is_planned_and_the_same_under_every_policy(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    plan = make_plan(config)
    assert plan.fits
    depth = plan.policy.resident_blocks + plan.policy.streamed_blocks
    kept = replace(plan.policy, keep_blocks=depth, recompute_blocks=0, offload_blocks=0)
    low = replace(kept, keep_blocks=0, recompute_blocks=depth, resident_blocks=0, streamed_blocks=depth)
    loss, expected = gradients(config, kept)
    unused = assemble(config, kept, torch.device("cpu")).trainable.keys() - expected.keys()
    assert all("altup.correction_coefs" in it for it in unused), "Gemma 3n reads that layer's weight without a call"
    again, found = gradients(config, low)
    assert again == loss
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    batches = FullBatches(config, low, vocabulary=100)
    simulated = simulate(config, low, kind="cpu", loss_tokens=batches[0].loss_tokens)
    measured = measured_train_peak(config, low, batches)
    # as the planner's own tests allow; routing decides of mixtures
    assert measured <= simulated.train_peak <= 1.05 * measured


@pytest.mark.parametrize(("name", "missing"), [("mamba", {"dt_proj", "out_proj"}), ("falcon_h1", {"out_proj"})])
def test_all_linear_leaves_out_layers_that_are_not_called(name: str, missing: set[str]) -> None:
    model = plain_model(name)
    layers = {path.rpartition(".")[2] for path in adaptable(model)}
    inject_lora(model, rank=4, alpha=8, targets="all-linear", dtype=torch.float32)
    assert layers - {path.rpartition(".")[2] for path in injection_of(model).paths} == missing


@pytest.mark.parametrize("targets", [["in_proj", "dt_proj"], r".*\.(in|dt)_proj"], ids=["names", "pattern"])
def test_layers_that_are_not_called_are_refused_as_targets(targets: list[str] | str) -> None:
    with pytest.raises(ConfigError, match="no say"):
        inject_lora(plain_model("mamba"), rank=4, targets=targets)


def test_all_linear_leaves_out_what_reads_pictures_and_sound() -> None:
    """In Phi 4 they are parts of the language model itself; a training step never calls them."""
    own = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
    vision = {**own, "num_hidden_layers": 2, "image_size": 28, "crop_size": 28, "patch_size": 14}
    sound = {**own, "num_blocks": 2, "nemo_conv_channels": 16}
    config = AutoConfig.for_model("phi4_multimodal", **SMALL, vision_config=vision, audio_config=sound)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    inject_lora(model, rank=4, alpha=8, targets="all-linear", dtype=torch.float32)
    assert {path.rpartition(".layers.")[0] for path in injection_of(model).paths} == {"model"}


@pytest.mark.parametrize(
    ("name", "missing"), [("deepseek_v32", "indexer.wq_b, indexer.wk, indexer.weights_proj"), ("gemma4", None)]
)
def test_adapters_that_no_gradient_reaches_are_told(name: str, missing: str | None, tmp_path: Path) -> None:
    config, policy = config_of(name, tmp_path), policy_of(16)
    stage = Stage(config, policy, kind="cpu")
    stage.step(policy, keep=0)
    said = without_gradient(stage.ready.trainable, stage.learning)
    assert (said is None) == (missing is None)
    if said is not None:
        assert f"adapters of {missing} learn nothing" in said
        targets = {"rank": 4, "targets": said.split("'")[-2]}
        stage = Stage(RunConfig.from_dict({**config.model_dump(), "adapter": targets}), policy, kind="cpu")
        stage.step(policy, keep=0)
        assert without_gradient(stage.ready.trainable, stage.learning) is None
