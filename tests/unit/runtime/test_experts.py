"""Our experts forward against each architecture's own, and its memory under every routing."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_ft.adapters.inject import inject_lora, trainable_parameters
from lowmem_ft.planner.verify import allocator_events
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.loader import load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.runtime import experts as experts_module
from lowmem_ft.runtime.activations import apply_activation_policy
from lowmem_ft.runtime.experts import EXPERTS, ExpertLayers, experts_forward
from lowmem_ft.runtime.rerun import Unread
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
@pytest.mark.parametrize(("bits", "together"), [(4, 1), (4, 3), (8, 3), (16, 1), (16, 8)])
@pytest.mark.parametrize("name", MIXTURES)
def test_equals_the_architectures_own_forward(
    name: str, bits: int, together: int, recompute: bool, tmp_path: Path
) -> None:
    folder = save_tiny(name, tmp_path)
    ids_BT = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for ours in (False, True):
        model = load(folder, bits)
        if ours:
            ExpertLayers(model).work_on(together)
            assert model.config._experts_implementation == EXPERTS
        torch.manual_seed(0)
        inject_lora(model, targets="all-linear", rank=4, alpha=8, dtype=torch.float32)
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                parameter.normal_(std=0.1)
        apply_activation_policy(model, keep=0 if recompute else model.config.num_hidden_layers)
        found.append(run(model.train(), ids_BT))
    (eager, eager_grads), (own, own_grads) = found
    # fp32, sums in another order: at most 2e-6 measured, 1.2e-5 of gradients
    torch.testing.assert_close(own, eager, rtol=1e-5, atol=1e-5)
    assert own_grads.keys() == eager_grads.keys()
    for key, gradient in own_grads.items():
        if eager_grads[key] is None:
            assert gradient is None, key
        else:
            torch.testing.assert_close(gradient, eager_grads[key], rtol=1e-4, atol=2e-5)


class Multiplied(TorchDispatchMode):
    """Within it `rows` gathers the numbers of rows of 16-bit floats that PyTorch multiplies with no operator of ours:
    oneDNN compiles, and keeps, a kernel for each."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
        at = products.get(func.overloadpacket.__name__)
        if at is not None and args[at].element_size() == 2:
            self.rows.add(args[at].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_no_product_has_as_many_rows_as_are_routed(name: str, recompute: bool, together: int, tmp_path: Path) -> None:
    """But for those of `quant.products`, of whose numbers of rows there are few."""
    model = load(save_tiny(name, tmp_path), 4, torch.bfloat16)
    ExpertLayers(model).work_on(together)
    inject_lora(model, targets="all-linear", rank=4, alpha=8, dtype=torch.float32)
    apply_activation_policy(model, keep=0 if recompute else model.config.num_hidden_layers)
    found = []
    for seed in range(3):  # other tokens, which go to others
        with Multiplied() as multiplied:
            run(model.train(), torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(seed)))
        found.append(multiplied.rows)
    assert found[0] == found[1] == found[2]


class Experts(nn.Module):
    """The attributes that transformers gives an experts module."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias, self.is_transposed = experts, True, False, False
        self.has_post_expert_norm = False
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
    assert max(peaks.values()) / min(peaks.values()) < 1.04, peaks


def test_memory_of_quantized_adapted_experts_does_not_depend_on_the_routing(tmp_path: Path) -> None:
    save_tiny("olmoe", tmp_path, num_experts=EXPERTS_COUNT, num_experts_per_tok=TOP_K)
    model = load(tmp_path, 4)
    ExpertLayers(model)
    inject_lora(model, targets="all-linear", rank=4, alpha=8, dtype=torch.float32)
    peaks = layer_peaks(model.model.layers[0].mlp.experts, 48)
    assert max(peaks.values()) / min(peaks.values()) < 1.04, peaks


def test_an_index_beyond_the_experts_belongs_to_none() -> None:
    torch.manual_seed(0)
    experts, hidden_TD = Experts(4, 16, 8), torch.randn(10, 16)
    weights_TK = torch.rand(10, 2)
    both = torch.stack([torch.arange(10) % 4, (torch.arange(10) + 1) % 4], 1)
    masked = both.clone()
    masked[:, 1] = 4
    one = experts_forward(experts, hidden_TD, both[:, :1].contiguous(), weights_TK[:, :1])
    torch.testing.assert_close(experts_forward(experts, hidden_TD, masked, weights_TK), one)


def reference(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Every expert on every token, in float64."""
    first, second = (getattr(experts, name).double() for name in ("gate_up_proj", "down_proj"))
    out_TED = []
    for e in range(experts.num_experts):
        inner = experts._apply_gate(
            hidden_TD @ first[e].t() + (experts.gate_up_proj_bias[e] if experts.has_bias else 0)
        )
        out = inner @ second[e].t() + (experts.down_proj_bias[e] if experts.has_bias else 0)
        out_TED.append(experts.post_expert_norm(out) if experts.has_post_expert_norm else out)
    chosen_TE = torch.zeros(len(hidden_TD), experts.num_experts, dtype=torch.float64)
    chosen_TE = chosen_TE.scatter_add(1, index_TK, weights_TK)
    return torch.einsum("te,etd->td", chosen_TE, torch.stack(out_TED))


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["plain", "biases", "norm"])
def test_gradients_of_input_and_weights(kind: str, again: bool, together: int) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 16, 8).double()
    experts.together = together
    experts.gate_up_proj, experts.down_proj = experts.gate_up_proj.double(), experts.down_proj.double()
    if kind == "biases":
        experts.has_bias = True
        experts.gate_up_proj_bias, experts.down_proj_bias = torch.randn(4, 16).double(), torch.randn(4, 16).double()
    if kind == "norm":
        experts.has_post_expert_norm, experts.post_expert_norm = True, nn.RMSNorm(16).double().requires_grad_(False)
    index_TK = torch.rand(40, 4).topk(2).indices
    found = []
    for forward in (experts_forward, reference):
        hidden_TD = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        weights_TK = torch.rand(40, 2, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
        with Unread().left_out() if again else nullcontext():
            out = forward(experts, hidden_TD, index_TK, weights_TK)
        out.backward(torch.randn(40, 16, generator=torch.Generator().manual_seed(3)).double())
        found.append((out, hidden_TD.grad, weights_TK.grad))
    for own, right in zip(*found, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-6, atol=1e-6)  # weights' gradients are summed in float32


def test_the_second_run_of_a_block_leaves_its_experts_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on; only a tile at a time is worked on in backward."""
    model = load(save_tiny("olmoe", tmp_path), 4)
    ExpertLayers(model)
    inject_lora(model, targets="all-linear", rank=4, alpha=8, dtype=torch.float32)
    apply_activation_policy(model, keep=0)
    runs: list[bool] = []
    own = experts_module._run

    def noted(experts: Any, hidden: Tensor, weights: Tensor, routing: Any, kept: Tensor | None = None) -> Tensor:
        runs.append(kept is not None)
        return own(experts, hidden, weights, routing, kept)

    def routed(*args: Any, **kwargs: Any) -> Any:
        waits.append(1)
        return route(*args, **kwargs)

    waits: list[int] = []
    route = experts_module.route
    monkeypatch.setattr(experts_module, "_run", noted)
    monkeypatch.setattr(experts_module, "route", routed)
    layers, ids_BT = model.config.num_hidden_layers, torch.arange(3, 43)[None]
    first = run(model.train(), ids_BT)
    assert runs == [False] * 2 * layers, "nobody knows yet what is read"
    assert len(waits) == 2 * layers, "once in each run: backward knows what the second has sorted"
    model.zero_grad()
    second = run(model, ids_BT)
    assert runs == [False] * 3 * layers
    assert len(waits) == 4 * layers
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())


def test_a_layer_that_runs_again_keeps_no_pairs() -> None:
    torch.manual_seed(0)
    experts = partial(experts_forward, Experts(EXPERTS_COUNT, 64, 128))

    def again(*given: Tensor) -> Tensor:
        with Unread().left_out():
            return experts(*given)

    kept = TOKENS * TOP_K * 256 * 4  # bytes of the first product
    once, twice = layer_peaks(experts, 64), layer_peaks(again, 64)
    assert all(once[name] - twice[name] > 0.85 * kept for name in ROUTINGS), (once, twice)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_dropout_is_the_same_in_backward(
    name: str, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer that keeps, of one that runs again, and of the same forward as PyTorch differentiates it."""

    def differentiated(experts: Any, index: Tensor, hidden: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
        return experts_module._run(experts, hidden, weights, experts_module._route(experts, hidden, index))

    folder, found = save_tiny(name, tmp_path), []
    for own, recompute in ((False, False), (True, False), (True, True)):
        model = load(folder, 16)
        ExpertLayers(model).work_on(together)
        torch.manual_seed(0)
        inject_lora(model, targets="all-linear", rank=4, alpha=8, dropout=0.3, dtype=torch.float32)
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                parameter.normal_(std=0.1)
        apply_activation_policy(model, keep=0 if recompute else model.config.num_hidden_layers)
        with monkeypatch.context() as patched:
            if not own:
                patched.setattr(experts_module._Experts, "apply", differentiated)
            for _ in range(2):  # the second step knows what is not read
                model.zero_grad()
                torch.manual_seed(1)
                both = run(model.train(), torch.arange(3, 43)[None])
        found.append(both)
    (right, right_grads), (kept, kept_grads), (again, again_grads) = found
    assert torch.equal(kept, right)
    assert torch.equal(kept, again)
    for key, gradient in kept_grads.items():
        torch.testing.assert_close(gradient, right_grads[key], rtol=1e-4, atol=2e-5)
        assert torch.equal(gradient, again_grads[key])


def test_experts_that_are_trained_whole(tmp_path: Path) -> None:
    folder, found = save_tiny("mixtral", tmp_path), []
    for ours in (False, True):
        model = load(folder, 16)
        if ours:
            ExpertLayers(model)
        torch.manual_seed(0)
        inject_lora(model, targets=["q_proj"], rank=4, train_modules=["experts"], dtype=torch.float32)
        found.append(run(model.train(), torch.arange(3, 43)[None]))
    (eager, eager_grads), (own, own_grads) = found
    torch.testing.assert_close(own, eager, rtol=1e-5, atol=1e-5)
    assert any("experts" in name for name in own_grads)
    for name, gradient in own_grads.items():
        torch.testing.assert_close(gradient, eager_grads[name], rtol=1e-4, atol=1e-5)
