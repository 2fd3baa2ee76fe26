"""Texts as llama.cpp cuts them into tokens beside the tokenizers that were exported: of every kind, and real ones."""

from __future__ import annotations

import json
import random
import re
import shutil
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.exported import ROOT
from benchmarks.llamacpp_engine import Engine

TEXTS = (
    *("", " ", "  ", "a", " a", "a ", "\n\n\n", "   \n   \n", "\t\ttabs\t\n  end  ", "  two  spaces and\nlines\n"),
    *("What does ls do?", "I'm, you'LL, WE'VE, it's 'S", "tokens_per_step: 16384", "AbCdEf GHIjkl", "...!!!???---"),
    *("Käse: 12 €, 日本語のテキスト", "Привет мир, שלום, مرحبا", "👩‍👩‍👧 🇩🇪 ﷽ ﬁ Å", "e\u0301 and é, A\u030a"),
    *("\u0130stanbul ſ ß ǅ", "ก็ไทย हिन्दी বাংলা", "a\u00a0b\u2003c\u200bd\u3000e", "Ünïcödé\x00\x01\x7f"),
    *("1 12 123 1234 12345 1234567890 ١٢٣ Ⅷ ½", "x=1;y+=2 // ok\r\n\r\nif(a&&b){\n\treturn;\n}"),
    *("http://example.com/a?b=c&d=e#f", "<|user|>", "hello <think> x </think> y", "<s>a</s>"),
)
# what random texts are put together from
PIECES = (
    *("a", "the", "The", "ls", " ", " ", "  ", "\n", "\r\n", "\t", "'s", "'RE", "1", "23", "4567", ".", ",", "!?"),
    *("é", "e\u0301", "ß", "日本", "語", "Привет", "🙂", "👩\u200d🚀", "\u00a0", "\u3000", "\u200d", "½", "ก็", "ि"),
    *("<", ">", "_", "-", "/", "▁", "Ġ", "<think>", "\x00", "\ufeff", "<0x41>", "[", "]"),
)
# kind of tokenizer -> the vocabulary of a real one among llama.cpp's sources
REAL = {
    "llama-bpe": "ggml-vocab-llama-bpe.gguf",
    "qwen2": "ggml-vocab-qwen2.gguf",
    "gpt-2": "ggml-vocab-gpt-2.gguf",
    "llama-spm": "ggml-vocab-llama-spm.gguf",  # merges in the order of the vocabulary where scores are equal
    "llama-spm, as transformers orders it": "ggml-vocab-llama-spm.gguf",
}


def tokenizers(folder: Path) -> dict[str, Path]:
    """Small tokenizers of each kind that GGUF has a name for: name -> folder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import trainers as training
    from transformers import PreTrainedTokenizerFast

    from lowmem_ft.export.gguf_vocab import SPLITS
    from tests.assets import ASSETS
    from tests.unit.export.test_gguf_vocab import save_spm

    texts = [ROOT / "README.md", *(ROOT / "lowmem_ft" / "docs").glob("*.md"), Path(__file__)]
    specials = ["<|bos|>", "<|eos|>", "<|user|>"]
    level = pre_tokenizers.ByteLevel
    rules: dict[str, Any] = {
        "gpt-2": level(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)]
        ),
    }
    for name, pattern in SPLITS.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        rules[name] = pre_tokenizers.Sequence([split, level(add_prefix_space=False, use_regex=False)])

    def byte_level(name: str, rule: str, *, bos: bool = False, nfc: bool = False, whole: bool = False) -> Path:
        tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
        tokenizer.normalizer = normalizers.NFC() if nfc else None
        tokenizer.pre_tokenizer, tokenizer.decoder = rules[rule], decoders.ByteLevel()
        trainer = training.BpeTrainer(
            vocab_size=2000, special_tokens=specials, initial_alphabet=level.alphabet(), show_progress=False
        )
        tokenizer.train([str(text) for text in texts], trainer)
        tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", 0)]
            )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>").save_pretrained(
            folder / name
        )
        return folder / name

    def spm(name: str, *, bos: bool, scheme: str | None = None, chat: str | None = None) -> Path:
        save_spm(folder / name)
        path = folder / name / "tokenizer.json"
        data = json.loads(path.read_text())
        if scheme is not None:
            data["normalizer"] = None
            data["pre_tokenizer"] = {
                "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False
            }  # fmt: skip
        if bos:
            single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            data["post_processor"] = {
                "type": "TemplateProcessing", "single": single, "pair": single,
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }  # fmt: skip
        path.write_text(json.dumps(data))
        if chat is not None:
            (folder / name / "chat_template.jinja").write_text(chat)
        return folder / name

    shutil.copytree(ASSETS / "doclm-7m", folder / "embedded")
    return {
        "embedded": folder / "embedded",
        "gpt-2": byte_level("gpt-2", "gpt-2"),
        "smollm": byte_level("smollm", "smollm"),
        "llama-bpe": byte_level("llama-bpe", "llama-bpe", bos=True, whole=True),
        "llama-bpe without a first token": byte_level("llama-bpe-plain", "llama-bpe", whole=True),
        "llama-bpe that merges": byte_level("llama-bpe-merges", "llama-bpe", bos=True),
        "qwen2": byte_level("qwen2", "qwen2", nfc=True),
        "qwen2 with a first token": byte_level("qwen2-bos", "qwen2", bos=True),
        "sentencepiece": spm("spm", bos=True),
        "sentencepiece without a first token": spm("spm-plain", bos=False),
        "sentencepiece, always a space": spm("spm-always", bos=True, scheme="always"),
        "sentencepiece, a space at the beginning": spm("spm-first", bos=True, scheme="first"),
        "sentencepiece, a space at the beginning, with conversations": spm(
            "spm-chat",
            bos=True,
            scheme="first",
            chat="{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
        ),
        "sentencepiece, no space": spm("spm-never", bos=True, scheme="never"),
    }


def real_tokenizers(vocabs: Path, folder: Path) -> dict[str, Path]:
    """The tokenizers of `REAL`, put together again as transformers has them, from the vocabularies that llama.cpp's own
    tests use: name -> folder."""
    import gguf
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    from lowmem_ft.export.gguf_vocab import SPLITS

    found = {}
    for name, file in REAL.items():
        reader = gguf.GGUFReader(vocabs / file)
        tokens, types = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type"))
        rule = name if name in SPLITS else "gpt-2"
        apart = [index for index, kind in enumerate(types) if kind in (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)]
        added = [
            {"id": index, "content": tokens[index], "special": True, "normalized": False, "single_word": False,
             "lstrip": False, "rstrip": False}
            for index in apart
        ]  # fmt: skip
        vocab = {
            token: index
            for index, token in enumerate(tokens)
            if name.startswith("llama-spm") or index not in set(apart)
        }
        model: dict[str, Any] = {"type": "BPE", "vocab": vocab}
        data: dict[str, Any] = {"version": "1.0", "added_tokens": added, "model": model}
        bos = None
        if name.startswith("llama-spm"):
            scores = reader.get_field("tokenizer.ggml.scores").contents()
            kept = {token: scores[index] for token, index in vocab.items() if types[index] == gguf.TokenType.NORMAL}
            merges = generate_merges(kept, kept)
            if name == "llama-spm":
                merges.sort(key=lambda pair: (-kept["".join(pair)], vocab["".join(pair)]))
            model |= {"merges": merges, "byte_fallback": True,
                      "unk_token": "<unk>", "fuse_unk": True}  # fmt: skip
            steps = [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]
            data["normalizer"] = {"type": "Sequence", "normalizers": steps}
            decode = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                      {"type": "Fuse"}]  # fmt: skip
            data["decoder"] = {"type": "Sequence", "decoders": decode}
            bos = "<s>"
        else:
            pairs = [pair.split(" ") for pair in reader.get_field("tokenizer.ggml.merges").contents()]
            model |= {"merges": pairs, "ignore_merges": rule == "llama-bpe"}
            level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": rule == "gpt-2"}
            data |= {
                "pre_tokenizer": level,
                "decoder": level,
                "normalizer": {"type": "NFC"} if rule == "qwen2" else None,
            }
            if rule in SPLITS:
                split = {"type": "Split", "pattern": {"Regex": SPLITS[rule]}, "behavior": "Isolated", "invert": False}
                data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
            bos = "<|begin_of_text|>" if rule == "llama-bpe" else None
        if bos is not None:
            single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            known = {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}}
            data["post_processor"] = {
                "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known
            }  # fmt: skip
        (folder / name).mkdir(parents=True)
        path = folder / name / "tokenizer.json"
        path.write_text(json.dumps(data))
        end = reader.get_field("tokenizer.ggml.eos_token_id")
        eos = tokens[end.contents()] if end is not None else tokens[apart[0]]
        PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            bos_token=bos,
            eos_token=eos,
            unk_token="<unk>" if name.startswith("llama-spm") else None,
        ).save_pretrained(folder / name)
        found[f"{name} (real)"] = folder / name
    return found


def vocabulary(folder: Path, *, size: int) -> Path:
    """A GGUF file with the tokenizer of `folder` alone."""
    import gguf
    from transformers import AutoTokenizer

    from lowmem_ft.export.gguf_vocab import add_tokenizer

    file = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    add_tokenizer(writer, AutoTokenizer.from_pretrained(folder), folder, vocab_size=size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


def same_tokens(folder: Path, *, count: int = 2000) -> dict[str, Any]:
    """Texts of which llama.cpp has the same tokens as transformers, whether special tokens are parsed or not.

    Of the others the shortest, and the number of those that the export does not tell of (`untold`).
    """
    from transformers import AutoTokenizer

    from lowmem_ft.export.gguf_vocab import differences

    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = random.Random(0)
    special = [str(it) for it in tokenizer.all_special_tokens]
    texts = [*TEXTS, *("".join(drawn.choices([*PIECES, *special], k=drawn.randint(1, 12))) for _ in range(count))]
    told = differences(tokenizer)
    found: dict[str, Any] = {"told": told}
    with closing(Engine(vocabulary(folder, size=len(tokenizer) + 8), weights=False)) as engine:

        def compared(texts: Sequence[str], *, add: bool, parse: bool) -> dict[str, Any]:
            wrong = []
            for text in texts:
                ours = tokenizer(text, add_special_tokens=add, split_special_tokens=not parse)["input_ids"]
                theirs = engine.tokenize(text, add_special=add, parse_special=parse)
                if ours != theirs:
                    wrong.append({"text": text, "ours": ours, "llama.cpp": theirs})
            untold = [it for it in wrong if not foreseen(it["text"], told, special if parse else [])]
            figures = {"texts": len(texts), "equal": len(texts) - len(wrong), "untold": len(untold)}
            return figures | ({"shortest": min(wrong, key=lambda it: len(it["text"]))} if wrong else {})

        found["with what is added"] = compared(texts, add=True, parse=True)
        found["alone"] = compared(texts, add=False, parse=True)
        found["special tokens as text"] = compared(texts, add=False, parse=False)
        if tokenizer.chat_template:
            talks = [[{"role": "user", "content": text}] for text in texts]
            rendered = [
                tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in talks
            ]
            found["conversations"] = compared(rendered, add=False, parse=True)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        found["text again"] = sum(engine.text(it) == tokenizer.decode(it).encode() for it in ids)
    return found


def foreseen(text: str, told: Sequence[str], special: Sequence[str]) -> bool:
    """Whether a text is one of those of which `gguf_vocab.differences` says that they have other tokens."""
    pieces = re.split("|".join(map(re.escape, special)), text) if special else [text]
    holds = {
        "NFC": unicodedata.normalize("NFC", text) != text,
        "a space at the beginning": any(piece.startswith((" ", "▁")) for piece in pieces),
        "a special token before text": len(pieces) > 1,
        "no special token at the beginning": pieces[0] != "",
    }
    return any(here and any(words in it for it in told) for words, here in holds.items())
