"""Whether an exported model is the trained one: logits against logits, on held-out text.

KL is the mean over tokens of sum_v p(v) ln(p(v) / q(v)), p of the reference and q of what is checked, in nats.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_ft.assemble import load_tokenizer
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import DataError, ParityError
from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.core.positions import positions_of
from lowmem_ft.core.preference import learns_preferences
from lowmem_ft.data.reading import read_preferences, read_sources
from lowmem_ft.data.records import SUFFIXES
from lowmem_ft.quant.checkpoint import Checkpoint

TOKENS = 1024  # that are compared, if the vocabulary is not larger than
LOGITS_BYTES = 128 << 20  # lets it be, in 16 bits: three such pieces exist when two bases are compared
SEQUENCE = 256
CLEAR = 0.1
RECORDS = {*SUFFIXES, ".jsonl"}
CHUNK = 64  # tokens whose probabilities exist at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Token ids of a few sequences, and in words where they are from."""

    sequences: Sequence[Sequence[int]]
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The most that an export may differ from its reference: `kl` in nats, and the least share of equal top tokens,
    where the reference's is clear."""

    kl: float
    top1: float


# Measured with the package's own model after the demo's 60 steps (NF4, bf16 compute, 1024 held-out tokens, an AMD EPYC,
# 2026-11-25): merged into either base 1.1e-4 to 1.2e-4 and 99.8% in fp32 and fp16, 1.7e-4 to 1.8e-4 and 99.6% in bf16,
# nearly all of it the roundings of two ways to compute in bf16; GGUF's q8_0 2.3e-4 and 99.5%; quantized again to 8 bits
# 2.7e-4 and 99.3%; to NF4 and FP4 from the original base 0.014 to 0.032 and 88%, q5_1 2.3e-3 and 97.6%, q4_0 0.012 and
# 88%. With 1.1B random weights, which make hardly any token likelier than others, in bf16 4.6e-4 and 95%. Allowed is
# about ten times the largest, and for 4 bits, where a lost adapter shows as 0.057 and 76%, less. Of top tokens those
# count that are clear in the reference: 100% were equal in bf16, q8_0 and 8 bits, 95% in NF4 and 94% in q4_0.
SIXTEEN_BITS = Bound(kl=4e-3, top1=0.97)
# Some models move further by rounding alone: tiny Gemmas with large norms of q and k in bf16 by up to 7.5e-3 and 85%.
# Merged, they were 0.3 to 2.2 times as far from what was trained as from themselves in fp32 (KL; 28 merges of tiny
# llama, qwen3, gemma3 and gpt_oss in bf16 and fp16, 2026-11-26), without the adapter of one matrix 7 to 8000 times.
# Three times that is allowed, up to a limit that a lost adapter would exceed.
ROUNDINGS = 3
ROUNDED_MOST = Bound(kl=2e-2, top1=0.8)
EIGHT_BITS = Bound(kl=6e-3, top1=0.95)
FOUR_BITS = Bound(kl=5e-2, top1=0.8)
# What 4 bits do differs from model to model, and small ones lose most. A run that was trained on 4 bits has measured
# it: up to three times that is allowed. Of others nothing is known: four times the above.
UNMEASURED_FOUR_BITS = Bound(kl=0.2, top1=0.6)
# Of tiny models that computed in fp32, where only the order of sums differs: up to 7e-14 and 100%.
THIRTY_TWO_BITS = Bound(kl=1e-6, top1=0.99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far a model is from its reference.

    Attributes:
        kl: mean over the tokens, in nats.
        kl_most: of one token.
        top1: share of tokens for which both hold the same next token for the likeliest.
        tokens: compared.
        clear_top1: the same, where the reference's likeliest token is ahead of the next by more than CLEAR nats; models
            that are undecided change their mind with every rounding.
        clear: how many tokens that is the share of.
    """

    kl: float
    kl_most: float
    top1: float
    tokens: int
    clear_top1: float = 1.0
    clear: int = TOKENS

    def __str__(self) -> str:
        return f"KL {self.kl:.2e} nats per token (at most {self.kl_most:.2e}), same top token {self.top1:.2%}"

    def is_within(self, bound: Bound) -> bool:
        """One token may always be another: of few it is a large share."""
        others = round((1 - self.clear_top1) * self.clear)
        return self.kl <= bound.kl and (self.clear_top1 >= bound.top1 or others <= 1)

    def check(self, bound: Bound, *, what: str, fix: str | None = None) -> None:
        """Raise ParityError if this is beyond `bound`."""
        if not self.is_within(bound):
            raise ParityError(
                f"{what} does not compute what it should: nothing was kept.",
                given=f"{self}, where it is clear {self.clear_top1:.2%}",
                allowed=f"KL up to {bound.kl:g}, same top token, where it is clear, for at least {bound.top1:.1%}",
                fix=fix
                or "a bug of lowmem-ft, or a model whose logits move that far by rounding alone: please report it",
            )


def sixteen_bits(rounding: Parity) -> Bound:
    """What may be lost by 16 bits in a model that moves far by rounding.

    Args:
        rounding: of what is checked, computed in fp32 beside itself.
    """
    return Bound(
        kl=max(SIXTEEN_BITS.kl, min(ROUNDED_MOST.kl, ROUNDINGS * rounding.kl)),
        top1=min(SIXTEEN_BITS.top1, max(ROUNDED_MOST.top1, 1 - ROUNDINGS * (1 - rounding.clear_top1))),
    )


def four_bits(between: Parity | None) -> Bound:
    """What may be lost by quantizing again to 4 or 5 bits.

    Args:
        between: of a run that was trained on 4 bits, the adapter on the original base beside the trained model.
    """
    if between is None:
        return UNMEASURED_FOUR_BITS
    return Bound(kl=max(FOUR_BITS.kl, 3 * between.kl), top1=min(FOUR_BITS.top1, between.clear_top1 - 0.1))


def held_out(config: RunConfig, base: Checkpoint, text: Path | None = None) -> HeldOut:
    """What to compare on: `text` (records, where the kind of file has them, else plain text), else `data.eval`, else
    text of the package.

    Without a tokenizer of the `base` model: random tokens, always the same.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    tokenizer = load_tokenizer(base)
    if tokenizer is None:
        vocabulary = base.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (2, 64), generator=generator).tolist()
        return HeldOut(sequences=ids, origin="random tokens, as the model has no tokenizer")
    most = min(TOKENS, max(2, LOGITS_BYTES // (2 * len(tokenizer))))
    longest = min(SEQUENCE, positions_of(base.config) or SEQUENCE)
    sources = config.data.held_out if text is None else str(text) if text.suffix.lower() in RECORDS else None
    if sources:
        records = _read_records(config, sources, tokenizer, most, longest=longest, own=text is None)
        return HeldOut(sequences=few(records, most), origin="data.eval" if text is None else str(text))
    if text is not None:
        try:
            content, origin = text.read_text(encoding="utf-8"), str(text)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("The text to check on cannot be read.", given=f"{text} ({error})") from error
    else:
        lines = (files("lowmem_ft") / "assets" / "whatis-eval.jsonl").read_text(encoding="utf-8").splitlines()
        turns = [turn["content"] for line in lines[:400] for turn in json.loads(line)["messages"]]
        content, origin = "\n".join(turns), "held-out text of the package"
    ids = tokenizer(content[: 16 * TOKENS], verbose=False)["input_ids"]
    if len(ids) < 2:
        raise DataError("There is no text to check on.", given=origin, allowed="two tokens or more")
    return HeldOut(sequences=few([ids[at : at + longest] for at in range(0, len(ids), longest)], most), origin=origin)


def _read_records(
    config: RunConfig, sources: Any, tokenizer: Any, most: int, *, longest: int, own: bool
) -> list[Sequence[int]]:
    """Up to `longest` token ids of each of up to `most` records, of the run's `own` data or of a file whose format is
    found out."""
    data = config.data.model_copy(update={"cache": None})
    common: dict[str, Any] = {"use": "eval", "task": lambda _: nullcontext(lambda *_: None)}
    try:
        if own and learns_preferences(config):  # whole rows: a shorter one may not hold an answer
            answers, _ = read_preferences(sources, data, tokenizer, wanted="verdicts", **common)
            some = (answers[at] for at in range(min(len(answers), most)))
            return [it.input_ids[:longest] for pair in some for it in pair.documents]
        changes = {"seq_len": longest, "assistant_only": False, "overlong": "truncate"}
        changes |= {} if own else {"format": "auto", "columns": {}}
        examples, _ = read_sources(sources, data.model_copy(update=changes), tokenizer, **common)
        return [examples[at].input_ids for at in range(min(len(examples), most))]
    except DataError as error:
        fix = "name what to check on with --text FILE: records, or plain text in a file such as FILE.txt"
        raise DataError(error.what, given=error.given, allowed=error.allowed, fix=fix) from error


def few(sequences: Sequence[Sequence[int]], most: int) -> list[Sequence[int]]:
    """The first `most` tokens of all."""
    chosen: list[Sequence[int]] = []
    left = most
    for ids in sequences:
        if left > 0 and len(ids) > 1:
            chosen.append(ids[:left])
            left -= len(ids)
    return chosen


@torch.no_grad()
def logits_of(model: Any, text: HeldOut) -> list[Tensor]:
    """Of each sequence (T, V), on the host, in the model's own dtype."""
    device = next(model.parameters()).device
    found = []
    for ids in text.sequences:
        given = torch.tensor([list(ids)], dtype=torch.int64, device=device)
        output: Tensor = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits
        found.append(output[0].detach().cpu())
    return found


def compare(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Parity:
    """Logits of the same sequences, each (T, V). A vocabulary that was padded at its end is compared without that."""
    total, most, same, tokens, clear, kept = 0.0, 0.0, 0, 0, 0, 0
    for ref_TV, other_TV in zip(reference, other, strict=True):
        shared = min(ref_TV.shape[-1], other_TV.shape[-1])
        for p_TV, q_TV in zip(ref_TV[:, :shared].split(CHUNK), other_TV[:, :shared].split(CHUNK), strict=True):  # type: ignore[no-untyped-call]
            log_p, log_q = p_TV.double().log_softmax(-1), q_TV.double().log_softmax(-1)
            kl_T = (log_p.exp() * (log_p - log_q)).sum(-1)
            total += kl_T.sum().item()
            most = max(most, kl_T.max().item()) if kl_T.isfinite().all() else math.inf
            same_T, top_T2 = _agreements(p_TV, q_TV), log_p.topk(2, dim=-1).values
            clear_T = top_T2[:, 0] - top_T2[:, 1] > CLEAR
            same += int(same_T.sum())
            clear += int(clear_T.sum())
            kept += int((same_T & clear_T).sum())
            tokens += len(kl_T)
    kl = max(0.0, total / tokens) if math.isfinite(total) else math.inf  # of NaN and 0, max takes 0
    clear_top1 = kept / clear if clear else 1.0
    return Parity(kl=kl, kl_most=most, top1=same / tokens, tokens=tokens, clear_top1=clear_top1, clear=clear)


def _agreements(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """(T,) whether the likeliest next token is the same; of equals in the reference (16 bits have many) any will do."""
    chosen_T = q_TV.argmax(-1, keepdim=True)
    return (p_TV.gather(-1, chosen_T) >= p_TV.amax(-1, keepdim=True)).squeeze(-1)


def tidy() -> None:
    """Give back the memory of a model that nobody holds any more."""
    gc.collect()
    release_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
