"""A tokenizer as GGUF metadata.

GGUF names the rule by which text is split before merging, and llama.cpp knows only the rules that it has a name for. So
the rule in `tokenizer.json` is compared with those below; one that is not there is refused, as another would give
other tokens without a word.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lowmem_ft.core.errors import CheckpointError, UnsupportedError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
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
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[_in_range(index, vocab_size, path)], types[index] = token, gguf.TokenType.NORMAL
    spm = _is_sentencepiece(tokenizer, path)
    for index, token in enumerate(tokens):
        if spm and types[index] == gguf.TokenType.NORMAL and _BYTE.fullmatch(token):
            types[index] = gguf.TokenType.BYTE
    for entry in added:
        special = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        tokens[_in_range(entry["id"], vocab_size, path)], types[entry["id"]] = entry["content"], special
    if spm:
        if model.get("unk_token") in tokens:
            types[tokens.index(model["unk_token"])] = gguf.TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(tokenizer))
        apart = {entry["content"] for entry in added} | set(filter(_BYTE.fullmatch, tokens))
        writer.add_token_scores(_scores(model, tokens, path, apart=apart))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(tokenizer, path))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special_tokens = gguf.SpecialVocab(folder, load_merges=not spm, n_vocab=vocab_size)
    special_tokens.add_to_gguf(writer, quiet=True)


def adds_bos(folder: Path) -> bool:
    """Whether llama.cpp puts the first token in front by itself, as the file that is written from `folder` says it."""
    import gguf

    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    found = gguf.SpecialVocab(folder).add_special_token.get("bos")
    if found is not None:
        return bool(found)
    return _is_sentencepiece(tokenizer, folder) or _splitting(tokenizer, folder) == "llama-bpe"  # llama.cpp's defaults


def _in_range(index: int, vocab_size: int, path: Path) -> int:
    if not 0 <= index < vocab_size:
        raise CheckpointError(
            "The tokenizer has tokens that the model has no embedding for.", given=f"{index} in {path}",
            allowed=f"0..{vocab_size - 1}",
        )  # fmt: skip
    return index


def _is_sentencepiece(tokenizer: dict[str, Any], path: Path) -> bool:
    """Whether it is BPE over characters that falls back to bytes, as SentencePiece trains it; else byte-level BPE.

    Raises:
        UnsupportedError: neither.
    """
    model = tokenizer["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
        normalizer = json.dumps(tokenizer.get("normalizer"))
        steps = {step["type"] for step in _steps(tokenizer.get("normalizer"), "normalizers")}
        spaces = "\\u2581" in normalizer or (tokenizer.get("pre_tokenizer") or {}).get("type") == "Metaspace"
        if not missing and spaces and steps <= {"Prepend", "Replace"}:
            return True
    elif model["type"] == "BPE":
        return False
    raise UnsupportedError(
        "This kind of tokenizer cannot be written as GGUF here.",
        given=f"{model['type']}{', falls back to bytes' if model.get('byte_fallback') else ''}, in {path}",
        allowed="byte-level BPE (Llama 3, Qwen, GPT-2), or BPE of SentencePiece (Llama 2, Mistral)",
        fix="merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py; or export the adapter alone",
    )


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a text starts with a space that it does not have."""
    before = tokenizer.get("pre_tokenizer") or {}
    if before.get("type") == "Metaspace":
        return str(before.get("prepend_scheme", "always")) != "never"
    return any(step["type"] == "Prepend" for step in _steps(tokenizer.get("normalizer"), "normalizers"))


def _steps(rule: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return [] if rule is None else rule.get(name, [rule])


def _scores(model: dict[str, Any], tokens: list[str], path: Path, *, apart: set[str]) -> list[float]:
    """One for each token: SentencePiece merges the neighbours whose union has the highest.

    In tokenizer.json merges lie in that order, all that give one token together, and none is left out.

    Args:
        apart: tokens that no merge gives.

    Raises:
        UnsupportedError: it is not so, and SentencePiece's rule would give other tokens.
    """
    pairs = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        if ranks.setdefault(left + right, rank) != rank and "".join(pairs[rank - 1]) != left + right:
            raise _other_rule(f"the merges that give {left + right} lie apart", path)
    known, vocab = set(pairs), model["vocab"]
    for token in vocab.keys() - apart:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in known and pair[0] in vocab and pair[1] in vocab:
                raise _other_rule(f"no merge of {pair[0]} and {pair[1]}", path)
    return [-float(ranks.get(token, len(pairs))) for token in tokens]


def _other_rule(given: str, path: Path) -> UnsupportedError:
    return UnsupportedError(
        "This tokenizer merges by another rule than SentencePiece's, which is the one that GGUF has for it.",
        given=f"{given}, in {path}",
        fix="export the adapter alone, and convert the base model with a tool that is made for it",
    )


def _splitting(tokenizer: dict[str, Any], path: Path) -> str:
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
