import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import DataError
from lowmem_ft.data import examples as examples_module
from lowmem_ft.data.examples import IGNORE_INDEX, Example, RecordEncoder, bytes_in_loss, read_examples

from .conftest import ASSETS

Write = Callable[..., Path]
CHAT = {"messages": [{"role": "user", "content": "What is ls?"}, {"role": "assistant", "content": "List files."}]}
PAIR = {"prompt": "What is ls?", "completion": " List files."}
TEXT = {"text": "ls lists files."}


def loss_text(tokenizer: PreTrainedTokenizerBase, labels: Any) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def test_shipped_data(tokenizer: PreTrainedTokenizerBase) -> None:
    seen: list[tuple[int, int]] = []
    path = ASSETS / "whatis-eval.jsonl"
    examples, report = read_examples(path, tokenizer, seq_len=512, progress=lambda *at: seen.append(at))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert (report.records, report.examples, report.truncated, report.dropped, report.masked) == (300, 300, 0, 0, 0)
    assert report.notes() == []
    for record, example in zip(records, examples, strict=True):
        assert loss_text(tokenizer, example.labels) == record["messages"][-1]["content"] + "<|eos|>"
        assert list(example.input_ids) == tokenizer.apply_chat_template(record["messages"])["input_ids"]
    assert report.tokens == sum(len(example) for example in examples)
    assert report.loss_tokens == sum(example.loss_tokens for example in examples)
    assert len(seen) == 300
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_formats_in_one_file(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    (chat, pair, text), _ = read_examples(jsonl(CHAT, "", PAIR, TEXT), tokenizer, seq_len=64)
    assert loss_text(tokenizer, chat.labels) == "List files.<|eos|>"
    assert loss_text(tokenizer, pair.labels) == " List files.<|eos|>"
    assert list(pair.input_ids) == [*tokenizer("What is ls? List files.")["input_ids"], tokenizer.eos_token_id]
    assert list(text.labels) == [*tokenizer(TEXT["text"])["input_ids"], tokenizer.eos_token_id]


def test_everything_in_the_loss(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    examples, _ = read_examples(jsonl(CHAT, PAIR, TEXT), tokenizer, seq_len=64, assistant_only=False)
    assert all(example.input_ids == example.labels for example in examples)


def test_eos_is_appended_once(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    path = jsonl(TEXT, {"text": TEXT["text"] + "<|eos|>"}, PAIR, {**PAIR, "completion": " List files.<|eos|>"})
    (text, text_with_eos, pair, pair_with_eos), _ = read_examples(path, tokenizer, seq_len=64)
    assert text == text_with_eos
    assert pair == pair_with_eos


def test_pad_that_is_eos_stays_in_the_loss(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    (chat,), _ = read_examples(jsonl(CHAT), tokenizer, seq_len=64)
    assert chat.labels[-1] == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_token_across_the_border_of_prompt_and_completion(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    """Tokens are those of the whole text; one that holds a character of the completion is in the loss."""
    whole = tokenizer("directory", return_offsets_mapping=True)
    assert whole["offset_mapping"][0][1] > 1, "this test wants a first token of several characters"
    (example,), _ = read_examples(jsonl({"prompt": "d", "completion": "irectory"}), tokenizer, seq_len=64)
    assert list(example.labels) == [*whole["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize(("overlong", "lengths"), [("truncate", [9, 9]), ("drop", [9])])
def test_overlong(tokenizer: PreTrainedTokenizerBase, jsonl: Write, overlong: Any, lengths: list[int]) -> None:
    short = tokenizer.decode(tokenizer("ls lists files in a directory, and so on")["input_ids"][:8])
    assert len(tokenizer(short)["input_ids"]) == 8
    long = short + " and much more"
    examples, report = read_examples(jsonl({"text": long}, {"text": short}), tokenizer, seq_len=9, overlong=overlong)
    assert [len(example) for example in examples] == lengths
    assert (report.truncated, report.dropped) == ((1, 0) if overlong == "truncate" else (0, 1))
    (note,) = report.notes()
    assert "1 of 2 examples" in note
    with pytest.raises(DataError, match=r"data\.jsonl:1: the example is too long"):
        read_examples(jsonl({"text": long}), tokenizer, seq_len=9, overlong="error")


def test_examples_without_loss_are_left_out_and_said(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    question_only = {"messages": CHAT["messages"][:1]}
    cut = {"prompt": "What is ls? " * 20, "completion": "List files."}
    examples, report = read_examples(jsonl(question_only, PAIR, cut), tokenizer, seq_len=32)
    assert len(examples) == report.examples == 1
    assert report.masked_lines == (1, 3)
    assert report.truncated == 1
    assert "2 examples left out, no token of theirs is in the loss: line 1, 3" in report.notes()[-1]
    with pytest.raises(DataError, match="no token of any example is in the loss") as error:
        read_examples(jsonl(question_only, cut), tokenizer, seq_len=32)
    assert "line 1, 2" in str(error.value)


def test_first_token_is_no_loss_token(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    """Nothing predicts it, so a text of one token has nothing to learn."""
    _, report = read_examples(jsonl({"text": ""}, TEXT), tokenizer, seq_len=32)
    assert report.masked_lines == (1,)


def test_nothing_left_after_dropping(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    with pytest.raises(DataError, match="every example is longer"):
        read_examples(jsonl(TEXT), tokenizer, seq_len=2, overlong="drop")


BAD = {
    "json": ('{"text": "a"', "not valid JSON"),
    "depth": ('{"text": ' + "[" * 100_000, "nested too deeply"),
    "array": ("[1]", "not a JSON object"),
    "surrogate": ('{"text": "a\\ud83d"}', "half of a surrogate pair"),
    "keys": ({"txt": "a"}, "lacks the keys"),
    "half": ({"prompt": "a"}, "lacks the keys"),
    "text type": ({"text": 3}, "'text' is not a string"),
    "completion type": ({"prompt": "a", "completion": ["b"]}, "'completion' is not a string"),
    "messages type": ({"messages": "hello"}, "'messages' is not a list"),
    "no messages": ({"messages": []}, "'messages' is not a list"),
    "message type": ({"messages": ["hello"]}, "message 1 is not an object"),
    "role": ({"messages": [{"from": "user", "content": "a"}]}, "message 1 has no 'role'"),
    "content": ({"messages": [*CHAT["messages"], {"role": "user", "content": 3}]}, "message 3 has no 'content'"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "message 1 has no 'content'"),
    "unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "the chat template refuses"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD.keys())
def test_bad_records_are_named_by_line(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write, record: Any, message: str
) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{message}"):
        read_examples(jsonl(TEXT, "", record), tokenizer, seq_len=32)


def test_half_of_a_character_in_an_array_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"text": "sound"}, {"text": "a\\ud83d b"}]')
    with pytest.raises(DataError, match=r"data\.json: row 2: .*half of a surrogate pair"):
        read_examples(path, tokenizer, seq_len=32)
    path.write_text('[{"text": "sound"}, {"te\\ude00xt": "a"}]')
    with pytest.raises(DataError, match=r"data\.json: row 2: .*lacks the keys"):
        read_examples(path, tokenizer, seq_len=32)


def test_bad_files(tokenizer: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        read_examples(path, tokenizer, seq_len=32)

    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)
    with pytest.raises(DataError, match="has no records"):
        read(jsonl(""))
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8"):
        read(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode())
    read(path)


def test_wrong_key_names_the_nearest(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    with pytest.raises(DataError, match="did you mean 'messages' by 'message'"):
        read_examples(jsonl({"message": []}), tokenizer, seq_len=32)
    with pytest.raises(DataError, match="'messages'") as error:
        read_examples(jsonl(TEXT), tokenizer, seq_len=32, format="messages")
    assert "prompt" not in str(error.value)


def test_tokenizers_that_cannot(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    class Slow:
        """The embedded tokenizer as a slow one shows itself: without offsets."""

        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *args: Any, return_offsets_mapping: bool, **kwargs: Any) -> Any:
            assert not return_offsets_mapping
            return tokenizer(*args, **kwargs)

    slow: Any = Slow()
    with pytest.raises(DataError, match="does not say which characters"):
        read_examples(jsonl(CHAT), slow, seq_len=32)
    for record in (CHAT, TEXT):
        theirs = read_examples(jsonl(record), slow, seq_len=32, assistant_only=False)
        assert theirs == read_examples(jsonl(record), tokenizer, seq_len=32, assistant_only=False)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        read_examples(jsonl(CHAT), tokenizer, seq_len=32)


def test_bytes_of_the_text_in_the_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    """Those of the answers, in UTF-8, without the tokens that end them."""
    encoder = RecordEncoder(tokenizer)
    answers = [" Zeigt Dateien: ä, ö, ü.", " 42"]
    examples = [it for text in answers for it in encoder.encode({"prompt": "What?", "completion": text})]
    assert bytes_in_loss(examples, tokenizer) == sum(len(text.encode()) for text in answers)
    assert bytes_in_loss(examples, None) == 0


def test_bytes_of_characters_that_are_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    """Text without a BOS begins with a token that nothing predicts, here the first byte of a character."""
    text = "日本語 😀 ünï"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "\ufffd" in tokenizer.decode(ids[:1]), "there is no token for the whole character"
    one = len(bytes_of(tokenizer, ids[0]))
    for end in range(2, len(ids) + 1):
        whole = b"".join(bytes_of(tokenizer, token) for token in ids[:end])
        assert text.encode().startswith(whole)
        assert bytes_in_loss([Example(ids[:end], ids[:end])], tokenizer) == len(whole) - one
    tokenizer.add_tokens(["Käse"])  # of its own, and no bytes
    ids = tokenizer("ein Käse", add_special_tokens=False)["input_ids"]
    assert bytes_in_loss([Example([0, *ids, 1], [0, *ids, 1])], tokenizer) == len("ein Käse".encode())


def bytes_of(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """By GPT-2's table: printable characters of Latin-1 stand for themselves, the others come behind 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(it): it for it in printable}
    table |= {chr(256 + at): it for at, it in enumerate(it for it in range(256) if it not in printable)}
    return bytes(table[letter] for letter in tokenizer.convert_ids_to_tokens(token))


@pytest.mark.parametrize("kind", ["text", "chat", "completion"])
def test_of_a_long_text_no_more_is_tokenized_than_is_wanted(
    kind: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tokens are those of the whole text, also where many characters make one token."""
    words = ("a directory of files, and so on; " * 40 + " " * 300) * 60
    records: dict[str, Any] = {
        "text": {"text": words},
        "chat": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": words}]},
        "completion": {"prompt": "What? ", "completion": words},
    }
    (whole,) = RecordEncoder(tokenizer).encode(records[kind])
    monkeypatch.setattr(examples_module, "WHOLE", 300)
    lengths: list[int] = []
    call = type(tokenizer).__call__

    def noted(self: Any, text: str, **settings: Any) -> Any:
        lengths.append(len(text))
        return call(self, text, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", noted)
    for seq_len in (20, 200, 1000):
        lengths.clear()
        (example,) = RecordEncoder(tokenizer, seq_len=seq_len).encode(records[kind])
        assert len(example) > seq_len
        assert example.cut(seq_len) == whole.cut(seq_len)
        assert max(lengths) < len(words) / 2
    (example,) = RecordEncoder(tokenizer, seq_len=1 << 20).encode(records[kind])
    assert example == whole, "which is no longer than what is wanted"


def test_chat_templates_of_which_none_is_the_default(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    tokenizer.chat_template = {"tool_use": tokenizer.chat_template}  # type: ignore[assignment]
    with pytest.raises(DataError, match="chat templates have no default"):
        read_examples(jsonl(CHAT), tokenizer, seq_len=32)
