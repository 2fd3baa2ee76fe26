"""SentencePiece's tokenizers in GGUF, read by the rule by which llama.cpp reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.export.gguf_vocab import SPLITS, add_tokenizer, adds_bos, differences
from tests.assets import ASSETS

CORPUS = Path(__file__).parents[3] / "LICENSE"  # a text that does not change, with indented lines
TEXTS = ["What does ls do?", "  two  spaces and\nlines\n", "Käse: 12 €, 日本", "a", "tokens_per_step: 16384"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def save_spm(folder: Path, **changes: Any) -> Tokenizer:
    """A tokenizer as transformers makes it of Llama 2's: every split of a piece into two is a merge, in order."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL + alphabet, show_progress=False)
    tokenizer.train([str(CORPUS)], trainer)
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


def written(folder: Path, *, size: int = 1000) -> GGUFReader:
    import gguf

    writer = gguf.GGUFWriter(folder / "v.gguf", "llama")
    add_tokenizer(writer, AutoTokenizer.from_pretrained(folder), folder, vocab_size=size)
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
    for text in [*TEXTS, CORPUS.read_text()[:2000]]:
        assert as_llama_cpp(text, tokens, scores, space=space) == tokenizer.encode(text, add_special_tokens=False).ids
    types = contents(reader, "token_type")
    assert types[:4] == [2, 3, 3, 6], "unknown, control, control, byte"
    assert types[-1] == 5, "unused"
    assert contents(reader, "bos_token_id") == 1
    # llama.cpp would put it in front of every text, where nothing is said
    assert contents(reader, "add_bos_token") is adds_bos(AutoTokenizer.from_pretrained(tmp_path)) is False
    assert differences(AutoTokenizer.from_pretrained(tmp_path)) == []


def change(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes, "model": {**data["model"], **changes.get("model", {})}}))


def save_spaces(folder: Path, *, mixed: bool, lengths: Sequence[int]) -> None:
    """With runs of spaces as Llama 2 has them, alone and of one score. It puts the longest left part first."""
    save_spm(folder)
    data = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [pair for pair in data["merges"] if "▁▁" not in "".join(pair)]
    vocab = {token: index for token, index in data["vocab"].items() if "▁▁" not in token}
    vocab = {token: index for index, token in enumerate([*vocab, *("▁" * length for length in lengths)])}
    pairs = [["▁" * cut, "▁" * (n - cut)] for n in lengths for cut in range(1, n) if {cut, n - cut} <= {1, *lengths}]
    if mixed:
        pairs.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    change(folder, model={"vocab": vocab, "merges": [*merges, *pairs]})


@pytest.mark.parametrize("mixed", [False, True], ids=["apart", "mixed"])
@pytest.mark.parametrize("lengths", [range(2, 17), (2, 4, 8)], ids=["all", "some"])
def test_runs_of_spaces(mixed: bool, lengths: Sequence[int], tmp_path: Path) -> None:
    save_spaces(tmp_path, mixed=mixed, lengths=lengths)
    reader = written(tmp_path)
    tokens, scores = contents(reader, "tokens"), contents(reader, "scores")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for count in range(1, 60):
        for text in (" " * count, " " * count + "the" + " " * (count % 7) + "a"):
            assert as_llama_cpp(text, tokens, scores, space=True) == tokenizer.encode(text).ids


def test_runs_of_spaces_of_another_rule_are_refused(tmp_path: Path) -> None:
    save_spaces(tmp_path, mixed=True, lengths=range(2, 6))
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    of_spaces = [pair for pair in model["merges"] if not "".join(pair).strip("▁")]
    rest = [pair for pair in model["merges"] if pair not in of_spaces]
    change(tmp_path, model={"merges": [*rest, *reversed(of_spaces)]})
    with pytest.raises(UnsupportedError, match="others are merged first"):
        written(tmp_path)
    change(tmp_path, model={"merges": [*of_spaces[:3], *rest, *of_spaces[3:]]})
    with pytest.raises(UnsupportedError, match="runs of spaces lie apart"):
        written(tmp_path)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
CHAT = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.mark.parametrize(
    ("scheme", "template", "space", "words"),
    [
        ("always", None, True, ["a space at the beginning"]),
        ("never", None, False, []),
        ("first", None, True, ["a space at the beginning", "before text"]),
        # each piece of a conversation lies behind a special token, where the tokenizer adds nothing
        ("first", CHAT, False, ["no special token"]),
        ("first", CHAT.removeprefix("{{ bos_token }}"), True, ["a space at the beginning", "before text"]),
    ],
)
def test_spaces_in_front(scheme: str, template: str | None, space: bool, words: list[str], tmp_path: Path) -> None:
    save_spm(tmp_path)
    change(tmp_path, normalizer=None, pre_tokenizer={**METASPACE, "prepend_scheme": scheme})
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    assert contents(written(tmp_path), "add_space_prefix") is space
    found = differences(AutoTokenizer.from_pretrained(tmp_path))
    assert len(found) == len(words)
    assert all(word in it for word, it in zip(words, found, strict=True))


def save_byte_level(folder: Path, rule: str = "llama-bpe", *, bos: bool = False) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLITS[rule]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(CORPUS)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize("bos", [False, True])
def test_whether_a_first_token_is_added_is_always_said(bos: bool, tmp_path: Path) -> None:
    """What llama.cpp does otherwise depends on the rule of splitting: for this one it adds one."""
    save_byte_level(tmp_path, bos=bos)
    reader = written(tmp_path)
    assert contents(reader, "add_bos_token") is adds_bos(AutoTokenizer.from_pretrained(tmp_path)) is bos
    assert contents(reader, "add_eos_token") is False
    assert contents(reader, "merges")[0].count(" ") == 1


def test_no_last_token_is_put_behind_prompts(tmp_path: Path) -> None:
    """Where the tokenizer does that, the programs of llama.cpp end at once: GGML_ASSERT(!llama_vocab_get_add_eos)."""
    save_byte_level(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path)
    reader = written(tmp_path)
    assert contents(reader, "add_bos_token") is True
    assert contents(reader, "add_eos_token") is False


def test_other_tokens_around_a_text_are_refused(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 0)]
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="other tokens around"):
        written(tmp_path)


def test_all_that_end_an_answer_are_said(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5, 7]}')
    reader = written(tmp_path)
    assert [contents(reader, f"{kind}_token_id") for kind in ("eos", "eot", "eom")] == [2, 5, 7]


def test_what_ends_answers_in_the_chat_template_is_said(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (last, index) = next((str(it), key) for key, it in tokenizer.added_tokens_decoder.items()
                         if it.special and key != tokenizer.eos_token_id)  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '" + last + "' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    assert contents(written(tmp_path), "eot_token_id") == index


def test_the_tokenizer_is_the_one_that_training_used(tmp_path: Path) -> None:
    """transformers splits by a rule of its own for a Qwen 2, whatever tokenizer.json says, and adds a token."""
    shutil.copytree(ASSETS / "doclm-7m", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 4097
    reader = written(tmp_path, size=4096)
    assert contents(reader, "pre") == "qwen2"
    assert len(contents(reader, "tokens")) == 4096
    assert "NFC" in differences(loaded)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "kind of tokenizer"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "kind of tokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "no name"),
    ],
    ids=["lowercase", "suffix", "space"],
)
def test_what_llama_cpp_does_not_do_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(UnsupportedError, match=words):
        written(tmp_path)


def test_tokens_that_take_white_space_in_are_told(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert differences(tokenizer) == []
    tokenizer.add_tokens([AddedToken("<x>", rstrip=True)])
    assert "white space beside <x>" in differences(tokenizer)[0]


def test_splitting_before_sentencepiece_is_refused(tmp_path: Path) -> None:
    save_spm(tmp_path)
    for changes in (
        {"normalizer": None, "pre_tokenizer": {**METASPACE, "split": True}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
    ):
        change(tmp_path, **changes)
        with pytest.raises(UnsupportedError, match="kind of tokenizer"):
            written(tmp_path)


def test_tokens_that_no_merges_give(tmp_path: Path) -> None:
    """llama.cpp takes a piece that is a token as it is for Llama 3's rule, and merges for others."""
    save_byte_level(tmp_path, "qwen2")
    change(tmp_path, model={"ignore_merges": True})
    written(tmp_path)  # it comes to the same
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    change(tmp_path, model={"vocab": {**model["vocab"], "qzqzqz": len(model["vocab"])}})
    with pytest.raises(UnsupportedError, match="qzqzqz is not what its merges give"):
        written(tmp_path)


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


@pytest.mark.parametrize("model", [models.Unigram([("a", 0.0)], 0, False), models.WordLevel({"a": 0}, "a")], ids=str)
def test_other_kinds_are_refused(model: Any, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="kind of tokenizer"):
        written(tmp_path)
