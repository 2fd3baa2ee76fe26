"""The checks of points that only a GPU can show: the CPU tests' claims again, where the kernels are CUDA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowmem_ft.adapters.inject import inject_lora, parameter_groups
from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.data.loader import eval_batches
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.loader import load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec, dequantize, quantize
from lowmem_ft.report.progress import Reporter
from lowmem_ft.runtime.activations import apply_activation_policy
from lowmem_ft.runtime.gradients import GradientAccumulator
from lowmem_ft.runtime.head import Head
from lowmem_ft.runtime.loss import cross_entropy_and_gradients
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.runtime.together import lay_together
from lowmem_ft.step import train_step
from lowmem_ft.trainer import loop
from tests.assets import ASSETS, write_share
from tests.models import ARCHITECTURES, MOE_ARCHITECTURES, save_tiny
from tests.unit.runtime import test_together

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SHAPES = [(64, 64), (48, 80), (1, 48), (131, 48), (257, 127), (1024, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_codes_and_values_are_bitsandbytes(shape: tuple[int, int], kind: Any, double: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    storage = quantize(weight, QuantSpec(type=kind, double_quant=double))
    codes, quant_state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    assert torch.equal(storage["qweight"].flatten(), codes.flatten())
    assert torch.equal(storage["absmax"], quant_state.absmax)
    values = dequantize(storage, kind=kind, shape=shape, dtype=torch.bfloat16)
    on_cpu = {name: tensor.cpu() for name, tensor in storage.items()}
    assert torch.equal(values.cpu(), dequantize(on_cpu, kind=kind, shape=shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_and_its_gradient(bits: Any) -> None:
    spec = QuantSpec(bits=bits)
    layer = QuantLinear(80, 48, bias=True, spec=spec)
    layer.load_storage(quantize(torch.randn(48, 80).bfloat16(), spec))
    nn.init.normal_(layer.bias)
    layer.to(DEVICE)
    x = torch.randn(3, 5, 80, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    dy = torch.randn(3, 5, 48, dtype=torch.bfloat16, device=DEVICE)
    layer(x).backward(dy)
    # one bf16 product of 48 terms on both sides; cuBLAS may sum them in another order
    torch.testing.assert_close(x.grad, dy @ layer.weight, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architectures_load_and_match_transformers_with_bitsandbytes(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path)
    checkpoint = Checkpoint.open(folder)
    model = meta_model(checkpoint, dtype=torch.bfloat16)
    load_weights(model, checkpoint, spec=QuantSpec(), place=lambda _, t: t.to(DEVICE), device=DEVICE)
    tokens = torch.arange(3, 35, device=DEVICE)[None]
    ours = model(input_ids=tokens, use_cache=False).logits.float()
    assert torch.isfinite(ours).all()
    if name in MOE_ARCHITECTURES or name in ("falcon", "mpt", "bloom"):
        return  # transformers leaves some of their matrices unquantized; the CPU tests compare the values
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    peer = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": 0})
    theirs = peer(input_ids=tokens, use_cache=False).logits.float()
    assert (ours - theirs).norm() / theirs.norm() < 1e-2


@pytest.mark.parametrize("dora", [False, True])
def test_lora_gradients_match_the_cpu(dora: bool) -> None:
    def gradients(device: torch.device) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = QuantLinear(80, 48, bias=False, spec=QuantSpec(), dtype=torch.float32)
        layer.load_storage(quantize(torch.randn(48, 80), QuantSpec()))
        model = nn.ModuleDict({"proj": layer, "other": nn.Linear(2, 2)})
        inject_lora(model, targets=["proj"], rank=4, dora=dora, dtype=torch.float32)
        nn.init.normal_(model["proj"].lora_B)
        model.to(device)
        x = torch.randn(7, 80).to(device).requires_grad_()
        model["proj"](x).square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        return [tensor.grad.cpu() for tensor in (x, *trained) if tensor.grad is not None]

    for ours, reference in zip(gradients(DEVICE), gradients(torch.device("cpu")), strict=True):
        # fp32 on both sides with other summation orders (TF32 is off by default): 1.8e-4 was measured on an H200
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


def test_chunked_loss_matches_the_cpu_and_never_makes_all_logits() -> None:
    torch.manual_seed(0)
    tokens, hidden, vocabulary, chunk = 4096, 64, 32000, 256
    head = Head(weight=torch.randn(vocabulary, hidden) * 0.1)
    states, labels = torch.randn(tokens, hidden), torch.randint(0, vocabulary, (tokens,))
    labels[::3] = -100
    reference, _ = cross_entropy_and_gradients(states, labels, head, chunk_tokens=chunk)
    on_device = states.to(DEVICE)
    weight = Head(weight=head.weight.to(DEVICE))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = cross_entropy_and_gradients(on_device, labels.to(DEVICE), weight, chunk_tokens=chunk)
    taken = torch.cuda.max_memory_allocated() - before
    assert loss.item() == pytest.approx(reference.item(), rel=1e-4)
    assert taken < tokens * vocabulary * 4 / 4  # less than a quarter of the logits in fp32


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_that_lie_together_train_as_they_do_apart(dtype: torch.dtype, bits: Any) -> None:
    apart, near = test_together.parameters(dtype, "cuda"), test_together.parameters(dtype, "cuda")
    lay_together(near)
    plain, joint = (AdamW(owned, bits=bits, **test_together.SETTINGS) for owned in (apart, near))
    assert len(joint.runs) < len(plain.runs)
    for step in range(4):
        plain.step(gradient=test_together.gradients(apart, step))
        joint.step(gradient=test_together.gradients(near, step))
    assert test_together.same(joint, plain)


@pytest.mark.parametrize("bits", [32, 8])
def test_paged_optimizers_equal_plain_ones_and_resume_exactly(bits: Any) -> None:
    def run(paged: bool, resume_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(300, 256, device=DEVICE).bfloat16())
        optimizer = AdamW([parameter], lr=1e-2, bits=bits, paged=paged)
        for step in range(6):
            if step == resume_at:
                tensors = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
                meta = optimizer.state_meta()
                optimizer = AdamW([parameter], lr=1e-2, bits=bits, paged=paged)
                optimizer.load_state(tensors, meta)
            parameter.grad = torch.randn(300, 256, generator=torch.Generator().manual_seed(step)).to(DEVICE).bfloat16()
            optimizer.step()
        return parameter.detach()

    plain = run(False, None)
    assert torch.equal(plain, run(True, None))
    assert torch.equal(plain, run(True, 3))


def config(tmp_path: Path, output: str, **sections: Any) -> RunConfig:
    write_share(tmp_path, train=60, eval=8)
    keys: dict[str, Any] = {
        "model": str(ASSETS / "doclm-7m"),
        "budget": {"device": DEVICE.type},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "seq_len": 64},
        "train": {"tokens_per_step": 256, "steps": 6, "lr": 1e-3, "eval_every": 3, "save_every": 2},
        "output": str(tmp_path / output),
    }
    for name, value in sections.items():
        keys[name] = {**keys.get(name, {}), **value}
    return RunConfig.from_dict(keys)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit", "paged_adamw"])
def test_training_lowers_the_loss_and_resumes(tmp_path: Path, compute_dtype: str, optimizer: str) -> None:
    settings = {"policy": {"compute_dtype": compute_dtype}, "train": {"optimizer": optimizer}}
    run = loop.train(config(tmp_path, "run", **settings), reporter=Reporter(quiet=True))
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert losses[-1] < losses[0]
    short = {**settings, "train": {**settings["train"], "max_time": 0.001}}
    loop.train(config(tmp_path, "resumed", **short), reporter=Reporter(quiet=True))
    again = loop.train(config(tmp_path, "resumed", **settings), resume=True, reporter=Reporter(quiet=True))
    # CUDA's attention backward adds with atomics, so the order of sums may change from run to run
    assert again.eval_loss == pytest.approx(run.eval_loss, rel=1e-3)


def test_a_checkpoint_of_a_card_goes_on_on_the_cpu(tmp_path: Path) -> None:
    short = {"train": {"optimizer": "paged_adamw8bit", "max_time": 0.001}}
    begun = loop.train(config(tmp_path, "moved", **short), reporter=Reporter(quiet=True))
    assert (begun.status, begun.plan.device["kind"]) == ("out_of_time", "cuda")
    moved = config(
        tmp_path, "moved", train={"optimizer": "paged_adamw8bit"}, budget={"device": "cpu", "memory": "4GiB"}
    )
    run = loop.train(moved, resume=True, reporter=Reporter(quiet=True))
    assert (run.status, run.plan.device["kind"]) == ("finished", "cpu")
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert losses[-1] < losses[0]


def test_keep_and_recompute_give_the_same_gradients(tmp_path: Path) -> None:
    settings = config(tmp_path, "unused", adapter={"dropout": 0.1})
    plan = make_plan(settings)
    examples, _ = loop.load_examples(settings, Reporter(quiet=True))
    batch = eval_batches(examples, seq_len=64, packing=True, micro_batch_tokens=256, pad_id=0)[0].to(DEVICE)

    def gradients(keep: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        ready = assemble(settings, plan.policy, DEVICE, optimizer=False)
        apply_activation_policy(ready.model, keep=keep)
        ready.accumulator = GradientAccumulator(list(ready.trainable.values()))
        ready.optimizer = AdamW(parameter_groups(ready.model, lr=0.0), lr=0.0)
        train_step(ready, [batch], lr=0.0)
        return [ready.accumulator.buffer(p).clone() for p in ready.trainable.values()]

    for kept, recomputed in zip(gradients(8), gradients(0), strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-3, atol=1e-5)
