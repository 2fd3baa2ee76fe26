import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

ASSETS = Path(__file__).parents[3] / "lowmem_ft" / "assets"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer, each test its own, so that it may change template and special tokens."""
    return AutoTokenizer.from_pretrained(ASSETS / "doclm-7m")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes records (objects, or raw lines) into a file."""

    def write(*records: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    return write
