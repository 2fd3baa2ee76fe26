"""SentencePiece's tokenizers in GGUF, read by the rule by which llama.cpp reads them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.export.gguf_vocab import add_tokenizer, adds_bos

ROOT = Path(__file__).parents[3]
TEXTS = ["What does ls do?", "  two  spaces and\nlines\n", "Käse: 12 €, 日本", "a", "tokens_per_step: 16384"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def save_spm(folder: Path, **changes: Any) -> Tokenizer:
    """A tokenizer as transformers makes it of Llama 2's: every split of a piece into two is a merge, in order."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL + alphabet, show_progress=False)
    tokenizer.train([str(ROOT / "README.md")], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] in SPECIAL]
    vocab = data["model"]["vocab"]
    # a trained piece's rank is that of its first merge
    order = list(dict.fromkeys("".join(pair) for pair in data["model"]["merges"]))
    data["model"]["merges"] = [
        [piece[:cut], piece[cut:]]
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    data["model"] |= changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return Tokenizer.from_str(json.dumps(data))


def written(folder: Path) -> GGUFReader:
    import gguf

    writer = gguf.GGUFWriter(folder / "v.gguf", "llama")
    add_tokenizer(writer, folder, vocab_size=1000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return GGUFReader(folder / "v.gguf")


def contents(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(f"tokenizer.ggml.{name}")
    assert field is not None
    return field.contents()


def as_llama_cpp(text: str, tokens: list[str], scores: list[float], *, space: bool) -> list[int]:
    """The rule of llama.cpp's `llm_tokenizer_spm`: again and again the best pair of neighbours, the first of equals."""
    ids = {token: index for index, token in enumerate(tokens)}
    symbols = list((" " * space + text).replace(" ", "▁"))
    while True:
        pairs = [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = save_spm(tmp_path)
    reader = written(tmp_path)
    assert contents(reader, "model") == "llama"
    tokens, scores = contents(reader, "tokens"), contents(reader, "scores")
    space = contents(reader, "add_space_prefix")
    assert space is True
    for text in [*TEXTS, (ROOT / "README.md").read_text()[:2000]]:
        assert as_llama_cpp(text, tokens, scores, space=space) == tokenizer.encode(text, add_special_tokens=False).ids
    types = contents(reader, "token_type")
    assert types[:4] == [2, 3, 3, 6], "unknown, control, control, byte"
    assert types[-1] == 5, "unused"
    assert contents(reader, "bos_token_id") == 1
    assert adds_bos(tmp_path)


def test_merges_of_another_rule_are_refused(tmp_path: Path) -> None:
    save_spm(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = data["model"]["merges"]
    at = next(i for i, (a, b) in enumerate(pairwise(merges)) if "".join(a) == "".join(b))
    for wrong in (merges[:-1], [*merges[:at], *merges[at + 1 :], merges[at]]):
        data["model"]["merges"] = wrong
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        with pytest.raises(UnsupportedError, match="another rule"):
            written(tmp_path)


@pytest.mark.parametrize("change", [{"type": "Unigram"}, {"type": "WordPiece"}])
def test_other_kinds_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    save_spm(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match="kind of tokenizer"):
        written(tmp_path)
