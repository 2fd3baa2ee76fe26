"""What the model says to held-out prompts, as it is at an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.preference import learns_preferences
from lowmem_ft.data.examples import IGNORE_INDEX, Example
from lowmem_ft.generate import answer_ends, complete
from lowmem_ft.trainer.recovery import Recovery


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out prompt, and what the data has behind it; both as token ids."""

    prompt: Sequence[int]
    answer: Sequence[int]


def prompts_of(examples: Iterable[Example], count: int, *, length: int) -> list[Asked]:
    """The prompts of the first `count` examples that have one, of the last `length` tokens at most.

    A prompt is what stands before the first answer in the loss; of text that is in the loss from its beginning, the
    first half.
    """
    found: list[Asked] = []
    for example in examples:
        if len(found) == count:
            break
        ids, labels = example.input_ids, example.labels
        first = next((at for at in range(1, len(ids)) if labels[at] != IGNORE_INDEX), len(ids))
        begin = first if first > 1 else len(ids) // 2
        end = next((at for at in range(begin, len(ids)) if labels[at] == IGNORE_INDEX), len(ids))
        if 0 < begin < end:
            found.append(Asked(ids[max(0, begin - length) : begin], ids[begin:end]))
    return found


def samples(recovery: Recovery, config: RunConfig, examples: Sequence[Any]) -> list[dict[str, str]]:
    """Prompt, answer and reference of `eval.samples` held-out prompts; none where memory does not suffice.

    Prompt and answer together have at most `data.seq_len` tokens: the plan counts the cache of so many.
    """
    settings, ready = config.eval, recovery.ready
    if not settings.samples or ready.tokenizer is None:
        return []
    tokenizer: PreTrainedTokenizerBase = ready.tokenizer
    given: Iterable[Example] = examples
    if learns_preferences(config):
        given = (it.documents[0] for it in examples)
    asked = prompts_of(given, settings.samples, length=config.data.seq_len - settings.max_new_tokens)
    prompts, ends = [it.prompt for it in asked], answer_ends(tokenizer)
    answers = recovery.optional(
        lambda: complete(ready.model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, ends=ends),
        "samples (eval.samples)",
    )
    # the pieces in which a cache grew are of sizes that a step has no use for; on a CPU it begins without them
    if ready.device.type == "cuda":
        torch.cuda.empty_cache()

    def text(ids: Any) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    return [
        {"prompt": text(it.prompt), "answer": answer.strip(), "reference": text(it.answer)}
        for it, answer in zip(asked, answers or (), strict=answers is not None)
    ]


def in_one_line(sample: dict[str, str]) -> str:
    """A sample in one line."""
    return " ".join(f"{sample['prompt']} -> {sample['answer'] or '(nothing)'}".split())
