"""What is learnt of reasoning, which chat templates show in the last turn, in each, or never."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.config import DataConfig
from lowmem_ft.core.errors import DataError
from lowmem_ft.core.sources import DataSource
from lowmem_ft.data.chat import ChatRenderer
from lowmem_ft.data.examples import RecordEncoder, read_examples
from lowmem_ft.data.preview import preview
from tests.unit.data.test_chat import answers
from tests.unit.data.test_templates import FOLDER, MULTI, ONE, SINGLE, TEMPLATES, TOOL_TALK, TOOLS, TWO, encode


def test_reasoning_of_earlier_turns_is_learnt_where_it_was_thought(tokenizer: PreTrainedTokenizerBase) -> None:
    """As Qwen3 sees it: with the reasoning of the turn that it is in, without that of earlier ones."""
    thoughts = [
        {**message, "content": f"<think>\nHm, {i}.\n</think>\n\n{message['content']}"}
        if message["role"] == "assistant" else message
        for i, message in enumerate(MULTI)
    ]  # fmt: skip
    known = encode(tokenizer, "qwen-3", thoughts)
    assert known.runs == [[f"<think>\nHm, {i}.\n</think>\n\n{answer}<|im_end|>"] for i, answer in ((1, ONE), (3, TWO))]
    assert known.plain == known.marked  # LFM2.5's template has markers, and drops earlier reasoning, too
    last = tokenizer.decode(known.plain[1].input_ids)
    assert "Hm, 1." not in last
    assert ONE in last


def test_template_that_drops_the_thoughts_that_it_asks_for_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """DeepSeek R1 opens a thought for the model, but shows no turn with one: what was thought cannot be known."""
    with pytest.raises(DataError, match=r"does not begin with the generation prompt[\s\S]*<think>[\s\S]*generation %"):
        encode(tokenizer, "deepseek-r1", MULTI)
    source = (FOLDER / "deepseek-r1.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = source.replace("{#gen#}", "{% generation %}").replace("{#end#}", "{% endgeneration %}")
    (example,) = RecordEncoder(tokenizer).encode({"messages": MULTI})
    assert answers(tokenizer, example) == [f"{answer}<｜end▁of▁sentence｜>" for answer in (ONE, TWO)]


def test_thoughts_before_calls_of_tools_that_are_no_longer_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    """gpt-oss takes the reasoning out of a call once an answer follows: the answer was given with it in sight."""
    talk = [{**it, "thinking": f"Hm, {i}."} if it["role"] == "assistant" else it for i, it in enumerate(TOOL_TALK)]
    known = encode(tokenizer, "gpt-oss", talk, TOOLS)
    call = f"<|end|><|start|>assistant{TEMPLATES['gpt-oss'].call}"
    final = "<|end|><|start|>assistant" + TEMPLATES["gpt-oss"].answer
    assert known.runs == [
        [f"<|channel|>analysis<|message|>Hm, 1.{call}"],
        [f"<|channel|>analysis<|message|>Hm, 3.{final.format(ONE)}"],
        [f"<|channel|>analysis<|message|>Hm, 5.{final.format(TWO)}"],
    ]
    seen = [tokenizer.decode(it.input_ids) for it in known.plain]
    prompt = str(tokenizer.apply_chat_template(talk[:3], tools=TOOLS, tokenize=False, add_generation_prompt=True))
    assert "Hm, 1." in prompt
    assert seen[1].startswith(prompt)
    assert "Hm, 1." not in seen[2]


@pytest.mark.parametrize("asked", ["enable_thinking", "thinking"])
def test_answers_are_told_from_the_prompt_that_asks_for_such(tokenizer: PreTrainedTokenizerBase, asked: str) -> None:
    """Nemotron 3 opens a thought by default, and another template only when asked to: answers of both kinds begin with
    the prompt of one of both."""
    encode(tokenizer, "nemotron-3", MULTI)
    source = (FOLDER / "nemotron-3.jinja").read_text(encoding="utf-8").replace("enable_thinking", asked)
    thoughts = [{**it, "reasoning_content": f"Hm, {i}."} if i in (1, 3) else it for i, it in enumerate(MULTI)]
    for default in ("true", "false"):
        tokenizer.chat_template = source.replace("default(true)", f"default({default})")
        plain, first, second = (
            example
            for messages in (MULTI, thoughts)
            for example in RecordEncoder(tokenizer).encode({"messages": messages})
        )
        assert answers(tokenizer, plain) == [f"{ONE}<|im_end|>", f"{TWO}<|im_end|>"]
        assert answers(tokenizer, first) == [f"Hm, 1.\n</think>\n{ONE}<|im_end|>"]
        assert answers(tokenizer, second) == [f"Hm, 3.\n</think>\n{TWO}<|im_end|>"]
        assert "assistant\n<think></think>List" in tokenizer.decode(second.input_ids)


def test_a_text_that_says_whether_to_think_is_that_of_its_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """As SmolLM3's, whose system turn tells the mode: an answer of the other mode gets a text of its own."""
    encode(tokenizer, "nemotron-3", MULTI)
    mode = "{{ '<|im_start|>system\n/think' if enable_thinking | default(true) else '<|im_start|>system\n/no_think' }}"
    tokenizer.chat_template = mode + "{{ '<|im_end|>\n' }}" + tokenizer.chat_template
    one, two = RecordEncoder(tokenizer).encode({"messages": MULTI})
    assert [answers(tokenizer, it) for it in (one, two)] == [[f"{ONE}<|im_end|>"], [f"{TWO}<|im_end|>"]]
    assert all("/no_think" in tokenizer.decode(it.input_ids) for it in (one, two))


@pytest.mark.parametrize("opened", ["<think>\n", "<think>", ""])
def test_thoughts_that_an_answer_brings_follow_the_prompt_that_opens_one(
    tokenizer: PreTrainedTokenizerBase, opened: str
) -> None:
    """DeepSeek R1 and QwQ are trained so; the template shows turns without what was thought."""
    thoughts = [
        {**message, "content": f"{opened}Hm, {i}.\n</think>\n\n{message['content']}"}
        if message["role"] == "assistant" else message
        for i, message in enumerate(MULTI)
    ]  # fmt: skip
    encode(tokenizer, "deepseek-v3", SINGLE)
    tokenizer.chat_template = (FOLDER / "deepseek-r1.jinja").read_text(encoding="utf-8")
    first, second = RecordEncoder(tokenizer).encode({"messages": thoughts})
    for example, upto, i, answer in ((first, 1, 1, ONE), (second, 3, 3, TWO)):
        assert answers(tokenizer, example) == [f"Hm, {i}.\n</think>\n\n{answer}<｜end▁of▁sentence｜>"]
        prompt = tokenizer.apply_chat_template(thoughts[:upto], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(example.input_ids).startswith(str(prompt))
        assert str(prompt).endswith("<think>\n")
    assert "Hm, 1." not in tokenizer.decode(second.input_ids)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_a_template_leaves_out_is_told(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, key: str
) -> None:
    path = tmp_path / "data.jsonl"
    thoughts = [{**it, key: f" Hm, {i}.\n"} if it["role"] == "assistant" else it for i, it in enumerate(MULTI)]
    path.write_text(json.dumps({"messages": thoughts}) + "\n" + json.dumps({"messages": MULTI}) + "\n")
    for name, unshown in (("chatml", 2), ("qwen-3", 0), ("gpt-oss", 0), ("llama-3.1", 2)):
        encode(tokenizer, name, SINGLE)
        _, report = read_examples(path, tokenizer, seq_len=1024)
        assert report.unshown == unshown
        told = "the reasoning of 2 messages is not learnt, the chat template leaves it out"
        assert [told in note for note in report.notes()] == [True] * (unshown > 0)
        known = preview(DataSource(path=str(path)), DataConfig(), tokenizer, rows=None, samples=0)
        assert known.to_dict()["unshown"] == unshown


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_the_names_that_templates_read(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Also with a transformers that names nothing; of two the standard name's is taken, if it is not empty."""
    said = {"role": "assistant", "content": ONE}
    encode(tokenizer, "chatml", SINGLE)
    (wanted,) = ChatRenderer(tokenizer).as_wanted([{**said, "reasoning_content": "", key: "Hm."}])
    assert wanted["reasoning_content"] == "Hm."
    assert wanted["thinking"] == "Hm."
    assert ChatRenderer(tokenizer).as_wanted([{**said, key: None}]) == [said]
