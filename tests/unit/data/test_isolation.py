"""Packed documents do not see each other, on every architecture, and a model that mixes them is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPTJPreTrainedModel, PreTrainedModel

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.data.examples import Example
from lowmem_ft.data.isolation import (
    ATTENTION,
    PROBE_TOLERANCE,
    attention_inputs,
    check_isolation,
    isolation_fault,
    probe_batch,
    taking_masks,
    visible,
)
from lowmem_ft.data.packing import Batch, collate
from lowmem_ft.runtime.attend import use_attention
from lowmem_ft.runtime.hidden import hidden_states
from tests.models import ARCHITECTURES, MOE, MOE_ARCHITECTURES, SMALL, tiny_model

PACKABLE = sorted(set(ARCHITECTURES) - {"bloom"})
# Restarted position ids alone do not isolate these (nor Falcon before transformers 5.24)
LEAK_BY_POSITIONS = ("opt", "mpt", "gpt_oss")
LEARNED_POSITIONS = ("gpt2", "gpt_neo")
# These attend by code of their own, or (capped scores) by transformers' eager function
WITHOUT_OURS = ["falcon", "gemma2", "gpt_neo", "mpt", "stablelm"]
if not GPTJPreTrainedModel._supports_attention_backend:  # before transformers 5.24
    WITHOUT_OURS.append("gptj")


def document(length: int, seed: int) -> Example:
    ids = torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, ids)


# Longer than the sliding windows and attention chunks (8) of the tiny models
FIRST, SECOND, THIRD = document(13, seed=1), document(21, seed=2), document(9, seed=3)
OTHER_FIRST, OTHER_THIRD = document(13, seed=4), document(9, seed=5)
WHERE_SECOND = slice(13, 34)


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, T, V), through decoder and head apart, as the training step does it."""
    inputs = attention_inputs(model, batch, dtype=model.dtype)
    hidden_BTD = model.base_model(input_ids=batch.input_ids, use_cache=False, **inputs)[0]
    return model.get_output_embeddings()(hidden_BTD)


CASES = [(name, None) for name in PACKABLE] + [(name, "eager") for name in sorted(MOE_ARCHITECTURES)]


@pytest.mark.parametrize(("name", "experts"), CASES)
def test_changing_one_document_leaves_the_others_bit_equal(name: str, experts: str | None) -> None:
    """Also in mixtures of experts, where the other document's tokens change how many rows an expert multiplies."""
    model = tiny_model(name)
    if experts is not None:
        model.set_experts_implementation(experts)
    before = logits(model, collate([[FIRST, SECOND, THIRD], [THIRD, SECOND]], pad_id=0))
    after = logits(model, collate([[OTHER_FIRST, SECOND, OTHER_THIRD], [OTHER_THIRD, SECOND]], pad_id=0))
    assert torch.equal(before[0, WHERE_SECOND], after[0, WHERE_SECOND])
    assert torch.equal(before[1, 9:30], after[1, 9:30])
    assert not torch.equal(before[0, :13], after[0, :13])


BACKENDS = [(name, "eager") for name in PACKABLE]
BACKENDS += [(name, ATTENTION) for name in PACKABLE if name not in WITHOUT_OURS]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_every_attention_in_use_isolates(name: str, backend: str) -> None:
    """SDPA is shown above; here eager attention, and ours where it takes the place of SDPA. Values and gradients."""
    model = tiny_model(name, attn_implementation="eager" if backend == "eager" else None)
    if backend == ATTENTION:
        use_attention(model)
    assert model.config._attn_implementation == backend
    check_isolation(model)
    before = logits(model, collate([[FIRST, SECOND, THIRD]], pad_id=0))
    after = logits(model, collate([[OTHER_FIRST, SECOND, OTHER_THIRD]], pad_id=0))
    assert torch.equal(before[0, WHERE_SECOND], after[0, WHERE_SECOND])
    assert not torch.equal(before[0, :13], after[0, :13])


@pytest.mark.parametrize("name", [name for name in PACKABLE if name not in WITHOUT_OURS])
def test_our_attention_gives_what_a_mask_gives(name: str) -> None:
    """Documents are longer than windows and chunks. Measured relative difference: 4e-7 at most."""
    model = tiny_model(name, dtype=torch.float32)
    batch = collate([[FIRST, SECOND, THIRD], [THIRD, SECOND]], pad_id=0)
    expected = logits(model, batch)
    use_attention(model)
    assert model.config._attn_implementation == ATTENTION
    assert (logits(model, batch) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_equals_alone(name: str) -> None:
    """Alone, the model is left to itself. Relative difference measured here (torch 2.13, CPU): bf16 0.009 at most
    (gemma3), 0.003 elsewhere; fp32 5e-7."""
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        model = tiny_model(name, dtype=dtype)
        packed = logits(model, collate([[FIRST, SECOND, THIRD]], pad_id=0))[0, WHERE_SECOND].float()
        alone = logits(model, collate([[SECOND]], pad_id=0))[0, : len(SECOND)].float()
        assert (packed - alone).norm() <= tolerance * alone.norm()


@pytest.mark.parametrize("name", PACKABLE)
def test_check_passes_and_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny_model(name).requires_grad_(False).train()
    model.base_model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    check_isolation(model)
    assert [module.training for module in model.modules()] == modes
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bloom_refuses_packing_but_not_single_documents() -> None:
    model = tiny_model("bloom")
    with pytest.raises(UnsupportedError, match=r"Packing cannot be isolated for bloom[\s\S]*data.packing: false"):
        check_isolation(model)
    assert attention_inputs(model, collate([[FIRST], [THIRD]], pad_id=0), dtype=model.dtype) == {}


def test_memory_that_runs_out_says_nothing_of_isolation() -> None:
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="can't allocate memory"), taking_masks(model):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("name", LEAK_BY_POSITIONS)
def test_probe_sees_that_positions_alone_leak(name: str) -> None:
    model = tiny_model(name)
    batch = probe_batch(model)
    inputs: dict[str, Any] = attention_inputs(model, batch, dtype=model.dtype)
    del inputs["attention_mask"]
    assert isolation_fault(model, batch, inputs) == "a packed document sees its neighbour"


@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_probe_sees_positions_that_do_not_restart(name: str) -> None:
    model = tiny_model(name)
    batch = probe_batch(model)
    inputs = attention_inputs(model, batch, dtype=model.dtype)
    del inputs["position_ids"]
    fault = isolation_fault(model, batch, inputs)
    assert fault is not None
    assert "positions do not restart" in fault
    # Far on the wrong side of the bound: 0.34 measured for both
    assert float(fault.split()[-1].rstrip(")")) > 2 * PROBE_TOLERANCE


def test_probe_sees_a_mask_that_lets_the_second_document_look_back() -> None:
    model = tiny_model("llama")
    batch = probe_batch(model)
    inputs = attention_inputs(model, batch, dtype=model.dtype)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][..., -1, 0] = True
    assert isolation_fault(model, batch, inputs) == "a packed document sees its neighbour"


def test_sliding_windows_stay_in_the_mask() -> None:
    """A plain causal mask would be taken as it is, and every layer would look back over the whole document."""
    batch = collate([[FIRST, SECOND, THIRD]], pad_id=0)
    mistral, gemma2, llama = (tiny_model(name) for name in ("mistral", "gemma2", "llama"))

    def seen(mask: Tensor) -> list[int]:
        """How many positions each position of the second document sees."""
        allowed = mask if mask.dtype == torch.bool else mask == 0
        return allowed[0, 0, WHERE_SECOND].sum(dim=-1).tolist()

    full, sliding = list(range(1, 22)), [min(i, 8) for i in range(1, 22)]
    masks = attention_inputs(gemma2, batch, dtype=torch.bfloat16)["attention_mask"]
    assert {kind: seen(mask) for kind, mask in masks.items()} == {"full_attention": full, "sliding_attention": sliding}
    assert seen(attention_inputs(mistral, batch, dtype=torch.bfloat16)["attention_mask"]) == sliding
    assert seen(attention_inputs(llama, batch, dtype=torch.bfloat16)["attention_mask"]) == full


def test_forms_of_the_mask() -> None:
    """SDPA takes a boolean mask, eager attention an additive one, and no line of either is empty."""
    batch = collate([[FIRST, SECOND]], pad_id=0)
    sdpa, eager = tiny_model("llama"), tiny_model("llama", attn_implementation="eager")
    allowed = attention_inputs(sdpa, batch, dtype=torch.float16)["attention_mask"]
    added = attention_inputs(eager, batch, dtype=torch.float16)["attention_mask"]
    assert allowed.shape == added.shape == (1, 1, 40, 40)
    assert (allowed.dtype, added.dtype) == (torch.bool, torch.float16)
    assert torch.equal(added == 0, allowed)
    assert added.min() == torch.finfo(torch.float16).min
    assert allowed.any(dim=-1).all()
    sdpa.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="takes no explicit mask"):
        attention_inputs(sdpa, batch, dtype=torch.float16)


def test_our_attention_is_told_where_documents_begin() -> None:
    """Nothing that it gets grows with the square of the rows, and what it means is what a mask shows."""
    batch = collate([[FIRST, SECOND, THIRD], [THIRD, SECOND]], pad_id=0)
    for name, chunk in (("llama", None), ("gemma3", None), ("mistral", None), ("llama", 8)):
        model = tiny_model(name)
        model.config.attention_chunk_size = chunk
        masks = attention_inputs(model, batch, dtype=torch.bfloat16)["attention_mask"]
        use_attention(model)
        told = attention_inputs(model, batch, dtype=torch.bfloat16)["attention_mask"]
        for kind in masks if isinstance(masks, dict) else [None]:
            mask, documents = (masks, told) if kind is None else (masks[kind], told[kind])
            assert documents.untyped_storage().nbytes() == 4 * 97
            assert torch.equal(visible(documents, 2, 48, torch.device("cpu")), mask)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3"])
def test_windows_of_single_documents_are_told_too(name: str) -> None:
    """transformers would make masks of T x T for them, which a plan for packed rows does not count."""
    model = tiny_model(name, dtype=torch.float32, sliding_window=8)
    batch = collate([[FIRST], [THIRD]], pad_id=0)
    assert attention_inputs(model, batch, dtype=torch.float32) == {}, "transformers' own attention has masks"
    with torch.no_grad():
        expected = hidden_states(model, batch, {})
    use_attention(model)
    inputs = attention_inputs(model, batch, dtype=torch.float32)
    (masks,) = inputs.values()
    told = list(masks.values()) if isinstance(masks, dict) else [masks]
    assert any(it is not None for it in told)
    assert all(it is None or it.dtype == torch.int32 for it in told)
    with torch.no_grad():
        found = hidden_states(model, batch, inputs)
    real = batch.segment_ids.flatten() != 0
    assert (found - expected)[real].norm() <= 1e-5 * expected[real].norm()
    short = collate([[document(7, seed=6)]], pad_id=0, length=7)
    assert attention_inputs(model, short, dtype=torch.float32) == {}, "each position sees all before it"


def test_a_dropout_in_attention_wants_a_mask() -> None:
    """PyTorch's function draws it, which knows of no documents."""
    model = tiny_model("llama").train()
    batch = collate([[FIRST, SECOND]], pad_id=0)
    use_attention(model)
    model.config.attention_dropout = 0.5
    assert attention_inputs(model, batch, dtype=torch.bfloat16)["attention_mask"].dtype == torch.bool
    told = attention_inputs(model.eval(), batch, dtype=torch.bfloat16)
    assert told["attention_mask"].dtype == torch.int32
    for layer in model.model.layers:  # where a configuration has another name for it
        layer.self_attn.attention_dropout = 0.5
    model.train()
    torch.manual_seed(0)
    hidden_BTD = model.base_model(input_ids=batch.input_ids, use_cache=False, **told)[0]
    batch = collate([[OTHER_FIRST, SECOND]], pad_id=0)
    torch.manual_seed(0)
    other_BTD = model.base_model(input_ids=batch.input_ids, use_cache=False, **told)[0]
    assert torch.equal(hidden_BTD[0, WHERE_SECOND], other_BTD[0, WHERE_SECOND])
    assert not torch.equal(hidden_BTD[0, :13], other_BTD[0, :13])


def test_attention_chunks_count_from_the_start_of_a_document() -> None:
    model = tiny_model("llama")
    model.config.sliding_window, model.config.attention_chunk_size = None, 8
    mask = attention_inputs(model, collate([[FIRST, SECOND]], pad_id=0), dtype=torch.bfloat16)["attention_mask"]
    assert mask[0, 0, WHERE_SECOND].sum(dim=-1).tolist() == [i % 8 + 1 for i in range(21)]


def test_layers_that_carry_a_state_are_refused() -> None:
    config = AutoConfig.for_model("qwen3_next", **SMALL, **MOE, head_dim=12, shared_expert_intermediate_size=24)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedError, match="qwen3_next: some layers do not attend") as error:
        check_isolation(model)
    assert "linear_attention" in str(error.value)
