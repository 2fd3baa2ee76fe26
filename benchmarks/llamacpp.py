"""What llama.cpp itself makes of what `lowmem-ft export` writes: tokens, logits, answers, adapters, chat templates.

Tiny random models of every architecture and the embedded model after a short training run, in every type, on the CPU;
and tokenizers of every kind. It needs

    pip install llama-cpp-python xllamacpp

of which the first calls llama.cpp's library (where there is no wheel pip compiles it, for a quarter of an hour on one
core), and the second is llama.cpp's server, which renders chat templates.

    python benchmarks/llamacpp.py --out benchmarks/results/llama_cpp.json
    python benchmarks/llamacpp.py --vocabs FOLDER    # `models/` of llama.cpp's sources: the vocabularies of real models
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

QUESTIONS = ("What does ls do?", "What does grep do?", "What is tar for?", "How do I copy a file?", "Käse, 日本?")
BEGINNINGS = ("The ls command", "SYNOPSIS\n", "This option", "If the file does not exist,")
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
NOTHING: dict[str, Any] = {}


class Engine:
    """A GGUF file, and maybe an adapter on it, in llama.cpp.

    Args:
        exact: attention and its cache in fp32; else as llama.cpp does it by default (a cache in fp16).
        weights: False: only the vocabulary.
    """

    def __init__(
        self, file: Path, *, adapter: Path | None = None, exact: bool = True, weights: bool = True, context: int = 512
    ) -> None:
        import llama_cpp as lib

        self._lib, self._context = lib, None
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = lib.llama_model_default_params()
        options.n_gpu_layers, options.vocab_only = 0, not weights
        self._model = lib.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {file.name}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.size = lib.llama_vocab_n_tokens(self._vocab)
        if not weights:
            return
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", "1"))
        if exact:
            settings.type_k = settings.type_v = lib.GGML_TYPE_F32
            settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lib.llama_init_from_model(self._model, settings)
        if adapter is not None:
            loaded = lib.llama_adapter_lora_init(self._model, str(adapter).encode())
            if not loaded:
                raise RuntimeError(f"llama.cpp does not load {adapter.name}")
            pointers, scales = (lib.llama_adapter_lora_p_ctypes * 1)(loaded), (ctypes.c_float * 1)(1.0)
            if lib.llama_set_adapters_lora(self._context, pointers, 1, scales) != 0:
                raise RuntimeError(f"llama.cpp does not take {adapter.name}")

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        self._lib.llama_log_set(ctypes.cast(None, self._lib.llama_log_callback), ctypes.c_void_p(0))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        given = text.encode()
        found = (self._lib.llama_token * (2 * len(given) + 8))()
        count = self._lib.llama_tokenize(self._vocab, given, len(given), found, len(found), add_special, parse_special)
        assert count >= 0, "there was room enough"
        return list(found[:count])

    def text(self, ids: Sequence[int], *, special: bool = True) -> bytes:
        pieces = b""
        for token in ids:
            room = ctypes.create_string_buffer(1024)
            count = self._lib.llama_token_to_piece(self._vocab, token, room, len(room), 0, special)
            pieces += room.raw[:count]
        return pieces

    def logits(self, ids: Sequence[int]) -> Any:
        """(T, V) of a sequence that begins anew."""
        import numpy as np
        import torch

        self._forget()
        self._decode(ids, at=0, all_logits=True)
        pointer = self._lib.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(len(ids), self.size)).copy())

    def answer(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest token each time, until one ends the answer."""
        self._forget()
        self._decode(ids, at=0)
        found: list[int] = []
        while len(found) < count:
            pointer = self._lib.llama_get_logits_ith(self._context, -1)
            token = max(range(self.size), key=pointer.__getitem__)
            found.append(token)
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            self._decode([token], at=len(ids) + len(found) - 1)
        return found

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], *, at: int, all_logits: bool = False) -> None:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, at + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = all_logits or index == len(ids) - 1
        failed = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        assert failed == 0, f"llama_decode: {failed}"


@contextmanager
def serving(file: Path) -> Iterator[Callable[..., Any]]:
    """llama.cpp's server with this file; gives a function that asks it something, `(path, **body) -> object`."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.port, options.n_ctx, options.n_parallel, options.n_gpu_layers, options.warmup = 0, 512, 1, 0, False
    options.use_jinja, options.verbosity = True, -1
    options.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    server = xllamacpp.Server(options)
    address = server.listening_address

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    yield ask


def shown(parity: Any) -> dict[str, Any]:
    """Rounded figures of a `Parity`."""
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in asdict(parity).items()}


def base_alone(adapter: Path, folder: Path) -> Path:
    """The same adapter with zeros in B: what is merged with it is the base."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: it * ("lora_B" not in name) for name, it in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def measured_types(run: Any, folder: Path, *, defaults: bool = False) -> dict[str, Any]:
    """Of a trained run: each type, and an adapter on its base, as llama.cpp computes them beside the trained model."""
    import torch

    from lowmem_ft.export.adapters import write_gguf_adapter
    from lowmem_ft.export.gguf import write_gguf
    from lowmem_ft.export.gguf_file import TYPES
    from lowmem_ft.export.parity import compare, held_out
    from lowmem_ft.export.weights import MergedWeights

    text = held_out(run.config, Path(run.config.model))
    trained = run.logits(text)

    def merged(adapter: Path, base: Any) -> Any:
        return MergedWeights(run.config, run.policy, adapter, base=base, dtype=torch.float32, stored=False)

    def measured(reference: Any, file: Path, **options: Any) -> dict[str, Any]:
        with closing(Engine(file, **options)) as engine:
            return shown(compare(reference, [engine.logits(ids) for ids in text.sequences]))

    found: dict[str, Any] = {}
    weights = merged(run.adapter, "dequantized")
    for kind in TYPES:
        file = folder / f"{kind}.gguf"
        write_gguf(weights, kind, file, name="measured")
        found[kind] = measured(trained, file)
        if defaults:
            found[f"{kind}, llama.cpp's defaults"] = measured(trained, file, exact=False)
        if kind != "f32":
            file.unlink()
    alone = base_alone(run.adapter, folder / "alone")
    try:
        write_gguf_adapter(weights.trained, weights.model.config, folder / "adapter.gguf")
    except Exception as error:  # what was trained is no plain LoRA
        return {**found, "adapter": str(error).splitlines()[0]}
    for base in ("dequantized", "original"):
        write_gguf(merged(alone, base), "f32", folder / f"{base}.gguf", name="base")
        expected = trained if base == "dequantized" else run.unquantized_logits(text, nbytes=0)
        found[f"adapter on the {base} base"] = measured(
            expected, folder / f"{base}.gguf", adapter=folder / "adapter.gguf"
        )
    found["without the adapter"] = measured(trained, folder / "dequantized.gguf")
    return found


def tiny(folder: Path) -> dict[str, Any]:
    """Tiny random models, trained in NF4, of every architecture."""
    from tests.unit.export.test_gguf import MODELS, run_of

    found = {}
    for name in MODELS:
        targets = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]} if "mix" in name or "moe" in name else NOTHING
        _, run = run_of(folder / name, name, **targets)
        found[name] = measured_types(run, folder / name)
        report(name, found[name])
    return found


def report(name: str, figures: Any) -> None:
    print(json.dumps({name: figures}, ensure_ascii=False), file=sys.stderr, flush=True)


def embedded(folder: Path, steps: int) -> dict[str, Any]:
    """The package's own model after a short training run."""
    from lowmem_ft.assemble import assemble
    from lowmem_ft.core.config import RunConfig
    from lowmem_ft.core.plan import Plan
    from lowmem_ft.export.models import TrainedRun
    from lowmem_ft.generate import complete
    from tests.assets import ASSETS
    from tests.unit.export.runs import CPU

    config: dict[str, Any] = {
        "model": str(ASSETS / "doclm-7m"),
        "data": {"train": str(ASSETS / "whatis-train.jsonl"), "eval": str(ASSETS / "whatis-eval.jsonl"), "seq_len": 64},
        "adapter": {"rank": 8},
        "train": {"tokens_per_step": 512, "steps": steps, "lr": 4e-3, "eval_every": steps},
        "policy": {"micro_batch_tokens": 256, "activations": "keep", "compute_dtype": "float32"},
        "output": str(folder / "run"),
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "lowmem_ft", "train", str(file)], check=True, stdout=sys.stderr)
    plan = Plan.from_dict(json.loads((folder / "run" / "plan.json").read_text()))
    run = TrainedRun(
        config=RunConfig.load(file), policy=plan.policy, adapter=folder / "run" / "adapter", device=CPU, scratch=folder
    )
    found: dict[str, Any] = {"types": measured_types(run, folder, defaults=True)}
    ready = assemble(run.config, run.policy, CPU, adapter=run.adapter, optimizer=False)
    ready.model.eval()
    tokenizer, same = ready.tokenizer, []
    assert tokenizer is not None, "it comes with the model"
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(it, tokenize=False, add_generation_prompt=True) for it in asked]
    with closing(Engine(folder / "f32.gguf")) as engine:
        for text in [*prompts, *BEGINNINGS]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert engine.tokenize(text, add_special=False) == ids, f"tokens of {text}"
            ours = complete(ready.model, tokenizer, [ids], max_new_tokens=96)[0]
            answer = engine.answer(ids, 96)
            theirs = engine.text(answer, special=False).decode(errors="replace")
            same.append({"prompt": text, "equal": theirs == ours, "tokens": len(answer)})
            if theirs != ours:
                same[-1] |= {"ours": ours, "llama.cpp": theirs}
    found["answers"] = same
    found["template"] = template(folder / "f32.gguf", tokenizer)
    found["served"] = served(folder / "f32.gguf", tokenizer, ready.model)
    return found


def template(file: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Conversations under the chat template in the file, as llama.cpp's server renders them, beside transformers."""
    from jinja2 import TemplateError

    turns = [{"role": role, "content": f"{role} {i}  é"} for i, role in enumerate(("user", "assistant", "user"))]
    found = []
    with serving(file) as ask:
        for messages in (turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns]):
            try:
                ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except TemplateError:
                continue  # it takes no system message
            theirs = ask("/apply-template", messages=messages)["prompt"]
            # the server leaves to its tokenizer what that adds
            ids = ask("/tokenize", content=theirs, add_special=True, parse_special=True)["tokens"]
            expected = tokenizer(ours, add_special_tokens=False)["input_ids"]
            found.append({"roles": [it["role"] for it in messages], "text": theirs == ours, "tokens": ids == expected})
            if not (found[-1]["text"] and found[-1]["tokens"]):
                found[-1] |= {"ours": ours, "llama.cpp": theirs}
    return found


def templates(folder: Path) -> dict[str, Any]:
    """The chat templates that the tests have, each in a file of a tiny model."""
    import torch
    from transformers import AutoTokenizer

    from lowmem_ft.export.gguf import write_gguf
    from lowmem_ft.export.weights import MergedWeights
    from tests.assets import ASSETS
    from tests.unit.data.test_templates import FOLDER, TEMPLATES
    from tests.unit.export.runs import trained
    from tests.unit.export.test_gguf import SIZES

    found = {}
    made = trained("llama", folder, model={**SIZES, "vocab_size": 4128})
    for name, known in TEMPLATES.items():
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / "doclm-7m")
        tokenizer.add_special_tokens({"bos_token": known.bos, "eos_token": known.eos})
        tokenizer.add_tokens(known.special, special_tokens=True)
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
        tokenizer.save_pretrained(folder / "base")
        weights = MergedWeights(made.config, made.policy, made.adapter, dtype=torch.float32, stored=False)
        write_gguf(weights, "f16", folder / "model.gguf", name="measured")
        found[name] = template(folder / "model.gguf", tokenizer)
        report(name, found[name])
    return found


def served(file: Path, tokenizer: Any, model: Any) -> list[dict[str, Any]]:
    """Answers of llama.cpp's server in a conversation, with its own defaults, beside ours."""
    from lowmem_ft.generate import converse

    found = []
    with serving(file) as ask:
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            ours = converse(model, tokenizer, messages, max_new_tokens=48).text
            said = ask("/v1/chat/completions", messages=messages, max_tokens=48, temperature=0)
            theirs = said["choices"][0]["message"]["content"].strip()
            found.append({"question": question, "equal": theirs == ours, "ended": said["choices"][0]["finish_reason"]})
            if theirs != ours:
                found[-1] |= {"ours": ours, "llama.cpp": theirs}
    return found


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

    from lowmem_ft.export.gguf_vocab import add_tokenizer

    file = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    add_tokenizer(writer, folder, vocab_size=size)
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


def main() -> None:
    parser = argparse.ArgumentParser(description="exported files in llama.cpp, on the CPU")
    parser.add_argument("--steps", type=int, default=60, help="of training, of the embedded model")
    parser.add_argument("--vocabs", type=Path, help="a folder with ggml-vocab-*.gguf of llama.cpp's sources")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    from common import leave, on_cpu, stamp  # beside this file, where scripts are run

    on_cpu(options.threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-llamacpp-") as name:
        folder = Path(name)
        tokens = {}
        made = tokenizers(folder / "tokenizers")
        if options.vocabs is not None:
            made |= real_tokenizers(options.vocabs, folder / "real")
        for kind, path in made.items():
            tokens[kind] = same_tokens(path)
            report(kind, tokens[kind])
        result = {
            **stamp(options.threads),
            "tokens": tokens,
            "templates": templates(folder / "templates"),
            "tiny": tiny(folder / "tiny"),
            "embedded": embedded(folder, options.steps),
        }
    packages = ("llama-cpp-python", "xllamacpp", "gguf")
    result["versions"] |= {package: importlib.metadata.version(package) for package in packages}
    leave({**result, "seconds": round(time.perf_counter() - start)}, options.out)


if __name__ == "__main__":
    main()
