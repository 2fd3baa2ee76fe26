"""A tokenizer as GGUF metadata.

GGUF names the rule by which text is split before merging, and llama.cpp knows only the rules that it has a name for. So
the rule in `tokenizer.json` is compared with those below; one that is not there is refused, as another would give
other tokens without a word.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lowmem_ft.core.errors import CheckpointError, UnsupportedError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# name in llama.cpp -> the expression that the tokenizer splits by
SPLITS = {"llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST, "qwen2": _WORDS + r"\p{N}" + _REST}


def add_tokenizer(writer: Any, folder: Path, *, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and the chat template of a model folder into `writer`.

    Args:
        writer: a `gguf.GGUFWriter`.
        vocab_size: rows of the embedding; those that no token has are filled up with unused ones.

    Raises:
        CheckpointError: there is no readable tokenizer.json.
        UnsupportedError: a kind of tokenizer, or a rule of splitting, that cannot be said in GGUF.
    """
    import gguf

    path = folder / "tokenizer.json"
    try:
        tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model, added = tokenizer["model"], tokenizer["added_tokens"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "The tokenizer cannot be read.", given=f"{path} ({error})", allowed="a fast tokenizer (tokenizer.json)"
        ) from error
    splitting = _splitting(tokenizer, path)
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[_in_range(index, vocab_size, path)], types[index] = token, gguf.TokenType.NORMAL
    for entry in added:
        special = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        tokens[_in_range(entry["id"], vocab_size, path)], types[entry["id"]] = entry["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    logger, level = logging.getLogger("gguf.vocab"), logging.getLogger("gguf.vocab").level
    logger.setLevel(logging.ERROR)
    try:
        special_tokens = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
        special_tokens.add_to_gguf(writer, quiet=True)
    finally:
        logger.setLevel(level)


def adds_bos(folder: Path) -> bool:
    """Whether llama.cpp puts the first token in front by itself, as the file that is written from `folder` says it."""
    import gguf

    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    found = gguf.SpecialVocab(folder).add_special_token.get("bos")
    return _splitting(tokenizer, folder) == "llama-bpe" if found is None else bool(found)


def _in_range(index: int, vocab_size: int, path: Path) -> int:
    if not 0 <= index < vocab_size:
        raise CheckpointError(
            "The tokenizer has tokens that the model has no embedding for.", given=f"{index} in {path}",
            allowed=f"0..{vocab_size - 1}",
        )  # fmt: skip
    return index


def _splitting(tokenizer: dict[str, Any], path: Path) -> str:
    model = tokenizer["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = f"{model['type']}{' with byte fallback (SentencePiece)' if model.get('byte_fallback') else ''}"
        raise UnsupportedError(
            "This kind of tokenizer cannot be written as GGUF here.",
            given=f"{kind} in {path}",
            allowed="byte-level BPE, as Llama 3, Qwen and GPT-2 have",
            fix="merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py; or export the adapter alone",
        )
    rule = tokenizer.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        found = next((name for name, known in SPLITS.items() if known == pattern), None)
        if found is not None and steps[0].get("behavior") == "Isolated":
            return found
    raise UnsupportedError(
        "The way in which this tokenizer splits text has no name that is known here.",
        given=f"{json.dumps(rule)[:300]} in {path}",
        allowed=f"gpt-2, smollm, {', '.join(SPLITS)}",
        fix="merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py, which knows more of them",
    )
