"""Answers found from the structure of a chat template, with and without generation markers."""

from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import DataError
from lowmem_ft.data.examples import IGNORE_INDEX, Example, RecordEncoder

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is assistant\nand <|im_end|> in ls?"},
    {"role": "assistant", "content": "List directory contents.\n\n  See also dir."},
    {"role": "user", "content": "And cat?"},
    {"role": "assistant", "content": "Concatenate files 😀"},
]
CHATML = (  # '\n' written out, because jinja drops a newline that follows a block
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}OPEN{{ m.content }}<|im_end|>CLOSE{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
UNMARKED = CHATML.replace("OPEN", "").replace("CLOSE", "")
# As Qwen3's: the last answer shows its (empty) reasoning, earlier ones do not.
THINKING = CHATML.replace("OPEN", "{% if loop.last %}<think></think>{% endif %}").replace("CLOSE", "")
# As Llama 2's: no generation prompt, and the answer stands between spaces.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chatml(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> list[Example]:
    tokenizer.chat_template = template
    return RecordEncoder(tokenizer).encode({"messages": messages})


def answers(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """The runs of tokens in the loss, decoded."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_templates_with_and_without_markers_agree(chatml: PreTrainedTokenizerBase) -> None:
    (marked,) = encode(chatml, MARKED, CONVERSATION)
    (unmarked,) = encode(chatml, UNMARKED, CONVERSATION)
    assert marked == unmarked
    assert answers(chatml, marked) == [f"{CONVERSATION[i]['content']}<|im_end|>" for i in (2, 4)]


@pytest.mark.parametrize("template", [MARKED, None], ids=["chatml", "embedded"])
def test_ids_and_mask_equal_those_of_transformers(chatml: PreTrainedTokenizerBase, template: str | None) -> None:
    (ours,) = encode(chatml, template or chatml.chat_template, CONVERSATION)
    theirs = chatml.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    assert list(ours.input_ids) == theirs["input_ids"]
    assert [label != IGNORE_INDEX for label in ours.labels] == [bool(m) for m in theirs["assistant_masks"]]


@pytest.mark.parametrize("content", ["foo ", "  foo", "foo 9 ", "\n\nfoo\n", "ß 😀", "é"])
def test_spaces_at_the_border_of_an_answer(chatml: PreTrainedTokenizerBase, content: str) -> None:
    """With offsets trimmed of spaces, apply_chat_template's own mask is wrong for the first two.

    A first token may hold the newline of the prompt too, or be told apart from it no more: compared without it.
    """
    chatml.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}] * 2
    (example,) = encode(chatml, UNMARKED, messages)
    assert [answer.lstrip() for answer in answers(chatml, example)] == [content.lstrip() + "<|im_end|>"] * 2
    assert encode(chatml, MARKED, messages) == [example]


@pytest.mark.parametrize("template", [MARKED, UNMARKED, THINKING], ids=["marked", "unmarked", "thinking"])
def test_answers_of_no_weight_are_shown_and_not_learnt(chatml: PreTrainedTokenizerBase, template: str) -> None:
    """As OpenAI and Mistral write it; ShareGPT's turns have it, too."""
    chatml.chat_template = template
    encoder, thought = RecordEncoder(chatml), "<think></think>" if template == THINKING else ""
    texts = [f"{thought}{CONVERSATION[i]['content']}<|im_end|>" for i in (2, 4)]
    for weights in ((0, 1), (1, 0.0), (False, True), (1, 1), (0, None), (0, 0)):
        messages = [*CONVERSATION[:2], CONVERSATION[2] | {"weight": weights[0]}, CONVERSATION[3]]
        messages.append(CONVERSATION[4] | {"weight": weights[1]})
        turns = [{"from": it["role"], "value": it["content"], "weight": it.get("weight")} for it in messages]
        for record in ({"messages": messages}, {"conversations": turns}):
            examples = encoder.encode(record)
            learnt = [text for example in examples for text in answers(chatml, example)]
            assert learnt == [text for text, weight in zip(texts, weights, strict=True) if weight in (1, None)]
            assert CONVERSATION[2]["content"] in chatml.decode(examples[-1].input_ids)
    with pytest.raises(DataError, match=r"message 3 has a 'weight' that is neither 0 nor 1"):
        encoder.encode({"messages": [*CONVERSATION[:2], CONVERSATION[2] | {"weight": 0.5}]})


@pytest.mark.parametrize("role", ["model", "Assistant", "bot"])
def test_roles_by_other_names_are_told(chatml: PreTrainedTokenizerBase, role: str) -> None:
    """A template that shows any role would show no answer, and what is left out would be said to be too long."""
    messages = [CONVERSATION[1], {"role": role, "content": "List."}]
    with pytest.raises(DataError, match=rf"no message is from the assistant[\s\S]*{role}[\s\S]*write 'assistant'"):
        encode(chatml, UNMARKED, messages)
    assert encode(chatml, UNMARKED, CONVERSATION[:2])[0].loss_tokens == 0  # a question alone is left out, and told


def test_eos_outside_the_markers_is_in_the_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    template = tokenizer.chat_template
    outside = template.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
    assert outside != template
    assert encode(tokenizer, outside, CONVERSATION) == encode(tokenizer, template, CONVERSATION)


def test_template_that_shows_answers_differently_later_gives_one_example_each(chatml: PreTrainedTokenizerBase) -> None:
    first, second = encode(chatml, THINKING, CONVERSATION)
    assert answers(chatml, first) == [f"<think></think>{CONVERSATION[2]['content']}<|im_end|>"]
    assert answers(chatml, second) == [f"<think></think>{CONVERSATION[4]['content']}<|im_end|>"]
    assert chatml.decode(first.input_ids) == chatml.apply_chat_template(CONVERSATION[:3], tokenize=False)
    assert chatml.decode(second.input_ids) == chatml.apply_chat_template(CONVERSATION, tokenize=False)


def test_template_without_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode(tokenizer, BRACKETS, CONVERSATION[1:])
    assert answers(tokenizer, example) == [f" {CONVERSATION[i]['content']} <|eos|>" for i in (2, 4)]


def test_ambiguous_template_is_refused(chatml: PreTrainedTokenizerBase) -> None:
    reasoning = UNMARKED.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
    with pytest.raises(DataError, match="does not begin with the generation prompt"):
        encode(chatml, reasoning, CONVERSATION)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages | length / 0 }}",
        "{% for _ in range(10**12) %}{% endfor %}",  # the sandbox has an OverflowError for it
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% break %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ ''.__class__.__mro__ }}",
    ],
    ids=["raises", "divides", "counts", "recurses", "breaks", "nested", "escapes"],
)
def test_a_template_that_fails_in_any_way_refuses_the_conversation(
    chatml: PreTrainedTokenizerBase, template: str
) -> None:
    with pytest.raises(DataError, match="the chat template refuses the conversation"):
        encode(chatml, template, CONVERSATION)


def test_bos_is_not_added_to_what_the_template_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    (chat,) = encode(tokenizer, tokenizer.chat_template, CONVERSATION)
    assert list(chat.input_ids).count(tokenizer.bos_token_id) == 1
    for text in ("x", f"{bos}x"):
        (example,) = RecordEncoder(tokenizer).encode({"prompt": text, "completion": " y"})
        assert list(example.input_ids[:2]) == tokenizer("x")["input_ids"]


def test_whole_conversation_in_the_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = RecordEncoder(tokenizer, assistant_only=False).encode({"messages": CONVERSATION})
    assert example.input_ids == example.labels
    assert example.loss_tokens == len(example) - 1


def test_tools_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tools = [{"type": "function", "function": {"name": "ls"}}]
    tokenizer.chat_template = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + tokenizer.chat_template
    (example,) = RecordEncoder(tokenizer).encode({"messages": CONVERSATION, "tools": tools})
    assert tokenizer.decode(example.input_ids).startswith("ls<|bos|>")
    with pytest.raises(DataError, match="'tools' is not a list"):
        RecordEncoder(tokenizer).encode({"messages": CONVERSATION, "tools": "ls"})
