"""Token ids of a tokenizer against the rows of a model's embedding.

Models have more rows than tokens, as a rule. A tokenizer that was exchanged, or got tokens added, may have more ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_ft.core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, device
    from transformers import PreTrainedTokenizerBase

_ON_HOST = "_on_host"  # the attribute of ids on a card


def known_ids(config: Any) -> int:
    """Ids below this have a row in the embedding of a model with this transformers config."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return int(rows) if rows else 1 << 40


def goes_beyond(tokenizer: PreTrainedTokenizerBase, config: Any) -> bool:
    """Whether `tokenizer` has ids for which the model has no row; texts may do without them."""
    return max(tokenizer.get_vocab().values(), default=0) >= known_ids(config)


def check_ids(largest: int, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Raise DataError if the model has no row for `largest`, an id of a text."""
    if largest >= known_ids(config):
        raise DataError(
            "The tokenizer gives tokens for which the model's embedding has no row.",
            given=f"id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of {tokenizer.name_or_path}",
            allowed=f"ids below {known_ids(config)} (vocab_size of the model)",
            fix="put the model's own tokenizer into its folder, or give the model as many rows with transformers: "
            "resize_token_embeddings, then save_pretrained",
        )


def pad_id_of(tokenizer: PreTrainedTokenizerBase | None, config: Any) -> int:
    """Any id will do: padding is told by segments, never by its id."""
    pad = tokenizer.pad_token_id if tokenizer is not None else None
    return int(pad) if pad is not None and pad < known_ids(config) else 0


def moved(ids: Tensor, where: device | str) -> Tensor:
    """`ids` on another device, whose values `on_host` knows without asking that device."""
    there = ids.to(where, non_blocking=True)
    if there is not ids:
        setattr(there, _ON_HOST, ids)
    return there


def on_host(ids: Tensor) -> Tensor:
    """`ids` in RAM. To ask a card for them would wait for all that it has been given to do."""
    known: Tensor | None = getattr(ids, _ON_HOST, None)
    return ids.cpu() if known is None else known
