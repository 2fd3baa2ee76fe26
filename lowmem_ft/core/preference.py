"""What a run learns from preferences: which objectives there are, what each reads, and what does not go with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowmem_ft.core.errors import ConfigError

if TYPE_CHECKING:
    from lowmem_ft.core.config import RunConfig

# objective -> the keys of `preference` that it reads, and what they are where none is given. Those of simpo are its
# paper's (arXiv:2405.14734), the others those that TRL has, too.
KEYS: Mapping[str, Mapping[str, float]] = {
    "sft": {},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "ipo": {"beta": 0.1},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
}
WITH_REFERENCE = frozenset({"dpo", "ipo", "kto"})  # they compare with the base, its adapters off


def learns_preferences(config: RunConfig) -> bool:
    """Whether a run learns from preferences, not from answers."""
    return config.train.objective != "sft"


def lanes(config: RunConfig) -> int:
    """Rows that belong together in a micro-batch: two where each pair has its better answer in one and its worse in
    the other."""
    return 1 if config.train.objective in ("sft", "kto") else 2


def counted(config: RunConfig) -> str:
    """What a run's examples are, over which losses of preferences are means; a word in the plural."""
    return {"sft": "examples", "kto": "answers"}.get(config.train.objective, "pairs")


def step_tokens(config: RunConfig) -> int:
    """Positions of a step in full rows, as `data.loader` fills them: those of so many rows as fit, at least one."""
    together = lanes(config) * config.data.seq_len
    return max(1, config.train.tokens_per_step // together) * together


def settings_of(config: RunConfig) -> dict[str, float]:
    """What the objective reads, with its defaults."""
    return {**KEYS[config.train.objective], **_given(config)}


def check_objective(config: RunConfig) -> None:
    """Hold `train.objective` against the rest of the config.

    Raises:
        ConfigError: keys or data of another objective, or a part of the reference is trained.
    """
    objective, known, given = config.train.objective, KEYS[config.train.objective], _given(config)
    foreign = next((key for key in given if key not in known), None)
    if foreign is not None:
        readers = [name for name, keys in KEYS.items() if foreign in keys]
        raise ConfigError(
            f"preference.{foreign} does not concern train.objective: {objective}.",
            given=f"preference.{foreign}: {given[foreign]}",
            allowed=", ".join(f"preference.{key}" for key in known) or "no key of preference",
            fix=f"remove it, or set train.objective: {' or '.join(readers)}",
        )
    if not learns_preferences(config):
        return
    formats = ("auto", "preference", "kto") if objective == "kto" else ("auto", "preference")
    if config.data.format not in formats:
        raise ConfigError(
            f"train.objective: {objective} learns from preferences, and data.format says that there are none.",
            given=f"data.format: {config.data.format}",
            allowed=", ".join(formats),
            fix="remove data.format, or set train.objective: sft",
        )
    if not config.data.assistant_only and objective != "orpo":
        warnings.warn(f"data.assistant_only: false has no effect on {objective}, which weighs answers", stacklevel=3)
    if objective in WITH_REFERENCE:
        _check_reference(config)


def _given(config: RunConfig) -> dict[str, float]:
    return {key: value for key, value in config.preference.model_dump().items() if value is not None}


def _check_reference(config: RunConfig) -> None:
    """What is trained in place would change the reference, too; so would a copy of the head, which stays in use."""
    objective, adapter, peft = config.train.objective, config.adapter, config.adapter.peft or {}
    biases = {"bias": adapter.bias, "peft.bias": peft.get("bias", "none")}
    trained: dict[str, Any] = {key: value for key, value in biases.items() if value != "none"}
    modules = {"train_modules": adapter.train_modules, "peft.modules_to_save": peft.get("modules_to_save")}
    trained |= {key: value for key, value in modules.items() if value}
    for key, value in trained.items():
        raise ConfigError(
            f"The reference of {objective} is the base with its adapters off; adapter.{key} would train a part of it.",
            given=f"adapter.{key}: {value}",
            fix=f"remove adapter.{key}, or set train.objective to simpo or orpo, which have no reference",
        )
