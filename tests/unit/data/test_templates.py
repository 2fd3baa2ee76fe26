"""The loss of real chat templates, written from their published formats: the answers with their end tokens, exactly.

In templates/ the comments {#gen#} and {#end#} stand where a template with markers would have them: the plain file is a
template without markers, and with the comments turned into markers its twin.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from lowmem_ft.assemble import load_tokenizer
from lowmem_ft.core.errors import DataError
from lowmem_ft.data.examples import Example, RecordEncoder, read_examples
from lowmem_ft.generate import _rendered
from lowmem_ft.quant.checkpoint import Checkpoint
from tests.assets import ASSETS

from .test_chat import answers

FOLDER = Path(__file__).parent / "templates"
SYSTEM = {"role": "system", "content": "Be brief."}
FIRST, SECOND = {"role": "user", "content": "What is ls?"}, {"role": "user", "content": "And cat, in\n two lines?"}
ONE, TWO = "List directory contents.", "Concatenate files\nand print them."
SINGLE = [FIRST, {"role": "assistant", "content": ONE}]
MULTI = [*SINGLE, SECOND, {"role": "assistant", "content": TWO}]
TOOLS = [{"type": "function", "function": {"name": "run", "description": "Run it.", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "id": "call00001", "function": {"name": "run", "arguments": {"command": "ls"}}}
TOOL_TALK = [
    FIRST,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "a.txt", "tool_call_id": "call00001"},
    {"role": "assistant", "content": ONE},
    SECOND,
    {"role": "assistant", "content": TWO},
]


@dataclass(frozen=True, kw_only=True)
class Template:
    """What a template's tokenizer knows, and what its answers look like.

    Attributes:
        special: its special tokens beside BOS and EOS.
        answer: an answer as the model generates it, around `{}`.
        earlier: whether earlier answers stand in the text as they were generated; else each has a text of its own.
        parts: whether contents are lists of parts, and nothing else.
        between: what a template puts between parts and at their ends, so that parts are not learnt as their text.
        joined: what of the next turn is one token with the end of an answer.
        call: the generated call of TOOL_TALK; None where the format has none.
        call_earlier: whether that holds in TOOL_TALK, too.
    """

    bos: str = "<s>"
    eos: str = "</s>"
    special: list[str] = field(default_factory=list)
    answer: str
    system: bool = True
    earlier: bool = True
    parts: bool = False
    between: bool = False
    joined: str = ""
    call: str | None = None
    call_earlier: bool = True


HEADER = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
IM = ["<|im_start|>", "<|im_end|>"]
QWEN_CALL = '<tool_call>\n{"name": "run", "arguments": {"command": "ls"}}\n</tool_call><|im_end|>'
DEEPSEEK = [f"<｜{name}｜>" for name in (
    "User", "Assistant", "tool▁calls▁begin", "tool▁call▁begin", "tool▁sep", "tool▁call▁end", "tool▁calls▁end",
    "tool▁outputs▁begin", "tool▁output▁begin", "tool▁output▁end", "tool▁outputs▁end",
)]  # fmt: skip
DEEPSEEK_ENDS = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
TEMPLATES = {
    "llama-2": Template(answer=" {} </s>"),
    "llama-3.1": Template(
        bos="<|begin_of_text|>", eos="<|eot_id|>", special=HEADER, answer="{}<|eot_id|>",
        call='{"name": "run", "parameters": {"command": "ls"}}<|eot_id|>',
    ),
    "mistral-v1": Template(answer="{}</s>", system=False),
    "mistral-v7-tekken": Template(
        special=["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                 "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]"],
        answer="{}</s>",
        call='[TOOL_CALLS][{"name": "run", "arguments": {"command": "ls"}, "id": "call00001"}]</s>',
        call_earlier=False,  # the tools stand before the last question
    ),
    "qwen-2.5": Template(eos="<|im_end|>", special=IM, answer="{}<|im_end|>", call=QWEN_CALL),
    "qwen-3": Template(
        eos="<|im_end|>", special=IM, answer="<think>\n\n</think>\n\n{}<|im_end|>", earlier=False,
        call="<think>\n\n</think>\n\n" + QWEN_CALL, call_earlier=False,
    ),
    "nemotron-3": Template(eos="<|im_end|>", special=IM, answer="{}<|im_end|>"),
    "gemma-2": Template(
        bos="<bos>", eos="<eos>", special=["<start_of_turn>", "<end_of_turn>"], answer="{}<end_of_turn>", system=False
    ),
    "gemma-3": Template(
        bos="<bos>", eos="<eos>", special=["<start_of_turn>", "<end_of_turn>"], answer="{}<end_of_turn>", between=True
    ),
    "qwen-2-vl": Template(eos="<|im_end|>", special=IM, answer="{}<|im_end|>"),
    "llava-1.5": Template(answer=" {} ", parts=True, between=True, joined="U"),
    "smolvlm": Template(
        bos="<|im_start|>", eos="<end_of_utterance>", answer=" {}<end_of_utterance>", parts=True
    ),
    "phi-3": Template(
        eos="<|endoftext|>", special=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], answer="{}<|end|>"
    ),
    "phi-4": Template(eos="<|im_end|>", special=[*IM, "<|im_sep|>", "<|endoftext|>"], answer="{}<|im_end|>"),
    "chatml": Template(eos="<|im_end|>", special=IM, answer="{}<|im_end|>"),
    "deepseek-v2": Template(**DEEPSEEK_ENDS, answer=" {}<｜end▁of▁sentence｜>"),
    "deepseek-v3": Template(
        **DEEPSEEK_ENDS, special=DEEPSEEK, answer="{}<｜end▁of▁sentence｜>",
        call="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>run\n```json\n" '{"command": "ls"}'
        "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
    ),
    "zephyr": Template(answer="{}</s>"),
    "vicuna": Template(answer=" {}</s>"),
    "command-r": Template(
        bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>",
        special=["<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"],
        answer="{}<|END_OF_TURN_TOKEN|>",
    ),
    "olmo-2": Template(bos="<|endoftext|>", eos="<|endoftext|>", answer="{}<|endoftext|>"),
    "smollm-3": Template(eos="<|im_end|>", special=IM, answer="{}<|im_end|>"),
    "gpt-oss": Template(
        bos="<|startoftext|>", eos="<|return|>",
        special=["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"],
        answer="<|channel|>final<|message|>{}<|return|>", earlier=False,
        call=' to=functions.run<|channel|>commentary json<|message|>{"command": "ls"}<|call|>', call_earlier=False,
    ),
    "granite-3": Template(
        eos="<|end_of_text|>", special=["<|start_of_role|>", "<|end_of_role|>"], answer="{}<|end_of_text|>"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """A conversation under a template and its twin with markers."""

    tokenizer: PreTrainedTokenizerBase
    plain: list[Example]
    marked: list[Example]

    @property
    def runs(self) -> list[list[str]]:
        """The runs of tokens in the loss, of each example of the plain template."""
        return [answers(self.tokenizer, example) for example in self.plain]


def encode(tokenizer: PreTrainedTokenizerBase, name: str, messages: Any, tools: Any = None) -> Encoded:
    template = TEMPLATES.get(name) or Template(**DEEPSEEK_ENDS, special=DEEPSEEK, answer="")
    tokenizer.add_special_tokens(
        {"bos_token": template.bos, "eos_token": template.eos, "extra_special_tokens": template.special}
    )
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    marked = source.replace("{#gen#}", "{% generation %}").replace("{#end#}", "{% endgeneration %}")
    assert marked.count("{% generation %}") == source.count("{#gen#}") > 0
    found = []
    for tokenizer.chat_template in (marked, source):
        found.append(RecordEncoder(tokenizer).encode({"messages": messages, "tools": tools}))
    return Encoded(tokenizer, found[1], found[0])


def shown(tokenizer: PreTrainedTokenizerBase, name: str, messages: list[dict[str, Any]]) -> str:
    """The text that transformers makes of `messages`, in the form that the template was published for."""
    if TEMPLATES[name].parts:
        messages = [{**it, "content": [{"type": "text", "text": it["content"]}]} for it in messages]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    assert all(it["content"] in text for it in messages if isinstance(it["content"], str))
    return text


def test_every_template_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.jinja")} == {*TEMPLATES, "deepseek-r1"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_single_turn(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    known = encode(tokenizer, name, SINGLE)
    assert known.runs == [[TEMPLATES[name].answer.format(ONE)]]
    assert known.plain == known.marked
    assert tokenizer.decode(known.plain[0].input_ids) == shown(tokenizer, name, SINGLE)


@pytest.mark.parametrize("name", TEMPLATES)
def test_several_turns(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    known, template = encode(tokenizer, name, MULTI), TEMPLATES[name]
    one, two = template.answer.format(ONE), template.answer.format(TWO)
    if template.earlier:
        assert known.runs == [[one + template.joined, two]]
    else:
        assert known.runs == [[one], [two]]
        assert tokenizer.decode(known.plain[0].input_ids) == shown(tokenizer, name, SINGLE)
    assert known.plain == known.marked
    assert tokenizer.decode(known.plain[-1].input_ids) == shown(tokenizer, name, MULTI)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_answer_is_learnt_as_its_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for messages in (
        [FIRST, {"role": "assistant", "content": ""}, *MULTI[2:]],
        [*MULTI[:3], {"role": "assistant", "content": ""}],
    ):
        known, template = encode(tokenizer, name, messages), TEMPLATES[name]
        runs = [run.strip() for example in known.runs for run in example]
        empty = template.answer.format("").strip() + template.joined * (messages[1]["content"] == "")
        full = template.answer.format(messages[1]["content"] or messages[3]["content"]).strip()
        assert empty in runs
        assert full in [run.removesuffix(template.joined).strip() if template.joined else run for run in runs]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name].system])
def test_system_turn(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    known = encode(tokenizer, name, [SYSTEM, *SINGLE])
    assert known.runs == [[TEMPLATES[name].answer.format(ONE)]]
    assert known.plain == known.marked
    assert "Be brief." in tokenizer.decode(known.plain[0].input_ids)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name].system])
def test_system_turn_is_refused_where_there_is_none(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    with pytest.raises(DataError, match="refuses the conversation"):
        encode(tokenizer, name, [SYSTEM, *SINGLE])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name].call])
def test_calls_of_tools(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    known, template = encode(tokenizer, name, TOOL_TALK, TOOLS), TEMPLATES[name]
    expected = [template.call, template.answer.format(ONE), template.answer.format(TWO)]
    if template.call_earlier:
        assert known.runs == [expected]
        assert known.plain == known.marked
    else:
        assert known.runs == [[answer] for answer in expected]
    for example in known.plain:
        assert "Run it." in tokenizer.decode(example.input_ids) or name in ("deepseek-v3", "gpt-oss")


@pytest.mark.parametrize("name", ["chatml", "zephyr", "phi-3", "olmo-2"])
def test_calls_that_a_template_leaves_out_are_refused(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Else the model would learn to answer nothing."""
    with pytest.raises(DataError, match=r"leaves out calls of tools[\s\S]*message 2"):
        encode(tokenizer, name, TOOL_TALK, TOOLS)


def test_special_tokens_that_strip_the_spaces_behind_them(tokenizer: PreTrainedTokenizerBase) -> None:
    """As Phi-3's tokenizer has them: the EOS behind the last turn follows the end of the answer, and the header holds
    the spaces that an answer begins with."""
    encode(tokenizer, "phi-3", SINGLE)
    stripping = [AddedToken(it, rstrip=True, special=True) for it in TEMPLATES["phi-3"].special]
    tokenizer.add_special_tokens({"extra_special_tokens": stripping})
    messages = [FIRST, {"role": "assistant", "content": f"\n  {ONE}"}, SECOND, MULTI[-1]]
    (example,) = RecordEncoder(tokenizer).encode({"messages": messages})
    assert answers(tokenizer, example) == [f"{ONE}<|end|>", f"{TWO}<|end|>"]
    assert list(example.input_ids)[-2:] == tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])


def test_newlines_inside_of_markers_are_not_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    """As LFM2.5's: what follows the end of a turn is never generated."""
    encode(tokenizer, "chatml", MULTI)
    source = (
        (FOLDER / "chatml.jinja")
        .read_text(encoding="utf-8")
        .replace("'<|im_end|>' }}{#end#}", "'<|im_end|>\n' }}{#end#}")
    )
    assert "\n' }}{#end#}" in source
    tokenizer.chat_template = source.replace("{#gen#}", "{% generation %}").replace("{#end#}", "{% endgeneration %}")
    encoder = RecordEncoder(tokenizer)
    (example,) = encoder.encode({"messages": MULTI})
    assert answers(tokenizer, example) == [f"{ONE}<|im_end|>", f"{TWO}<|im_end|>"]
    assert encoder.ends(example)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("test", ["is none", "is not string", "== ''"])
def test_calls_with_nothing_said_beside_them(
    tokenizer: PreTrainedTokenizerBase, test: str, content: dict[str, Any]
) -> None:
    """DeepSeek V3's first template knows a call by its content, which is null; others join an empty one."""
    encode(tokenizer, "deepseek-v3", SINGLE)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<｜Assistant｜>' }}{% if m['content'] TEST %}"
        "{% for call in m.tool_calls %}{{ call.function.name + call.function.arguments }}{% endfor %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% else %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ).replace("TEST", test)
    call = {"role": "assistant", "tool_calls": [CALL], **content}
    (example,) = RecordEncoder(tokenizer).encode({"messages": [FIRST, call, *TOOL_TALK[2:]]})
    ends = [f"{text}<｜end▁of▁sentence｜>" for text in ('run{"command": "ls"}', ONE, TWO)]
    assert answers(tokenizer, example) == ends


LEADING = ["llama-3.1", "qwen-2.5", "qwen-3", "chatml", "granite-3", "smollm-3", "phi-3", "gpt-oss"]


@pytest.mark.parametrize("name", LEADING)
def test_answer_that_nobody_asked_for(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """A greeting, as personas begin: templates look for a first message, or show a system turn before it."""
    greeting = {"role": "assistant", "content": "Hello."}
    known = encode(tokenizer, name, [greeting, *SINGLE])
    said = [run for it in known.runs for run in it]
    assert len(said) == 2
    end = TEMPLATES[name].answer.split("{}")[1]
    assert said[0].endswith(f"Hello.{end}")
    assert said[0].removesuffix(f"Hello.{end}") in ("", "<|channel|>final<|message|>")
    assert said[1] == TEMPLATES[name].answer.format(ONE)


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each content in two parts, where there is one to part."""
    return [
        {**it, "content": [{"type": "text", "text": text} for text in (it["content"][:3], it["content"][3:])]}
        for it in messages
    ]


@pytest.mark.parametrize("name", [*TEMPLATES, "doclm"])
def test_text_parts_are_learnt_as_the_text(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if name in TEMPLATES:
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    encoder = RecordEncoder(tokenizer)
    if name == "doclm" or not TEMPLATES[name].between:
        assert encoder.encode({"messages": as_parts(MULTI)}) == encoder.encode({"messages": MULTI})
    goes_through = name in ("gemma-3", "qwen-2-vl", "llava-1.5", "smolvlm")
    for part in (
        ({"type": "image"}, "a") if goes_through else ({"type": "image"}, {"type": "thinking", "thinking": "a"}, "a")
    ):
        with pytest.raises(DataError, match="message 3 has a part that is no text"):
            encoder.encode({"messages": [*SINGLE, {"role": "user", "content": [part]}, MULTI[-1]]})


def test_parts_stay_what_they_are_for_a_template_that_goes_through_them(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    spaced = [{"role": "user", "content": [{"type": "text", "text": f" {it} "} for it in "ab"]}, MULTI[-1]]
    (example,) = RecordEncoder(tokenizer).encode({"messages": spaced})
    assert tokenizer.decode(example.input_ids).startswith("<user>ab<|eos|>")
    for part in ({"type": "image"}, {"type": "text", "text": None}, "a"):
        with pytest.raises(DataError, match="message 1 has a part that is no text"):
            RecordEncoder(tokenizer).encode({"messages": [{"role": "user", "content": [part]}]})


def test_counts_are_of_examples_where_a_record_gives_several(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = (FOLDER / "qwen-3.jinja").read_text()
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": MULTI * 2}) + "\n" + json.dumps({"text": "ls lists files"}) + "\n")
    lengths = sorted(map(len, read_examples(path, tokenizer, seq_len=1024)[0]))
    assert len(lengths) == 5
    _, cut = read_examples(path, tokenizer, seq_len=lengths[0])
    truncated, left_out = cut.notes()
    assert "4 of 5 examples truncated" in truncated
    assert left_out.endswith("4 examples left out, no token of theirs is in the loss: line 1")
    _, dropped = read_examples(path, tokenizer, seq_len=lengths[0], overlong="drop")
    assert "4 of 5 examples dropped" in dropped.notes()[0]


def test_answers_without_an_end_are_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As GLM-4's, where the next turn's header ends an answer, and no header follows the last one."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": MULTI}) + "\n" + json.dumps({"text": "ls"}) + "\n")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    _, report = read_examples(path, tokenizer, seq_len=64)
    assert report.unended == 1
    assert "1 of 2 examples end without a special token" in report.notes()[0]
    _, cut = read_examples(path, tokenizer, seq_len=16)
    assert (cut.truncated, cut.unended) == (1, 0)  # cut examples have no end anyway


def test_empty_answers_are_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("instruction,output\nSay yes,yes\nSay nothing,\n,\n")  # the last as spreadsheets leave them
    _, report = read_examples(path, tokenizer, seq_len=64)
    assert (report.examples, report.silent) == (3, 2)
    assert "2 of 3 examples have no text in the loss" in report.notes()[0]


@pytest.mark.parametrize("name", ["gemma-3", "llava-1.5", "smolvlm", "qwen-2-vl"])
def test_multimodal_templates_show_strings_when_asked(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """What an answer is asked with: jinja goes through the letters of a string, of which none is a part, and says
    nothing."""
    encode(tokenizer, name, SINGLE)
    for messages in ([FIRST], [SYSTEM, FIRST], [SYSTEM, *MULTI[:3]]):
        ids = _rendered(tokenizer, messages)[0].tolist()
        text = tokenizer.decode(ids)
        assert all(it["content"] in text for it in messages)
        known = RecordEncoder(tokenizer).encode({"messages": [*messages, {"role": "assistant", "content": ONE}]})
        assert list(known[-1].input_ids)[: len(ids)] == ids


def test_a_system_message_of_parts_of_which_a_template_shows_the_first(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": text} for text in ("Be brief.", " And kind.")]
    known = encode(tokenizer, "gemma-3", [{"role": "system", "content": parts}, *SINGLE])
    assert "Be brief. And kind." in tokenizer.decode(known.plain[0].input_ids)


def test_a_processors_chat_template_in_a_file_of_its_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    source = (FOLDER / "llava-1.5.jinja").read_text(encoding="utf-8")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    shutil.copy(ASSETS / "doclm-7m" / "config.json", tmp_path)
    loaded = load_tokenizer(Checkpoint.open(tmp_path, weights=False))
    assert loaded is not None
    assert loaded.chat_template == source
