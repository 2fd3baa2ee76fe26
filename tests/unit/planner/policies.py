"""Policies for tests of the planner."""

from __future__ import annotations

from typing import Any

from lowmem_ft.core.plan import Policy


def policy(*, rows: int = 2, seq_len: int = 64, keep: int = 0, depth: int = 2, **changes: Any) -> Policy:
    """NF4, one micro-batch of so many rows, the last `keep` of `depth` blocks keeping."""
    settings: dict[str, Any] = {
        "bits": 4, "quant": "nf4", "double_quant": True, "compute_dtype": "bfloat16",
        "micro_batch_tokens": rows * seq_len, "accumulation": 1, "resident_blocks": depth, "streamed_blocks": 0,
        "stream_from": "host", "keep_blocks": keep, "recompute_blocks": depth - keep, "offload_blocks": 0,
        "optimizer": "adamw8bit", "loss_chunk_tokens": 32,
    }  # fmt: skip
    return Policy(**{**settings, **changes})
