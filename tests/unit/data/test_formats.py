"""What records say: the formats that are in use, found by their keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import DataError
from lowmem_ft.core.sources import DataRole
from lowmem_ft.data.examples import IGNORE_INDEX, RecordEncoder, read_examples
from lowmem_ft.data.formats import Completion, Conversation, RecordReader

Write = Callable[..., Path]
ASKED, ANSWERED = {"role": "user", "content": "What is ls?"}, {"role": "assistant", "content": "List files."}
BAD = {"role": "assistant", "content": "No idea."}
TURNS = "\n\nHuman: What is ls?\n\nAssistant: List.\n\nHuman: Sure?\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "run"}}]
CALL = {"name": "run", "arguments": {"command": "ls"}}

SAID: dict[str, tuple[dict[str, Any], str, Conversation | Completion]] = {
    "messages": ({"messages": [ASKED, ANSWERED]}, "messages", Conversation([ASKED, ANSWERED])),
    "messages in conversations": ({"conversations": [ASKED, ANSWERED]}, "messages", Conversation([ASKED, ANSWERED])),
    "tools as text": (
        {"messages": [ASKED, ANSWERED], "tools": '[{"type": "function", "function": {"name": "run"}}]'},
        "messages",
        Conversation([ASKED, ANSWERED], TOOLS),
    ),
    "messages as text": (
        {"messages": '[{"role": "user", "content": "What is ls?"}]'},
        "messages",
        Conversation([ASKED]),
    ),
    "no tools": ({"messages": [ASKED, ANSWERED], "tools": ""}, "messages", Conversation([ASKED, ANSWERED])),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "What is ls?"}, {"from": "gpt", "value": "List files."}]},
        "sharegpt",
        Conversation([ASKED, ANSWERED]),
    ),
    "sharegpt with tools": (
        {
            "system": "Be brief.",
            "tools": TOOLS,
            "conversations": [
                {"from": "human", "value": "What is ls?"},
                {"from": "function_call", "value": '{"name": "run", "arguments": {"command": "ls"}}'},
                {"from": "observation", "value": "a b"},
                {"from": "gpt", "value": "List files."},
            ],
        },
        "sharegpt",
        Conversation(
            [
                SYSTEM,
                ASKED,
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "a b"},
                ANSWERED,
            ],
            TOOLS,
        ),
    ),
    "alpaca": (
        {"instruction": "What is", "input": "ls?", "output": "List files."},
        "alpaca",
        Conversation([{"role": "user", "content": "What is\n\nls?"}, ANSWERED]),
    ),
    "alpaca without input": (
        {"instruction": "What is ls?", "input": "", "output": "List files.", "text": "all of it"},
        "alpaca",
        Conversation([ASKED, ANSWERED]),
    ),
    "alpaca with system": (
        {"instruction": "What is ls?", "output": "List files.", "system": "Be brief."},
        "alpaca",
        Conversation([SYSTEM, ASKED, ANSWERED]),
    ),
    "strings": ({"prompt": "a", "completion": "b"}, "prompt_completion", Completion("a", "b")),
    "a class is no verdict": (
        {"prompt": "a", "completion": "b", "label": 3},
        "prompt_completion",
        Completion("a", "b"),
    ),
    "prompt and completion of messages": (
        {"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]},
        "prompt_completion",
        Conversation([SYSTEM, ASKED, ANSWERED], first=2),
    ),
    "string and messages": (
        {"prompt": "What is ls?", "completion": [ANSWERED]},
        "prompt_completion",
        Conversation([ASKED, ANSWERED], first=1),
    ),
    "text": ({"text": "a"}, "text", Completion(None, "a")),
}


@pytest.mark.parametrize(("record", "kind", "said"), SAID.values(), ids=SAID.keys())
def test_found_by_keys(record: dict[str, Any], kind: str, said: Conversation | Completion) -> None:
    content = RecordReader().read(record)
    assert (content.kind, content.good, content.bad) == (kind, said, None)


PAIRS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "strings": (
        {"prompt": "a", "chosen": "b", "rejected": "c"}, Completion("a", "b"), Completion("a", "c")
    ),
    "common beginning": (
        {"chosen": "Q: ls? A: The files", "rejected": "Q: ls? A: The folders"},
        Completion("Q: ls? A: The", " files"), Completion("Q: ls? A: The", " folders"),
    ),
    "common beginning of one that ends there": (
        {"chosen": "Q: ls? A: file", "rejected": "Q: ls? A: files"},
        Completion("Q: ls? A:", " file"), Completion("Q: ls? A:", " files"),
    ),
    "common beginning of one that goes on": (
        {"chosen": "Q: ls? A: files", "rejected": "Q: ls? A: files and folders"},
        Completion("Q: ls? A: files", ""), Completion("Q: ls? A: files", " and folders"),
    ),
    "common beginning without spaces": (
        {"chosen": "问题：" + 20 * "目录" + "好", "rejected": "问题：" + 20 * "目录" + "坏"},
        Completion("问题：" + 20 * "目录", "好"), Completion("问题：" + 20 * "目录", "坏"),
    ),
    "turns in a text": (
        {"chosen": TURNS + " I think so.", "rejected": TURNS + " I think not."},
        Completion(TURNS, " I think so."), Completion(TURNS, " I think not."),
    ),
    "answers behind a conversation": (
        {
            "conversations": [{"from": "human", "value": "What is ls?"}],
            "chosen": {"from": "gpt", "value": "List files."}, "rejected": {"from": "gpt", "value": "No idea."},
        },
        Conversation([ASKED, ANSWERED], first=1), Conversation([ASKED, BAD], first=1),
    ),
    "answers behind messages": (
        {"messages": [SYSTEM, ASKED], "chosen": ANSWERED, "rejected": BAD},
        Conversation([SYSTEM, ASKED, ANSWERED], first=2), Conversation([SYSTEM, ASKED, BAD], first=2),
    ),
    "common beginning before a space": (
        {"chosen": "Q: ls? A: yes", "rejected": "Q: ls? A: no"},
        Completion("Q: ls? A:", " yes"), Completion("Q: ls? A:", " no"),
    ),
    "answers of messages": (
        {"prompt": [SYSTEM, ASKED], "chosen": [ANSWERED], "rejected": [BAD]},
        Conversation([SYSTEM, ASKED, ANSWERED], first=2), Conversation([SYSTEM, ASKED, BAD], first=2),
    ),
    "whole conversations": (
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, BAD]},
        Conversation([ASKED, ANSWERED], first=1), Conversation([ASKED, BAD], first=1),
    ),
    "whole conversations beside their prompt": (
        {"prompt": "What is ls?", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, BAD], "messages": [ASKED, ANSWERED]},
        Conversation([ASKED, ANSWERED], first=1), Conversation([ASKED, BAD], first=1),
    ),
    "a system turn beside them": (
        {"system": "Be brief.", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, BAD]},
        Conversation([SYSTEM, ASKED, ANSWERED], first=2), Conversation([SYSTEM, ASKED, BAD], first=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "good", "bad"), PAIRS.values(), ids=PAIRS.keys())
def test_preferences(record: dict[str, Any], good: Any, bad: Any) -> None:
    content = RecordReader().read(record)
    assert (content.kind, content.good, content.bad) == ("preference", good, bad)
    chosen = RecordReader(format="chosen").read(record)
    assert (chosen.good, chosen.bad) == (good, None)


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), ("True", True), ("false", False)])
def test_verdicts(label: Any, good: bool) -> None:
    content = RecordReader().read({"prompt": "a", "completion": "b", "label": label})
    assert content.kind == "kto"
    assert (content.good, content.bad)[not good] == Completion("a", "b")
    assert (content.good, content.bad)[good] is None
    assert RecordReader(format="kto").read({"prompt": "a", "completion": "b", "label": int(good)}) == content


@pytest.mark.parametrize("write_list", [json.dumps, str], ids=["json", "pandas"])
@pytest.mark.parametrize("columns", [{}, {"messages": "said", "tools": "known"}], ids=["keys", "columns"])
def test_conversations_in_cells(write_list: Any, columns: dict[Any, str]) -> None:
    """A CSV file that pandas wrote has them as Python writes lists; a single such column was refused."""
    turns = [{"role": "user", "content": 'It\'s "ls"?'}, {"role": "assistant", "content": "Yes.\n", "weight": None}]
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    cells = {"messages": f" {write_list(turns)}", "tools": write_list(tools)}
    record = {columns.get(role, role): cell for role, cell in cells.items()}
    assert RecordReader(columns=columns).read(record).good == Conversation(turns, tools)
    for unread in ("[{'role': user}]", "[" * 9999, "", "Hello."):
        assert RecordReader().read({"messages": unread}).good == Conversation(unread)
    assert RecordReader().read({"messages": turns, "tools": "null"}).good == Conversation(turns)


@pytest.mark.parametrize("write_list", [list, json.dumps], ids=["json", "csv"])
def test_turns_before_an_instruction(write_list: Any) -> None:
    """As LLaMA-Factory writes them; they were left out without a word."""
    record = {
        "system": "Be brief.",
        "instruction": "And cat?",
        "output": "It.",
        "history": write_list([["ls?", "Files."]]),
    }
    said = RecordReader().read(record).good
    texts = [
        ("system", "Be brief."),
        ("user", "ls?"),
        ("assistant", "Files."),
        ("user", "And cat?"),
        ("assistant", "It."),
    ]
    assert said == Conversation([{"role": role, "content": text} for role, text in texts])
    with pytest.raises(DataError, match="'history' wants a chat template"):
        RecordReader(chat=False).read(record)
    for wrong in (["ls?"], [["ls?"]], [["ls?", 3]], [{"ls?": "Files."}]):
        with pytest.raises(DataError, match="'history' is no list of earlier turns"):
            RecordReader().read({**record, "history": wrong})
    for none in ([], "", None, "[]", "Cooking.", 3):
        assert len(RecordReader().read({**record, "history": none}).good.messages) == 3  # type: ignore[union-attr]
        assert isinstance(RecordReader(chat=False).read({**record, "history": none}).good, Completion)


def test_a_system_turn_beside_texts() -> None:
    """It begins the text, as that of an instruction told as text; it was left out without a word."""
    asked = {"system": "Be brief.", "prompt": "What is ls?"}
    whole = "Be brief.\n\nWhat is ls?"
    assert RecordReader().read({**asked, "completion": " It."}).good == Completion(whole, " It.")
    assert RecordReader().read({**asked, "completion": " It.", "label": False}).bad == Completion(whole, " It.")
    pair = RecordReader().read({**asked, "chosen": " It.", "rejected": " No."})
    assert (pair.good, pair.bad) == (Completion(whole, " It."), Completion(whole, " No."))
    columns: dict[DataRole, str] = {"system": "persona"}
    mapped = RecordReader(columns=columns).read({"persona": "Be brief.", "prompt": "What is ls?", "completion": " It."})
    assert mapped.good == Completion(whole, " It.")
    with pytest.raises(DataError, match="'system' is not a string"):
        RecordReader().read({**asked, "system": 3, "completion": " It."})


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_verdicts_on_the_last_answer_of_a_conversation(key: str) -> None:
    """As LLaMA-Factory writes them: bad answers must not be learnt without a word."""
    turns = [SYSTEM, ASKED, ANSWERED, ASKED, BAD]
    shares = [{"from": it["role"], "value": it["content"]} for it in turns]
    for listed in (turns, json.dumps(turns)) if key == "messages" else (shares,):
        content = RecordReader().read({key: listed, "label": False})
        assert (content.kind, content.good) == ("kto", None)
        assert content.bad == Conversation(turns, first=4)
        assert RecordReader().read({key: listed, "label": 0}).kind != "kto"  # it may be the class of anything
        assert RecordReader().read({key: listed, "label": 1}, judged=True).good == content.bad
        assert RecordReader(format="kto").read({key: listed, "label": 1}).good == content.bad
        assert RecordReader(format="messages").read({key: listed, "label": False}).kind in ("messages", "sharegpt")
    with pytest.raises(DataError, match="the last message of a conversation with a 'label' is no answer"):
        RecordReader().read({key: [SYSTEM, ASKED], "label": True})


@pytest.mark.parametrize("label", [1, "0", 1.0, False])
def test_numbers_are_verdicts_where_they_are_known_to_be(label: Any) -> None:
    record = {"prompt": "a", "completion": "b", "label": label}
    content = RecordReader().read(record, judged=True)
    assert (content.kind, content.good is None) == ("kto", label in ("0", False))
    if not isinstance(label, bool):
        assert RecordReader().read(record).kind == "prompt_completion"


def test_nulls_are_absent_keys() -> None:
    """As to_json of datasets and pandas writes what a record has not."""
    record = {"text": "a", "chosen": None, "rejected": None, "messages": None, "prompt": None}
    assert RecordReader().read(record).good == Completion(None, "a")
    assert RecordReader(columns={"text": "body"}).read({"body": "a", "text": None}).good == Completion(None, "a")
    with pytest.raises(DataError, match=r"text \(null\), id"):
        RecordReader().read({"text": None, "id": 3})
    with pytest.raises(DataError, match=r"lacks the column that data\.columns names for 'text'"):
        RecordReader(columns={"text": "body"}).read({"body": None})


def test_columns_that_a_record_may_lack() -> None:
    columns: dict[DataRole, str] = {"instruction": "q", "output": "a", "input": "ctx", "system": "meta.rules"}
    reader, whole = RecordReader(columns=columns), {"q": "What is", "a": "List files.", "ctx": "ls?"}
    reader.check_columns()  # nothing was read
    asked = RecordReader().read({"instruction": "What is", "output": "List files."}).good
    for lacking in ({"ctx": None, "meta": None}, {"meta": {"rules": None}, "ctx": None, "input": "is another column"}):
        assert reader.read({**whole, **lacking}).good == asked
    with pytest.raises(DataError, match=r"no record has the column[\s\S]*for 'input'[\s\S]*ctx[\s\S]*q, a"):
        reader.check_columns()
    assert reader.read(whole).good == Conversation([{"role": "user", "content": "What is\n\nls?"}, ANSWERED])
    with pytest.raises(DataError, match=r"for 'system'[\s\S]*meta\.rules"):
        reader.check_columns()
    assert reader.read({**whole, "meta": {"rules": "Be brief."}}).good != asked
    reader.check_columns()
    with pytest.raises(DataError, match=r"lacks the column that data\.columns names for 'output'"):
        reader.read({**whole, "a": None})
    pairs = RecordReader(columns={"prompt": "q", "chosen": "better", "rejected": "worse"})
    content = pairs.read({"better": "Q: ls? A: yes", "worse": "Q: ls? A: no"})
    assert content.good == Completion("Q: ls? A:", " yes")
    with pytest.raises(DataError, match="for 'prompt'"):
        RecordReader(columns={"prompt": "q", "completion": "a"}).read({"a": "b"})


def test_a_column_that_no_record_has_is_an_error(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    columns: dict[DataRole, str] = {"instruction": "q", "output": "a", "input": "ctx"}
    path = jsonl({"q": "b", "a": "c"}, {"q": "b", "a": "c", "ctx": "d"})
    assert len(read_examples(path, tokenizer, seq_len=64, columns=columns)[0]) == 2
    with pytest.raises(DataError, match="no record has the column"):
        read_examples(jsonl({"q": "b", "a": "c"}), tokenizer, seq_len=64, columns=columns, invalid="skip")


def test_columns() -> None:
    record = {"question": "What is ls?", "answer": {"text": "List files."}, "text": "all of it", "a.b": "dotted"}
    reader = RecordReader(columns={"instruction": "question", "output": "answer.text"})
    assert reader.read(record).good == Conversation([ASKED, ANSWERED])
    assert RecordReader(columns={"text": "a.b"}).read(record).good == Completion(None, "dotted")
    # what is mapped joins what is called by its role already
    assert RecordReader(columns={"completion": "a.b"}).read({**record, "prompt": "p"}).good == Completion("p", "dotted")
    # and is joined by what says more of it: without it the answer would be another, or the bad one
    pair = {"prompt": "a", "better": " b", "worse": " bc", "text": "all of it"}
    content = RecordReader(columns={"chosen": "better", "rejected": "worse"}).read(pair)
    assert (content.good, content.bad) == (Completion("a", " b"), Completion("a", " bc"))
    judged = {"question": "a", "answer": "b", "label": False}
    columns: dict[DataRole, str] = {"prompt": "question", "completion": "answer"}
    assert RecordReader(columns=columns).read(judged).kind == "kto"
    assert RecordReader(columns={**columns, "label": "good"}).read({**judged, "good": 0}).kind == "kto"
    asked = {"q": "What is", "input": "ls?", "output": "List files."}
    said = RecordReader(columns={"instruction": "q", "output": "output"}).read(asked).good
    assert said == RecordReader().read({**asked, "instruction": "What is"}).good
    with pytest.raises(DataError, match=r"lacks the column[\s\S]*did you mean 'question'"):
        RecordReader(columns={"instruction": "questoin", "output": "answer.text"}).read(record)
    with pytest.raises(DataError, match="lacks the column"):
        RecordReader(columns={"text": "answer.none"}).read(record)


WRONG = {
    "speaker": ({"conversations": [{"from": "moon", "value": "a"}]}, "message 1 is from nobody known"),
    "value": ({"conversations": [{"from": "human", "value": 3}]}, "message 1 has no 'value' of text"),
    "call": ({"conversations": [{"from": "function_call", "value": "{"}]}, "message 1, a call of a function"),
    "instruction": ({"instruction": 3, "output": "a"}, "'instruction' is not a string"),
    "same": ({"chosen": "a", "rejected": "a"}, "are the same"),
    "mixed": ({"chosen": "a", "rejected": [ASKED]}, "of different kinds"),
    "nothing shared": ({"chosen": [ASKED, ANSWERED], "rejected": [SYSTEM, BAD]}, "begin with different messages"),
    "type": ({"chosen": 1, "rejected": 2}, "'chosen' is not a string"),
}


@pytest.mark.parametrize(("record", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_records(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        RecordReader().read(record)
    with pytest.raises(DataError, match="'label' is no verdict"):
        RecordReader(format="kto").read({"prompt": "a", "completion": "b", "label": "maybe"})


def test_records_beneath_a_key() -> None:
    with pytest.raises(DataError) as error:
        RecordReader().read({"version": 1, "data": [{"prompt": "a", "completion": "b"}]})
    assert error.value.fix == "'data' holds records: write them as an array of their own, or one a line"


def loss_text(tokenizer: PreTrainedTokenizerBase, labels: Any) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


@pytest.mark.parametrize("marked", [True, False])
def test_answers_in_the_prompt_are_not_in_the_loss(tokenizer: PreTrainedTokenizerBase, marked: bool) -> None:
    if not marked:
        for word in ("{% generation %}", "{% endgeneration %}"):
            tokenizer.chat_template = tokenizer.chat_template.replace(word, "")
    record = {"prompt": [ASKED, BAD, ASKED], "completion": [ANSWERED, ASKED, ANSWERED]}
    (example,) = RecordEncoder(tokenizer).encode(record)
    assert loss_text(tokenizer, example.labels) == "List files.<|eos|>" * 2


def test_markers_that_are_not_one_for_each_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{% generation %}{{ eos_token }}{% endgeneration %}"
    )
    with pytest.raises(DataError, match="which answers are not to be learnt"):
        RecordEncoder(tokenizer).encode({"prompt": [ASKED, BAD, ASKED], "completion": [ANSWERED]})


def test_alpaca_without_a_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    (example,) = RecordEncoder(tokenizer).encode({"instruction": "What?", "input": "ls", "output": "Files."})
    text = "### Instruction:\nWhat?\n\n### Input:\nls\n\n### Response:\nFiles.<|eos|>"
    assert tokenizer.decode(example.input_ids) == text
    assert loss_text(tokenizer, example.labels) == "Files.<|eos|>"


def test_preferences_are_refused_by_supervised_training(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    pair, verdict = (
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": "a", "completion": "b", "label": False},
    )
    for record, fix in ((pair, "data.format: chosen"), (verdict, "data.format: prompt_completion")):
        for invalid in ("error", "skip"):
            with pytest.raises(DataError, match=r"data\.jsonl:2: the record is a preference") as error:
                read_examples(jsonl({"text": "ls"}, record), tokenizer, seq_len=64, invalid=invalid)  # type: ignore[arg-type]
            assert fix in str(error.value)
    (example,), report = read_examples(jsonl(pair), tokenizer, seq_len=64, format="chosen")
    assert loss_text(tokenizer, example.labels) == " b<|eos|>"
    assert report.formats == {"preference": 1}


def test_skipping_counts_and_says_why(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    path = jsonl({"text": "ls"}, '{"text": ', {"txt": "a"}, "[1]", {"text": 3}, {"text": "cat"})
    examples, report = read_examples(path, tokenizer, seq_len=64, invalid="skip")
    assert len(examples) == 2
    assert (report.records, report.skipped, len(report.reasons)) == (6, 4, 3)
    (note,) = report.notes()
    assert "4 of 6 records skipped" in note
    assert f"{path}:2: not valid JSON" in note
    with pytest.raises(DataError, match=r"no record can be used[\s\S]*:1: not a JSON object"):
        read_examples(jsonl("[1]"), tokenizer, seq_len=64, invalid="skip")
    with pytest.raises(DataError, match=r"data\.invalid: skip"):
        read_examples(jsonl({"text": 3}), tokenizer, seq_len=64)
    with pytest.raises(DataError, match="too long"):
        read_examples(jsonl({"text": "ls " * 9}), tokenizer, seq_len=8, invalid="skip", overlong="error")


@pytest.mark.parametrize("arguments", [{"command": "ls"}, '{"command": "ls"}'])
def test_arguments_of_calls(tokenizer: PreTrainedTokenizerBase, arguments: Any) -> None:
    """Objects, or for a template that joins them to text JSON, whichever way the record has them."""
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "run", "arguments": arguments}}],
    }
    messages = [ASKED, call]
    for template in (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for c in m.tool_calls %}{{ '' + c.function.arguments }}{% endfor %}{% endfor %}",
    ):
        tokenizer.chat_template = template
        (example,) = RecordEncoder(tokenizer, assistant_only=False).encode({"messages": messages})
        assert tokenizer.decode(example.input_ids) == '{"command": "ls"}'
