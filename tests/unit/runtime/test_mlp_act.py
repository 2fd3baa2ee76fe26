"""MLPs that run their activation function again give the same bits, hold less, and multiply nothing twice."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_ft.adapters.inject import inject_lora
from lowmem_ft.runtime.activations import apply_activation_policy
from lowmem_ft.runtime.blocks import find_decoder
from lowmem_ft.runtime.mlp_act import linears_of, run_keeping_products
from lowmem_ft.runtime.saved import keeping
from lowmem_ft.runtime.tiled_mlp import TiledMlps, find_mlps
from tests.models import ARCHITECTURES, tiny_model
from tests.unit.runtime.memory import peak_bytes
from tests.unit.runtime.test_activations import DROPOUT, gradients, trainable
from tests.unit.runtime.test_streaming import (
    ADAPTERS,
    QUANT,
    Poisoned,
    models,  # noqa: F401  a fixture
    same,
    tiers,
    trained,
)
from tests.unit.runtime.test_tiled_mlp import Products, adapted


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], it) for key, it in expected.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_have_the_same_bits(name: str) -> None:
    """Whether blocks keep or recompute, and in tiles. What draws random numbers is left as it is."""
    model = trainable(name, **DROPOUT if name in ("gpt2", "gptj", "falcon", "bloom") else {})
    mlps = TiledMlps(model)
    for tokens in (0, 4):
        mlps.work_in(tokens)
        expected = gradients(model)
        mlps.work_in(tokens, recompute_act=True)
        assert equal(gradients(model), expected)
        policy = apply_activation_policy(model, keep=1)
        for _ in range(2):  # the second leaves out what the first found unread
            assert equal(gradients(model), expected)
        policy.remove()
    mlps.work_in(0)
    assert all("forward" not in vars(module) for module in find_mlps(model))
    assert all("forward" not in vars(linear) for module in find_mlps(model) for linear in linears_of(module))


ATTENTION = {"targets": r".*\.(q_proj|qkv_proj|query_key_value|c_attn)"}  # and none in the MLP


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"dropout": 0.3}, {"bias": "all"}, ATTENTION], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "falcon", "bloom"])
def test_adapters(name: str, settings: dict[str, Any]) -> None:
    model = adapted(name, **settings)
    mlps, expected = TiledMlps(model), gradients(model)
    mlps.work_in(0, recompute_act=True)
    assert equal(gradients(model), expected)


def wide(name: str) -> Any:
    model = tiny_model(name, hidden_size=32, intermediate_size=512, max_position_embeddings=2048)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_lora(model, rank=2)
    return model.train()


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_what_is_held_falls_by_what_is_computed_again(name: str, keep: int) -> None:
    """Of a gated MLP two tensors of the hidden layer: what the function gave, and the product with the gate."""
    model, tokens = wide(name), 1024
    apply_activation_policy(model, keep=keep)
    ids = torch.randint(0, 131, (1, tokens))

    def step() -> None:
        find_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()

    mlps, peaks = TiledMlps(model), []
    for again in (False, True):
        mlps.work_in(0, recompute_act=again)
        step()
        peaks.append(peak_bytes(step))
    inner = tokens * 512 * 2  # bytes of one tensor of the hidden layer
    # but of the last block, whose backward comes at once; as what is computed again there
    assert peaks[0] - peaks[1] >= 2 * max(keep - 1, 0) * inner
    assert keep or peaks[0] == peaks[1]


def test_products_run_once() -> None:
    model = adapted("llama")
    counts = []
    for again in (False, True):
        TiledMlps(model).work_in(0, recompute_act=again)
        with Products() as products:
            gradients(model)
        counts.append(products.rows)
    assert counts[0] == counts[1]


class Mlp(nn.Module):
    """One whose `act` is given."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 32), nn.Linear(32, 8), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


def run(mlp: nn.Module, x: Tensor) -> Tensor:
    return run_keeping_products(mlp.forward, linears_of(mlp), [x])


@pytest.mark.parametrize(
    "act", [lambda x: x.mul_(2).tanh_(), lambda x: x.relu_() * 2, lambda x: torch.tanh(x) * x.sigmoid()], ids=range(3)
)
def test_what_is_written_over_is_kept(act: Any) -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(act), torch.randn(2, 3, 8, requires_grad=True)
    found = []
    for call in (mlp, lambda x: run(mlp, x)):
        x.grad = None
        mlp.zero_grad()
        call(x).sin().sum().backward()
        found.append([x.grad, *(it.grad for it in mlp.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_written_over_later_is_an_error() -> None:
    mlp = Mlp(nn.functional.silu)
    x = torch.randn(2, 3, 8, requires_grad=True) * 1
    out = run(mlp, x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_may_come_twice() -> None:
    mlp, x = Mlp(nn.functional.silu), torch.randn(2, 3, 8, requires_grad=True)
    out = run(mlp, x)
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(out.sum(), x)[0])
    assert torch.equal(first[0], torch.autograd.grad(mlp(x).sum(), x)[0])


def test_under_autocast_and_in_another_thread() -> None:
    """Backward runs where autocast is off, and on a card in a thread of its own."""
    mlp, x = Mlp(nn.functional.silu), torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [mlp(x), run(mlp, x)]
    grads = [torch.autograd.grad(out.float().sum(), [x, *mlp.parameters()]) for out in outs]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_error_leaves_the_layers_as_they_were() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    mlp, x = Mlp(fails), torch.randn(1, 2, 8, requires_grad=True)
    held = weakref.ref(x)
    with pytest.raises(KeyboardInterrupt):
        run(mlp, x)
    assert "forward" not in vars(mlp.up)
    del x
    gc.collect()
    assert held() is None


def test_hooks_around_are_asked_for_what_is_kept() -> None:
    asked: list[Tensor] = []
    mlp, x = Mlp(nn.functional.silu), torch.randn(1, 2, 8, requires_grad=True)
    with keeping(asked.append):  # type: ignore[arg-type]  # gives None: leaves all of them alone
        out = run(mlp, x)
    assert any(it is mlp.down.weight or torch.equal(it.mT, mlp.down.weight) for it in asked)
    assert not any(it.shape == (2, 32) and torch.equal(it, nn.functional.silu(mlp.up(x))[0]) for it in asked)
    out.sum().backward()


# of bf16 with peft's adapters autograd holds views of a slot
@pytest.mark.parametrize(
    "case", ["llama nf4 lora", "llama bf16 peft", "gpt2 int8 lora", "qwen2 fp4 dora", "mixtral nf4 lora"]
)
@pytest.mark.parametrize("activations", ["keep", "some", "recompute", "offload"])
def test_streamed_blocks(models: dict[str, Path], case: str, activations: str) -> None:  # noqa: F811
    """Bit by bit those of resident ones that keep all, with slots that are poisoned before each copy."""
    name, quant, adapter = case.split()
    sections = {"quant": QUANT[quant], "adapter": ADAPTERS[adapter]}
    resident = trained(models[name], sections, streamed=0, activations="keep")
    with tiers(Poisoned):
        for streamed in (0, 3, 5):
            given = {"streamed": streamed, "activations": activations, "recompute_mlp_act": True}
            assert same(trained(models[name], sections, **given), resident)
