"""Where nothing fits: the cheapest changes of the config that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Change
from lowmem_ft.planner.answer import Answer

Smallest = Callable[[RunConfig], Answer | None]
COUNT = 3
SHORTEST = 256  # tokens of a sequence
LOWEST_RANK = 4


def cheapest_changes(config: RunConfig, smallest: Smallest) -> tuple[Change, ...]:
    """Up to three single changes that fit, what costs quality least first; else the first sum of them that fits.

    Args:
        smallest: the answer for a config's smallest policy, exact; None if that does not fit.
    """
    fitting: list[Change] = []
    for group in _groups(config):
        least = _least(config, group, smallest)
        if least is not None:
            fitting.append(least)
        if len(fitting) == COUNT:
            return tuple(fitting)
    return tuple(fitting) or _together(config, smallest)


def _least(config: RunConfig, group: Sequence[tuple[str, Any]], smallest: Smallest) -> Change | None:
    """The smallest change of a key that fits. Larger ones take less: where the last does not fit, none does, and most
    often it is that or the first. To ask for one takes half a second."""

    def of(change: tuple[str, Any]) -> Change | None:
        answer = smallest(_changed(config, *change))
        return None if answer is None else _change(*change, answer)

    found = of(group[0])
    if found is None and of(group[-1]) is not None:
        found = next(filter(None, map(of, group[1:])))
    return found


def _together(config: RunConfig, smallest: Smallest) -> tuple[Change, ...]:
    """The farthest change of every key, one after the other, until it fits."""
    before = ""
    for group in _groups(config):
        *_, (key, value) = group
        config = _changed(config, key, value)
        answer = smallest(config)
        if answer is not None:
            return (_change(before + key, value, answer),)
        before += f"{key}={value} "
    return ()


def _change(key: str, value: Any, answer: Answer) -> Change:
    speed = answer.tokens / answer.weighed.seconds
    return Change(key=key, value=value, process_peak_bytes=answer.process, tokens_per_second=speed)


def _groups(config: RunConfig) -> Iterator[list[tuple[str, Any]]]:
    """Changes by key, small ones first; the keys whose change costs the result least come first."""
    groups: list[list[tuple[str, Any]]] = [
        [("train.optimizer", config.train.optimizer + "8bit")] if not config.train.optimizer.endswith("8bit") else [],
        [("quant.bits", bits) for bits in (8, 4) if config.quant.bits != "auto" and bits < config.quant.bits],
        [("data.seq_len", length) for length in _shorter(config)],
        [("adapter.rank", rank) for rank in _halved(config.adapter.rank, LOWEST_RANK)]
        if config.adapter.method == "lora"
        else [],
    ]
    yield from (group for group in groups if group)


def _shorter(config: RunConfig) -> list[int]:
    """Lengths of sequences that leave room for a sample's prompt; none where the plan finds the length itself."""
    if config.policy.objective == "context":
        return []
    room = config.eval.max_new_tokens + 1 if config.eval.samples else 0
    return _halved(config.data.seq_len, max(SHORTEST, room))


def _halved(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    section, _, name = key.partition(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
