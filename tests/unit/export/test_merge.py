"""Merged models as transformers alone loads them, against the models that were trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from lowmem_ft.assemble import assemble
from lowmem_ft.core.errors import CheckpointError, ConfigError, UnsupportedError
from lowmem_ft.export import weights as weights_module
from lowmem_ft.export.adapters import plain_factors
from lowmem_ft.export.merge import merge, write_merged
from lowmem_ft.export.models import TrainedRun
from lowmem_ft.export.weights import Base, MergedWeights
from lowmem_ft.export.write import new_folder
from lowmem_ft.quant import shards
from lowmem_ft.quant.checkpoint import Checkpoint, scan
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.report.progress import Reporter
from tests.assets import ASSETS
from tests.models import ARCHITECTURES, save_tiny
from tests.unit.adapters.helpers import error
from tests.unit.adapters.test_peft_methods import METHODS as PEFT_METHODS
from tests.unit.export.runs import CPU, Trained, logits, plain, trained
from tests.unit.quant.loading import change_tensors, save_gemma3
from tests.unit.quant.test_prequantized import FORMATS, ROUND, save_bitsandbytes, save_fp8, save_mxfp4

# In fp32 nothing but the order of sums differs. Measured over all architectures, 4 and 16 bits: 1.7e-7 to 7.4e-6.
EXACT = 3e-5
# model, and how it is trained
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"rslora": True}),
    "dora": ("llama", {"dora": True}),
    "dropout": ("llama", {"dropout": 0.1}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}}),
    "layers": ("llama", {"layers": [1], "targets": ["q_proj", "up_proj"]}),
    "bias": ("qwen2", {"bias": "all"}),
    "bias of adapted": ("qwen2", {"bias": "lora_only", "targets": ["q_proj"]}),
    "modules": ("llama", {"train_modules": ["embed_tokens", "lm_head", "norm"]}),
    "conv1d": ("gpt2", {}),
    "conv1d dora": ("gpt2", {"dora": True, "bias": "all"}),
    "experts": ("mixtral", {}),
    "stored experts": ("gpt_oss", {}),
    "attention of experts": ("qwen3_moe", {"targets": ["q_proj"]}),
}


PROMPTS = {"prompt", "prefix", "p_tuning"}
UNMERGED = {"osf", "psoft", "lily"}  # methods of peft that can be served as adapters alone


def merged_by_peft(base: Path, adapter: Path) -> Tensor:
    """Logits of the original base with the adapter, by peft alone."""
    model = plain(base, dtype=torch.float32, experts_implementation="eager")
    model.config.tie_word_embeddings = False  # peft's merge would tie again what is no longer tied
    return logits(PeftModel.from_pretrained(model, adapter).eval())


def write(run: Trained, out: Path, base: Base = "dequantized", dtype: torch.dtype = torch.float32) -> Path:
    weights = MergedWeights(run.config, run.policy, run.adapter, base=base, dtype=dtype)
    with new_folder(out, nbytes=0) as folder:
        write_merged(weights, folder)
    return out


def merged_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits(plain(folder, dtype=dtype, experts_implementation="eager"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_merged_is_trained(method: str, bits: int, tmp_path: Path) -> None:
    name, adapter = METHODS[method]
    run = trained(name, tmp_path, bits=bits, **adapter)
    out = write(run, tmp_path / "out")
    assert error(merged_logits(out), run.logits) < EXACT


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {name for name, _ in METHODS.values()}))
def test_architectures(name: str, tmp_path: Path) -> None:
    run = trained(name, tmp_path)
    assert error(merged_logits(write(run, tmp_path / "out")), run.logits) < EXACT


@pytest.mark.parametrize("method", ["lora", "dora", "experts", "conv1d", "bias", "modules"])
def test_the_original_base_is_what_peft_merges_into(method: str, tmp_path: Path) -> None:
    name, adapter = METHODS[method]
    run = trained(name, tmp_path, **adapter)
    theirs = merged_by_peft(tmp_path / "base", run.adapter)
    ours = merged_logits(write(run, tmp_path / "out", "original"))
    assert error(ours, theirs) < EXACT
    assert error(ours, run.logits) > 0.02, "4 bits lie between them"


@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(base: Base, dtype: torch.dtype, tmp_path: Path) -> None:
    run = trained("llama", tmp_path, dora=True)
    exact = load_file(write(run, tmp_path / "exact", base) / "model-00001-of-00001.safetensors")
    rounded = load_file(write(run, tmp_path / "out", base, dtype) / "model-00001-of-00001.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(rounded[key], exact[key].to(dtype)) for key in exact)
    # measured: 0.6% (bf16), 0.07% (fp16)
    assert error(merged_logits(tmp_path / "out"), run.logits) < (0.02 if base == "dequantized" else 1)


@pytest.mark.parametrize("trains", [["embed_tokens"], []])
def test_tied_embeddings_are_written_once(trains: list[str], tmp_path: Path) -> None:
    run = trained("llama", tmp_path, model={"tie_word_embeddings": True}, train_modules=trains)
    out = write(run, tmp_path / "out")
    assert "lm_head.weight" not in scan(out)[1]
    assert error(merged_logits(out), run.logits) < EXACT


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ROUND)
def test_a_checkpoint_that_is_quantized_already(name: str, kind: str, tmp_path: Path) -> None:
    save_bitsandbytes(name, tmp_path / "base", FORMATS[kind][1], **ROUND[name])
    run = trained(name, tmp_path, base=tmp_path / "base" / "bnb")
    out = write(run, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert error(merged_logits(out), run.logits) < EXACT


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_checkpoints_in_8_and_4_bit_floats(name: str, tmp_path: Path) -> None:
    if name == "llama":
        save_fp8("llama", tmp_path / "base", (16, 16))
    else:
        save_mxfp4(tmp_path / "base")
    run = trained(name, tmp_path)
    out = write(run, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert error(merged_logits(out), run.logits) < EXACT


def test_the_text_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    save_gemma3(tmp_path / "base")
    run = trained("gemma3", tmp_path)
    out = write(run, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == "gemma3_text"
    assert error(merged_logits(out), run.logits) < EXACT


def test_names_are_those_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    run = trained("mixtral", tmp_path)
    out = write(run, tmp_path / "out", dtype=torch.bfloat16)
    before, after = Checkpoint.open(tmp_path / "base").tensors, Checkpoint.open(out).tensors
    assert {name: it.shape for name, it in after.items()} == {name: it.shape for name, it in before.items()}
    assert len(list(out.glob("*.safetensors"))) > 3
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"] is True


@pytest.mark.parametrize("known", [None, 2, [2, 5]])
def test_what_ends_answers_in_the_chat_template_is_written(known: Any, tmp_path: Path) -> None:
    run = trained("llama", tmp_path, model={"vocab_size": 4096})
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "doclm-7m" / file, tmp_path / "base" / file)
    path = tmp_path / "base" / "generation_config.json"
    if known is None:
        path.unlink()  # then config.json says 2
    else:
        path.write_text(json.dumps({"eos_token_id": known, "temperature": 0.5, "do_sample": True}))
    out = write(run, tmp_path / "out")
    written = json.loads((out / "generation_config.json").read_text())
    assert written["eos_token_id"] == [*(known if isinstance(known, list) else [2]), 1]
    assert written.get("temperature") == (None if known is None else 0.5)


def test_the_whole_tokenizer_comes_along(tmp_path: Path) -> None:
    """With its other templates, such as that for tools, which lie in a folder, and files of SentencePiece."""
    run = trained("llama", tmp_path, model={"vocab_size": 4096})
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "doclm-7m")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "spiece.model").write_bytes(b"pieces")
    out = write(run, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert (out / "spiece.model").read_bytes() == b"pieces"


def test_what_training_ends_texts_by_is_written(tmp_path: Path) -> None:
    """Where there is no chat template the tokenizer's EOS ends them, which is 1 here, and 2 in config.json."""
    run = trained("llama", tmp_path, model={"vocab_size": 4096})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "doclm-7m" / file, tmp_path / "base" / file)
    out = write(run, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 1]


def test_what_is_beyond_the_range_of_fp16(tmp_path: Path) -> None:
    run = trained("llama", tmp_path, size=3e4)
    with pytest.raises(UnsupportedError, match="range of float16"):
        write(run, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_what_is_beyond_it_and_was_not_trained(tmp_path: Path) -> None:
    run = trained("llama", tmp_path)
    norm = torch.full((48,), 1e5, dtype=torch.bfloat16)
    change_tensors(tmp_path / "base" / "model.safetensors", {"model.norm.weight": norm})
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight"):
        write(run, tmp_path / "out", dtype=torch.float16)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("method", sorted(set(PEFT_METHODS) - PROMPTS - UNMERGED))
def test_methods_of_peft(method: str, bits: int, tmp_path: Path) -> None:
    run = trained("qwen2", tmp_path, bits=bits, method="peft", peft=PEFT_METHODS[method])
    assert error(merged_logits(write(run, tmp_path / "out")), run.logits) < EXACT
    weights = MergedWeights(run.config, run.policy, run.adapter)
    with pytest.raises(UnsupportedError, match="cannot serve this adapter"):
        plain_factors(weights.trained, weights.model.config, server="vLLM")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", sorted(UNMERGED))
def test_methods_that_cannot_be_merged(method: str, tmp_path: Path) -> None:
    run = trained("qwen2", tmp_path, method="peft", peft=PEFT_METHODS[method])
    with pytest.raises(UnsupportedError, match=r"merge[\s\S]*serve it as an adapter"):
        write(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("bits", [4, 16])
def test_methods_of_peft_on_conv1d(bits: int, tmp_path: Path) -> None:
    method = {"peft_type": "IA3", "target_modules": ["c_attn", "c_fc"], "feedforward_modules": ["c_fc"]}
    run = trained("gpt2", tmp_path, bits=bits, method="peft", peft=method)
    assert error(merged_logits(write(run, tmp_path / "out")), run.logits) < EXACT


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_copies_that_peft_trains(tied: bool, tmp_path: Path) -> None:
    method = {**PEFT_METHODS["lora_bias"], "modules_to_save": ["lm_head", "norm"]}
    run = trained("qwen2", tmp_path, bits=16, model={"tie_word_embeddings": tied}, method="peft", peft=method)
    assert error(merged_logits(write(run, tmp_path / "out")), run.logits) < EXACT


LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
ON_EMBEDDINGS: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 6]},
    "lora and tokens": {**LORA, "trainable_token_indices": [5, 6]},
    "copy": {**LORA, "modules_to_save": ["embed_tokens"]},
    "copy of the head": {**LORA, "modules_to_save": ["lm_head"]},
    "copies of both": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]},
}
ON_THE_HEAD = ("tokens", "lora and tokens")  # where that is tied to the embeddings


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", ON_EMBEDDINGS)
def test_what_peft_does_to_embeddings(method: str, tmp_path: Path) -> None:
    run = trained("llama", tmp_path, method="peft", peft=ON_EMBEDDINGS[method])
    assert torch.equal(logits(assemble(run.config, run.policy, CPU, adapter=run.adapter).model.eval()), run.logits)
    assert error(merged_logits(write(run, tmp_path / "out")), run.logits) < EXACT


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize("method", sorted(set(ON_EMBEDDINGS) - set(ON_THE_HEAD)))
def test_tied_embeddings_that_peft_changes_apart_are_untied(method: str, base: Base, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    run = trained("llama", tmp_path, model=tied, method="peft", peft=ON_EMBEDDINGS[method])
    assert torch.equal(logits(assemble(run.config, run.policy, CPU, adapter=run.adapter).model.eval()), run.logits)
    out = write(run, tmp_path / "out", base)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert scan(out)[1].keys() == scan(tmp_path / "base")[1].keys() | {"lm_head.weight"}
    exact = run.logits if base == "dequantized" else merged_by_peft(tmp_path / "base", run.adapter)
    assert error(merged_logits(out), exact) < EXACT


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", ["lora", "copies of both"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bloom"])
def test_other_architectures_are_untied(name: str, method: str, tmp_path: Path) -> None:
    words = {"gpt2": "wte", "bloom": "word_embeddings"}.get(name, "embed_tokens")
    leaf = {"gpt2": "c_attn", "bloom": "query_key_value"}.get(name, "q_proj")
    names = {"embed_tokens": words, "q_proj": leaf}
    method_of = {key: [names.get(it, it) for it in value] if isinstance(value, list) else value
                 for key, value in ON_EMBEDDINGS[method].items()}  # fmt: skip
    run = trained(name, tmp_path, model={"tie_word_embeddings": True}, method="peft", peft=method_of)
    assert error(merged_logits(write(run, tmp_path / "out")), run.logits) < EXACT


def test_an_untied_merge_says_so(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    made = trained("llama", tmp_path, model=tied, method="peft", peft=ON_EMBEDDINGS["copy"])
    run = TrainedRun(config=made.config, policy=made.policy, adapter=made.adapter, device=CPU, scratch=tmp_path)
    done = merge(run, tmp_path / "out", dtype=torch.float32, reporter=Reporter(quiet=True))
    assert done.untied
    assert "tie_word_embeddings: false" in done.lines()[-1]
    again = merge(run, tmp_path / "int8", quantize_to=QuantSpec(bits=8), reporter=Reporter(quiet=True))
    assert "lm_head.weight" in scan(again.folder)[1]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_architecture_that_cannot_be_untied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = {"tie_word_embeddings": True}
    run = trained("llama", tmp_path, model=tied, method="peft", peft=ON_EMBEDDINGS["copy"])
    build = weights_module.meta_model
    monkeypatch.setattr(
        weights_module, "meta_model", lambda _, **options: build(Checkpoint.open(run.config.model), **options)
    )
    with pytest.raises(UnsupportedError, match="cannot be untied"):
        write(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", ON_THE_HEAD)
def test_what_peft_puts_on_a_tied_head_is_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="adapter on the output head"):
        trained("llama", tmp_path, model={"tie_word_embeddings": True}, method="peft", peft=ON_EMBEDDINGS[method])


def test_an_adapter_of_peft_on_the_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="adapter on the output head"):
        trained("llama", tmp_path, method="peft", peft={**LORA, "target_modules": ["lm_head"]})


@pytest.mark.parametrize("method", sorted(PROMPTS))
def test_prompts_cannot_be_merged(method: str, tmp_path: Path) -> None:
    run = trained("qwen2", tmp_path)
    settings = json.loads((run.adapter / "adapter_config.json").read_text())
    kind = PEFT_METHODS[method]["peft_type"].upper()
    (run.adapter / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": kind}))
    with pytest.raises(UnsupportedError, match="trains tokens before the text"):
        write(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    run = trained("llama", tmp_path)
    save_tiny("llama", tmp_path / "base", hidden_size=32)
    with pytest.raises(CheckpointError, match="another shape"):
        write(run, tmp_path / "out")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    run = trained("llama", tmp_path)
    (tmp_path / "out").mkdir()
    write(run, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        write(run, tmp_path / "out")


def test_no_space(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no space left"), new_folder(tmp_path / "out", nbytes=2**60):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(there: bool, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "place")
    if there:
        (tmp_path / "place").mkdir()
    with new_folder(tmp_path / "link", nbytes=0) as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "whole").read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "place"}


def test_a_folder_in_use_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the current one"), new_folder(Path(), nbytes=0):
        pass
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(ConfigError, match="--out mounted/NAME"), new_folder(Path("mounted"), nbytes=0):
        pass


@pytest.mark.parametrize("out", ["/proc/x/y", "/dev/null/x"])
def test_a_path_that_is_wrong_is_not_called_full(out: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be written") as refused, new_folder(Path(out), nbytes=0):
        pass
    assert refused.value.fix == "name another folder with --out"


SLOW = """
import signal, sys, time
from pathlib import Path
from lowmem_ft.export.write import new_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this
with new_folder(Path(sys.argv[1]), nbytes=0) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_export_leaves_nothing(stop: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, stop)
    process.wait()
    assert not out.exists()
    if stop == signal.SIGINT:
        assert not list(tmp_path.iterdir())
    with new_folder(out, nbytes=0) as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "also what could not be removed then is gone"
