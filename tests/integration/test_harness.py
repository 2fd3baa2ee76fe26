"""Tasks of the lm-evaluation-harness: the same answers as from the harness's own model for transformers, and from the
command line, on local tasks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError, UnsupportedError
from lowmem_ft.planner.choices import first_policy
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer import harness
from lowmem_ft.trainer.harness import HarnessModel
from lowmem_ft.trainer.recovery import NoSaferPolicyError, Recovery
from tests.assets import ASSETS, write_share
from tests.failing import Failing
from tests.unit.cli.conftest import command  # noqa: F401 - a fixture
from tests.unit.planner.test_solver import DEVICE

Command = Callable[..., tuple[int, str, str]]
LENGTH = 96
QUIET = Reporter(quiet=True)
RECORDS = [json.loads(line)["messages"] for line in (ASSETS / "whatis-eval.jsonl").read_text().splitlines()[:24]]
PAIRS = [(question["content"], answer["content"]) for question, answer in RECORDS]


def settings(**sections: Any) -> RunConfig:
    keys: dict[str, Any] = {
        "model": str(ASSETS / "doclm-7m"),
        "quant": {"bits": 16},
        "data": {"seq_len": LENGTH},
        "policy": {"compute_dtype": "float32", "micro_batch_tokens": 4 * LENGTH, "loss_chunk_tokens": 64},
    }
    return RunConfig.from_dict({**keys, **sections})


@pytest.fixture(scope="module")
def ready() -> Assembled:
    config = settings()
    return assemble(config, first_policy(config, DEVICE, 16), torch.device("cpu"), adapter=False, optimizer=False)


@pytest.fixture
def ours(ready: Assembled) -> HarnessModel:
    return HarnessModel(Recovery(ready, first_policy(settings(), DEVICE, 16)), LENGTH, QUIET)


@pytest.fixture(scope="module")
def theirs(ready: Assembled) -> Any:
    """With room for as many tokens: it does not count the last one, which is no input."""
    ready.model.eval()
    return HFLM(pretrained=ready.model, tokenizer=ready.tokenizer, max_length=LENGTH - 1, batch_size=1)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=it) for it in arguments]


def test_likelihoods_are_theirs(ours: HarnessModel, theirs: Any) -> None:
    cases = [(question, f" {answer}") for question, answer in PAIRS]
    cases += [(f"{question} ", answer) for question, answer in PAIRS[:4]]  # the space goes to the answer
    cases += [("", answer) for _, answer in PAIRS[:4]]
    cases += [("<|bos|>What is ls", "?")]
    cases += [(" ".join(question for question, _ in PAIRS), " the end")]  # longer than a row
    # what they take for likeliest, so that some answers are
    for context, _ in cases[:6]:
        ids = torch.tensor([theirs.tok_encode(context)])
        token = int(theirs.model(ids).logits[0, -1].argmax())
        if theirs.tok_encode(context + (word := theirs.tok_decode([token]))) == [*ids[0].tolist(), token]:
            cases.append((context, word))
    expected = theirs.loglikelihood(requests(*cases), disable_tqdm=True)
    found = ours.loglikelihood(requests(*cases), disable_tqdm=True)
    assert {greedy for _, greedy in expected} == {True, False}
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # fp32 sums in other orders: measured 2e-6
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5, abs=1e-4)
    assert ours.shortened == 1
    assert ours.loglikelihood(requests(("nothing is", "")), disable_tqdm=True) == [(0.0, True)]
    assert ours.loglikelihood([], disable_tqdm=True) == []


def test_likelihoods_of_texts_longer_than_a_row_are_theirs(ours: HarnessModel, theirs: Any) -> None:
    texts = [" ".join(answer for _, answer in PAIRS[:count]) for count in (1, 3, 24)] + [""]
    assert len(theirs.tok_encode(texts[2])) > 2 * LENGTH
    found = ours.loglikelihood_rolling(requests(*((text,) for text in texts)))
    expected = theirs.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] == 0
    assert ours.shortened == 0


@pytest.mark.parametrize("until", [[], ["."], ["e", "\n\n", " th"]], ids=str)
def test_answers_are_theirs(ours: HarnessModel, theirs: Any, until: list[str]) -> None:
    asked = {"until": until, "max_gen_toks": 24, "do_sample": False}
    cases = [(question, asked) for question, _ in PAIRS[:5]] + [(" ".join(question for question, _ in PAIRS), asked)]
    found = ours.generate_until(requests(*cases))
    assert found == theirs.generate_until(requests(*cases), disable_tqdm=True)
    assert all(stop not in answer for answer in found for stop in until)
    assert any(found)
    assert ours.shortened == 1


def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_a_question(ours: HarnessModel) -> None:
    """Nor of an answer: the EOS of some would be all that is scored. In training it stands behind the answer."""
    cases, asked = requests(("ls is", " it"), ("ls is", " a command")), {"until": [], "max_gen_toks": 6}
    expected = ours.loglikelihood(cases, disable_tqdm=True), ours.generate_until(requests(("ls is", asked)))
    ours.tokenizer = copy.deepcopy(ours.tokenizer)
    ours.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", ours.tokenizer.eos_token_id)]
    )
    found = ours.loglikelihood(cases, disable_tqdm=True), ours.generate_until(requests(("ls is", asked)))
    assert found == expected


def test_questions_through_the_template_are_tokenized_as_in_training(ours: HarnessModel) -> None:
    """A template without a BOS has none there, whatever the tokenizer puts in front of other texts."""
    tokenizer = ours.tokenizer = copy.deepcopy(ours.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    asked = [{"role": "user", "content": "What is ls?"}]
    whole = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert ours.tok_encode(text := ours.apply_chat_template(asked))[0] == tokenizer.bos_token_id
    scored = ours.loglikelihood_rolling(requests(("ls is a command",)))
    ours.chat = True
    assert ours.tok_encode(text) == whole
    assert ours.loglikelihood_rolling(requests(("ls is a command",))) == scored


def test_what_training_ends_texts_by_ends_answers(ready: Assembled, ours: HarnessModel) -> None:
    """Of which the model's own generation config may know nothing."""
    head, model, calls = ready.model.get_output_embeddings(), ready.model, list[int]()
    known, end = model.generation_config.eos_token_id, ours.tokenizer.eos_token_id
    hook = head.register_forward_hook(lambda module, given, logits: calls.append(1) or torch.nn.functional.one_hot(
        torch.full(logits.shape[:-1], end), logits.shape[-1]).to(logits))  # fmt: skip
    model.generation_config.eos_token_id = None
    try:
        assert ours.generate_until(requests(("ls is", {"until": [], "max_gen_toks": 6}))) == [""]
    finally:
        hook.remove()
        model.generation_config.eos_token_id = known
    assert len(calls) == 1


def test_ways_to_generate(ours: HarnessModel) -> None:
    def said(**asked: Any) -> str:
        return ours.generate_until(requests(("What is ls?", {"max_gen_toks": 12, "until": [], **asked})))[0]

    assert said() == said(temperature=0.0)
    assert said(do_sample=True, temperature=5.0) != said()
    assert said(do_sample=True, temperature=5.0, top_p=1e-6) == said()
    with pytest.raises(UnsupportedError, match="top_k"):
        said(top_k=3)
    with pytest.raises(ConfigError, match=r"data\.seq_len above 96"):
        said(max_gen_toks=LENGTH)


def test_scores_do_not_depend_on_micro_batches_and_survive_a_lack_of_memory(ready: Assembled) -> None:
    cases = requests(*((question, f" {answer}") for question, answer in PAIRS))

    def scored(rows: int, failing: Failing) -> list[float]:
        config = settings(policy={"compute_dtype": "float32", "micro_batch_tokens": rows * LENGTH})
        recovery = Recovery(ready, first_policy(config, DEVICE, 16))
        with failing:
            return [score for score, _ in HarnessModel(recovery, LENGTH, QUIET).loglikelihood(cases, disable_tqdm=True)]

    one = scored(1, Failing())
    assert scored(8, Failing()) == pytest.approx(one, rel=1e-5)
    assert scored(8, Failing(lambda at: at in (50, 100))) == pytest.approx(one, rel=1e-5)
    with pytest.raises(NoSaferPolicyError):
        scored(8, Failing(lambda at: at % 5 == 0))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and a folder with a task of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    write_share(folder, train=4, eval=4)
    (folder / "config.yaml").write_text(
        f"model: {ASSETS / 'doclm-7m'}\n"
        f"data: {{train: {folder / 'train.jsonl'}, seq_len: {LENGTH}}}\n"
        f"train: {{tokens_per_step: {LENGTH}}}\n"
        f"policy: {{micro_batch_tokens: {LENGTH}, loss_chunk_tokens: 64, activations: keep}}\n"
    )
    rows = [
        {"question": question, "choices": [answer, PAIRS[at - 1][1], PAIRS[at - 2][1]], "answer": 0, "text": answer}
        for at, (question, answer) in enumerate(PAIRS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "manual_choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "manual_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: byte_perplexity}]\n",
        "manual_answer": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{text}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, text in kinds.items():
        shared = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        )
        (folder / f"{name}.yaml").write_text(f"{shared}test_split: test\n{text}metadata: {{version: 1.0}}\n")
    return folder


def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To find the 14,000 that come with the harness takes seven seconds each time."""
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))


def test_command(tasks: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = [word for name in ("manual_choice", "manual_text", "manual_answer") for word in ("--harness", name)]
    code, out, err = command("eval", tasks / "config.yaml", *asked, "--include", tasks, "--limit", "12", "--json")
    assert code == 0, err
    found = json.loads(out)
    results = found["results"]
    assert 0 <= results["manual_choice"]["acc,none"] <= 1
    assert 1 < results["manual_text"]["byte_perplexity,none"] < 10
    assert results["manual_answer"]["exact_match,none"] == 0
    assert found["n-samples"]["manual_choice"]["effective"] == 12
    own_tasks_alone(monkeypatch)
    code, out, err = command(
        "eval", tasks / "config.yaml", "--harness", "manual_choice", "--include", tasks, "--limit", "4",
        "--chat", "--fewshot", "1",
    )  # fmt: skip
    assert code == 0, err
    assert "|manual_choice|" in out
    assert "|acc_norm|" in out


def test_bad_input(tasks: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    own_tasks_alone(monkeypatch)
    config = tasks / "config.yaml"
    for arguments, words in (
        (["--harness", "manual_chioce", "--include", tasks], "did you mean manual_choice?"),
        (["--harness", "manual_choice", "--include", tasks / "nowhere"], "The folder of tasks is not there"),
        (["--limit", "3"], "name a task: --harness TASK"),
    ):
        code, out, err = command("eval", config, *arguments)
        assert (code, out) == (2, ""), err
        assert words in err
        assert "Traceback" not in err
    (tasks / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    # as of many tasks that come with the harness
    (tasks / "lacking.py").write_text("import no_such_package\n\ntext = str\n")
    (tasks / "lacking.yaml").write_text(
        "task: lacking\ndataset_path: json\noutput_type: loglikelihood_rolling\ndoc_to_text: !function lacking.text\n"
    )
    for name, words in (("broken", "/nowhere.jsonl"), ("lacking", "No module named 'no_such_package'")):
        code, out, err = command("eval", config, "--harness", name, "--include", tasks)
        assert code == 2, err
        assert "could not run the task" in err
        assert words in err
        assert "Traceback" not in err
