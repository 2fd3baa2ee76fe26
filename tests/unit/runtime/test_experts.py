"""Our experts forward against each architecture's own, and its memory under every routing."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_ft.adapters.inject import inject_lora, trainable_parameters
from lowmem_ft.planner.verify import allocator_events
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.loader import load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.runtime.activations import apply_activation_policy
from lowmem_ft.runtime.experts import EXPERTS, experts_forward, tile_rows, use_experts
from tests.models import save_tiny

MIXTURES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "olmoe"]


def load(folder: Path, bits: Any, dtype: torch.dtype = torch.float32) -> Any:
    checkpoint = Checkpoint.open(str(folder))
    model = meta_model(checkpoint, dtype=dtype)
    load_weights(model, checkpoint, spec=QuantSpec(bits=bits), dtype=dtype, place=lambda _, tensor: tensor)
    return model


def run(model: Any, ids_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradients of the adapter."""
    hidden = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    generator = torch.Generator().manual_seed(1)
    hidden.backward(torch.randn(hidden.shape, generator=generator))
    return hidden.detach(), {name: p.grad for name, p in trainable_parameters(model)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", MIXTURES)
def test_equals_the_architectures_own_forward(name: str, bits: int, recompute: bool, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path)
    ids_BT = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for ours in (False, True):
        model = load(folder, bits)
        if ours:
            use_experts(model)
            assert model.config._experts_implementation == EXPERTS
        torch.manual_seed(0)
        inject_lora(model, targets="all-linear", rank=4, alpha=8, dtype=torch.float32)
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                parameter.normal_(std=0.1)
        apply_activation_policy(model, keep=0 if recompute else model.config.num_hidden_layers)
        found.append(run(model.train(), ids_BT))
    (eager, eager_grads), (own, own_grads) = found
    # fp32, sums in another order: at most 2e-6 measured
    torch.testing.assert_close(own, eager, rtol=1e-5, atol=1e-5)
    assert own_grads.keys() == eager_grads.keys()
    for key, gradient in own_grads.items():
        if eager_grads[key] is None:
            assert gradient is None, key
        else:
            torch.testing.assert_close(gradient, eager_grads[key], rtol=1e-4, atol=1e-5)


class Experts(nn.Module):
    """The attributes that transformers gives an experts module."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias, self.is_transposed = experts, True, False, False
        self.gate_up_proj = torch.randn(experts, 2 * inner, hidden)
        self.down_proj = torch.randn(experts, hidden, inner)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


TOKENS, EXPERTS_COUNT, TOP_K = 2048, 8, 2


def skewed() -> Tensor:
    """One token in 64 to each expert in turn, all others to the first two: many low tiles beside the high ones."""
    index_TK = torch.tensor([[0, 1]]).repeat(TOKENS, 1)
    few = torch.arange(0, TOKENS, 64)
    index_TK[few, 1] = 2 + torch.arange(len(few)) % (EXPERTS_COUNT - 2)
    return index_TK


ROUTINGS = {
    "all to the same": torch.tensor([[0, 1]]).repeat(TOKENS, 1),
    "all to the last": torch.tensor([[7, 6]]).repeat(TOKENS, 1),
    "balanced": torch.stack([torch.arange(TOKENS) % 8, (torch.arange(TOKENS) + 1) % 8], 1),
    "random": torch.rand(TOKENS, EXPERTS_COUNT, generator=torch.Generator().manual_seed(0)).topk(TOP_K).indices,
    "skewed": skewed(),
}


def layer_peaks(experts: Any, hidden: int) -> dict[str, int]:
    """Of a forward and a backward under each routing, without what was there before."""
    peaks = {}
    for name, index_TK in ROUTINGS.items():
        hidden_TD = torch.randn(TOKENS, hidden, requires_grad=True)
        weights_TK = torch.rand(TOKENS, TOP_K, requires_grad=True)

        def step(hidden_TD: Tensor = hidden_TD, index_TK: Tensor = index_TK, weights_TK: Tensor = weights_TK) -> None:
            experts(hidden_TD, index_TK, weights_TK).sum().backward()

        step()  # gradients are there afterwards, and added to
        peaks[name] = max(accumulate(allocator_events(step)))
    return peaks


def test_memory_of_plain_experts_does_not_depend_on_the_routing() -> None:
    torch.manual_seed(0)
    peaks = layer_peaks(partial(experts_forward, Experts(EXPERTS_COUNT, 64, 128)), 64)
    assert max(peaks.values()) / min(peaks.values()) < 1.01, peaks  # MEASURED_PLAIN


def test_memory_of_quantized_adapted_experts_does_not_depend_on_the_routing(tmp_path: Path) -> None:
    save_tiny("olmoe", tmp_path, num_experts=EXPERTS_COUNT, num_experts_per_tok=TOP_K)
    model = load(tmp_path, 4)
    use_experts(model)
    inject_lora(model, targets="all-linear", rank=4, alpha=8, dtype=torch.float32)
    peaks = layer_peaks(model.model.layers[0].mlp.experts, 48)
    assert max(peaks.values()) / min(peaks.values()) < 1.01, peaks  # MEASURED_ADAPTED


def test_an_index_beyond_the_experts_belongs_to_none() -> None:
    torch.manual_seed(0)
    experts, hidden_TD = Experts(4, 16, 8), torch.randn(10, 16)
    weights_TK = torch.rand(10, 2)
    both = torch.stack([torch.arange(10) % 4, (torch.arange(10) + 1) % 4], 1)
    masked = both.clone()
    masked[:, 1] = 4
    one = experts_forward(experts, hidden_TD, both[:, :1].contiguous(), weights_TK[:, :1])
    torch.testing.assert_close(experts_forward(experts, hidden_TD, masked, weights_TK), one)


def test_tiles_follow_from_shapes_alone() -> None:
    assert tile_rows(16384, 128, 64) == 256
    assert tile_rows(64, 128, 64) == 64
    assert tile_rows(16384, 8, 64) == 2048 + 128
    assert tile_rows(16384, 128, 2048) == 512
    assert tile_rows(129, 2, 64) == 128
