"""Positions that a model was made for, and models that look them up in a table and compute nothing behind its end."""

from __future__ import annotations

import itertools
from typing import Any

_OFFSET = 8  # rows that a table may have beside those of positions: OPT's has 2


def positions_of(config: Any) -> int | None:
    """How many positions for text a transformers config names; None if it names none."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(known) if known else None


def has_position_table(model: Any) -> bool:
    """Whether positions of a transformers model (on any device, adapters or not) are rows of a table, learned or not.

    Of rotary positions, which are computed, there is none, and a model goes on behind those that it was made for.
    """
    known = positions_of(model.config)
    if known is None:
        return False
    words = model.get_input_embeddings().weight
    tables = (
        tensor
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        if tensor.ndim == 2 and tensor is not words and any(word in name for word in ("position", "wpe"))
    )
    return any(known <= table.shape[0] <= known + _OFFSET for table in tables)
