"""What a record says, found by its keys: conversations, prompts with completions, texts, preferences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem_ft.core.errors import DataError, nearest
from lowmem_ft.core.sources import DataFormat, DataRole
from lowmem_ft.data.records import parsed

# kind -> keys that a record of it has. In this order `auto` looks for them: pairs and verdicts first, because training
# on all of their answers would be wrong without a word.
KINDS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
PREFERENCES = ("preference", "kto")
BESIDE = ("prompt", "input", "label", "system", "tools", "history")  # keys that say more of what other keys say
OPTIONAL = ("input", "system", "tools")  # roles that a record may do without
LISTS = ("messages", "conversations", "conversation")  # keys of a list of turns
ASSISTANT = "\n\nAssistant:"  # before each answer in texts of Anthropic's preferences
LONGEST_WORD = 30  # characters; more without a space are no word, as in Chinese
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with role and content. Answers before message `first` are part of the prompt."""

    messages: Any
    tools: list[dict[str, Any]] | None = None
    first: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A text of which `completion` is the answer, or without a prompt (None) all."""

    prompt: str | None
    completion: str


@dataclass(frozen=True, slots=True)
class Content:
    """What a record says.

    Attributes:
        kind: a key of `KINDS`.
        good: what is to be learnt; None where the record shows only a bad answer.
        bad: the rejected answer, with the same prompt.
    """

    kind: str
    good: Conversation | Completion | None
    bad: Conversation | Completion | None = None


@dataclass(frozen=True, slots=True)
class RecordReader:
    """Reads what records say.

    Args:
        format: the kind that records are of; `chosen` takes the better answer of a preference for the only one.
        columns: role -> the column that plays it; `a.b` is key b of column a.
        chat: whether an instruction with its output becomes a conversation. Otherwise it is told as text under the
            headings `### Instruction:`, `### Input:` and `### Response:`.
    """

    format: DataFormat = "auto"
    columns: Mapping[DataRole, str] = field(default_factory=dict)
    chat: bool = True
    _found: set[str] = field(default_factory=set, init=False)  # optional roles that some record has a column for
    _lacking: dict[str, DataError] = field(default_factory=dict, init=False)  # and those that some has none for

    def read(self, record: Mapping[str, Any], *, judged: bool = False) -> Content:
        """What `record` says. A null is an absent key.

        Args:
            judged: whether a number is known to be a verdict; otherwise a label of 0 or 1 may be the class of anything.

        Raises:
            DataError: columns or keys are missing, or have wrong types.
        """
        given, record = record, {key: value for key, value in record.items() if value is not None}
        mapped = self._mapped(record)
        record = {key: value for key, value in record.items() if key not in self.columns}
        judged = judged or "label" in mapped
        kind = None
        if mapped:  # what the user mapped decides the kind, whatever other columns are called
            beside = {key: record[key] for key in BESIDE if key in record} | mapped
            kind = _kind(beside, self.format, judged=judged)
            record = {**record, **mapped} if kind is None else beside
        if kind is None:
            kind = _kind(record, self.format, judged=judged)
        if kind is None:
            raise _lacks_keys(given, self.format)
        if kind == "preference":
            good, bad = _pair(record)
            return Content(kind, good, None if self.format == "chosen" else bad)
        if kind == "kto":
            answer = _answer(record) if "completion" in record else _last_answer(record)
            return Content(kind, answer) if _verdict(record["label"]) else Content(kind, None, answer)
        if kind == "alpaca":
            return Content(kind, self._instruction(record))
        if kind == "prompt_completion":
            return Content(kind, _answer(record))
        if kind == "text":
            return Content(kind, Completion(None, _string(record, "text")))
        turns = _parsed(next(record[key] for key in LISTS if key in record))
        return Content("sharegpt" if _is_sharegpt(turns) else "messages", _conversation(record, turns))

    def check_columns(self) -> None:
        """Raise DataError for an optional column that none of the records had. Of each record that is no error."""
        for role, error in self._lacking.items():
            if role not in self._found:
                raise DataError(
                    f"no record has the column that data.columns names for '{role}'.",
                    given=error.given,
                    allowed=error.allowed,
                    fix=error.fix or "remove it from data.columns",
                )

    def _mapped(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Role -> value, of the columns that the user mapped."""
        mapped: dict[str, Any] = {}
        pairs = "chosen" in self.columns or "chosen" in record
        for role, name in self.columns.items():
            optional = role in OPTIONAL or (role == "prompt" and pairs)
            if (value := _column(record, name)) is not None:
                mapped[role] = value
                self._found.add(role)
            elif not optional:
                raise _lacks_column(record, role, name)
            elif role not in self._lacking:
                self._lacking[role] = _lacks_column(record, role, name)
        return mapped

    def _instruction(self, record: Mapping[str, Any]) -> Conversation | Completion:
        instruction, output = _string(record, "instruction"), _string(record, "output")
        beside = _string(record, "input") if record.get("input") is not None else ""
        if self.chat:
            asked = f"{instruction}\n\n{beside}" if beside else instruction
            turns = [*_history(record), _message("user", asked), _message("assistant", output)]
            return _conversation(record, turns)
        if _history(record):
            raise DataError("'history' wants a chat template, and the tokenizer has none.", allowed="no earlier turns")
        given = f"### Input:\n{beside}\n\n" if beside else ""
        return Completion(f"{_system_text(record)}### Instruction:\n{instruction}\n\n{given}### Response:\n", output)


def _kind(record: Mapping[str, Any], format: DataFormat, *, judged: bool) -> str | None:
    """The kind whose keys `record` has, of those that `format` allows; of a list of turns always `messages`.

    `judged`: whether a label is known to be a verdict; a number may be the class of anything.
    """
    if format in ("messages", "sharegpt"):
        return "messages" if any(key in record for key in LISTS) else None
    listed = any(key in record for key in LISTS)
    if format != "auto":
        wanted = "preference" if format == "chosen" else format
        has = all(key in record for key in KINDS[wanted])
        return wanted if has or (wanted == "kto" and listed and "label" in record) else None
    for kind, keys in KINDS.items():
        if kind == "kto" and not judged and str(record.get("label")).lower() not in ("true", "false"):
            continue
        if all(key in record for key in keys) or (kind == "kto" and listed and "label" in record):
            return kind
    return "messages" if any(key in record for key in LISTS) else None


def keys_of(record: Mapping[str, Any]) -> str:
    """The keys of a record for a message, which says of which the value is null."""
    return ", ".join(f"{key} (null)" if value is None else key for key, value in record.items())


def _lacks_keys(record: Mapping[str, Any], format: DataFormat) -> DataError:
    wanted = KINDS if format == "auto" else {format: KINDS["preference" if format == "chosen" else format]}
    allowed = " or ".join(" and ".join(f"'{key}'" for key in keys) for keys in wanted.values())
    known = sorted({key for keys in wanted.values() for key in keys})
    close = {key: near for key in record if key not in known and (near := nearest(key, known))}
    fix = "; ".join(f"did you mean '{near}' by '{key}'?" for key, near in close.items())
    beneath = next((k for k, v in record.items() if _is_messages(v) and _kind(v[0], "auto", judged=True)), None)
    if beneath is not None:
        fix = f"'{beneath}' holds records: write them as an array of their own, or one a line"
    return DataError(
        "the record lacks the keys of its format.",
        given=keys_of(record) or "no keys",
        allowed=allowed,
        fix=fix or "name the columns in data.columns, for example {instruction: question, output: answer}",
    )


def _column(record: Mapping[str, Any], name: str) -> Any:
    """The value of a column, None where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _lacks_column(record: Mapping[str, Any], role: str, name: str) -> DataError:
    near = nearest(name, record)
    return DataError(
        f"the record lacks the column that data.columns names for '{role}'.",
        given=name,
        allowed=", ".join(record) or "no keys",
        fix=f"did you mean '{near}'?" if near else None,
    )


def _string(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"'{key}' is not a string.", given=type(value).__name__, allowed="a string")
    return value


def _verdict(label: Any) -> bool:
    found = VERDICTS.get(str(label).lower())
    if found is None:
        raise DataError("'label' is no verdict.", given=repr(label), allowed="true or false, 1 or 0")
    return found


def _history(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns before an instruction, as LLaMA-Factory writes them: pairs of what was asked and answered."""
    found = _parsed(record.get("history"))
    pairs = found if isinstance(found, list) else []  # a column of this name may say anything else
    if not all(isinstance(it, list) and len(it) == 2 and all(isinstance(text, str) for text in it) for it in pairs):
        allowed = "[[asked, answered], ...]"
        raise DataError("'history' is no list of earlier turns.", given=str(found)[:80], allowed=allowed)
    return [_message(role, text) for it in pairs for role, text in zip(("user", "assistant"), it, strict=True)]


def _system_text(record: Mapping[str, Any]) -> str:
    """What a text begins with that has a system turn beside it."""
    return f"{_string(record, 'system')}\n\n" if record.get("system") else ""


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _is_sharegpt(turns: Any) -> bool:
    return _is_messages(turns) and "from" in turns[0] and "value" in turns[0]


def _conversation(record: Mapping[str, Any], turns: Any, *, first: int = 0) -> Conversation:
    """`turns` as messages, with the record's tools and its system turn where it names one."""
    if _is_sharegpt(turns):
        turns = [_from_sharegpt(number, turn) for number, turn in enumerate(turns, start=1)]
    system = record.get("system")
    if system and _is_messages(turns) and turns[0].get("role") != "system":
        turns, first = [_message("system", _string(record, "system")), *turns], first + 1 if first else 0
    return Conversation(turns, _parsed(record.get("tools")) or None, first)


def _from_sharegpt(number: int, turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker, value = turn.get("from"), turn.get("value")
    role = SHAREGPT_ROLES.get(str(speaker).lower())
    if role is None:
        raise DataError(f"message {number} is from nobody known.", given=speaker, allowed=", ".join(SHAREGPT_ROLES))
    if not isinstance(value, str):
        raise DataError(f"message {number} has no 'value' of text.", given=type(value).__name__, allowed="a string")
    weighed = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
    if str(speaker).lower() not in ("function_call", "tool_call"):
        return _message(role, value) | weighed
    try:
        calls = json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"message {number}, a call of a function, is not valid JSON: {error}."
        raise DataError(what, given=value[:80], allowed='{"name": ..., "arguments": {...}}') from None
    calls = calls if isinstance(calls, list) else [calls]
    called = [{"type": "function", "function": call} for call in calls]
    return {"role": role, "content": "", "tool_calls": called, **weighed}


def _parsed(value: Any) -> Any:
    """A list that a table holds as text: CSV knows nothing else, and schemas of tools differ from row to row. Of what
    is none ChatRenderer says what is wrong."""
    return parsed(value) if isinstance(value, str) else value


def _answer(record: Mapping[str, Any], key: str = "completion") -> Conversation | Completion:
    """A prompt with the answer under `key`; each is a string or a list of messages."""
    prompt, answer = record["prompt"], record[key]
    for name, part in (("prompt", prompt), (key, answer)):
        if not isinstance(part, str) and not _is_messages(part):
            allowed = "a string, or a list of messages"
            raise DataError(f"'{name}' is not a string.", given=type(part).__name__, allowed=allowed)
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(_system_text(record) + prompt, answer)
    before = _turns(prompt, "user")
    return _conversation(record, [*before, *_turns(answer, "assistant")], first=len(before))


def _last_answer(record: Mapping[str, Any]) -> Conversation:
    """A conversation whose last turn has a verdict, as LLaMA-Factory writes it."""
    turns = _parsed(next(record[key] for key in LISTS if key in record))
    conversation = _conversation(record, turns)
    said = conversation.messages
    if _is_messages(said) and said[-1].get("role") != "assistant":
        given = said[-1].get("role")
        raise DataError(
            "the last message of a conversation with a 'label' is no answer.", given=given, allowed="assistant"
        )
    return replace(conversation, first=len(said) - 1) if _is_messages(said) else conversation


def _turns(part: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(part, str):
        return [_message(role, part)]
    if _is_sharegpt(part):
        return [_from_sharegpt(number, turn) for number, turn in enumerate(part, start=1)]
    return list(part)


def _pair(record: Mapping[str, Any]) -> tuple[Conversation | Completion, Conversation | Completion]:
    """The better and the worse answer, with the same prompt: the one given, or what both begin with."""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, dict) and isinstance(rejected, dict):  # as LLaMA-Factory writes them, behind a conversation
        chosen, rejected = [chosen], [rejected]
        record = {**record, "chosen": chosen, "rejected": rejected}
        if "prompt" not in record and (listed := next((record[key] for key in LISTS if key in record), None)):
            record["prompt"] = _parsed(listed)
    for name, part in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(part, str) and not _is_messages(part):
            allowed = "a string, or a list of messages"
            raise DataError(f"'{name}' is not a string.", given=type(part).__name__, allowed=allowed)
    if chosen == rejected:
        raise DataError("'chosen' and 'rejected' are the same.", allowed="two answers that differ")
    if isinstance(chosen, str) != isinstance(rejected, str):
        given = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise DataError("'chosen' and 'rejected' are of different kinds.", given=given, allowed="the same kind")
    prompt = record.get("prompt")
    if isinstance(chosen, str):
        if prompt is not None:
            return _answer(record, "chosen"), _answer(record, "rejected")
        shared = _answers_begin(chosen, rejected)
        common = chosen[:shared]
        return Completion(common, chosen[shared:]), Completion(common, rejected[shared:])
    good, bad = _turns(chosen, "assistant"), _turns(rejected, "assistant")
    if prompt is not None and good[0].get("role") == "assistant" and bad[0].get("role") == "assistant":
        return _answer(record, "chosen"), _answer(record, "rejected")
    # whole conversations: a prompt beside them says again what they begin with
    shared = _shared(good, bad)
    if not shared:
        raise DataError("'chosen' and 'rejected' begin with different messages.", allowed="the same prompt in both")
    return _conversation(record, good, first=shared), _conversation(record, bad, first=shared)


def _answers_begin(chosen: str, rejected: str) -> int:
    """Where two answers begin in texts that begin with the same prompt: behind the last header of the assistant, where
    they have those of Anthropic's data, or else at the last word in which they differ. Else the beginning that two
    answers share would be no part of them, and half a word may be a token of its own in one text and not in the other.
    """
    shared = _shared(chosen, rejected)
    if (header := chosen.rfind(ASSISTANT, 0, shared)) >= 0:
        return header + len(ASSISTANT)
    begin = shared
    while begin > 0 and shared - begin < LONGEST_WORD and not chosen[begin - 1].isspace():
        begin -= 1
    in_word = any(text[shared : shared + 1].strip() for text in (chosen, rejected))
    shared = begin if in_word and (not begin or chosen[begin - 1].isspace()) else shared
    while shared and chosen[shared - 1].isspace():  # a space belongs to the word behind it
        shared -= 1
    return shared


def _shared(one: Any, other: Any) -> int:
    """How many characters or messages both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
