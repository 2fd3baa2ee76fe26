"""An Ollama Modelfile: which file, how a conversation is written, and where an answer ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.json_text import read_settings
from lowmem_ft.data.chat import ChatRenderer

Messages = list[dict[str, str]]
# contents that no template changes or contains; the conversations that the result is held against
_USER, _ANSWER, _AGAIN, _SYSTEM = "usr0txt", "ans0txt", "usr1txt", "sys0txt"
_SHAPES: Sequence[tuple[str, ...]] = (
    ("user",), ("user", "assistant", "user"), ("system", "user"), ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)  # fmt: skip


def modelfile(
    tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, source: str, adapter: str | None = None,
    adds_bos: bool = False,
) -> str:  # fmt: skip
    """The text of a Modelfile.

    TEMPLATE is written only where it can be shown to give the very text that the chat template gives.

    Args:
        folder: of the base model, whose generation_config.json may name more than one token that ends an answer, and a
            penalty for words that were said.
        source: what FROM names, a file beside it or a model.
        adapter: a GGUF adapter beside it.
        adds_bos: whether llama.cpp itself puts the first token in front.

    Raises:
        CheckpointError: generation_config.json cannot be read.
    """
    lines = [f"FROM {source}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    ends: list[str] = []
    if tokenizer is not None:
        ends = stop_words(tokenizer, folder)
        if tokenizer.chat_template is not None:
            found = go_template(tokenizer, adds_bos=adds_bos)
            if found is None:
                lines.append("# No TEMPLATE: the chat template does more than to put words around each message.")
                lines.append("# Ollama takes the one in the GGUF file (before 0.30: one of its own that is like it).")
            else:
                template, ending = found
                lines.append(f'TEMPLATE """{template}"""')
                ends += [ending] if ending and ending not in ends else []
        else:
            lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines += [f"PARAMETER stop {_quoted(word)}" for word in ends if _is_kept(word)]
    # before 0.32.12 Ollama's own is 1.1, under which the likeliest answer is another than the trained one
    lines.append(f"PARAMETER repeat_penalty {_generation(folder).get('repetition_penalty') or 1.0:g}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As Ollama reads it: between quotes that nothing escapes."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def _is_kept(text: str) -> bool:
    """Whether Ollama reads the text as it is: it drops characters that are not printed, as spaces that do not break."""
    return '"""' not in text and all(it.isprintable() or it in "\t\r\n" for it in text)


def _generation(folder: Path) -> dict[str, Any]:
    return read_settings(folder / "generation_config.json")


def stop_words(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """The texts of the tokens that end an answer."""
    ids = [tokenizer.eos_token_id]
    given = _generation(folder).get("eos_token_id")
    ids += given if isinstance(given, list) else [given]
    words = [tokenizer.convert_ids_to_tokens(index) for index in dict.fromkeys(ids) if index is not None]
    return [str(word) for word in words if word]


def go_template(tokenizer: PreTrainedTokenizerBase, *, adds_bos: bool = False) -> tuple[str, str] | None:
    """(Go template, what ends an answer), or None where the chat template is no row of messages between fixed words.

    What stands around a message is read off from conversations whose contents are known, put together again, and
    compared with what the chat template gives for others.
    """

    renderer = ChatRenderer(tokenizer)

    def render(messages: Messages, start_answer: bool) -> str:
        wanted = renderer.as_wanted(messages)
        text: Any = tokenizer.apply_chat_template(wanted, tokenize=False, add_generation_prompt=start_answer)
        return str(text)

    parts = _parts(render)
    if parts is None:
        return None
    around = {role: parts[role] for role in ("user", "assistant", "system")}
    head, start = parts["head"][0], parts["start"][0]
    for shape in _SHAPES:
        messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(shape)]
        ours = head + "".join(around[it["role"]][0] + it["content"] + around[it["role"]][1] for it in messages) + start
        if ours != render(messages, True):
            return None
    words = [head, start, *(word for pair in around.values() for word in pair)]
    if any("{{" in word or "}}" in word or word.endswith("{") or not _is_kept(word) for word in words):
        return None
    bos = tokenizer.bos_token
    if adds_bos and isinstance(bos, str):
        head = head.removeprefix(bos)
    turns = "{{ else if ".join(
        f'eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in around.items()
    )
    template = f"{head}{{{{ range .Messages }}}}{{{{ if {turns}{{{{ end }}}}{{{{ end }}}}{start}"
    return template, around["assistant"][1].strip()


def _parts(render: Callable[[Messages, bool], str]) -> dict[str, tuple[str, str]] | None:
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    again, system = {"role": "user", "content": _AGAIN}, {"role": "system", "content": _SYSTEM}
    try:
        turns = render([user, answer, again], False)
        before_user, rest = turns.split(_USER)
        between, rest = rest.split(_ANSWER)
        before_again, after_user = rest.split(_AGAIN)
        start = render([user, answer, again], True).removeprefix(turns)
        after_answer = render([user, answer], False).split(_ANSWER)[1]
        first, rest = render([system, user], False).split(_SYSTEM)
        before_second = rest.split(_USER)[0]
    except Exception:  # a template raises what it likes for conversations that it does not take
        return None
    pairs = ((between, after_user), (before_again, after_answer))
    if not all(text.startswith(prefix) for text, prefix in pairs):
        return None
    user_before, answer_before = before_again.removeprefix(after_answer), between.removeprefix(after_user)
    if not (before_user.endswith(user_before) and before_second.endswith(user_before)):
        return None
    head = before_user.removesuffix(user_before)
    if not first.startswith(head):
        return None
    return {
        "head": (head, ""), "start": (start, ""), "user": (user_before, after_user),
        "assistant": (answer_before, after_answer),
        "system": (first.removeprefix(head), before_second.removesuffix(user_before)),
    }  # fmt: skip
