"""Modelfiles, whose templates are held against the chat templates that they stand for."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.export.ollama import go_template, modelfile

ASSETS = Path(str(files("lowmem_ft") / "assets" / "doclm-7m"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}You are helpful.{% endif %}" + CHATML
NUMBERED = "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML


def tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(ASSETS)
    found.chat_template = template or found.chat_template
    return found


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """The few constructs of Go's templates that are written, in Python."""
    before, rest = template.split("{{ range .Messages }}{{ if ")
    body, after = rest.split("{{ end }}{{ end }}")
    turns = dict(re.fullmatch(r'eq \.Role "(\w+)" }}(.*)', it, re.DOTALL).groups() for it in body.split("{{ else if "))  # type: ignore[union-attr]
    return before + "".join(turns[it["role"]].replace("{{ .Content }}", it["content"]) for it in messages) + after


@pytest.mark.parametrize("template", [None, CHATML, LLAMA3], ids=["own", "chatml", "llama3"])
def test_templates_give_the_same_text(template: str | None) -> None:
    tok = tokenizer(template)
    found = go_template(tok)
    assert found is not None
    talk = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is ls?"},
        {"role": "assistant", "content": "A command."}, {"role": "user", "content": "And cd?"},
    ]  # fmt: skip
    for messages in (talk, talk[1:], talk[1:2]):
        expected = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert run_go(found[0], messages) == expected


def test_the_first_token_is_written_once() -> None:
    tok = tokenizer(LLAMA3)
    twice, once = go_template(tok), go_template(tok, adds_bos=True)
    assert twice is not None
    assert once is not None
    assert twice[0] == tok.bos_token + once[0]


@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, NUMBERED, NO_SYSTEM], ids=["default", "numbered", "no system"])
def test_other_templates_are_not_guessed(template: str) -> None:
    assert go_template(tokenizer(template)) is None
    text = modelfile(tokenizer(template), ASSETS, source="./model.gguf")
    assert 'TEMPLATE """' not in text
    assert text.startswith("FROM ./model.gguf\n# No TEMPLATE")


def test_a_modelfile(tmp_path: Path) -> None:
    text = modelfile(tokenizer(CHATML), ASSETS, source="base", adapter="./adapter.gguf")
    lines = text.splitlines()
    assert lines[:2] == ["FROM base", "ADAPTER ./adapter.gguf"]
    assert 'PARAMETER stop "<|eos|>"' in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert 'PARAMETER stop "<|user|>"' in modelfile(tokenizer(), tmp_path, source="base")
    assert modelfile(None, tmp_path, source="base") == "FROM base\nPARAMETER repeat_penalty 1\n"


@pytest.mark.parametrize("text", ["{", "[" * 3000, "[1]"])
def test_settings_that_cannot_be_read_are_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        modelfile(None, tmp_path, source="base")


def read(text: str) -> list[tuple[str, str]]:
    """Commands as Ollama reads them: values end with their line, or with the quotes; nothing escapes within them."""
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
    values = r'(FROM|ADAPTER|TEMPLATE|PARAMETER \w+) ("""(?:.|\n)*?"""(?!")|"[^\n]*"|[^\n]*)\n'
    return [(name, value.removeprefix('"""').removesuffix('"""') if value.startswith('"""') else value.strip('"'))
            for name, value in re.findall(values, "".join(lines))]  # fmt: skip


@pytest.mark.parametrize("word", ['<"end">', "a\\nb", "</s>\n", "▁<｜end｜>"])
def test_words_are_written_as_ollama_reads_them(word: str) -> None:
    tok = tokenizer()
    tok.add_special_tokens({"eos_token": word})
    text = modelfile(tok, ASSETS, source="./model.gguf")
    assert ("PARAMETER stop", word) in read(text)


def test_what_ollama_drops_is_not_written() -> None:
    # a space that does not break is no printed character, of which Ollama keeps none
    tok = tokenizer(CHATML.replace("<|im_end|>", "\u00a0<|im_end|>"))
    text = modelfile(tok, ASSETS, source="./model.gguf")
    assert "\u00a0" not in text
    assert "# No TEMPLATE" in text


def test_a_brace_before_an_action_is_no_go_template() -> None:
    def turns(before: str) -> str:
        return CHATML.replace("{{ m['content'] }}", f"{{{{ '{before}' + m['content'] }}}}")

    assert go_template(tokenizer(turns("{:"))) is not None
    assert go_template(tokenizer(turns(":{"))) is None


def test_words_that_were_said_are_as_likely_as_they_were_trained(tmp_path: Path) -> None:
    assert "PARAMETER repeat_penalty 1\n" in modelfile(tokenizer(), ASSETS, source="./model.gguf")
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    assert "PARAMETER repeat_penalty 1.05\n" in modelfile(tokenizer(), tmp_path, source="./model.gguf")
