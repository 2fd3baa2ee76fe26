"""`lowmem-ft chat`: turns, commands, what ends an answer, and streamed text against generated text."""

import copy
import io
import json
import os
import signal
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_ft.cli.chat import _lines, piped_lines
from lowmem_ft.core.errors import DataError, UnsupportedError
from lowmem_ft.core.interrupt import first_interrupt
from lowmem_ft.data.chat import ChatRenderer
from lowmem_ft.generate import complete, converse, generate, known_ends
from tests.unit.cli.conftest import Command

MODEL = Path(str(files("lowmem_ft") / "assets" / "doclm-7m"))
QUESTION = {"role": "user", "content": "What does ls do?"}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {MODEL}\ndata: {{seq_len: 64}}\nbudget: {{memory: 4GiB}}\ntrain: {{tokens_per_step: 64}}\n"
    )
    return path


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_text_is_the_generated_text(loaded: tuple[Any, Any], temperature: float) -> None:
    told: list[str] = []
    said = converse(*loaded, [QUESTION], say=told.append, max_new_tokens=40, temperature=temperature, seed=3)
    (whole,) = generate(*loaded, [QUESTION["content"]], max_new_tokens=40, temperature=temperature, seed=3)
    assert "".join(told).rstrip() == said.text == whole
    assert len(told) > 3


def test_what_ends_an_answer(loaded: tuple[Any, Any]) -> None:
    assert converse(*loaded, [QUESTION], max_new_tokens=2).ended == "length"
    whole = converse(*loaded, [QUESTION], max_new_tokens=20)
    model, tokenizer = copy.copy(loaded[0]), loaded[1]
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = [1, tokenizer(whole.text, add_special_tokens=False)["input_ids"][-1]]
    ended = converse(model, tokenizer, [QUESTION], max_new_tokens=20)
    assert (ended.ended, whole.text.startswith(ended.text)) == ("end", True)
    count = iter(range(100))
    stopped = converse(*loaded, [QUESTION], stop=lambda: next(count) == 2, max_new_tokens=20)
    assert (stopped.ended, stopped.tokens) == ("stopped", 3)
    assert whole.text.startswith(stopped.text)


ENDED = (  # as where a base that ends texts by another token was trained on conversations
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}<|assistant|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def test_what_ends_answers_in_the_chat_template_ends_them(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(loaded)
    tokenizer.chat_template = ENDED
    end = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert ChatRenderer(tokenizer).answer_end() == end
    assert end not in known_ends(model.generation_config)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, logits: torch.nn.functional.one_hot(
        torch.full(logits.shape[:-1], end), logits.shape[-1]).to(logits))  # fmt: skip
    said = converse(model, tokenizer, [QUESTION], max_new_tokens=9)
    assert (said.ended, said.tokens) == ("end", 1)
    assert generate(model, tokenizer, ["a"], max_new_tokens=9) == [""]
    assert complete(model, tokenizer, [[5, 6]], max_new_tokens=9, ends=[end]) == [""]
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError):
        converse(model, tokenizer, [QUESTION])


def test_what_training_ends_texts_by_ends_them(loaded: tuple[Any, Any]) -> None:
    """The tokenizer's EOS, of which the model's configuration may know nothing."""
    model, tokenizer = copy.deepcopy(loaded)
    tokenizer.chat_template, model.generation_config.eos_token_id = None, None
    head, end = model.get_output_embeddings(), tokenizer.eos_token_id
    head.register_forward_hook(lambda module, given, logits: torch.nn.functional.one_hot(
        torch.full(logits.shape[:-1], end), logits.shape[-1]).to(logits))  # fmt: skip
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, tokenizer, ["a"], max_new_tokens=9) == [""]
    assert len(calls) == 1


def test_nothing_stands_between_a_prompt_and_its_answer(loaded: tuple[Any, Any]) -> None:
    """Some tokenizers put an EOS behind a text, which in training stands behind the answer."""
    model, tokenizer = copy.deepcopy(loaded)
    tokenizer.chat_template = None
    expected = generate(model, tokenizer, ["<|bos|>ls -", ""], max_new_tokens=4)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(it, tokenizer.convert_tokens_to_ids(it)) for it in (bos, eos)]
    )
    assert tokenizer("ls -")["input_ids"][-1] == tokenizer.eos_token_id
    assert generate(model, tokenizer, ["ls -", ""], max_new_tokens=4) == expected
    assert generate(model, tokenizer, ["<|bos|>ls -", ""], max_new_tokens=4) == expected, "one is enough"


def test_a_prompt_past_the_chat_template(loaded: tuple[Any, Any], command: Command, config: Path) -> None:
    """As a run on prompts with completions has seen it, whose tokenizer has a template all the same."""
    model, tokenizer = loaded
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    (expected,) = generate(model, bare, "ls - list", max_new_tokens=6)
    assert [expected] == generate(model, tokenizer, "ls - list", max_new_tokens=6, raw=True)
    assert [expected] != generate(model, tokenizer, "ls - list", max_new_tokens=6)
    ask = ("generate", config, "ls - list", "--max-new-tokens", "6", "--json")
    raw, chat = (json.loads(command(*ask, *more)[1])["answer"] for more in (["--raw"], []))
    assert raw != chat


def test_positions(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    word = len(tokenizer(" a" * 100, add_special_tokens=False)["input_ids"]) // 100
    assert word == 1
    fixed = tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)["input_ids"]
    full = [{"role": "user", "content": " a" * (1024 - len(fixed))}]
    with pytest.raises(DataError, match=r"(?s)1024 tokens.*at most 1023"):
        converse(model, tokenizer, full)
    nearly = [{"role": "user", "content": " a" * (1024 - len(fixed) - 1)}]
    said = converse(model, tokenizer, nearly, max_new_tokens=5)
    assert said.tokens == 1
    assert said.ended in ("positions", "end")


def test_learnt_prompts_take_positions(loaded: tuple[Any, Any]) -> None:
    model = copy.copy(loaded[0])
    model.active_peft_config = SimpleNamespace(num_virtual_tokens=1020)
    with pytest.raises(DataError, match="at most 3,"):
        converse(model, loaded[1], [QUESTION])


def test_without_a_chat_template(loaded: tuple[Any, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = None
    for given in (tokenizer, None):
        with pytest.raises(UnsupportedError, match="lowmem-ft generate"):
            converse(loaded[0], given, [QUESTION])
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError, match=r"(?s)refuses.*no system here"):
        converse(loaded[0], tokenizer, [QUESTION])


def test_turns_from_a_pipe(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch, loaded: tuple[Any, Any]
) -> None:
    turns = "What does ls do?\n\n  and cat?\n/system Be short.\nWhat is cp?\n/reset\nWhat is cp?\n/exit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(turns))
    code, out, err = command("chat", config, "--json", "--max-new-tokens", "24")
    told = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [it["prompt"] for it in told] == ["What does ls do?", "and cat?", "What is cp?", "What is cp?"]
    assert all(it["answer"] and it["tokens"] > 1 and it["ended"] in ("end", "length") for it in told)
    assert told[2] == told[3], "the system message stays, and nothing else does"

    monkeypatch.setattr("sys.stdin", io.StringIO("What does ls do?\nand cat?"))
    code, out, err = command("chat", config, "--max-new-tokens", "24")
    assert code == 0
    assert out == f"{told[0]['answer']}\n{told[1]['answer']}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("What is cp?\n"))
    assert command("chat", config, "--max-new-tokens", "24", "--system", "Be short.")[1] == told[2]["answer"] + "\n"


def test_with_the_adapter_of_a_run(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    data = MODEL.parent / "whatis-train.jsonl"
    tuned = (f"data.train={data}", f"output={output}", "train.steps=3", "train.lr=0.05", "train.warmup=0")
    code, _, err = command("train", config, *tuned)
    assert code == 0, err
    said = {}
    for options in ((), ("--adapter", "none"), ("--adapter", output / "adapter")):
        monkeypatch.setattr("sys.stdin", io.StringIO("What is cp?\n"))
        code, said[options], err = command("chat", output, "--max-new-tokens", "16", *options)
        assert code == 0, err
    trained, base, named = said.values()
    assert trained == named != base
    monkeypatch.setattr("sys.stdin", io.StringIO("What is cp?\n"))
    assert json.loads(command("generate", output, "--max-new-tokens", "16", "--json")[1])["answer"] == trained.strip()


def test_generate_streams(command: Command, config: Path) -> None:
    plain = command("generate", config, "What is cp?", "What does ls do?", "--max-new-tokens", "16")
    streamed = command("generate", config, "What is cp?", "What does ls do?", "--max-new-tokens", "16", "--stream")
    assert (plain[0], streamed[0]) == (0, 0)
    assert plain[1].split() == streamed[1].split()
    assert streamed[1].endswith("\n")
    code, _, err = command("generate", config, "What is cp?", "--stream", "--json")
    assert (code, "do not go together" in err) == (2, True)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_answers_command_no_terminal(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], terminal: bool
) -> None:
    """Escape sequences, as they may stand in what a model was trained on; a pipe gets what was generated."""
    rings = "\x1b]0;changed\x07ls"

    def generated(*_: Any, say: Any = None, **__: Any) -> list[str]:
        if say is not None:
            say(0, rings)
        return [rings]

    monkeypatch.setattr(sys.modules["lowmem_ft.generate"], "generate", generated)
    monkeypatch.setattr("lowmem_ft.core.printable.is_terminal", lambda: terminal)
    assert command("generate", config, "hi", *options)[1].strip() == ("\\x1b]0;changed\\x07ls" if terminal else rings)


def test_a_byte_order_mark_is_no_part_of_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffhi\r\n\n who \n"))
    assert list(piped_lines()) == ["hi", "who"]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # by the locale
def test_input_that_is_no_text(command: Command, config: Path, monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    for name in ("chat", "generate"):
        stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, err = command(name, config)
        assert (code, out, "The input is no text" in err) == (2, "", True)


def test_prompts_that_are_no_text(command: Command, config: Path) -> None:
    code, out, err = command("generate", config, os.fsdecode(b"\xff"))
    assert (code, out, "is not Unicode" in err) == (2, "", True)


def test_no_such_command(command: Command, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/rest\n"))
    code, out, err = command("chat", config)
    assert (code, out, "/reset begins anew" in err) == (2, "", True)
    monkeypatch.setattr("sys.stdin", io.StringIO("/usr/bin is what?\n"))
    assert command("chat", config, "--max-new-tokens", "1")[0] == 0


def test_sampling_is_checked_before_the_model_is_loaded(command: Command, tmp_path: Path) -> None:
    for name in ("chat", "generate"):
        code, _, err = command(name, tmp_path / "none.yaml", "--temperature", "1e-40")
        assert (code, "temperature has no such value" in err) == (2, True)
    with pytest.warns(UserWarning, match="top_p and seed: without effect"):
        command("generate", tmp_path / "none.yaml", "--top-p", "0.5", "--seed", "1")


def test_a_run_of_a_card_that_is_not_here(command: Command, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    data = MODEL.parent / "whatis-train.jsonl"
    code, _, err = command("train", config, f"data.train={data}", f"output={output}", "train.steps=1")
    assert code == 0, err
    settings = (output / "config.yaml").read_text()
    assert "device: auto" in settings
    (output / "config.yaml").write_text(settings.replace("device: auto", "device: cuda:7"))
    words = ("generate", output, "What is cp?", "--max-new-tokens", "2")
    code, _, err = command(*words)
    assert (code, "cuda:7" in err) == (2, True)
    assert command(*words, "--device", "cpu")[0] == 0
    text = tmp_path / "held-out.txt"
    text.write_text("What is cp? A program that copies files.\n")
    for export in (("merge",), ("export", "--vllm")):
        code, _, err = command(*export, output, "--device", "cpu", "--text", text)
        assert code == 0, err


def test_a_turn_that_is_too_long_ends_a_pipe(command: Command, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a " * 2000 + "\n"))
    code, out, err = command("chat", config)
    assert (code, out, "longer than the model can see" in err) == (2, "", True)


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with first_interrupt() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before
    typed = iter([KeyboardInterrupt(), " hi ", "", EOFError()])

    def read(prompt: str) -> str:
        it = next(typed)
        if isinstance(it, BaseException):
            raise it
        return it

    monkeypatch.setattr("builtins.input", read)
    assert list(_lines(ask=True)) == ["hi"]
