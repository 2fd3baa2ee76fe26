"""What a checkpoint is worth nothing without: the base, the adapter's settings and the objective it was trained for.

Names, shapes and data are compared where they are restored; here is what would change without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lowmem_ft.adapters.peft_format import adapter_digest, adapter_folder
from lowmem_ft.core.config import AdapterConfig, Init, RunConfig
from lowmem_ft.core.errors import CheckpointError
from lowmem_ft.core.plan import Policy
from lowmem_ft.core.preference import settings_of
from lowmem_ft.data.loader import row_lengths
from lowmem_ft.data.mixture import checksums_of
from lowmem_ft.data.pairs import preferences_of
from lowmem_ft.quant.checkpoint import Checkpoint

# of an adapter what decides the function that its weights are of; how it is trained may change
_OF_FUNCTION = (
    "method", "rank", "alpha", "targets", "rslora", "dora", "bias", "rank_pattern", "alpha_pattern", "layers",
    "train_modules",
)  # fmt: skip


def identity_of(config: RunConfig, policy: Policy) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON can hold it."""
    stored = {4: f"{policy.quant}{', double-quantized' if policy.double_quant else ''}", 8: "int8"}
    return {
        "model": Checkpoint.open(config.model, trust_remote_code=config.trust_remote_code).sample(),
        "dtype of what is trained": "float32" if policy.compute_dtype == "float32" else "bfloat16",
        "quant": stored.get(policy.bits, f"{policy.bits} bits"),
        "adapter": _function(config.adapter),
        "train.objective": config.train.objective,
        "preference": settings_of(config),
    }


def _function(adapter: AdapterConfig) -> dict[str, Any]:
    if adapter.init not in get_args(Init):  # a folder, whose own settings hold
        return {"init (content)": adapter_digest(adapter_folder(adapter.init))}
    if adapter.peft is not None:
        return {name: value for name, value in adapter.peft.items() if "dropout" not in name}
    return adapter.model_dump(include=set(_OF_FUNCTION))


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Hold a run against the one that a checkpoint is of.

    Raises:
        CheckpointError: they differ.
    """
    was, wanted = _flat(saved), _flat(now)
    changed = sorted(key for key in was.keys() | wanted.keys() if was.get(key) != wanted.get(key))
    if not changed:
        return
    given, allowed = (", ".join(f"{key} {of.get(key)}" for key in changed) for of in (wanted, was))
    raise CheckpointError(
        "The checkpoint is of a run with another base, adapter or objective, so the run cannot go on.",
        given=given,
        allowed=allowed,
        fix="put the settings back, or start over in another output folder; `adapter.init: FOLDER` starts from a saved "
        "adapter",
    )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a section by themselves, `adapter.alpha`."""
    found: dict[str, Any] = {}
    for name, value in identity.items():
        found |= {f"{name}.{key}": it for key, it in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def held_out_identity(config: RunConfig, examples: Sequence[Any], *, dated: bool = False) -> str | None:
    """Of held-out examples, since on other ones a loss means something else; None without any.

    It has a word for their lengths and one for their content; the second is left out where it is not known.

    Args:
        dated: their tokens hold the day's date (`data.store.writes_date`), which makes no other examples of them.
    """
    if not len(examples):
        return None
    words = [_digest(row_lengths(examples, preferences_of(config)), np.int64)]
    content = None if dated else checksums_of(examples)
    return " ".join(words if content is None else [*words, _digest(content, np.uint32)])


def same_held_out(saved: str | None, now: str | None) -> bool:
    """Whether two identities of held-out examples are of the same ones, as far as both tell."""
    if saved is None or now is None:
        return saved == now
    return all(was == it for was, it in zip(saved.split(), now.split(), strict=False))


def _digest(numbers: NDArray[Any], dtype: type[np.generic]) -> str:
    return hashlib.sha256(numbers.astype(dtype).tobytes()).hexdigest()[:16]
