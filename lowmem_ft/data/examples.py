"""JSONL records -> token ids with a loss mask, by the tokenizer's own rules and chat template."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import DataError, nearest
from lowmem_ft.data.chat import ChatRenderer, RenderedChat, Spans

IGNORE_INDEX = -100
Format = Literal["auto", "messages", "prompt_completion", "text"]
Overlong = Literal["truncate", "drop", "error"]
FORMAT_KEYS = {"messages": ("messages",), "prompt_completion": ("prompt", "completion"), "text": ("text",)}
NOTE_LINES = 10  # line numbers that a note lists before it says "..."


@dataclass(frozen=True, slots=True)
class Example:
    """One document: token ids, and labels that are the same ids, or -100 where a token is not in the loss.

    `labels[i]` belongs to `input_ids[i]`; the shift by one happens in `packing.collate`. `read_examples` fills both
    with arrays of 4 bytes a token.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """Tokens in the loss; the first of a document is predicted from nothing, so it never is."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a file. `truncated`, `dropped` and `masked` count examples; `masked_lines` numbers records.

    `examples`, `tokens` and `loss_tokens` are those that are left to train on.
    """

    path: str
    records: int
    examples: int
    tokens: int
    loss_tokens: int
    truncated: int
    dropped: int
    masked_lines: tuple[int, ...]

    @property
    def masked(self) -> int:
        """Examples left out because no token of theirs is in the loss."""
        return len(self.masked_lines)

    def notes(self) -> list[str]:
        """Sentences that a user must read before training; none where nothing was cut or left out."""
        notes = []
        if self.truncated:
            notes.append(f"{self.path}: {self.truncated} of {self.records} examples truncated to data.seq_len")
        if self.dropped:
            notes.append(f"{self.path}: {self.dropped} of {self.records} examples dropped, longer than data.seq_len")
        if self.masked:
            lines = ", ".join(map(str, self.masked_lines[:NOTE_LINES])) + (", ..." if self.masked > NOTE_LINES else "")
            notes.append(
                f"{self.path}: {self.masked} examples left out, no token of theirs is in the loss: line {lines}"
            )
        return notes


def read_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    format: Format = "auto",
    assistant_only: bool = True,
    overlong: Overlong = "truncate",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Example], DataReport]:
    """The examples of a JSONL file, in its order, at most `seq_len` tokens each.

    Args:
        format: which keys a record has; `auto` looks at each record.
        assistant_only: only the assistant's answers (or the completion), each with the token that ends it, are in
            the loss. Otherwise every token is. Records of plain text always train on every token.
        overlong: what to do with an example longer than `seq_len`: keep its beginning, leave it out, or stop.
        progress: called with (bytes read, bytes of the file) after each record.

    Raises:
        DataError: naming file and line: no such file, broken JSON, missing keys, wrong types, a conversation that
            the chat template refuses, an example too long with `overlong="error"`; a file without records, or one
            that leaves no token in the loss.
    """
    examples: list[Example] = []
    records = truncated = dropped = 0
    masked_lines: list[int] = []
    encoder = RecordEncoder(tokenizer, format=format, assistant_only=assistant_only)
    for line, record in _read_records(Path(path), progress):
        records += 1
        try:
            encoded = encoder.encode(record)
            if overlong == "error" and any(len(example) > seq_len for example in encoded):
                tokens = max(map(len, encoded))
                fix = "raise data.seq_len, or set data.overlong to truncate or drop"
                raise DataError("the example is too long.", given=f"{tokens} tokens", allowed=seq_len, fix=fix)
        except DataError as error:
            raise _at(Path(path), line, error) from error
        for example in encoded:
            if len(example) > seq_len and overlong == "drop":
                dropped += 1
                continue
            if len(example) > seq_len:
                truncated += 1
                example = Example(example.input_ids[:seq_len], example.labels[:seq_len])
            if example.loss_tokens:
                examples.append(example)
            else:
                masked_lines.append(line)
    report = DataReport(
        path=str(path),
        records=records,
        examples=len(examples),
        tokens=sum(map(len, examples)),
        loss_tokens=sum(example.loss_tokens for example in examples),
        truncated=truncated,
        dropped=dropped,
        masked_lines=tuple(masked_lines),
    )
    if not examples:
        raise _nothing_left(report, seq_len)
    return examples, report


class RecordEncoder:
    """Turns records into examples.

    Args:
        tokenizer: whose rules and chat template apply.
        format, assistant_only: as `read_examples` takes them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, format: Format = "auto", assistant_only: bool = True
    ) -> None:
        self.tokenizer, self.format, self.assistant_only = tokenizer, format, assistant_only
        self.chat = ChatRenderer(tokenizer)

    def encode(self, record: dict[str, Any]) -> list[Example]:
        """The examples of one record: one, or one per answer where the template shows answers differently later on.

        Raises:
            DataError: missing keys, wrong types, or a conversation that the chat template refuses.
        """
        kind = _format_of(record, self.format)
        if kind == "messages":
            chats = self.chat.render(record["messages"], tools=record.get("tools"), answers_only=self.assistant_only)
            return [self._encode_chat(chat) for chat in chats]
        parts = [record[key] for key in FORMAT_KEYS[kind]]
        for key, part in zip(FORMAT_KEYS[kind], parts, strict=True):
            if not isinstance(part, str):
                raise DataError(f"'{key}' is not a string.", given=type(part).__name__, allowed="a string")
        text = "".join(parts)
        answers = [(len(parts[0]), len(text))] if kind == "prompt_completion" and self.assistant_only else None
        return [self._encode_text(text, answers)]

    def _encode_chat(self, chat: RenderedChat) -> Example:
        """A template writes its own special tokens, BOS included: none are added."""
        ids, kept = self._tokenize(chat.text, chat.answers, add_special_tokens=False)
        for i in range(1, len(ids)):  # some templates leave the EOS that ends an answer outside its markers
            kept[i] = kept[i] or (ids[i] == self.tokenizer.eos_token_id and kept[i - 1])
        return _labelled(ids, kept)

    def _encode_text(self, text: str, answers: Spans | None) -> Example:
        """The tokenizer adds what it adds to any text; one EOS ends it, and is in the loss."""
        ids, kept = self._tokenize(text, answers, add_special_tokens=True)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:  # the text brought its own
            del ids[0], kept[0]
        if eos is not None:
            if list(ids[-1:]) != [eos]:
                ids.append(eos)
                kept.append(True)
            kept[-1] = True
        return _labelled(ids, kept)

    def _tokenize(self, text: str, answers: Spans | None, *, add_special_tokens: bool) -> tuple[array[int], list[bool]]:
        """Tokens of the whole `text`, and which of them belong to `answers` (None: all of them)."""
        if answers is not None and not self.tokenizer.is_fast:
            raise DataError(
                "answers cannot be told from prompts: this tokenizer does not say which characters a token stands for.",
                given=type(self.tokenizer).__name__,
                allowed="a fast tokenizer (tokenizer.json)",
                fix="convert the tokenizer, or set data.assistant_only: false",
            )
        encoding = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=answers is not None, verbose=False
        )
        ids = array("i", encoding["input_ids"])
        return ids, [True] * len(ids) if answers is None else _in_spans(encoding["offset_mapping"], answers)


def _labelled(ids: array[int], kept: Sequence[bool]) -> Example:
    return Example(ids, array("i", [token if keep else IGNORE_INDEX for token, keep in zip(ids, kept, strict=True)]))


def _in_spans(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Which tokens stand for a character of the (sorted) `spans`.

    Byte-level tokenizers may trim whitespace from offsets, which leaves a token of whitespace an empty range at its
    end: it then stands for what is between the token before and there.
    """
    kept = []
    previous_end = 0
    at = 0
    for start, end in offsets:
        begin = start if start < end else previous_end
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        kept.append(at < len(spans) and begin < end and end > spans[at][0])
        previous_end = max(previous_end, end)
    return kept


def _format_of(record: dict[str, Any], format: Format) -> str:
    wanted = FORMAT_KEYS if format == "auto" else {format: FORMAT_KEYS[format]}
    for kind, keys in wanted.items():
        if all(key in record for key in keys):
            return kind
    allowed = " or ".join(" and ".join(f"'{key}'" for key in keys) for keys in wanted.values())
    known = [key for keys in wanted.values() for key in keys]
    close = {key: near for key in record if key not in known and (near := nearest(key, known))}
    fix = "; ".join(f"did you mean '{near}' by '{key}'?" for key, near in close.items()) or None
    raise DataError(
        "the record lacks the keys of its format.", given=", ".join(record) or "no keys", allowed=allowed, fix=fix
    )


def _read_records(path: Path, progress: Callable[[int, int], None] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, record) of each line that is not blank."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError("The data file cannot be read.", given=f"{path} ({error.strerror})") from error
    with file:
        size, done = path.stat().st_size, 0
        for number, raw in enumerate(file, start=1):
            try:
                record = _record(raw)
            except DataError as error:
                raise _at(path, number, error) from error
            if record is not None:
                yield number, record
            done += len(raw)
            if progress is not None:
                progress(done, size)


def _record(raw: bytes) -> dict[str, Any] | None:
    """The object of a line, None for a blank one. A byte order mark is ignored."""
    try:
        line = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text.", given=f"{error.reason}", fix="write the file as UTF-8") from error
    if not line:
        return None
    shown = line if len(line) <= 80 else line[:77] + "..."
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"not valid JSON: {error.msg} at column {error.colno}."
        raise DataError(what, given=shown, allowed="one JSON object a line") from error
    except RecursionError as error:
        raise DataError("not valid JSON: nested too deeply.", given=shown) from error
    if not isinstance(record, dict):
        raise DataError("not a JSON object.", given=shown, allowed='an object, for example {"text": "..."}')
    return record


def _at(path: Path, line: int, error: DataError) -> DataError:
    """The same error, with its place in front."""
    return DataError(f"{path}:{line}: {error.what}", given=error.given, allowed=error.allowed, fix=error.fix)


def _nothing_left(report: DataReport, seq_len: int) -> DataError:
    if not report.records:
        return DataError("The data file has no records.", given=report.path, allowed="one JSON object a line")
    if not report.masked:
        return DataError(
            f"{report.path}: every example is longer than data.seq_len, and was dropped.",
            given=f"{report.records} records",
            allowed=f"{seq_len} tokens",
            fix="raise data.seq_len, or set data.overlong: truncate",
        )
    return DataError(
        f"{report.path}: no token of any example is in the loss, so there is nothing to learn.",
        given="; ".join(report.notes()),
        allowed="examples with an answer inside their first data.seq_len tokens",
        fix="raise data.seq_len, or set data.assistant_only: false",
    )
