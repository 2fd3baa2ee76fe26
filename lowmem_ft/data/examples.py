"""Records -> token ids with a loss mask, by the tokenizer's own rules and chat template."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import DataError
from lowmem_ft.core.sources import DataFormat, DataRole
from lowmem_ft.data.chat import ChatRenderer, RenderedChat
from lowmem_ft.data.formats import PREFERENCES, Completion, Conversation, RecordReader
from lowmem_ft.data.records import Progress, Row, read_rows
from lowmem_ft.data.tally import DataReport, Invalid, Overlong, Tally, WrongDataError
from lowmem_ft.data.template import Spans

IGNORE_INDEX = -100
# Characters of a text that is tokenized whole, however few of its tokens are wanted: it takes 150 bytes for each. Of a
# longer one some tokens more than are wanted show that they are those of the whole: what a cut changes lies near it.
WHOLE, BEHIND = 1 << 18, 64


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

    def cut(self, length: int) -> Example:
        """Its first `length` tokens; itself if it has no more."""
        return self if len(self) <= length else Example(self.input_ids[:length], self.labels[:length])


def bytes_in_loss(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase | None) -> int:
    """UTF-8 bytes of the text whose tokens are in the loss: what bits per byte are counted over, whatever the
    tokenizer. Special tokens, such as the one that ends an answer, are no text. 0 without a tokenizer."""
    if tokenizer is None:
        return 0
    kept = ([label for label in it.labels[1:] if label != IGNORE_INDEX] for it in examples)
    if tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return _bytes_of_tokens((token for ids in kept for token in ids), tokenizer)
    return sum(len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in kept)


def _bytes_of_tokens(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Of a tokenizer whose tokens are bytes, each written as one character: where text begins or is cut within a
    character, decoding would put another one of three bytes for what is left of it."""
    added = {index: "" if it.special else it.content for index, it in tokenizer.added_tokens_decoder.items()}
    total = 0
    for index, count in Counter(ids).items():
        one = len(added[index].encode()) if index in added else len(str(tokenizer.convert_ids_to_tokens(index)))
        total += count * one
    return total


def read_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    format: DataFormat = "auto",
    columns: Mapping[DataRole, str] | None = None,
    assistant_only: bool = True,
    overlong: Overlong = "truncate",
    invalid: Invalid = "error",
    progress: Progress | None = None,
) -> tuple[list[Example], DataReport]:
    """The examples of a file, in its order, at most `seq_len` tokens each, in memory; `store` has them on disk.

    Args:
        format: which keys a record has; `auto` looks at each record.
        columns: role -> column of the file.
        assistant_only: only the assistant's answers (or the completion), each with the token that ends it, are in
            the loss. Otherwise every token is. Records of plain text always train on every token.
        overlong: what to do with an example longer than `seq_len`: keep its beginning, leave it out, or stop.
        invalid: whether a record that cannot be used is an error, or skipped and counted.
        progress: called with (bytes read, bytes of the file) after each record.

    Raises:
        DataError: naming file and line: no such file, broken JSON, missing keys, wrong types, a conversation that
            the chat template refuses, an example too long with `overlong="error"`; a file without records, or one
            that leaves no token in the loss; preferences.
    """
    encoder = RecordEncoder(tokenizer, format=format, columns=columns, assistant_only=assistant_only, seq_len=seq_len)
    tally = Tally(str(path), seq_len=seq_len, overlong=overlong, invalid=invalid)
    examples = list(encode_rows(read_rows(Path(path), progress), encoder, tally))
    return examples, tally.report()


def encode_rows(rows: Iterable[Row], encoder: RecordEncoder, tally: Tally) -> Iterator[Example]:
    """The examples of `rows`, each as soon as it is known; `tally` counts them. Raises as `read_examples`."""
    for row in rows:
        for example in tally.attempt(row, encoder.encode_known) or ():
            if not tally.fits(row, len(example)):
                continue
            kept = example.cut(tally.seq_len)
            if not (loss_tokens := kept.loss_tokens):
                tally.masked_lines.append(row.number)
                continue
            unended = kept is example and not encoder.ends(example)
            silent = kept is example and encoder.says_nothing(example)
            tally.counts.update(examples=1, tokens=len(kept), loss_tokens=loss_tokens, unended=unended, silent=silent)
            yield kept
    tally.counts["unshown"] = encoder.chat.unshown
    encoder.reader.check_columns()


class RecordEncoder:
    """Turns records into examples.

    Args:
        tokenizer: whose rules and chat template apply.
        format, columns, assistant_only: as `read_examples` takes them.
        seq_len: tokens of an example that are wanted. A text of more than `WHOLE` characters gives its first ones, and
            some more by which it is known to be longer; None: all of them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: DataFormat = "auto",
        columns: Mapping[DataRole, str] | None = None,
        assistant_only: bool = True,
        seq_len: int | None = None,
    ) -> None:
        self.tokenizer, self.format, self.assistant_only = tokenizer, format, assistant_only
        self.seq_len = seq_len
        self.reader = RecordReader(format=format, columns=columns or {}, chat=bool(tokenizer.chat_template))
        self.chat = ChatRenderer(tokenizer)
        self.special_ids = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)

    def ends(self, example: Example) -> bool:
        """Whether the last token in the loss is a special one, from which a model learns to stop."""
        last = next((label for label in reversed(example.labels) if label != IGNORE_INDEX), None)
        return last in self.special_ids

    def says_nothing(self, example: Example) -> bool:
        """Whether special tokens alone are in the loss."""
        return example.loss_tokens <= 2 and self.special_ids.issuperset({*example.labels} - {IGNORE_INDEX})

    def encode(self, record: Mapping[str, Any]) -> list[Example]:
        """The examples of one record: one, or one per answer where the template shows answers differently later on.

        Raises:
            DataError: missing keys, wrong types, preferences, or a conversation that the chat template refuses.
        """
        return self.encode_known(record)[1]

    def encode_known(self, record: Mapping[str, Any]) -> tuple[str, list[Example]]:
        """The kind of a record, and its examples. Raises as `encode`."""
        content = self.reader.read(record)
        if content.good is None or (content.kind in PREFERENCES and self.format != "chosen"):
            raise _no_preferences(content.kind)
        return content.kind, self.examples(content.good)

    def examples(self, said: Conversation | Completion) -> list[Example]:
        """The examples of one conversation or completion."""
        if isinstance(said, Conversation):
            chats = self.chat.render(
                said.messages, tools=said.tools, answers_only=self.assistant_only, first=said.first
            )
            return [self._encode_chat(chat) for chat in chats]
        prompt = said.prompt or ""
        text = prompt + said.completion
        answers = [(len(prompt), len(text))] if said.prompt is not None and self.assistant_only else None
        return [self._encode_text(text, answers)]

    def _encode_chat(self, chat: RenderedChat) -> Example:
        """A template writes its own special tokens, BOS included: none are added."""
        return _labelled(*self._tokenize(chat.text, chat.answers, add_special_tokens=False))

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
        """Tokens of `text`, and which of them belong to `answers` (None: all of them)."""
        if answers is not None and not self.tokenizer.is_fast:
            raise DataError(
                "answers cannot be told from prompts: this tokenizer does not say which characters a token stands for.",
                given=type(self.tokenizer).__name__,
                allowed="a fast tokenizer (tokenizer.json)",
                fix="convert the tokenizer, or set data.assistant_only: false",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write halves of a character, which no tokenizer takes
            half = f"{text[error.start]!a} at character {error.start + 1}"
            raise DataError("the text is not Unicode: half of a surrogate pair stands alone.", given=half) from None
        length = len(text) if self.seq_len is None else max(WHOLE, 4 * self.seq_len)
        while True:
            encoding = self.tokenizer(
                text[:length],
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=answers is not None,
                verbose=False,
            )
            ids = array("i", encoding["input_ids"])
            if length >= len(text) or len(ids) > (self.seq_len or 0) + BEHIND:
                break
            length *= 2
        if answers is None:
            return ids, [True] * len(ids)
        special = [token in self.special_ids for token in ids]
        return ids, _in_spans(encoding["offset_mapping"], special, answers)


def _labelled(ids: array[int], kept: Sequence[bool]) -> Example:
    return Example(ids, array("i", [token if keep else IGNORE_INDEX for token, keep in zip(ids, kept, strict=True)]))


def _in_spans(offsets: Sequence[tuple[int, int]], special: Sequence[bool], spans: Spans) -> list[bool]:
    """Which tokens stand for a character of the (sorted) `spans`.

    Byte-level tokenizers may trim whitespace from offsets, which leaves a token of whitespace an empty range at its
    end: it then stands for what is between the token before and there. A special token that strips the spaces behind it
    (Phi-3's `<|assistant|>`) covers those that an answer begins with, and is no part of it.
    """
    kept = []
    previous_end = 0
    at = 0
    for (start, end), is_special in zip(offsets, special, strict=True):
        begin = start if start < end else previous_end
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        inside = at < len(spans) and begin < end and end > spans[at][0]
        kept.append(inside and not (is_special and begin < spans[at][0]))
        previous_end = max(previous_end, end)
    return kept


def _no_preferences(kind: str) -> WrongDataError:
    keys = "chosen and rejected answers" if kind == "preference" else "answers with a label, good or bad"
    chosen = "set train.objective: dpo to learn from both, or data.format: chosen to train on the chosen answers"
    return WrongDataError(
        "the record is a preference, of which supervised fine-tuning would learn the bad answers too.",
        given=keys,
        allowed="conversations, prompts with completions, texts",
        fix=chosen
        if kind == "preference"
        else "set train.objective: kto to learn from both, or data.format: prompt_completion or messages for all",
    )
