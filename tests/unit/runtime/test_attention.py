"""Our attention operator against attention in double precision, and inside transformers' models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_ft.data.isolation import ATTENTION, visible
from lowmem_ft.data.packing import as_bounds
from lowmem_ft.runtime import attend, attention_cpu, attention_cuda
from lowmem_ft.runtime.activations import apply_activation_policy
from lowmem_ft.runtime.attend import Asked, attend_by_operator, attend_on_card, use_attention
from lowmem_ft.runtime.attention import Attended, attention
from tests.models import ARCHITECTURES, SMALL, tiny_config

B, H, T, E = 2, 6, 20, 16
KINDS = ["causal", "one mask", "mask per row", "mask per head", "documents", "documents in windows"]
BOUNDS = [0, 1, 13, 20, 24, 40]  # of a row of three documents and one of two


def told(bounds: list[int], window: int) -> Tensor:
    """As `data.isolation.documents` tells them."""
    return as_bounds(bounds).expand(1, 1, window, -1)


def as_mask(mask: Tensor | None) -> Tensor | None:
    return visible(mask, B, T, torch.device("cpu")) if mask is not None and mask.dtype == torch.int32 else mask


def inputs(groups: int, dtype: torch.dtype, kind: str) -> tuple[list[Tensor], Tensor | None]:
    torch.manual_seed(0)
    tensors = [torch.randn(B, T, heads, E).to(dtype).transpose(1, 2) for heads in (H, groups, groups)]
    if kind == "causal":
        return [t.requires_grad_() for t in tensors], None
    if kind.startswith("documents"):
        return [t.requires_grad_() for t in tensors], told(BOUNDS, window=5 if "windows" in kind else T)
    shape = {"one mask": (1, 1), "mask per row": (B, 1), "mask per head": (B, H)}[kind]
    mask = torch.rand(*shape, T, T) > 0.4
    mask |= torch.eye(T, dtype=torch.bool)  # every position sees one
    return [t.requires_grad_() for t in tensors], mask.tril()


def assert_as(expected: Tensor, exact: Sequence[Tensor], out: Tensor, given: Sequence[Tensor], *, limit: float) -> None:
    """Of an output by `given`, and of its gradients, against the same by `exact` in double precision."""
    assert out.is_contiguous()
    assert out.dtype == given[0].dtype
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, given, dout)
    theirs = torch.autograd.grad(expected, exact, dout.double())
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        assert (a.double() - b).norm() <= limit * b.norm()


@pytest.mark.parametrize("tile_bytes", [1, 8 << 20])
@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients(
    dtype: torch.dtype, groups: int, kind: str, widen: bool, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(attention_cpu, "multiplies", lambda dtype: not widen)
    tensors, mask = inputs(groups, dtype, kind)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = F.scaled_dot_product_attention(
        *exact, attn_mask=as_mask(mask), is_causal=mask is None, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    out = attention(*tensors, mask, 0.3)
    # bf16: inputs of the kernel's products are rounded to 2^-9 several times; measured 0.8e-2 at most
    assert_as(expected, exact, out, tensors, limit=1e-5 if dtype == torch.float32 else 2e-2)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks_H: Tensor, scale: float) -> Tensor:
    """With one more score for each query, of a value of 0."""
    share = q.shape[1] // k.shape[1]
    scores = (scale * q @ k.repeat_interleave(share, 1).mT).masked_fill(~mask, -torch.inf)
    sinks = sinks_H.view(1, -1, 1, 1).expand(*q.shape[:3], 1)
    shares = torch.cat([scores, sinks], 3).softmax(3)[..., :-1]
    return (shares @ v.repeat_interleave(share, 1)).transpose(1, 2)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks(dtype: torch.dtype, groups: int, kind: str, kept: bool) -> None:
    tensors, mask = inputs(groups, dtype, kind)
    sinks_H = torch.linspace(-3, 3, H, dtype=dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (*tensors, sinks_H)]
    seen = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else as_mask(mask)
    expected = with_sinks(*exact[:3], seen, exact[3], 0.3)
    attended = Attended(kept=[])
    out = attention(*tensors, mask, 0.3, attended, sinks_H)
    if kept:  # as a second run of the block has it
        attended.again = attended.kept
        out = attention(*tensors, mask, 0.3, attended, sinks_H)
    assert_as(expected, exact, out, [*tensors, sinks_H], limit=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_mask_that_hides_nothing_but_the_future_is_causal() -> None:
    tensors, _ = inputs(2, torch.float32, "causal")
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(*tensors, mask, 0.3), attention(*tensors, None, 0.3))


@pytest.mark.parametrize("kind", ["causal", "one mask", "documents in windows"])
def test_operator_contract(kind: str) -> None:
    tensors, mask = inputs(2, torch.float32, kind)
    q, k, v = (t.detach() for t in tensors)
    torch.library.opcheck(torch.ops.lowmem_ft.attention.default, (q, k, v, mask, 0.3))
    out, lse = torch.ops.lowmem_ft.attention.default(q, k, v, mask, 0.3)
    backward = torch.ops.lowmem_ft.attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), q, k, v, mask, out, lse, 0.3))
    torch.library.opcheck(torch.ops.lowmem_ft.capped_attention.default, (q, k, v, mask, 0.3, 20.0))
    out, lse = torch.ops.lowmem_ft.capped_attention.default(q, k, v, mask, 0.3, 20.0)
    backward = torch.ops.lowmem_ft.capped_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), q, k, v, mask, out, lse, 0.3, 20.0))


def test_bounds_that_a_model_has_cut_are_not_taken() -> None:
    tensors, documents = inputs(2, torch.float32, "documents")
    assert documents is not None
    with pytest.raises(AssertionError, match="cut"):
        attention(*tensors, documents[..., :-1], 0.3)


@pytest.fixture
def flash_kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """FlashAttention's kernels for sequences of any lengths on a CPU, by their definition. What lies in no sequence is
    NaN, as on a card it is whatever was there. The list tells positions and sequences of each backward call."""
    calls: list[tuple[int, int]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, scale: float, back: int | None) -> Tensor:
        share = q.shape[1] // k.shape[1]
        out = torch.full_like(q, torch.nan)
        for first, last in itertools.pairwise(begins.tolist()):
            if last == first:
                continue
            at = torch.arange(last - first)
            seen = at <= at[:, None]
            if back is not None and back >= 0:
                seen &= at >= at[:, None] - back
            heads = [
                it[first:last].transpose(0, 1).repeat_interleave(n, 0) for it, n in ((q, 1), (k, share), (v, share))
            ]
            out[first:last] = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale).transpose(0, 1)
        return out

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        begins: Tensor,
        _: Tensor,
        longest: int,
        __: int,
        p: float,
        causal: bool,
        debug: bool,
        *,
        scale: float,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:
        assert causal
        assert longest >= begins.diff().max()
        lse = torch.arange(q.shape[0], dtype=torch.float32).expand(q.shape[1], -1).contiguous()  # tells positions
        none = torch.empty(2, dtype=torch.uint64)
        return attend(q, k, v, begins, scale, window_size_left), lse, none, none[0].clone(), q.new_empty(0)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        begins: Tensor,
        _: Tensor,
        longest: int,
        __: int,
        p: float,
        causal: bool,
        seed: Tensor,
        offset: Tensor,
        *,
        scale: float,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> list[Tensor]:
        assert lse.is_contiguous()
        assert lse[0].diff().eq(1).all()
        calls.append((int(begins[-1] - begins[0]), int((begins.diff() > 0).sum())))
        inside = torch.zeros(q.shape[0], dtype=torch.bool)
        inside[begins[0] : begins[-1]] = True
        given = [it.detach().requires_grad_() for it in (q, k, v)]
        found = attend(*given, begins, scale, window_size_left)
        torch.testing.assert_close(found[inside], out[inside])
        gradients = torch.autograd.grad(found[inside], given, dout[inside])
        return [it.masked_fill(~inside[:, None, None], torch.nan) for it in gradients]

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", SimpleNamespace(default=forward))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", SimpleNamespace(default=backward))
    return calls


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [1024, 10])
@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 1024, 2048],
        [0, 1024, 1030, 2048],
        [0, *range(8, 1017, 8), 1020, 1024, 1028, 2040, 2048],
        [*range(0, 2048, 3), 2048],
        [0, 700, 1024, 1025, 1026, 1027, 1028, 1029, 1730, 2048],
    ],
)
def test_documents_on_a_card(
    bounds: list[int], size: int, window: int, groups: int, flash_kernels: list[tuple[int, int]]
) -> None:
    """All of it but the kernels: calls for a few documents at a time give every position its gradient."""
    bounds = sorted({*bounds, 1024})  # no document lies in two rows
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 1024, heads, size) for heads in (4, groups, groups)]
    q, k, v = (torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes)
    dout = torch.randn(2, 1024, 4, size, generator=generator).bfloat16()
    documents, card = told(bounds, window), {"capability": (8, 0)}
    out, lse = attention_cuda.attention_cuda(q, k, v, documents, 0.3, **card)
    ours = attention_cuda.attention_backward_cuda(dout, q, k, v, documents, out, lse, 0.3, **card)
    expected, expected_lse = attention_cpu.attention_cpu(q, k, v, documents, 0.3)
    theirs = attention_cpu.attention_backward_cpu(dout, q, k, v, documents, expected, expected_lse, 0.3)
    assert out.is_contiguous()
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).norm() <= 2e-2 * b.float().norm()
    most = attention_cuda.documents_at_once(2048)
    assert all(count <= most for _, count in flash_kernels)
    assert all(tokens <= 1024 and (count == 1 or tokens <= 2048 // 3) for tokens, count in flash_kernels[1:])


@pytest.fixture
def efficient_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The memory-efficient kernels on a CPU, by their definition. The list tells positions of each backward call."""
    calls: list[int] = []

    def scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
        found = scale * q.float() @ k.float().transpose(2, 3)
        hidden = torch.ones(found.shape[2:], dtype=torch.bool).triu(1) if causal else torch.tensor(False)
        return (found if bias is None else found + bias).masked_fill(hidden, -torch.inf)

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        compute_log_sumexp: bool,
        p: float,
        causal: bool,
        *,
        scale: float,
    ) -> tuple[Tensor, ...]:
        assert compute_log_sumexp
        found = scores(q, k, bias, causal, scale)
        out = (found.softmax(3) @ v.float()).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        lse = F.pad(found.logsumexp(3), (0, -q.shape[2] % 32), value=torch.inf)
        return out, lse, torch.empty(0), torch.empty(0)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        seed: Tensor,
        offset: Tensor,
        p: float,
        wanted: list[bool],
        causal: bool,
        *,
        scale: float,
    ) -> tuple[Tensor | None, ...]:
        length = q.shape[2]
        calls.append(length)
        assert lse.shape[2] == -(-length // 32) * 32
        assert lse[:, :, length:].eq(torch.inf).all()
        shares = (scores(q, k, bias, causal, scale) - lse[:, :, :length, None]).exp()
        dout, out = dout.float(), out.float()
        dscores = scale * shares * (dout @ v.float().transpose(2, 3) - (dout * out).sum(3, keepdim=True))
        found = dscores @ k.float(), dscores.transpose(2, 3) @ q.float(), shares.transpose(2, 3) @ dout
        return *(it.to(q.dtype) for it in found), None

    name = "_scaled_dot_product_efficient_attention"
    monkeypatch.setattr(torch.ops.aten, name, SimpleNamespace(default=forward))
    monkeypatch.setattr(torch.ops.aten, f"{name}_backward", SimpleNamespace(default=backward))
    return calls


@pytest.mark.parametrize(("dtype", "card"), [(torch.float16, (7, 5)), (torch.float32, (9, 0))])
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("kind", [*KINDS, "documents of one position"])
def test_where_flash_attention_does_not_serve(
    kind: str, size: int, groups: int, dtype: torch.dtype, card: tuple[int, int], efficient_kernels: list[int]
) -> None:
    """Cards before Ampere, and fp32: by the memory-efficient kernels, each document for itself."""
    tensors, mask = inputs(groups, dtype, "documents" if "one position" in kind else kind)
    if "one position" in kind:
        mask = told([*range(B * T + 1)], T)
    q, k, v = (t.detach()[..., :size] for t in tensors)
    dout = torch.randn(B, T, H, size).to(dtype)
    out, lse = attention_cuda.attention_cuda(q, k, v, mask, 0.3, capability=card)
    ours = attention_cuda.attention_backward_cuda(dout, q, k, v, mask, out, lse, 0.3, capability=card)
    expected, expected_lse = attention_cpu.attention_cpu(q, k, v, mask, 0.3)
    theirs = attention_cpu.attention_backward_cpu(dout, q, k, v, mask, expected, expected_lse, 0.3)
    assert out.is_contiguous()
    limit = 1e-5 if dtype == torch.float32 else 4e-3  # fp16 has 11 bits
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).norm() <= limit * b.float().norm().clamp(min=1)
    apart = {"documents of one position": [1] * B * T, "documents": [1, 12, 7, 4, 16]}
    apart["documents in windows"] = apart["documents"]
    assert efficient_kernels == apart.get(kind, [T])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_compute_what_they_computed(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).eval()
    ids = torch.randint(3, 100, (2, 16))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    before = model.config._attn_implementation
    expected = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padding).logits[:, 5:]]
    use_attention(model)
    served = (before == "sdpa" or name in ("gemma2", "gpt_oss")) and type(model)._supports_attention_backend
    assert model.config._attn_implementation == (ATTENTION if served else before)
    found = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padding).logits[:, 5:]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WITH_SINKS: dict[str, dict[str, int]] = {
    "granite_swa": {},
    "granitemoe_swa": EXPERTS,
    "mimo_v2_flash": {
        **EXPERTS,
        "head_dim": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
    },  # not of all layers
}


@pytest.mark.parametrize("name", WITH_SINKS)
def test_other_models_with_sinks(name: str) -> None:
    """Values and gradients, in windows too."""
    sizes = {**SMALL, "num_hidden_layers": 4, "sliding_window": 8, **WITH_SINKS[name]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), dtype=torch.float32)
    sinks = [it for key, it in model.named_parameters() if key.endswith("sinks")]
    for parameter in sinks:
        parameter.data.normal_()
    ids = torch.randint(3, 100, (2, 40))

    def found() -> list[Tensor]:
        out = model(input_ids=ids, use_cache=False).logits
        return [out, *torch.autograd.grad(out.square().sum(), [model.get_input_embeddings().weight, *sinks])]

    assert sinks
    expected = found()
    assert model.config._attn_implementation == "eager"
    use_attention(model)
    assert model.config._attn_implementation == ATTENTION
    for ours, right in zip(found(), expected, strict=True):
        assert (ours - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_generation_with_a_cache_is_unchanged(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).eval()
    ids = torch.randint(3, 100, (2, 12))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    use_attention(model)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("name", ["stablelm", "falcon"])
@pytest.mark.parametrize("kernel", [attend_by_operator, attend_on_card])
def test_models_that_call_pytorchs_attention_compute_the_same(
    kernel: Callable[[Asked], Tensor | None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernel that is chosen, on a card too, where our operator's is a CPU's here; also where backward runs
    again."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).train()
    model.config.use_cache = False
    ids, embedding = torch.randint(3, 100, (2, 16)), model.get_input_embeddings().weight
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, embedding)[0]
    served: list[Tensor | None] = []

    def counted(asked: Asked) -> Tensor | None:
        served.append(kernel(asked))
        return served[-1]

    monkeypatch.setattr(attend, kernel.__name__, counted)
    use_attention(model, on_card=kernel is attend_on_card)
    apply_activation_policy(model, keep=1)
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, embedding)[0]
    assert len(served) == 3, "of two blocks, one of which runs twice"
    assert all(out is not None for out in served)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
