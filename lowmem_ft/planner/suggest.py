"""Values for a new config, from what the model, the data and the device are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.config import DataConfig, TrainConfig
from lowmem_ft.core.errors import DataError
from lowmem_ft.core.sizes import format_size
from lowmem_ft.core.sources import DataFormat, DataSource
from lowmem_ft.data.preview import Preview, preview
from lowmem_ft.data.records import Progress
from lowmem_ft.planner.device import Device

STEP = 256  # sequences are suggested in multiples of so many tokens
ROWS = 2000  # records that are looked at
UPDATES = 50  # that an epoch has at least, where its tokens suffice: with few, a warmup and a schedule mean nothing
LOOKS = 4  # evaluations and checkpoints of an epoch, at least: the best is one of several, and a crash costs less
SHARE = 0.9  # of what is free: the rest is for what else the machine does meanwhile


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """Of a data file.

    Attributes:
        seq_len: tokens, a multiple of `STEP` that holds the longest example that was looked at, or all positions of
            the model.
        format: the one that all records have, else `auto`.
        tokens: of an epoch; from the share of the file that was looked at, if that was not all.
        notes: what the user should know.
    """

    seq_len: int
    format: DataFormat
    tokens: int
    notes: tuple[str, ...]


def suggest_data(
    path: str, tokenizer: PreTrainedTokenizerBase, positions: int | None, *, progress: Progress | None = None
) -> Suggestion:
    """Look at the first records of a data file.

    Args:
        positions: that the model has; None for any number.

    Raises:
        DataError: the file cannot be read, or none of its records can be trained on.
    """
    data = DataConfig(seq_len=positions or 1 << 30)
    read = whole = 1

    def told(done: int, size: int) -> None:
        nonlocal read, whole
        read, whole = done, size
        if progress is not None:
            progress(done, size)

    found = preview(DataSource(path=path), data, tokenizer, rows=ROWS, samples=0, progress=told)
    kinds = list(found.formats)
    if not found.lengths:
        raise DataError(
            "The data file has no record that can be used.",
            given=f"{path}" + (f": {found.wrong[0]}" if found.wrong else ""),
            fix="`lowmem-ft data FILE data.columns.prompt=NAME ...` tries names of columns",
        )
    if "kto" in kinds or ("preference" in kinds and len(kinds) > 1):
        raise DataError(
            "Fine-tuning would learn these records' bad answers, too.",
            given=f"{path}: {', '.join(kinds)}",
            allowed="answers to learn, or preference records alone, of which the chosen ones are learnt",
            fix="to learn from preferences, write a config with train.objective: kto, or dpo for pairs",
        )
    longest = max(found.lengths)
    seq_len = -(-longest // STEP) * STEP
    if positions:
        seq_len = min(seq_len, positions)
    return Suggestion(
        seq_len=seq_len,
        format=_format(kinds),
        tokens=found.tokens if found.complete else found.tokens * whole // read,
        notes=tuple(_notes(found, longest, seq_len)),
    )


def suggest_step(tokens: int, seq_len: int) -> int:
    """Tokens of an update for an epoch of so many: the default, or less where it would leave few updates."""
    step: int = TrainConfig().tokens_per_step
    while tokens < UPDATES * step and step // 2 >= seq_len:
        step //= 2
    return max(step, seq_len)


def suggest_every(updates: int) -> int:
    """Updates from one evaluation, or checkpoint, to the next, for an epoch of so many: the default, or less where an
    epoch would have fewer than `LOOKS`."""
    most: int = TrainConfig().eval_every
    return max(1, min(most, updates // LOOKS))


def _format(kinds: list[str]) -> DataFormat:
    if kinds == ["preference"]:
        return "chosen"
    return next((known for known in get_args(DataFormat) if [known] == kinds), "auto")


def _notes(found: Preview, longest: int, seq_len: int) -> list[str]:
    looked = f"{found.records} records" if found.complete else f"the first {found.records} records"
    notes = [f"{found.name}: {looked}, format {', '.join(found.formats)}, the longest example has {longest} tokens"]
    over = sum(length > seq_len for length in found.lengths)
    if over:
        notes.append(f"{over} of them are longer than the {seq_len} tokens that the model has positions for: cut there")
    if found.unusable:
        notes.append(f"{found.unusable} cannot be used: `lowmem-ft data` shows why; data.invalid: skip leaves them out")
    if found.formats["preference"]:
        notes.append("the chosen answers are learnt")
    return notes


def suggest_budget(device: Device) -> str:
    """`SHARE` of what is free on the device, in whole GiB, or MiB where that is little."""
    size = int(device.free_bytes * SHARE)
    return f"{size >> 30}GiB" if size >= 4 << 30 else f"{size >> 20}MiB"


def free_words(device: Device) -> str:
    """`rtx 3060: 11.2 GiB free`"""
    return f"{device.name}: {format_size(device.free_bytes)} free"
