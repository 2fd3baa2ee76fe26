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

import importlib.metadata
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.exported import (
    BEGINNINGS,
    QUESTIONS,
    arguments,
    base_alone,
    report,
    shown,
    trained_embedded,
    with_templates,
)
from benchmarks.llamacpp_engine import Engine, serving
from benchmarks.llamacpp_tokens import real_tokenizers, same_tokens, tokenizers

NOTHING: dict[str, Any] = {}


def measured_types(run: Any, folder: Path, *, defaults: bool = False) -> dict[str, Any]:
    """Of a trained run: each type, and an adapter on its base, as llama.cpp computes them beside the trained model."""
    import torch

    from lowmem_ft.export.adapters import write_gguf_adapter
    from lowmem_ft.export.gguf import write_gguf
    from lowmem_ft.export.gguf_file import TYPES
    from lowmem_ft.export.parity import compare, held_out
    from lowmem_ft.export.weights import MergedWeights
    from lowmem_ft.quant.checkpoint import Checkpoint

    text = held_out(run.config, Checkpoint.open(run.config.model))
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


def embedded(folder: Path, steps: int) -> dict[str, Any]:
    """The package's own model after a short training run."""
    from lowmem_ft.assemble import assemble
    from lowmem_ft.generate import complete
    from tests.unit.export.runs import CPU

    run = trained_embedded(folder, steps)
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
    found = {}
    for name, file, tokenizer, _ in with_templates(folder):
        found[name] = template(file, tokenizer)
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


def main() -> None:
    parser = arguments("exported files in llama.cpp, on the CPU")
    parser.add_argument("--vocabs", type=Path, help="a folder with ggml-vocab-*.gguf of llama.cpp's sources")
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
