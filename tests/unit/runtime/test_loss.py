"""Chunked head and cross-entropy against plain PyTorch, and heads against the models' own logits."""

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.runtime import loss as module
from lowmem_ft.runtime import vocabulary
from lowmem_ft.runtime.blocks import find_decoder
from lowmem_ft.runtime.head import Head, head_of
from lowmem_ft.runtime.loss import cross_entropy_and_gradients, scratch_bytes
from tests.models import ARCHITECTURES, SMALL, tiny_config, tiny_model
from tests.unit.runtime.memory import peak_bytes

N, D, V = 37, 24, 101
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.3},
    "all": {"bias": True, "softcap": 2.0, "scale": 1.7},
}


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    z = F.linear(hidden, head.weight, head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def make(
    dtype: torch.dtype = torch.float32, *, bias: bool = False, trained: bool = False, **rest: Any
) -> tuple[Tensor, Tensor, Head]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.4] = -100
    weight = nn.Parameter(torch.randn(V, D, generator=generator).to(dtype), requires_grad=trained)
    own_bias = nn.Parameter(torch.randn(V, generator=generator).to(dtype), requires_grad=trained) if bias else None
    return hidden, labels, Head(weight=weight, bias=own_bias, **rest)


def double(head: Head) -> Head:
    """The same head in fp64, with leaves of its own."""
    leaves = [None if t is None else nn.Parameter(t.detach().double()) for t in (head.weight, head.bias)]
    return Head(weight=leaves[0], bias=leaves[1], softcap=head.softcap, scale=head.scale)


def differentiated(hidden: Tensor, labels: Tensor, head: Head, **settings: Any) -> tuple[Tensor, list[Any]]:
    """The loss, and the gradients of hidden states, weight and bias, where these are trained; sums are in fp32."""
    buffers = [
        torch.zeros_like(it, dtype=torch.float32) if it is not None and it.requires_grad else None
        for it in (head.weight, head.bias)
    ]
    grads = {"weight_grad": buffers[0], "bias_grad": buffers[1]}
    loss, gradient = cross_entropy_and_gradients(hidden, labels, head, **grads, **settings)
    return loss, [gradient, *buffers]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("slab", [1, 3 * V, 1 << 21])
def test_loss_and_gradients_equal_plain_cross_entropy(
    variant: str, chunk: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLAB", slab)
    hidden, labels, head = make(trained=True, **VARIANTS[variant])
    head = replace(head, on_card=chunk == 5)  # then a slab is a quarter of a chunk at least
    loss, gradients = differentiated(hidden, labels, head, chunk_tokens=chunk, grad_scale=0.5)
    exact_hidden, exact = hidden.detach().double().requires_grad_(), double(head)
    reference = F.cross_entropy(logits_of(exact_hidden, exact), labels, reduction="sum")
    (reference * 0.5).backward()
    # fp32 against fp64: measured below 3e-7 of the largest entry
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    for ours, theirs in zip(gradients, (exact_hidden, exact.weight, exact.bias), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs.grad).abs().max() < 2e-6 * theirs.grad.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_gradients_are_as_good_as_autograd(variant: str) -> None:
    hidden, labels, head = make(torch.bfloat16, trained=True, **VARIANTS[variant])
    loss, (hidden_grad, weight_grad, _) = differentiated(hidden, labels, head, chunk_tokens=8)
    assert hidden_grad.dtype == torch.bfloat16
    exact_hidden, exact = hidden.detach().double().requires_grad_(), double(head)
    reference = F.cross_entropy(logits_of(exact_hidden, exact), labels, reduction="sum")
    reference.backward()
    # logits are rounded to bf16 (relative 2^-9, of logits up to 15), as they are in the models themselves
    assert loss.item() == pytest.approx(reference.item(), rel=2e-3)
    for ours, theirs in ((hidden_grad, exact_hidden.grad), (weight_grad, exact.weight.grad)):
        assert (ours - theirs).norm() < 1.5e-2 * theirs.norm()  # measured: 0.2 to 0.7%


def test_grad_scale_comes_before_fp16_rounding() -> None:
    hidden, labels, head = make(torch.float16)
    plain = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=8, grad_scale=1e-8)[1]
    scaled = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=8, grad_scale=1e-8 * 2**16)[1]
    reference = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=8)[1]
    assert not plain.any(), "1e-8 is nothing in fp16: the smallest number is 6e-8"
    error = (scaled.float() / (1e-8 * 2**16) - reference.float()).norm() / reference.float().norm()
    assert error < 2e-2  # fp16 below 6e-5 has an absolute step of 6e-8: measured 0.6%


def test_rows_out_of_the_loss_are_not_computed() -> None:
    hidden, labels, head = make()
    expected, _ = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=4)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    kept = int((labels != -100).sum())
    loss, gradient = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=4, kept=kept)
    assert gradient is not None
    assert torch.equal(loss, expected)
    assert not gradient[labels == -100].any()
    assert gradient[labels != -100].all(dim=1).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", [1, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_whole_logits(
    variant: str, tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "TILE_BYTES", tile)
    generator = torch.Generator().manual_seed(2)
    size, tokens = 1000, 300
    # of whole numbers, so that sums are exact in any order and many tokens are equally likely: the first one counts
    weight = torch.randint(-2, 3, (size, D), generator=generator).to(dtype)
    weight[500:700] = weight[:200]
    bias = torch.zeros(size, dtype=dtype) if VARIANTS[variant].get("bias") else None
    hidden = torch.randint(-2, 3, (tokens, D), generator=generator).to(dtype)
    head = Head(weight=weight, **{**VARIANTS[variant], "bias": bias})
    logits = logits_of(hidden.float(), replace(head, weight=weight.float(), bias=None))
    best = logits.argmax(1)
    labels = torch.where(torch.rand(tokens, generator=generator) < 0.5, best, best.roll(1))
    labels[:100] = torch.where(best[:100] < 200, best[:100] + 500, 0)
    labels[::7] = -100
    losses, correct = torch.zeros(tokens), torch.zeros(tokens, dtype=torch.bool)
    loss, _ = cross_entropy_and_gradients(
        hidden, labels, head, chunk_tokens=64, hidden_grad=False, losses_N=losses, correct_N=correct
    )
    assert len(head.tiles) == (1 if tile > 1 else 8 if dtype == torch.float32 else 4)
    assert torch.equal(correct, labels == best)
    assert 0 < int(correct.sum()) < tokens
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    without, _ = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=64, hidden_grad=False)
    assert torch.equal(loss, without)


def test_nothing_in_the_loss() -> None:
    hidden, labels, head = make(trained=True)
    loss, gradients = differentiated(hidden, torch.full_like(labels, -100), head, chunk_tokens=4)
    assert loss.item() == 0.0
    assert not any(it.any() for it in gradients if it is not None)


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, labels, head = make(bias=True)
    loss, _ = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=4)
    evaluated, gradient = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=4, hidden_grad=False)
    assert gradient is None
    assert torch.equal(evaluated, loss)


def test_gradients_of_a_trained_head_are_added_to_a_buffer() -> None:
    hidden, labels, head = make(torch.bfloat16, bias=True, trained=True)
    weight_grad, bias_grad = torch.zeros(V, D), torch.zeros(V)
    for _ in range(2):
        cross_entropy_and_gradients(
            hidden, labels, head, chunk_tokens=1000, weight_grad=weight_grad, bias_grad=bias_grad, hidden_grad=False
        )
    _, (_, weight_once, bias_once) = differentiated(hidden, labels, head, chunk_tokens=1000)
    assert torch.equal(weight_grad / 2, weight_once)
    assert torch.equal(bias_grad / 2, bias_once)


def test_same_way_without_data() -> None:
    hidden = torch.empty(N, D, device="meta", dtype=torch.bfloat16)
    head = Head(weight=torch.empty(V, D, device="meta", dtype=torch.bfloat16), softcap=2.0)
    labels = torch.empty(N, device="meta", dtype=torch.int64)
    loss, gradient = cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=8, kept=20)
    assert gradient is not None
    assert gradient.shape == (N, D)
    assert loss.shape == ()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("trained", [False, True])
def test_peak_does_not_grow_with_tokens_times_vocabulary(softcap: float | None, trained: bool) -> None:
    vocabulary, hidden_size, chunk = 9000, 16, 256
    weight = nn.Parameter(torch.randn(vocabulary, hidden_size).bfloat16(), requires_grad=trained)
    head = Head(weight=weight, softcap=softcap)
    buffer = torch.zeros(vocabulary, hidden_size) if trained else None

    def run(tokens: int) -> int:
        hidden = torch.randn(tokens, hidden_size).bfloat16()
        labels = torch.randint(0, vocabulary, (tokens,))
        return peak_bytes(
            lambda: cross_entropy_and_gradients(hidden, labels, head, chunk_tokens=chunk, weight_grad=buffer)
        )

    few, many = run(512), run(4096)
    per_token = (many - few) / (4096 - 512)
    assert per_token < 2 * hidden_size + 20, "only the gradient and the row numbers grow: 2 D + 9 bytes per token"
    growing = 4096 * (2 * hidden_size + 20)
    product = 2 * weight.numel() if trained else 0
    workspace = 600_000  # of oneDNN's bf16 GEMM on the CPU: measured 0.15 MB, and 0.53 MB for the weight's gradient
    assert many < scratch_bytes(head, chunk) + growing + product + workspace
    assert many > 0.9 * scratch_bytes(head, chunk), "the bound is not far off"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_gives_the_models_own_logits(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    head = head_of(model)
    ids = torch.randint(0, 131, (2, 7))
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        hidden = find_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
        # the same linear in the same dtype: equal, or one rounding apart where a GEMM sees another shape
        torch.testing.assert_close(logits_of(hidden, head), theirs, rtol=1e-6, atol=1e-6)
    assert "forward" not in vars(find_decoder(model)), "the probe leaves nothing behind"


@pytest.mark.parametrize("name", ["gemma2", "cohere", "phi", "gpt2"])
def test_head_is_the_same_without_weights(name: str) -> None:
    real = head_of(tiny_model(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.bfloat16)
    head = head_of(model)
    assert (head.scale, head.softcap, head.bias is None) == (real.scale, real.softcap, real.bias is None)
    assert head.weight.shape == real.weight.shape


def test_odd_scales_and_caps_are_measured() -> None:
    assert head_of(tiny_model("granite", logits_scaling=6.0)).scale == pytest.approx(1 / 6, rel=1e-6)
    head = head_of(tiny_model("gemma2", final_logit_softcapping=27.5))
    assert (head.scale, head.softcap) == (pytest.approx(1.0, rel=1e-6), pytest.approx(27.5, rel=1e-6))
    assert head_of(tiny_model("gemma2", final_logit_softcapping=None)).softcap is None


class ScalesHidden(LlamaForCausalLM):
    """As MiniCPM: hidden states are scaled before the head. (It caps too.)"""

    def forward(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        outputs.logits = 7.0 * torch.tanh(self.lm_head(outputs.last_hidden_state.bfloat16() / 12.5).float() / 7.0)
        return outputs


class AddsToLogits(LlamaForCausalLM):
    def forward(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        outputs.logits = self.lm_head(outputs.last_hidden_state) + 1.0
        return outputs


class HidesSomeLogits(LlamaForCausalLM):
    def forward(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        outputs.logits = self.lm_head(outputs.last_hidden_state)
        outputs.logits[..., 100] = -1e4
        return outputs


class DoesMoreToHidden(LlamaForCausalLM):
    def forward(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        outputs.logits = self.lm_head(self.model.norm(outputs.last_hidden_state))
        return outputs


class Breaks(LlamaForCausalLM):
    def forward(self, **kwargs: Any) -> Any:
        raise KeyError("something of its own")


def test_scaled_hidden_states_are_a_scale() -> None:
    head = head_of(ScalesHidden(tiny_config("llama")))
    # bf16 hidden states divided by 12.5: each is off by up to 2^-9, their least-squares slope by far less
    assert head.scale == pytest.approx(1 / 12.5, rel=1e-3)
    assert head.softcap == pytest.approx(7.0)


@pytest.mark.parametrize("kind", [AddsToLogits, HidesSomeLogits, DoesMoreToHidden, Breaks])
def test_other_forwards_are_refused(kind: type[LlamaForCausalLM]) -> None:
    with pytest.raises(UnsupportedError, match=r"head of this architecture cannot be served"):
        head_of(kind(tiny_config("llama")))


def test_layers_between_decoder_and_head_are_named() -> None:
    """ModernBERT has its output matrix where other models have their decoder, and before it a layer and a norm."""
    config = AutoConfig.for_model("modernbert-decoder", **SMALL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedError, match=r"layers of its own, such as lm_head\.dense"):
        head_of(model)


def test_the_copy_that_peft_trains_is_the_head() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_model("cohere"), config)
    head = head_of(model)
    assert head.weight.requires_grad
    assert head.scale == 0.25
    assert any(head.weight is parameter for parameter in model.parameters())


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedError, match="Sequential"):
        head_of(model)
