"""Steps over preferences: the same however they are split, stored, streamed and packed; the reference is the base."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lowmem_ft.adapters.inject import adapters_disabled, inject_lora, trainable_parameters
from lowmem_ft.adapters.peft_format import save_adapter
from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.preference import KEYS
from lowmem_ft.data.examples import Example
from lowmem_ft.data.loader import BatchLoader, MicroBatches
from lowmem_ft.data.packing import Answers, Batch
from lowmem_ft.data.pairs import preferences_of
from lowmem_ft.data.preference import PreferenceExample
from lowmem_ft.runtime.hidden import decoder_inputs, hidden_states
from lowmem_ft.runtime.preference import Objective, Share, Totals, objective_of, token_weights
from lowmem_ft.runtime.scaler import LossScaler
from lowmem_ft.step import evaluate_preferences, sum_gradients, train_step
from lowmem_ft.trainer.recovery import Recovery
from tests.failing import Failing
from tests.models import save_tiny, tiny_model
from tests.unit.planner.policies import policy
from tests.unit.test_step import gradients, make_ready

DEPTH, LENGTH = 4, 24
OBJECTIVES = [name for name in KEYS if name != "sft"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: save_tiny(name, folder / name, n_layer=DEPTH, num_hidden_layers=DEPTH)
        for name in ("llama", "mixtral", "gpt2")
    }


def drawn(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 131, (length,), generator=generator).tolist()


def examples(count: int = 8, *, verdicts: bool = False) -> list[PreferenceExample]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for at in range(count):
        prompt = drawn(2 + at % 4, generator)
        sides = [drawn(3 + (5 * at + side) % 9, generator) for side in range(2)]
        pair = [Example(prompt + it, [-100] * len(prompt) + it) for it in sides]
        if verdicts:
            pair = [it if side == at % 2 else None for side, it in enumerate(pair)]  # type: ignore[misc]
        found.append(PreferenceExample(*pair))
    return found


def config_of(objective: str, model: Path | str = "m", **sections: Any) -> RunConfig:
    data = {"seq_len": LENGTH, **sections.pop("data", {})}
    keys: dict[str, Any] = {
        "model": str(model),
        "output": f"{model}/run",
        "data": data,
        "train": {"objective": objective},
    }
    return RunConfig.from_dict({**keys, **sections})


def step_of(config: RunConfig, tokens: int, found: Sequence[PreferenceExample] | None = None) -> MicroBatches:
    """All examples in one step."""
    found = found or examples(verdicts=config.train.objective == "kto")
    return next(
        BatchLoader(
            found, seq_len=LENGTH, packing=config.data.packing, micro_batch_tokens=tokens, tokens_per_step=1 << 16,
            seed=0, pad_id=0, preferences=preferences_of(config),
        )
    )  # fmt: skip


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model whose adapter has learned something."""
    model = tiny_model(name, dtype=dtype, **changes)
    torch.manual_seed(0)
    inject_lora(model, rank=4, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in trainable_parameters(model):
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def ready_for(config: RunConfig, **overrides: Any) -> SimpleNamespace:
    return make_ready(adapted(), objective=objective_of(config), **overrides)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_splits_and_packing_give_the_same_step(objective: str) -> None:
    """Micro-batches of any size, rows packed or not. Of KTO whose prompt gets whose answer is a matter of the order."""
    found: dict[bool, list[tuple[Any, dict[str, Tensor]]]] = {}
    for packing in (False, True):
        config = config_of(objective, data={"packing": packing})
        for tokens in (1, 4 * LENGTH, 1 << 16):
            batches = step_of(config, tokens)
            ready = ready_for(config)
            result = sum_gradients(ready, batches, batches.mismatched)
            found.setdefault(packing, []).append((result, gradients(ready)))
            evaluated = evaluate_preferences(ready, batches, batches.mismatched)
            # fp32, sums in another order: measured 3e-7
            assert evaluated == pytest.approx({"loss": result.loss, **result.metrics}, rel=1e-5, abs=1e-6)
    groups = [*found.values()] if objective == "kto" else [[*found[False], *found[True]]]
    for (first, whole), *others in groups:
        for other, gradient in others:
            assert other.loss == pytest.approx(first.loss, rel=1e-5)
            assert other.tokens == first.tokens
            assert other.metrics == pytest.approx(first.metrics, rel=1e-4, abs=1e-6)
            for key in whole:  # measured 3e-6
                assert (gradient[key] - whole[key]).norm() < 1e-4 * whole[key].norm(), key


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_loss_scale_shows_in_no_gradient(objective: str) -> None:
    config = config_of(objective)
    batches = step_of(config, 4 * LENGTH)
    plain, scaled = ready_for(config), ready_for(config, scaler=LossScaler())
    norms = [sum_gradients(ready, batches).grad_norm for ready in (plain, scaled)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for key, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(scaled)[key], gradient, rtol=1e-4, atol=1e-7)


def test_a_trained_head_gets_the_gradient_of_the_loss() -> None:
    """SimPO by plain autograd on whole logits."""
    config = config_of("simpo", preference={"beta": 1.5, "gamma": 0.3})
    model = tiny_model("llama", dtype=torch.float32).requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    ready = make_ready(copy.deepcopy(model), objective=objective_of(config))
    result = sum_gradients(ready, step_of(config, 4 * LENGTH))
    losses = []
    for pair in examples():
        means = []
        for side in (pair.chosen, pair.rejected):
            assert side is not None
            logps = model(input_ids=torch.tensor([side.input_ids])).logits[0, :-1].float().log_softmax(-1)
            kept = [(at - 1, label) for at, label in enumerate(side.labels) if label != -100]
            means.append(torch.stack([logps[at, label] for at, label in kept]).mean())
        losses.append(-torch.nn.functional.logsigmoid(1.5 * (means[0] - means[1]) - 0.3))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    (name, gradient), *rest = gradients(ready).items()
    assert not rest
    assert (gradient - model.get_parameter(name).grad).norm() < 1e-5 * gradient.norm()  # type: ignore[operator]


def equipped(config: RunConfig, **changes: Any) -> Assembled:
    torch.manual_seed(0)
    together = 1 if config.train.objective == "kto" else 2
    planned = policy(rows=together, seq_len=LENGTH, depth=DEPTH, loss_chunk_tokens=16, optimizer="adamw", **changes)
    return assemble(config, planned, torch.device("cpu"))


POLICIES: dict[str, dict[str, Any]] = {
    "kept": {"keep": DEPTH},
    "recomputed": {},
    "attention kept": {"keep_attention": True},
    "offloaded": {"offload_blocks": DEPTH, "recompute_blocks": 0},
    "streamed": {"streamed_blocks": DEPTH, "resident_blocks": 0, "stream_from": "disk"},
    "embeddings streamed": {"stream_embeddings": "both", "stream_from": "disk"},
}


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_policies_give_the_same_bits(models: dict[str, Path], name: str, objective: str) -> None:
    """NF4, two steps and an evaluation; the second step is the first whose model and reference differ."""
    config = config_of(objective, models[name])
    batches = step_of(config, 2 * LENGTH)
    expected: tuple[Any, dict[str, Tensor]] | None = None
    for key, changes in POLICIES.items():
        if key == "attention kept" and name == "gpt2":
            continue
        ready = equipped(config, **changes)
        steps = [train_step(ready, batches, lr=1e-2, mismatched=batches.mismatched) for _ in range(2)]
        said = steps, evaluate_preferences(ready, batches, batches.mismatched)
        weights = {it: parameter.detach().clone() for it, parameter in ready.trainable.items()}
        expected = expected or (said, weights)
        assert said == expected[0], key
        assert all(torch.equal(weights[it], other) for it, other in expected[1].items()), key
    assert expected is not None
    if objective == "dpo":
        assert expected[0][0][0].loss == pytest.approx(math.log(2), rel=1e-6), "nothing is dropped, in GPT-2 either"
        assert expected[0][0][1].loss != expected[0][0][0].loss


def test_tiles_of_mlps_change_rounding_alone(models: dict[str, Path]) -> None:
    config = config_of("dpo", models["llama"])
    batches = step_of(config, 2 * LENGTH)
    losses = []
    for tile in (0, 16):
        ready = equipped(config, mlp_tile_tokens=tile)
        losses.append([train_step(ready, batches, lr=1e-2).loss for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # bf16: measured 4e-4


@pytest.mark.parametrize(
    "method", [{"peft_type": "IA3"}, {"peft_type": "LOHA", "r": 4}, {"peft_type": "LN_TUNING"},
               {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}],
    ids=lambda it: it["peft_type"],
)  # fmt: skip
def test_the_reference_of_a_peft_method_is_the_base(models: dict[str, Path], method: dict[str, Any]) -> None:
    prompts = method["peft_type"] == "PROMPT_TUNING"
    adapter = {"method": "peft", "peft": {**method, "task_type": "CAUSAL_LM"}}
    config = config_of("dpo", models["llama"], adapter=adapter, data={"packing": not prompts})
    batches = step_of(config, 4 * LENGTH)
    ready = equipped(config, keep=DEPTH)
    assert isinstance(ready.model, peft.PeftModel)
    base = assemble(config, policy(seq_len=LENGTH, depth=DEPTH), torch.device("cpu"), adapter=False, optimizer=False)
    before = {name: it.detach().clone() for name, it in ready.trainable.items()}
    first = train_step(ready, batches, lr=1e-2)
    if not prompts:
        assert first.loss == pytest.approx(math.log(2), rel=1e-6)
    assert any(not torch.equal(before[name], it) for name, it in ready.trainable.items())
    assert [*ready.trainable] == [*before], "what is trained is trained still"
    batch = batches[0]
    with torch.no_grad(), adapters_disabled(ready.model):
        ready.model.eval()
        off = hidden_states(ready.model, batch, decoder_inputs(ready.model, batch, dtype=torch.bfloat16))
        base.model.eval()
        plain = hidden_states(base.model, batch, decoder_inputs(base.model, batch, dtype=torch.bfloat16))
    real = (batch.segment_ids != 0).flatten()
    assert torch.equal(off[real], plain[real])


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_whichever_allocation_fails_the_step_gives_the_same_bits(models: dict[str, Path], objective: str) -> None:
    config = config_of(objective, models["llama"], adapter={"rank": 4, "dropout": 0.1})
    batches = step_of(config, 2 * LENGTH)

    def stepped(fails: Any) -> tuple[Any, dict[str, Tensor], int]:
        ready = equipped(config, keep=1)
        made = policy(rows=2, seq_len=LENGTH, depth=DEPTH, keep=1)
        recovery = Recovery(ready, made)
        torch.manual_seed(1)
        with Failing(fails) as failing:
            result = recovery.step(batches, lr=1e-2)
        assert not any(not it.enabled for it in ready.model.modules() if hasattr(it, "lora_A")), "adapters are on again"
        return result, {name: it.detach().clone() for name, it in ready.trainable.items()}, failing.count

    result, weights, count = stepped(lambda at: False)
    for failing in range(1, count, count // 6):
        again, others, _ = stepped(lambda at, failing=failing: at == failing)
        assert again == result
        assert all(torch.equal(weights[name], it) for name, it in others.items())


def test_answers_that_are_certain_give_finite_gradients() -> None:
    """In fp32 a probability of one has no odds."""
    objective = Objective(method="orpo", beta=0.1)
    answers = Answers(spans=((0, 2), (2, 4)), whole=((0, 2), (2, 4)), tokens=(2, 2), good=1, likely=2)
    for losses in ([0.0, 0.0, 5.0, 5.0], [5.0, 5.0, 0.0, 0.0], [0.0] * 4):
        totals = Totals(torch.device("cpu"))
        share = Share.of(objective, [answers])
        weights = token_weights(objective, torch.tensor(losses), None, answers, share, totals)
        assert weights is not None
        assert weights.isfinite().all()
        assert totals.loss(share).isfinite()


def test_rows_lie_in_pairs_and_spans_are_the_answers() -> None:
    config = config_of("orpo", data={"assistant_only": False})
    for batch in step_of(config, 4 * LENGTH):
        answers, width = batch.answers, batch.input_ids.shape[1]
        assert answers is not None
        labels = batch.labels.flatten()
        assert batch.loss_tokens == answers.likely + sum(answers.tokens[answers.good :])
        for at, ((begin, end), tokens) in enumerate(zip(answers.spans, answers.tokens, strict=True)):
            assert (labels[begin:end] != -100).all()
            assert end - begin == tokens
            assert answers.whole[at][1] == end
            good = at < answers.good
            assert (begin // width) % 2 == (0 if good else 1)
            whole = labels[answers.whole[at][0] : end] != -100
            assert bool(whole.all()) == good, "the likelihood of better answers is that of their prompts, too"


def test_what_is_no_answer_within_a_better_one_has_no_say_in_its_odds() -> None:
    """Such as a question between two answers: whether prompts are learned, too, does not change what answers are."""
    prompt, better, worse = [*range(15, 20)], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34]
    masked = [-100] * len(prompt)
    pair = PreferenceExample(
        Example(prompt + better, [*masked, 20, 21, -100, -100, 24]), Example(prompt + worse, masked + worse)
    )
    said = []
    for only in (True, False):
        config = config_of("orpo", data={"assistant_only": only})
        batches = step_of(config, 4 * LENGTH, [pair])
        assert sum(batch.loss_tokens for batch in batches) == 3 + 5 + (0 if only else 4)
        said.append(evaluate_preferences(ready_for(config), batches))
    for name in ("rewards/chosen", "logps/chosen", "rewards/margins"):
        assert said[0][name] == pytest.approx(said[1][name], rel=1e-5)
    assert said[0]["nll_loss"] != said[1]["nll_loss"]


def documents(batch: Batch) -> list[list[int]]:
    found = []
    for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
        found += [ids[segments == part].tolist() for part in range(1, int(segments.max()) + 1)]
    return found


def split(example: PreferenceExample) -> tuple[list[int], list[int]]:
    """Prompt and answer of one with a verdict."""
    document = example.chosen or example.rejected
    assert document is not None
    begin = sum(label == -100 for label in document.labels)
    return list(document.input_ids[:begin]), list(document.input_ids[begin:])


def test_mismatched_answers_do_not_depend_on_micro_batches() -> None:
    config = config_of("kto")
    seen = []
    for tokens in (1, 3 * LENGTH, 1 << 16):
        batches = step_of(config, tokens)
        seen.append(sorted(document for batch in batches.mismatched for document in documents(batch)))
        own = [examples(verdicts=True)[it] for row in batches.rows for it in row]
        for at, example in enumerate(own):
            prompt, answer = split(example)[0], split(own[at - 1])[1]
            assert [*prompt, *answer][:LENGTH] in seen[-1]
    assert seen[0] == seen[1] == seen[2]
    assert step_of(config_of("dpo"), 1).mismatched == ()


def test_packed_mismatched_answers_have_rows_of_one_length() -> None:
    """oneDNN compiles each product for each number of rows, and a plan counts those of rows as long as a step's."""
    batches = step_of(config_of("kto"), LENGTH)
    assert len(batches.mismatched) > 1
    assert {batch.input_ids.shape[1] for batch in batches.mismatched} == {LENGTH} == {batches.width}


def test_a_step_goes_on_where_it_was_saved() -> None:
    """With other micro-batches, but not with other objectives: an epoch of pairs is another than one of verdicts."""
    config = config_of("dpo")

    def loader(tokens: int) -> BatchLoader:
        return BatchLoader(
            examples(), seq_len=LENGTH, packing=True, micro_batch_tokens=tokens, tokens_per_step=2 * LENGTH, seed=0,
            pad_id=0, preferences=preferences_of(config),
        )  # fmt: skip

    first = loader(1)
    next(first)
    second = loader(1 << 16)
    second.load_state_dict(first.state_dict())
    both = [[it.input_ids.tolist() for it in next(one)] for one in (first, second)]
    assert [row for batch in both[0] for row in batch] == [row for batch in both[1] for row in batch]
    assert first.state_dict()["data"]["preferences"] == "pairs"
    assert replace(first.preferences, lanes=1).identity() == {"preferences": "verdicts"}  # type: ignore[type-var]


def test_smaller_micro_batches_give_the_same_step_when_memory_runs_out(models: dict[str, Path]) -> None:
    """Memory runs out twice, so that the policy with half of the rows takes over: a pair is never parted."""
    config = config_of("dpo", models["llama"])
    batches = step_of(config, 4 * LENGTH)
    made = policy(rows=4, seq_len=LENGTH, depth=DEPTH, loss_chunk_tokens=16, optimizer="adamw")

    def stepped(fails: Any) -> tuple[Recovery, list[Any]]:
        ready = equipped(config)
        said: list[str] = []
        recovery = Recovery(ready, made, say=said.append)
        results = []
        for failing in (lambda at: False, fails):
            with Failing(failing):
                results.append(recovery.step(batches, lr=1e-2))
        return recovery, results

    whole, expected = stepped(lambda at: False)
    smaller, found = stepped(lambda at: at in (50, 100))
    assert smaller.repeated == 2
    assert smaller.policy.micro_batch_tokens == 2 * LENGTH == whole.policy.micro_batch_tokens // 2
    assert found[0] == expected[0]
    assert found[1].loss == pytest.approx(expected[1].loss, rel=1e-5)
    assert found[1].grad_norm == pytest.approx(expected[1].grad_norm, rel=1e-3)  # bf16: measured 6e-5
    assert found[1].metrics == pytest.approx(expected[1].metrics, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("own", [{"bias": "all"}, {"train_modules": ["lm_head"]}], ids=str)
def test_a_saved_adapter_that_trains_the_base_is_refused(tmp_path: Path, own: dict[str, Any]) -> None:
    model = save_tiny("phi" if "bias" in own else "llama", tmp_path / "model")
    saved = assemble(config_of("sft", model, adapter={"rank": 4, **own}), policy(seq_len=LENGTH), torch.device("cpu"))
    save_adapter(saved.model, tmp_path / "adapter", base_model=str(model))
    init = {"init": str(tmp_path / "adapter")}
    config = config_of("dpo", model, adapter=init)
    with pytest.raises(ConfigError, match="trains parts of the base in place"):
        assemble(config, policy(seq_len=LENGTH), torch.device("cpu"))
    assemble(config_of("simpo", model, adapter=init), policy(seq_len=LENGTH), torch.device("cpu"))
