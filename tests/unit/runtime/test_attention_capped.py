"""Attention with capped scores against double precision, inside transformers' models, and what it holds at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_ft.core.config import RunConfig
from lowmem_ft.data.isolation import ATTENTION
from lowmem_ft.planner.simulate import simulate
from lowmem_ft.planner.verify import FullBatches, measured_eval_peak, measured_train_peak
from lowmem_ft.runtime import attention_capped
from lowmem_ft.runtime.attend import use_attention
from lowmem_ft.runtime.attention import Attended, attention
from tests.models import SMALL, save_tiny
from tests.unit.planner.sampler import policy_of
from tests.unit.runtime.test_attention import KINDS, H, T, as_mask, assert_as, inputs

MODELS = ["gemma2", "vaultgemma"]


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    share = q.shape[1] // k.shape[1]
    scores = softcap * (scale / softcap * q @ k.repeat_interleave(share, 1).mT).tanh()
    return (scores.masked_fill(~mask, -torch.inf).softmax(3) @ v.repeat_interleave(share, 1)).transpose(1, 2)


@pytest.fixture(params=["one tile", "tiles"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tiles":
        monkeypatch.setattr(attention_capped, "_TILE_BYTES", 4 * H * T * 3)
        monkeypatch.setattr(attention_capped, "_FEWEST", 3)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize(
    ("dtype", "softcap"), [(torch.float32, 3.0), (torch.float32, 200.0), (torch.bfloat16, 3.0)]
)  # exp(200) is more than fp32 holds
def test_value_and_gradients(dtype: torch.dtype, groups: int, kind: str, kept: bool, softcap: float) -> None:
    tensors, mask = inputs(groups, dtype, kind)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    seen = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else as_mask(mask)
    assert seen is not None
    scale = 2.0 if softcap < 10 else 40.0  # many of them are cut
    expected = capped(*exact, seen, scale, softcap)
    attended = Attended(kept=[])
    out = attention(*tensors, mask, scale, attended, softcap=softcap)
    if kept:  # as a second run of the block has it
        attended.again = attended.kept
        out = attention(*tensors, mask, scale, attended, softcap=softcap)
    # bf16: values of 2^-9; gradients by an output that is rounded so
    assert_as(expected, exact, out, tensors, limit=2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_a_card(kind: str, dtype: torch.dtype) -> None:
    """Products in 16 bits, all else in fp32."""
    tensors, mask = inputs(2, dtype, kind)
    q, k, v = (it.detach() for it in tensors)
    dout = torch.randn(len(q), T, H, q.shape[3]).to(dtype)
    found = []
    for on_card in (True, False):
        out, lse = attention_capped.capped_attention(q, k, v, mask, 2.0, 3.0, on_card=on_card)
        given = dout, q, k, v, mask, out, lse, 2.0, 3.0
        found.append([out, lse, *attention_capped.capped_attention_backward(*given, on_card=on_card)])
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours.double() - expected.double()).norm() <= 2e-2 * expected.double().norm()


def test_in_fp16_many_keys_do_not_overflow() -> None:
    """What all of 2048 keys have to say sums up to more than fp16 holds, and its mean does not."""
    q, k = (torch.zeros(1, 1, 2048, 12, dtype=torch.float16) for _ in range(2))
    v = torch.full_like(k, 40.0)
    out, lse = attention_capped.capped_attention(q, k, v, None, 1.0, 3.0, on_card=True)
    torch.testing.assert_close(out, torch.full_like(out, 40.0))
    torch.testing.assert_close(lse[0, 0], torch.arange(1, 2049).log())
    dq, dk, dv = attention_capped.capped_attention_backward(
        torch.ones_like(out), q, k, v, None, out, lse, 1.0, 3.0, on_card=True
    )
    assert all(it.isfinite().all() for it in (dq, dk, dv))


def model_of(name: str) -> torch.nn.Module:
    """By transformers' eager function: in 5.17 and 5.20 the one that it takes by itself leaves the cap out."""
    sizes = {**SMALL, "num_hidden_layers": 4, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **sizes, attn_logit_softcapping=0.5)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_they_computed(name: str) -> None:
    """Values and gradients, in windows too; the cap is one that cuts."""
    model = model_of(name)
    ids = torch.randint(3, 100, (2, 40))

    def found() -> list[Tensor]:
        out = model(input_ids=ids, use_cache=False).logits
        return [out, *torch.autograd.grad(out.square().sum(), [it for it in model.parameters() if it.requires_grad])]

    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.weight.data.mul_(30)
    expected = found()
    use_attention(model)
    assert model.config._attn_implementation == ATTENTION
    for ours, right in zip(found(), expected, strict=True):
        assert (ours - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_unchanged(name: str) -> None:
    model = model_of(name).eval()
    ids = torch.randint(3, 100, (2, 12))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    use_attention(model)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_step_of_many_tiles_takes_what_was_planned(
    activations: str, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which two are traced; and less than the scores of one block."""
    length, rows, heads = 512, 2, 4
    save_tiny("gemma2", tmp_path / "model", max_position_embeddings=length)
    config = RunConfig.from_dict(
        {
            "model": str(tmp_path / "model"), "adapter": {"rank": 2}, "data": {"seq_len": length, "packing": packing},
            "train": {"tokens_per_step": length * rows},
            "policy": {
                "micro_batch_tokens": length * rows, "loss_chunk_tokens": 16, "activations": activations,
                "compute_dtype": "float32",
            },
        }
    )  # fmt: skip
    policy = policy_of(config, 2)
    batches, peaks = FullBatches(config, policy, vocabulary=100), []
    for tile_bytes in (8 << 20, 4 * heads * length * 20):
        monkeypatch.setattr(attention_capped, "_TILE_BYTES", tile_bytes)
        simulated = simulate(config, policy, kind="cpu", loss_tokens=batches[0].loss_tokens)
        train, evaluation = measured_train_peak(config, policy, batches), measured_eval_peak(config, policy, batches)
        assert train <= simulated.train_peak <= 1.01 * train
        assert evaluation <= simulated.eval_peak <= 1.01 * evaluation
        peaks.append(train)
    assert peaks[0] - peaks[1] > 4 * heads * length * length  # of scores alone
