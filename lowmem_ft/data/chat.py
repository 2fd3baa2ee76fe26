"""Conversations -> text and the characters of the assistant's answers, from the structure of the chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import DataError
from lowmem_ft.data.template import PROBE, SECOND, TEXT_PARTS, Forms, Spans, Template, is_text

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
ROLES = "system, user, assistant, tool"
LIKE_ASSISTANT = ("assistant", "model", "gpt", "bot", "chatbot", "ai")  # roles that are meant so
MEDIA = ("image", "image_url", "audio", "input_audio", "video")  # types of parts that no text model is shown
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys by which messages have it, for all templates alike
OPENED, CLOSED = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text, and where its answers stand, each with the token that ends it (None: not asked for)."""

    text: str
    answers: Spans | None


class ChatRenderer:
    """A tokenizer's chat template.

    Attributes:
        unshown: messages so far whose reasoning the template left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = sorted(special, key=len, reverse=True)  # of two with the same end the whole one
        self.unshown = 0
        self._forms: dict[str, dict[str, Forms]] = {}  # template -> role -> what it takes

    def as_wanted(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`messages` whose contents have the form that the chat template takes: a string, or a list of parts.

        Raises:
            DataError: malformed messages, or no chat template.
        """
        return self._template(None).with_contents_as_wanted(_checked([*messages]))

    def answer_end(self) -> int | None:
        """The id of the special token that ends an answer, from which training learns to stop; None without one."""
        try:
            found = self.render([{"role": "user", "content": PROBE}, {"role": "assistant", "content": SECOND}])
        except DataError:
            return None
        spans = found[-1].answers if found else None
        text = found[-1].text[: spans[-1][1]].rstrip() if spans else ""
        token = next((it for it in self.special_tokens if text.endswith(it)), None)
        return None if token is None else int(self.tokenizer.convert_tokens_to_ids(token))

    def render(
        self, messages: object, *, tools: object = None, answers_only: bool = True, first: int = 0
    ) -> list[RenderedChat]:
        """`messages` as text, with the spans of what the assistant says from message `first` on if `answers_only`.

        An answer with a `weight` of 0 (as OpenAI and Mistral have it) is shown, and is not to be learnt.
        A template with `{% generation %}` blocks marks the answers itself. Of any other an answer is what the text
        gains from the generation prompt before a turn to the special token that ends the turn. What some templates put
        behind the last turn of all (Phi-3 an EOS) is no part of it: it is not there once the conversation goes on.
        Usually all turns stand in the whole text as they stood when they were the last. A template that shows an answer
        differently later on (Qwen3 drops the reasoning of earlier turns, gpt-oss ends them by another token) gives one
        text per answer, each as the model sees it when it answers.

        Raises:
            DataError: malformed messages, no chat template, or a conversation that the template refuses or renders
                so that the answers cannot be told from the rest.
        """
        template = self._template(tools)
        checked = template.with_contents_as_wanted(_checked(messages))
        if any(message.get("tool_calls") for message in checked):
            checked = template.with_calls_as_wanted(checked)
        found = self._rendered(template, checked, answers_only=answers_only, first=first)
        self.unshown += sum(not any(it in chat.text for chat in found) for it in _reasoning(checked))
        return found

    def _rendered(
        self, template: Template, checked: Sequence[dict[str, Any]], *, answers_only: bool, first: int
    ) -> list[RenderedChat]:
        if not answers_only:
            return [RenderedChat(template.render(checked), None)]
        turns = [index for index, message in enumerate(checked) if message["role"] == "assistant"]
        near = next((it["role"] for it in checked if it["role"].strip().lower() in LIKE_ASSISTANT), None)
        if near is not None and not turns:
            raise DataError(
                "no message is from the assistant.", given=near, allowed=ROLES, fix="write 'assistant' for it"
            )
        learnt = [turn for turn in turns if turn >= first and _weight(checked[turn], turn + 1)]
        if GENERATION_BLOCK.search(template.source):
            return self._marked_answers(template, checked, turns, learnt)
        whole = template.render(checked)
        found = [self._answer(template, checked, turn, whole) for turn in learnt]
        if all(stays for _, _, stays in found):
            return [RenderedChat(whole, [span for _, span, _ in found])]
        return [RenderedChat(text, [span]) for text, span, _ in found]

    def _answer(
        self, template: Template, messages: Sequence[dict[str, Any]], turn: int, whole: str
    ) -> tuple[str, tuple[int, int], bool]:
        """The text up to message `turn`, where the answer stands in it, and whether it stands in `whole` likewise.

        An answer that does not begin with what the template asks for by default (Nemotron 3 opens a thought, and shows
        an answer without one behind an empty thought) is one to what it asks for when it shall think, or not.
        """
        for thinks in (None, False, True):
            rendered = template.render(messages[: turn + 1], thinks=thinks)
            if (found := _begin(template, messages[:turn], messages[turn], rendered, thinks)) is not None:
                break
        else:
            prompt = template.render(messages[:turn], add_generation_prompt=True)
            brought = f"give answers with their thought ({OPENED}...{CLOSED}), " if OPENED in prompt[-40:] else ""
            raise DataError(
                f"the chat template does not show which part of message {turn + 1} is the answer: "
                "the turn does not begin with the generation prompt.",
                given=f"generation prompt {prompt[-40:]!r}",
                fix=f"{brought}use a template with {{% generation %}} blocks, or set data.assistant_only: false",
            )
        text, begin = found
        last = turn + 1 == len(messages)
        stays = text == whole if last else True
        later = template.continued(messages, thinks=thinks) if last else whole
        # What stands between the token that ends a turn and the next turn (a newline, in ChatML) is never generated.
        ends = self._ends(text, max(begin, len(text) - _closing(template, messages[: turn + 1], rendered, thinks)))
        for end in ends:
            if later is None or later.startswith(text[:end]):
                return text, (begin, end), stays
        if later is None or later.startswith(text):
            return text, (begin, len(text)), stays
        return text, (begin, ends[0] if ends else len(text)), last and stays

    def _marked_answers(
        self, template: Template, messages: Sequence[dict[str, Any]], turns: Sequence[int], learnt: Sequence[int]
    ) -> list[RenderedChat]:
        """The answers at messages `learnt` of all (which are at `turns`), of a template that marks them."""
        whole, marked = template.render_marked(messages)
        spans = [self._marked(whole, *span) for span in marked]
        known = len(spans) == len(turns)  # else nothing tells which marked part is which answer
        alone = []
        for turn in learnt if known else ():
            try:
                last = turn + 1 == len(messages)
                text, upto = (whole, marked) if last else template.render_marked(messages[: turn + 1])
            except DataError:
                upto = []
            if not (known := len(upto) == turns.index(turn) + 1):
                break
            alone.append((text, self._marked(text, *upto[-1])))
        if not known or all(whole.startswith(text[:end]) for text, (_, end) in alone):
            return [RenderedChat(whole, _of_turns(spans, turns, learnt))]
        return [RenderedChat(text, [span]) for text, span in alone]

    def _marked(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A marked answer with the token that ends it: some templates leave the EOS outside their markers, and others
        mark the newline behind it (LFM2.5), which is never generated."""
        if ends := self._ends(text[:end], start):
            end = ends[0]
        eos = self.tokenizer.eos_token
        return start, end + len(eos) if isinstance(eos, str) and eos and text.startswith(eos, end) else end

    def _ends(self, text: str, start: int) -> list[int]:
        """Where the special tokens end that close `text` behind `start`, the last first."""
        found, body = [], text.rstrip()
        while (token := next((it for it in self.special_tokens if body.endswith(it)), None)) is not None:
            if len(body) <= start:
                break
            found.append(len(body))
            body = body.removesuffix(token).rstrip()
        return found

    def _template(self, tools: object) -> Template:
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise DataError("'tools' is not a list of objects.", given=type(tools).__name__, allowed="JSON schemas")
        if not self.tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so conversations cannot be rendered.",
                given=self.tokenizer.name_or_path or type(self.tokenizer).__name__,
                fix="use records of 'prompt' and 'completion', or a tokenizer with chat_template.jinja",
            )
        try:
            source = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several with names, and none of them the default
            raise DataError(
                "the tokenizer's chat templates have no default.",
                given=str(error).partition("\n")[0],
                fix="write one of them into chat_template.jinja beside the tokenizer, or name it 'default'",
            ) from None
        return Template(source, tools, self.tokenizer.special_tokens_map, self._forms.setdefault(source, {}))


def _begin(
    template: Template, before: Sequence[dict[str, Any]], answer: dict[str, Any], text: str, thinks: bool | None
) -> tuple[str, int] | None:
    """A text with the answer as the model gives it, and where it begins there; None where the template shows neither.

    Mostly that is `text`, of all messages. Where this shows earlier turns otherwise than the model saw them (gpt-oss
    takes the reasoning out of calls of tools once an answer follows them), what the model saw stands there instead.

    Args:
        before: the messages that it answers.
    """
    if not before:  # many templates look for a first message, or write a system turn before it
        asked = template.render([answer], add_generation_prompt=True, thinks=thinks)
        header = asked.removeprefix(text) if asked.startswith(text) else ""
        if header and text.count(header) == 1:
            return text, text.index(header) + len(header)
    prompt = template.render(before, add_generation_prompt=True, thinks=thinks)
    if text.startswith(prompt):
        return text, len(prompt)
    earlier = template.rendered(before[:-1], thinks=thinks)
    asked = prompt.removeprefix(earlier) if earlier and prompt.startswith(earlier) else ""
    if asked and text.count(asked) == prompt.count(asked):
        return prompt + text[text.rindex(asked) + len(asked) :], len(prompt)
    thought = _thought(template, before, answer, prompt, thinks)
    return None if thought is None else (prompt + thought, len(prompt))


def _thought(
    template: Template, before: Sequence[dict[str, Any]], answer: dict[str, Any], prompt: str, thinks: bool | None
) -> str | None:
    """An answer with the thought in it, and its end, behind a prompt that opens a thought, of a template that shows
    turns without theirs (DeepSeek R1, QwQ); None if it is not so."""
    said, opened = answer.get("content"), prompt.rstrip()
    if not isinstance(said, str) or CLOSED not in said or not opened.endswith(OPENED) or answer.get("tool_calls"):
        return None
    head, probe, end = (template.rendered([*before, {**answer, "content": PROBE}], thinks=thinks) or "").rpartition(
        PROBE
    )
    if not probe or head.rstrip() != opened.removesuffix(OPENED).rstrip():
        return None
    return said.lstrip().removeprefix(OPENED).lstrip("\n") + end


def _closing(template: Template, messages: Sequence[dict[str, Any]], text: str, thinks: bool | None) -> int:
    """Characters at the end of `text`, of `messages`, among which the token is that ends the last answer. Of an empty
    one they are what stands behind where a content would: its header may end with special tokens, too (gpt-oss')."""
    answer = messages[-1]
    said = answer.get("content") or ""
    texts = [said] if isinstance(said, str) else [part.get("text", "") for part in said]
    if answer.get("tool_calls") or any(it.strip() for it in texts):
        return len(text)
    probe = template.with_contents_as_wanted([{**answer, "content": PROBE}])
    filled = template.rendered([*messages[:-1], *probe], thinks=thinks) or ""
    pairs = enumerate(zip(text, filled, strict=False))
    return len(text) - next((i for i, (one, other) in pairs if one != other), min(len(text), len(filled)))


def _of_turns(spans: Spans, turns: Sequence[int], learnt: Sequence[int]) -> Spans:
    """The spans of the answers at messages `learnt`, given those of all (which are at `turns`)."""
    if len(learnt) == len(turns):
        return spans
    if len(spans) != len(turns):
        raise DataError(
            "the chat template does not show which answers are not to be learnt: its markers are not one for each.",
            given=f"{len(spans)} marked parts",
            allowed=f"{len(turns)}, one for each answer",
            fix="leave the assistant out of the prompt, and weights out, or set data.assistant_only: false",
        )
    return [span for span, turn in zip(spans, turns, strict=True) if turn in learnt]


def _reasoning(messages: Sequence[dict[str, Any]]) -> list[str]:
    """What is given as reasoning, without the spaces around it, which templates trim."""
    given = (it.get(REASONING[0]) for it in messages)
    return [text.strip() for text in given if isinstance(text, str) and text.strip()]


def _weight(message: dict[str, Any], number: int) -> bool:
    """Whether an answer is to be learnt."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"message {number} has a 'weight' that is neither 0 nor 1.", given=weight, allowed="0 or 1")
    return bool(weight)


def _checked(messages: object) -> list[dict[str, Any]]:
    """`messages` with absent values (null) left out, as transformers hands them to a template.

    Reasoning under any name gets the names that templates read, which transformers does only from 5.21 on.
    """
    if not isinstance(messages, list) or not messages:
        given = "an empty list" if messages == [] else type(messages).__name__
        raise DataError("'messages' is not a list of messages.", given=given, allowed=f"role ({ROLES}) and content")
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DataError(f"message {number} is not an object.", given=type(message).__name__, allowed="an object")
        if not isinstance(message.get("role"), str):
            raise DataError(f"message {number} has no 'role'.", given=", ".join(message) or "no keys", allowed=ROLES)
        message = {key: value for key, value in message.items() if value is not None}
        if reasoning := next((message[key] for key in REASONING if message.get(key)), None):
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        content = message.get("content", "" if "tool_calls" in message else None)
        if not isinstance(content, str | list):
            given = type(content).__name__
            raise DataError(
                f"message {number} has no 'content' of text.", given=given, allowed="a string, or text parts"
            )
        for part in content if isinstance(content, list) else ():
            whole = isinstance(part, dict) and (isinstance(part.get("text"), str) or not is_text(part))
            if not whole or part.get("type") in MEDIA:
                what = f"message {number} has a part that is no text."
                raise DataError(what, given=str(part)[:80], allowed=TEXT_PARTS)
        checked.append(message)
    return checked
