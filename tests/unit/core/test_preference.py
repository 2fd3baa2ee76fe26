"""Objectives that learn from preferences: what each reads, and what does not go with it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import yaml

from lowmem_ft.core.config import PreferenceConfig, RunConfig, TrainConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.preference import KEYS, lanes, settings_of


def preferring(objective: str, **sections: Any) -> RunConfig:
    return RunConfig.from_dict({"model": "m", "train": {"objective": objective}, **sections})


def test_objectives_and_their_keys() -> None:
    assert settings_of(preferring("dpo")) == {"beta": 0.1, "label_smoothing": 0.0}
    assert settings_of(preferring("simpo", preference={"gamma": 0})) == {"beta": 2, "gamma": 0, "label_smoothing": 0}
    assert [lanes(preferring(name)) for name in KEYS] == [1, 2, 2, 2, 2, 1]
    config = preferring("kto", preference={"undesirable_weight": 2})
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config, "what is null is not given"
    assert set(KEYS) == set(get_args(TrainConfig.model_fields["objective"].annotation))
    read = {key for keys in KEYS.values() for key in keys}
    assert read == set(PreferenceConfig.model_fields), "every key is read by an objective"


@pytest.mark.parametrize(
    ("objective", "sections", "match"),
    [
        ("sft", {"preference": {"beta": 0.1}}, r"preference\.beta does not concern train\.objective: sft"),
        (
            "dpo",
            {"preference": {"gamma": 1}},
            r"preference\.gamma: 1\.0\n.*beta, preference.label_smo.*\n.*simpo",
        ),
        ("simpo", {"preference": {"desirable_weight": 1}}, r"set train\.objective: kto"),
        ("dpo", {"preference": {"label_smoothing": 0.5}}, r"preference\.label_smoothing"),
        ("dpo", {"preference": {"beta": 0}}, r"preference\.beta"),
        ("dpo", {"data": {"format": "chosen"}}, r"data\.format: chosen"),
        ("dpo", {"data": {"format": "kto"}}, r"data\.format: kto"),
        ("kto", {"adapter": {"bias": "all"}}, r"adapter\.bias would train a part of it"),
        ("ipo", {"adapter": {"train_modules": ["lm_head"]}}, r"adapter\.train_modules: \['lm_head'\]"),
        ("dpo", {"adapter": {"method": "peft", "peft": {"peft_type": "LORA", "bias": "all"}}}, r"adapter\.peft\.bias"),
        (
            "dpo",
            {"adapter": {"method": "peft", "peft": {"peft_type": "LORA", "modules_to_save": ["lm_head"]}}},
            r"adapter\.peft\.modules_to_save",
        ),
        ("ppo", {}, r"sft \| dpo \| ipo \| orpo \| simpo \| kto"),
    ],
)
def test_what_does_not_go_with_an_objective(objective: str, sections: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        preferring(objective, **sections)


def test_what_an_objective_ignores_is_said() -> None:
    with pytest.warns(UserWarning, match="assistant_only: false has no effect on dpo"):
        preferring("dpo", data={"assistant_only": False})
    preferring("orpo", data={"assistant_only": False}, adapter={"init": "runs/first/adapter", "bias": "all"})
