"""A chat template: which forms of messages it shows, and their text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from lowmem_ft.core.errors import DataError
from lowmem_ft.core.out_of_memory import is_out_of_memory

TEXT_PARTS = 'parts of {"type": "text", "text": ...}'
THINKING = ("enable_thinking", "thinking")  # variables of templates: whether the model shall think
PROBE, SECOND = "lowmem", "second"  # what no template writes by itself
Spans = Sequence[tuple[int, int]]  # (start, end) in characters, in order


class Forms(NamedTuple):
    """Which forms of a content a template shows: a string, a list of one text part, or of several."""

    text: bool
    part: bool
    parts: bool


@dataclass(frozen=True, slots=True)
class Template:
    """One template (a tokenizer may have another for tools), with its errors told to the user."""

    source: str
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]
    forms: dict[str, Forms] = field(default_factory=dict)  # by role, as far as they are known

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False, thinks: bool | None = None
    ) -> str:
        """The text of `messages`; where the template asks whether to think, as it is told, or left to its default."""
        asked = {} if thinks is None else {name: thinks for name in THINKING if name in self.source}
        return self._render(messages, add_generation_prompt=add_generation_prompt, **asked)[0]

    def _leaves_out_calls(self, messages: Sequence[dict[str, Any]]) -> bool:
        """Whether the text of `messages` is the same without their calls of tools."""
        without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        try:
            return self.render(without) == self.render(messages)
        except DataError:  # then the template looks for them
            return False

    def continued(self, messages: Sequence[dict[str, Any]], *, thinks: bool | None = None) -> str | None:
        """The text of `messages` with another turn of the user behind them; None if the template refuses it."""
        asked = self.with_contents_as_wanted([{"role": "user", "content": "And then?"}])
        return self.rendered([*messages, *asked], thinks=thinks)

    def rendered(self, messages: Sequence[dict[str, Any]], *, thinks: bool | None = None) -> str | None:
        """The text of `messages`; None if the template refuses them."""
        try:
            return self.render(messages, thinks=thinks)
        except DataError:
            return None

    def render_marked(self, messages: Sequence[dict[str, Any]]) -> tuple[str, Spans]:
        """The text of `messages` and the spans of its `{% generation %}` blocks."""
        return self._render(messages, return_assistant_tokens_mask=True)

    def with_contents_as_wanted(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """`messages` with text parts joined, but for a template that goes through parts itself; and with strings as
        parts for one that takes nothing else (LLaVA's would go through the letters, and leave all of them out)."""
        return [
            {**message, "content": self._wanted(number, message["role"], message["content"])}
            if "content" in message
            else message
            for number, message in enumerate(messages, start=1)
        ]

    def _wanted(self, number: int, role: str, content: Any) -> Any:
        takes = self._takes(role)
        if isinstance(content, str):
            return content if takes.text or not takes.part else [_part(content)]
        if takes.parts:
            return content
        joined = _joined(number, content)
        return joined if takes.text or not takes.part else [_part(joined)]

    def _takes(self, role: str) -> Forms:
        """Which forms of a content the template shows in the turns of `role`; where it shows none, those of a user."""
        if role not in self.forms:
            contents = (PROBE, [_part(PROBE)], [_part(PROBE), _part(SECOND)])
            found = Forms(*(self._shows(role, content) for content in contents))
            self.forms[role] = found if any(found) or role == "user" else self._takes("user")
        return self.forms[role]

    def _shows(self, role: str, content: Any) -> bool:
        """Whether the template's text has the texts of `content`. In quotes it does where a list was written."""
        messages = [{"role": role, "content": content}]
        if role != "user":
            asked = self._wanted(0, "user", "a")
            messages.insert(1 if role == "system" else 0, {"role": "user", "content": asked})
        try:
            text = self.render(messages)
        except DataError:
            return False
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        quoted = isinstance(content, list) and re.search(f"[\"']{PROBE}[\"']", text)
        return all(it in text for it in texts) and not quoted

    def with_calls_as_wanted(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """`messages` with calls of tools in a form that the template shows: their arguments as objects, or for one that
        joins them to text as JSON text; and where nothing is said beside them, the content as it is given, null (by
        which DeepSeek V3's knows a call), or empty.

        Raises:
            DataError: the template leaves out calls, or refuses all forms.
        """
        refused: DataError | None = None
        for silent in ({}, {"content": None}, {"content": ""}):
            try:
                found = self._with_arguments_as_wanted(
                    [{**it, **silent} if it.get("tool_calls") and not it.get("content") else it for it in messages]
                )
            except DataError as error:
                refused = refused or error
                continue
            if not self._leaves_out_calls(found):
                return found
            refused = DataError(
                "the chat template leaves out calls of tools, so empty answers would be learnt for them.",
                given=", ".join(f"message {i}" for i, it in enumerate(messages, start=1) if it.get("tool_calls")),
                fix="use a template that shows 'tool_calls', or leave such conversations out",
            )
        assert refused is not None
        raise refused

    def _with_arguments_as_wanted(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        objects = _arguments(messages, _parsed)
        try:
            self.render(objects)
        except DataError as refused:
            if isinstance(refused.__cause__, TypeError):
                texts = _arguments(objects, _as_text)
                self.render(texts)
                return texts
            raise
        return objects

    def _render(self, messages: Sequence[dict[str, Any]], **options: bool) -> tuple[str, Spans]:
        # Not through apply_chat_template: where a tokenizer trims spaces from its offsets (as Llama 3's does), its mask
        # takes in all that follows an answer that ends with a space, and loses all answers from one that begins so.
        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=self.tools,
                chat_template=self.source,
                **options,
                **self.variables,
            )
        except Exception as error:  # of any kind: a template is a program of the model's folder
            if is_out_of_memory(error):
                raise
            raise DataError("the chat template refuses the conversation.", given=f"{error}") from error
        return texts[0], spans[0] if spans else []


def _arguments(messages: Sequence[dict[str, Any]], form: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """`messages` with `form` of the arguments of each call."""

    def called(call: Any) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        function = {**function, "arguments": form(function["arguments"])}
        return {**call, "function": function} if "function" in call else function

    return [
        {**message, "tool_calls": [called(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _parsed(arguments: Any) -> Any:
    """Arguments as an object, where they are the JSON text of one, as OpenAI writes them."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (json.JSONDecodeError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _joined(number: int, parts: list[dict[str, Any]]) -> str:
    """The text of message `number`, all of whose parts must be text."""
    for part in parts:
        if not is_text(part):
            raise DataError(
                f"message {number} has a part that is no text, and the chat template takes no parts.",
                given=str(part)[:80],
                allowed=f"a string, or {TEXT_PARTS}",
            )
    return "".join(part["text"] for part in parts)


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def is_text(part: dict[str, Any]) -> bool:
    return part.get("type") in (None, "text")
