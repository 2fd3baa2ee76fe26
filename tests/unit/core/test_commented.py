"""A config with comments: every key has one, and it loads back as it was."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem_ft.core.commented import COMMENTS, commented_yaml
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.config_words import keys_of

RICH: dict[str, Any] = {
    "model": "a: 'b' # c",
    "quant": {"bits": "auto"},
    "adapter": {
        "targets": ["q_proc", "re:.*, x"],
        "rank_pattern": {"a.b": 3},
        "alpha_pattern": {"[x]": 2.5},
        "layers": [0, 3],
        "init": "no",
    },
    "budget": {"memory": "1.5GiB", "host": 123456789},
    "data": {
        "train": ["a b.jsonl", {"path": "owner/name", "weight": 0.5, "columns": {"prompt": "x, {y}"}}],
        "eval": "ünï.jsonl",
        "columns": {"prompt": "1"},
        "cache": None,
    },
    "train": {"lr": 1e-7, "max_time": "3h", "grad_clip": None, "steps": 7},
    "policy": {"objective": "memory", "keep_attention": True, "mlp_tile_tokens": 0},
    "output": "runs/a b: c",
}


def test_every_key_has_a_comment_and_nothing_else_has() -> None:
    assert list(COMMENTS) == keys_of(RunConfig)
    assert all(text.strip() and "\n" not in text for text in COMMENTS.values())


@pytest.mark.parametrize("given", [{"model": "m"}, RICH], ids=["defaults", "rich"])
def test_it_loads_back_equal(given: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.from_dict(given)
    text = commented_yaml(config)
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert RunConfig.load(tmp_path / "c.yaml") == config
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == len(COMMENTS), "a line for every key"
    for line, (key, words) in zip(lines, COMMENTS.items(), strict=True):
        assert line.endswith(f"  # {words}")
        assert line.strip().startswith(f"{key.rpartition('.')[2]}:")


def test_sizes_as_people_write_them() -> None:
    text = commented_yaml(RunConfig.from_dict(RICH))
    assert "memory: 1536MiB" in text
    assert yaml.safe_load(text)["budget"]["host"] == 123456789


def test_a_peft_method_loads_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Keys of LoRA are written at their defaults."""
    config = RunConfig.from_dict({"model": "m", "adapter": {"method": "peft", "peft": {"peft_type": "IA3"}}})
    assert RunConfig.from_dict(yaml.safe_load(commented_yaml(config))) == config
    assert not recwarn.list
