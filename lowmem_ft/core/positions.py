"""Models that look their positions up in a table, and compute nothing behind its end."""

from __future__ import annotations

import itertools
from typing import Any

_OFFSET = 8  # rows that a table may have beside those of positions: OPT's has 2


def has_position_table(model: Any) -> bool:
    """Whether positions of a transformers model (on any device, adapters or not) are rows of a table, learned or not.

    Of rotary positions, which are computed, there is none, and a model goes on behind those that it was made for.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not known:
        return False
    words = model.get_input_embeddings().weight
    tables = (
        tensor
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        if tensor.ndim == 2 and tensor is not words and any(word in name for word in ("position", "wpe"))
    )
    return any(known <= table.shape[0] <= known + _OFFSET for table in tables)
