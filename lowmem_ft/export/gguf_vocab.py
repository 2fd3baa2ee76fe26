"""A tokenizer as GGUF metadata.

What is written is the tokenizer as transformers loads it, since that made the tokens of the training: its classes for
Llama and Qwen take vocabulary and merges from `tokenizer.json`, but rules of their own.

GGUF names the rule by which text is split before merging, and llama.cpp knows only the rules that it has a name for. So
the tokenizer's rule is compared with those below; one that is not there is refused, as another would give other tokens
without a word.
"""

from __future__ import annotations

import json
import re
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.core.json_text import read_settings
from lowmem_ft.data.chat import ChatRenderer
from lowmem_ft.generate import added_around, answer_ends

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "▁"  # SentencePiece's
# name in llama.cpp -> the expression that the tokenizer splits by
SPLITS = {"llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST, "qwen2": _WORDS + r"\p{N}" + _REST}
# those where llama.cpp takes a piece that is a token as it is, without merging
_WHOLE = frozenset({"llama-bpe"})
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


def add_tokenizer(writer: Any, loaded: PreTrainedTokenizerBase, folder: Path, *, vocab_size: int) -> None:
    """Write a tokenizer's tokens, merges, special tokens and chat template into `writer`.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: of the model, whose other files say more of special tokens.
        vocab_size: rows of the embedding; those that no token has are filled up with unused ones.

    Raises:
        CheckpointError: it is no fast tokenizer, or a file that says more of it cannot be read.
        UnsupportedError: a kind of tokenizer, or a rule of splitting, that cannot be said in GGUF.
    """
    import gguf

    tokenizer = _rules(loaded, folder)
    spm = _is_sentencepiece(tokenizer, folder)
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[_in_range(index, vocab_size, folder)], types[index] = token, gguf.TokenType.NORMAL
    for index, token in enumerate(tokens):
        if spm and types[index] == gguf.TokenType.NORMAL and _BYTE.fullmatch(token):
            types[index] = gguf.TokenType.BYTE
    # transformers' classes add tokens that they want to exist, and that no text of the training can have had
    named = {entry["content"] for entry in read_settings(folder / "tokenizer.json").get("added_tokens") or []}
    for entry in added:
        if entry["id"] >= vocab_size and named and entry["content"] not in named:
            continue
        special = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        tokens[_in_range(entry["id"], vocab_size, folder)], types[entry["id"]] = entry["content"], special
    pairs = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    if spm:
        if model.get("unk_token") in tokens:
            types[tokens.index(model["unk_token"])] = gguf.TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(tokenizer, loaded))
        apart = {entry["content"] for entry in added} | set(filter(_BYTE.fullmatch, tokens))
        writer.add_token_scores(_scores(model["vocab"], pairs, tokens, folder, apart=apart))
    else:
        writer.add_tokenizer_model("gpt2")
        rule = _splitting(tokenizer, folder)
        _check_whole(model, rule, folder, apart={entry["content"] for entry in added})
        writer.add_tokenizer_pre(rule)
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, loaded, folder, vocab_size)
    writer.add_add_bos_token(adds_bos(loaded))
    # whatever the tokenizer does: llama.cpp would put it behind prompts, and its programs refuse such a file
    writer.add_add_eos_token(False)
    template: Any = loaded.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def adds_bos(loaded: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp puts the first token in front by itself, as the file that is written says it.

    Raises:
        UnsupportedError: the tokenizer puts others around a text than the first and the last one.
    """
    around = added_around(loaded)
    for ids, allowed in zip(around, (loaded.bos_token_id, loaded.eos_token_id), strict=True):
        if ids not in ([], [allowed]):
            raise UnsupportedError(
                "This tokenizer puts other tokens around a text than the one that begins and the one that ends it.",
                given=f"{loaded.convert_ids_to_tokens(ids)} in {loaded.name_or_path}",
                fix="merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py; or export the adapter alone",
            )
    return bool(around[0])


def differences(loaded: PreTrainedTokenizerBase) -> list[str]:
    """In words, of which texts llama.cpp has other tokens, as GGUF has no word for what the tokenizer does."""
    rules = _rules(loaded, Path(loaded.name_or_path))
    before, found = rules.get("pre_tokenizer") or {}, []
    if any(step["type"] == "NFC" for step in _steps(rules.get("normalizer"), "normalizers")):
        found.append("characters that are not composed (Unicode's NFC), which the tokenizer composes")
    greedy = [entry["content"] for entry in rules["added_tokens"] if entry["lstrip"] or entry["rstrip"]]
    if greedy:
        found.append(f"white space beside {', '.join(greedy[:3])}, which the tokenizer drops")
    scheme = before.get("prepend_scheme", "always") if before.get("type") == "Metaspace" else "never"
    if scheme != "never" and _adds_space(rules, loaded):
        found.append("a space at the beginning, to which llama.cpp adds another")
    if scheme == "first":
        found.append(
            "a special token before text, where llama.cpp adds a space"
            if _adds_space(rules, loaded)
            else "no special token at the beginning, where the tokenizer adds a space"
        )
    return [f"llama.cpp has other tokens for texts with {it}." for it in found]


def _rules(loaded: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """What `tokenizer.json` would say of a tokenizer as transformers loads it."""
    backend: Any = getattr(loaded, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise CheckpointError(
            "The tokenizer cannot be read.",
            given=f"{folder} ({type(loaded).__name__})",
            allowed="a fast tokenizer (tokenizer.json)",
        )
    rules: dict[str, Any] = json.loads(backend.to_str())
    return rules


def _add_special(writer: Any, loaded: PreTrainedTokenizerBase, folder: Path, vocab_size: int) -> None:
    """Write which tokens are special, and which end an answer: `generation_config.json` may name more than one."""
    config, generation = read_settings(folder / "config.json"), read_settings(folder / "generation_config.json")
    for kind in _SPECIAL:
        index = getattr(loaded, f"{kind}_token_id", None)
        index = config.get(f"{kind}_token_id") if index is None else index
        if isinstance(index, int) and 0 <= index < vocab_size:
            getattr(writer, f"add_{kind}_token_id")(index)
    ends = generation.get("eos_token_id")
    known = [it for it in (ends if isinstance(ends, list) else [ends]) if isinstance(it, int) and it < vocab_size]
    known += answer_ends(loaded)
    others = [it for it in dict.fromkeys(known) if it != loaded.eos_token_id]
    for index, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(index)


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
    model, before = tokenizer["model"], tokenizer.get("pre_tokenizer")
    steps = _steps(tokenizer.get("normalizer"), "normalizers")
    kinds = {step["type"] for step in steps}
    if model["type"] == "BPE" and model.get("byte_fallback"):
        missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
        replaces = any(step["type"] == "Replace" and step.get("content") == _SPACE for step in steps)
        by_metaspace = before is not None and before["type"] == "Metaspace" and not before.get("split", True)
        spaces = (not kinds and by_metaspace) or (kinds <= {"Prepend", "Replace"} and replaces and before is None)
        if not missing and spaces:
            return True
    elif model["type"] == "BPE":
        # llama.cpp composes no characters (NFC): texts that are not composed have other tokens there
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if kinds <= {"NFC"} and not affixes:
            return False
    raise UnsupportedError(
        "This kind of tokenizer cannot be written as GGUF here.",
        given=f"{model['type']}{', falls back to bytes' if model.get('byte_fallback') else ''}"
        f"{', normalizes by ' + ', '.join(sorted(kinds)) if kinds else ''}, in {path}",
        allowed="byte-level BPE (Llama 3, Qwen, GPT-2), or BPE of SentencePiece (Llama 2, Mistral)",
        fix="merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py; or export the adapter alone",
    )


def _adds_space(tokenizer: dict[str, Any], loaded: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp shall begin each piece of text between special tokens with a space that is not there.

    A tokenizer may do so at the beginning of a text alone, for which GGUF has no word. Then conversations decide: where
    the template begins with a special token, none of their pieces has such a space.
    """
    before = tokenizer.get("pre_tokenizer") or {}
    if before.get("type") != "Metaspace":
        return any(step["type"] == "Prepend" for step in _steps(tokenizer.get("normalizer"), "normalizers"))
    scheme = str(before.get("prepend_scheme", "always"))
    if scheme == "first" and loaded.chat_template:
        try:
            messages = ChatRenderer(loaded).as_wanted([{"role": "user", "content": "a"}])
            text = loaded.apply_chat_template(messages, tokenize=False)
        except Exception:  # a template raises what it likes for conversations that it does not take
            return True
        return not any(str(text).startswith(token) for token in loaded.all_special_tokens)
    return scheme != "never"


def _steps(rule: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return [] if rule is None else rule.get(name, [rule])


def _scores(
    vocab: dict[str, int], pairs: list[tuple[str, ...]], tokens: list[str], path: Path, *, apart: set[str]
) -> list[float]:
    """One for each token: SentencePiece merges the neighbours whose union has the highest.

    In tokenizer.json merges lie in that order, all that give one token together, and none is left out. But runs of
    spaces, which have one score among them in the models of Llama 2 and its like, may lie mixed there.

    Args:
        apart: tokens that no merge gives.

    Raises:
        UnsupportedError: it is not so, and SentencePiece's rule would give other tokens.
    """
    ranks: dict[str, int] = {}
    for given, group in groupby(range(len(pairs)), key=lambda rank: "".join(pairs[rank])):
        first = next(group)
        if ranks.setdefault(given, first) != first and given.strip(_SPACE):
            raise _other_rule(f"the merges that give {given} lie apart", path)
    known = set(pairs)
    for token in vocab.keys() - apart:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in known and pair[0] in vocab and pair[1] in vocab:
                raise _other_rule(f"no merge of {pair[0]} and {pair[1]}", path)
    _rank_spaces(ranks, pairs, path)
    return [-float(ranks.get(token, len(pairs))) for token in tokens]


def _rank_spaces(ranks: dict[str, int], pairs: list[tuple[str, ...]], path: Path) -> None:
    """Where the merges of runs of spaces lie mixed, give longer runs the better ranks, if that comes to the same."""
    of_spaces = {pair: rank for rank, pair in enumerate(pairs) if not "".join(pair).strip(_SPACE)}
    places = sorted(of_spaces.values())
    if len(set(map("".join, of_spaces))) == sum(1 for _ in groupby(places, key=lambda rank: "".join(pairs[rank]))):
        return  # not mixed
    if places != list(range(places[0], places[0] + len(places))):
        raise _other_rule("the merges of runs of spaces lie apart", path)
    runs = sorted(set(map("".join, of_spaces)), key=len, reverse=True)
    ranks |= {run: places[0] + at for at, run in enumerate(runs)}
    for length in range(2, 3 * len(runs[0]) + 1):
        symbols = [_SPACE] * length
        while True:
            joins = [(pair, at) for at, pair in enumerate(pairwise(symbols)) if pair in of_spaces]
            if not joins:
                break
            at = min(joins, key=lambda it: (of_spaces[it[0]], it[1]))[1]
            if at != min(joins, key=lambda it: (ranks["".join(it[0])], it[1]))[1]:
                raise _other_rule(f"of {length} spaces others are merged first", path)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def _other_rule(given: str, path: Path) -> UnsupportedError:
    return UnsupportedError(
        "This tokenizer merges by another rule than SentencePiece's, which is the one that GGUF has for it.",
        given=f"{given}, in {path}",
        fix="export the adapter alone, and convert the base model with a tool that is made for it",
    )


def _check_whole(model: dict[str, Any], rule: str, path: Path, *, apart: set[str]) -> None:
    """Raise UnsupportedError where it matters that llama.cpp merges pieces that are tokens, or does not merge them.

    Args:
        apart: tokens that are found before text is split.
    """
    if bool(model.get("ignore_merges")) == (rule in _WHOLE):
        return
    from tokenizers import models

    merging = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])
    found = next((token for token in model["vocab"].keys() - apart if len(merging.tokenize(token)) > 1), None)
    if found is not None:
        raise UnsupportedError(
            "llama.cpp and this tokenizer differ in whether a piece that is a token is merged from smaller ones.",
            given=f"ignore_merges {bool(model.get('ignore_merges'))}, and {found} is not what its merges give ({path})",
            allowed=f"ignore_merges {rule in _WHOLE}, for the rule of splitting {rule}",
            fix="merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py",
        )


def _splitting(tokenizer: dict[str, Any], path: Path) -> str:
    rule = tokenizer.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):  # of byte-level BPE, llama.cpp never does so
        kinds = []
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
