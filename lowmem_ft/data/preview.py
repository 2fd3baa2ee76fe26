"""What a data file holds and what training would see of it."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.config import DataConfig, Objective
from lowmem_ft.core.errors import DataError
from lowmem_ft.core.sources import DataSource
from lowmem_ft.data.examples import IGNORE_INDEX, Example, RecordEncoder
from lowmem_ft.data.formats import PREFERENCES
from lowmem_ft.data.packing import pack
from lowmem_ft.data.preference import cut_preference, encode_preference, no_pair
from lowmem_ft.data.records import Progress, Row, at
from lowmem_ft.data.sources import find_source
from lowmem_ft.data.tally import Overlong, WrongDataError

COLUMN_ROWS = 100  # whose columns and types are listed
WRONG_ROWS = 10  # told one by one
BARS = 10  # of the histogram
Segments = list[tuple[str, bool]]  # runs of text, and whether they are in the loss


@dataclass(kw_only=True)
class Preview:
    """Counts over the records that were looked at.

    Attributes:
        complete: whether these are all records.
        columns: name -> types that its values have in the first records.
        formats: kind -> records.
        wrong: what is wrong with the first records that cannot be used; `unusable` counts all.
        pairs, answers: of preferences, whose answers are the examples.
        lengths: tokens of each example, before it is cut.
        used: tokens of those that are trained on, as they are then.
        loss_tokens: of those that are trained on.
        overlong: what becomes of the `truncated` examples, which are longer than `seq_len`. A pair of answers is
            dropped as a whole; both count then.
        masked: examples without a token in the loss.
        unshown: messages whose reasoning the chat template leaves out.
        endings: text of the last token of an answer -> examples.
        samples: the first examples, cut to `seq_len`: (name, runs of text).
    """

    name: str
    seq_len: int
    overlong: Overlong
    complete: bool = True
    records: int = 0
    columns: dict[str, Counter[str]] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    answers: int = 0
    unusable: int = 0
    wrong: list[str] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    used: array[int] = field(default_factory=lambda: array("i"))
    loss_tokens: int = 0
    truncated: int = 0
    masked: int = 0
    unshown: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[str, Segments]] = field(default_factory=list)

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, examples): lengths in `BARS` ranges of the same width, both ends included."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, -(-(high - low + 1) // BARS))
        counts = np.bincount((np.asarray(self.lengths) - low) // width).tolist()
        return [(low + i * width, low + (i + 1) * width - 1, count) for i, count in enumerate(counts)]

    @property
    def unit(self) -> str:
        """What an example is: `answers` of pairs or with a verdict, else `examples`."""
        return "answers" if self.answers == len(self.lengths) > 0 else "examples"

    @property
    def tokens(self) -> int:
        """Of the examples that are trained on."""
        return sum(self.used)

    def packed(self) -> tuple[int, float]:
        """Rows of `seq_len` tokens that hold all examples that are used, and how full they are."""
        if not self.used:
            return 0, 0.0
        rows = len(pack(np.asarray(self.used, np.int32), capacity=self.seq_len, seed=0))
        return rows, self.tokens / (rows * self.seq_len)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        lengths = np.asarray(self.lengths)
        rows, full = self.packed()
        return {
            "path": self.name,
            "complete": self.complete,
            "records": self.records,
            "unusable": self.unusable,
            "wrong": self.wrong,
            "formats": dict(self.formats),
            "columns": {name: sorted(types) for name, types in self.columns.items()},
            "examples": len(lengths),
            "unit": self.unit,
            "pairs": self.pairs,
            "seq_len": self.seq_len,
            "tokens": self.tokens,
            "used": len(self.used),
            "loss_tokens": self.loss_tokens,
            "loss_share": self.loss_tokens / self.tokens if self.tokens else 0.0,
            "truncated": self.truncated,
            "truncated_share": self.truncated / len(lengths) if len(lengths) else 0.0,
            "masked": self.masked,
            "unshown": self.unshown,
            "length": {
                name: int(np.quantile(lengths, share, method="inverted_cdf")) if len(lengths) else 0
                for name, share in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))
            },
            "histogram": [{"from": low, "to": high, "examples": count} for low, high, count in self.histogram()],
            "packed_rows": rows,
            "packed_share": full,
            "endings": dict(self.endings),
            "samples": [
                {"what": name, "parts": [{"text": text, "loss": loss} for text, loss in runs]}
                for name, runs in self.samples
            ],
        }


def preview(
    source: DataSource,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: Objective | None = None,
    rows: int | None,
    samples: int,
    progress: Progress | None = None,
) -> Preview:
    """Look at the first `rows` records of `source` (None: all), and show the first examples of `samples` of them.

    Records that cannot be used are collected. Of preferences, both answers count as examples.

    Args:
        objective: what training would read them for; None: whatever they are for.

    Raises:
        DataError: the file cannot be read, holds records that are not for `objective`, or no record has a column.
    """
    found = Preview(name=source.path, seq_len=data.seq_len, overlong=data.overlong)
    encoder = RecordEncoder(
        tokenizer,
        format=source.format or data.format,
        columns=data.columns if source.columns is None else source.columns,
        assistant_only=data.assistant_only or objective not in (None, "sft"),  # as `read_preferences`
        seq_len=data.seq_len,
    )
    for row in find_source(source, "train").rows(progress):
        if found.records == rows:
            found.complete = False
            break
        found.records += 1
        try:
            examples, together = _encoded(row, encoder, objective, found)
        except WrongDataError as error:
            raise at(row.place, error) from error
        except DataError as error:
            found.unusable += 1
            if len(found.wrong) < WRONG_ROWS:
                found.wrong.append(str(at(row.place, error)))
            continue
        shown = found.records - found.unusable <= samples
        longest = max((len(example) for _, example in examples), default=0)
        for what, example in examples:
            whole = (longest if together and data.overlong != "truncate" else len(example)) <= data.seq_len
            _count(example, found, encoder, whole=whole)
            if shown:
                name = f"{row.place} {what}".rstrip()
                found.samples.append((name, segments(example.cut(data.seq_len), tokenizer)))
    found.unshown = encoder.chat.unshown
    if found.complete:
        encoder.reader.check_columns()
    return found


def _encoded(
    row: Row, encoder: RecordEncoder, objective: Objective | None, found: Preview
) -> tuple[list[tuple[str, Example]], bool]:
    """(what it is, example) of a record, and whether these are used together or not at all."""
    if isinstance(row.record, DataError):
        raise row.record
    if found.records <= COLUMN_ROWS:
        for name, value in row.record.items():
            found.columns.setdefault(name, Counter())[_type(value)] += 1
    if objective is None:
        learnt = encoder.format == "chosen" or encoder.reader.read(row.record).kind not in PREFERENCES
    else:
        learnt = objective == "sft"
    if learnt:
        kind, examples = encoder.encode_known(row.record)
        found.formats[kind] += 1
        return [("", example) for example in examples], False
    kind, pair = encode_preference(encoder, row.record)
    if kind == "kto" and objective not in (None, "kto"):
        raise no_pair()
    if found.overlong == "truncate" or max(map(len, pair.documents)) <= found.seq_len:
        cut_preference(pair, found.seq_len)  # which training would refuse
    found.formats[kind] += 1
    found.pairs += pair.label is None
    found.answers += len(pair.documents)
    named = [("chosen", pair.chosen), ("rejected", pair.rejected)]
    return [(what, example) for what, example in named if example is not None], True


def _count(example: Example, found: Preview, encoder: RecordEncoder, *, whole: bool) -> None:
    found.lengths.append(len(example))
    found.truncated += not whole
    kept = example.cut(found.seq_len)
    if found.overlong == "truncate" or whole:
        found.masked += not kept.loss_tokens
        if kept.loss_tokens:
            found.used.append(len(kept))
            found.loss_tokens += kept.loss_tokens
    last = next((label for label in reversed(example.labels) if label != IGNORE_INDEX), None)
    if last is not None:
        ending = str(encoder.tokenizer.decode([last])) if encoder.ends(example) else "no special token"
        found.endings[ending] += 1


def segments(example: Example, tokenizer: PreTrainedTokenizerBase) -> Segments:
    """Its tokens as text, in runs that are in the loss or not. The first token is predicted from nothing: it is not."""
    in_loss = [False, *(label != IGNORE_INDEX for label in example.labels[1:])]
    runs = groupby(zip(example.input_ids, in_loss, strict=True), key=lambda pair: pair[1])
    return [(str(tokenizer.decode([token for token, _ in run])), loss) for loss, run in runs]


def _type(value: Any) -> str:
    names = {bool: "true or false", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    if value is None:
        return "null"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"list of objects ({', '.join(value[0])})"
    return names.get(type(value), type(value).__name__)
