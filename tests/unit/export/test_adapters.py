"""Adapters for llama.cpp and vLLM, and what these cannot serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from lowmem_ft.core.errors import ParityError, UnsupportedError
from lowmem_ft.export import adapters as adapters_module
from lowmem_ft.export.exports import Export, export_gguf_adapter, export_vllm
from lowmem_ft.export.models import TrainedRun
from lowmem_ft.report.progress import Reporter
from tests.assets import ASSETS
from tests.unit.export.runs import CPU, Trained, trained

QUIET = Reporter(quiet=True)
EXPORTS = {"gguf": export_gguf_adapter, "vllm": export_vllm}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "k_proj": 7}, "alpha_pattern": {"down_proj": 5, "k_proj": 3}},
    "layers": {"layers": [1], "targets": ["q_proj", "k_proj"]},
}


def exported(made: Trained, folder: Path, kind: str) -> Export:
    run = TrainedRun(config=made.config, policy=made.policy, adapter=made.adapter, device=CPU, scratch=folder)
    return EXPORTS[kind](run, folder / "out", text=None, reporter=QUIET)


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_read_back_equal(kind: str, method: str, tmp_path: Path) -> None:
    done = exported(trained("llama", tmp_path, **METHODS[method]), tmp_path, kind)
    # measured: 0 to 2e-14
    assert done.check.kl < 1e-9
    assert done.check.top1 == 1
    assert done.on_original is not None
    assert done.on_original.kl > 1e-4
    assert len(done.lines()) == 5
    json.dumps(done.to_dict())
    assert "unpacked" not in {path.name for path in done.folder.iterdir()}


@pytest.mark.parametrize("name", ["qwen2", "mistral", "qwen3"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    done = exported(trained(name, tmp_path), tmp_path, "gguf")
    assert done.check.kl < 1e-9
    general = GGUFReader(done.folder / "adapter.gguf").get_field("general.architecture")
    assert general is not None
    assert general.contents() == ("llama" if name == "mistral" else name)


def test_a_gguf_adapter_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    made = trained("llama", tmp_path, rank=4, alpha=8)
    folder = exported(made, tmp_path, "gguf").folder
    reader = GGUFReader(folder / "adapter.gguf")
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    assert {name: reader.get_field(name).contents() for name in fields} == fields  # type: ignore[union-attr]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 7 * 2
    q = tensors["blk.0.attn_q.weight.lora_b"]
    assert list(tensors["blk.0.ffn_up.weight.lora_a"].shape) == [48, 4], "inputs lie innermost"
    assert list(q.shape) == [4, 48]
    saved = load_file(made.adapter / "adapter_model.safetensors")
    rows = saved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    # four heads of 12: pairs of the two halves of each
    expected = rows.view(4, 2, 6, 4).transpose(1, 2).reshape(48, 4)
    assert torch.equal(torch.from_numpy(q.data.copy()).view(48, 4), expected.float())
    assert (folder / "Modelfile").read_text().splitlines()[1] == "ADAPTER ./adapter.gguf"


def test_one_rank_for_vllm(tmp_path: Path) -> None:
    folder = exported(trained("llama", tmp_path, **METHODS["patterns"]), tmp_path, "vllm").folder
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (7, 7, {})
    ranks = {t.shape[0] for name, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in name}
    assert ranks == {7}


def test_a_pattern_of_all_layers_is_a_pattern(tmp_path: Path) -> None:
    made = trained("llama", tmp_path, rank=4, alpha=8, targets=["q_proj"])
    file = made.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 8, "rank_pattern": {"q_proj": 4}}))
    folder = exported(made, tmp_path, "vllm").folder
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (4, 4, {}), "vLLM reads no pattern"
    ours, theirs = (load_file(it / "adapter_model.safetensors") for it in (made.adapter, folder))
    assert all(torch.equal(theirs[name], ours[name] * (2.0 if "lora_B" in name else 1.0)) for name in ours)


def test_what_is_uniform_goes_as_it_is(tmp_path: Path) -> None:
    made = trained("llama", tmp_path)
    done = exported(made, tmp_path, "vllm")
    name = "adapter_model.safetensors"
    assert (done.folder / name).read_bytes() == (made.adapter / name).read_bytes()
    assert "--max-lora-rank 8" in done.notes[0]


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize(
    ("name", "method", "word"),
    [
        ("llama", {"dora": True}, "DoRA"),
        ("qwen2", {"bias": "all"}, "trained biases"),
        ("llama", {"train_modules": ["lm_head"]}, "whole trained modules"),
        ("mixtral", {}, "stacked experts"),
    ],
)
def test_what_servers_cannot_serve(kind: str, name: str, method: dict[str, Any], word: str, tmp_path: Path) -> None:
    made = trained(name, tmp_path, **method)
    with pytest.raises(UnsupportedError, match=word):
        exported(made, tmp_path, kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize(("name", "known"), [("llama", True), ("gemma2", False)])
def test_gguf_is_named_where_it_can_be_written(kind: str, name: str, known: bool, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="lowmem-ft merge") as refused:
        exported(trained(name, tmp_path, dora=True), tmp_path, kind)
    assert ("export --gguf" in str(refused.value.fix)) == known


def test_ranks_beyond_vllm(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="given:   513"):
        exported(trained("llama", tmp_path, rank=513, targets=["q_proj"]), tmp_path, "vllm")


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("gpt2", {}, "no adapters on models of this architecture"),
        ("deepseek_v3", {"targets": ["q_b_proj", "kv_b_proj"]}, "does not apply an adapter on this layer"),
    ],
)
def test_what_vllm_puts_no_adapter_on(name: str, method: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        exported(trained(name, tmp_path, **method), tmp_path, "vllm")
    assert not (tmp_path / "out").exists()


def test_commands_are_quoted_for_a_shell(tmp_path: Path) -> None:
    base = tmp_path / "a base"
    done = exported(trained("llama", tmp_path, base=base), tmp_path, "vllm")
    assert f"vllm serve '{base}' --enable-lora" in done.notes[0]


def test_a_local_base_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = trained("llama", Path(), base=Path("base"))
    folder = exported(made, tmp_path, "gguf").folder
    # Ollama would look for a relative one beside the Modelfile
    assert (folder / "Modelfile").read_text().splitlines()[0] == f"FROM {tmp_path.resolve() / 'base'}"


def test_the_adapter_brings_the_template_of_its_base(tmp_path: Path) -> None:
    # Ollama finds no chat template in a folder that FROM names, and would take ChatML
    made = trained("llama", tmp_path, model={"vocab_size": 4096})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "doclm-7m" / name, tmp_path / "base" / name)
    text = (exported(made, tmp_path, "gguf").folder / "Modelfile").read_text()
    assert 'TEMPLATE """<|bos|>{{ range .Messages }}' in text
    assert 'PARAMETER stop "<|eos|>"' in text


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be written as GGUF"):
        exported(trained("gpt2", tmp_path), tmp_path, "gguf")


def test_a_wrong_permutation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained("llama", tmp_path)
    monkeypatch.setattr(adapters_module, "permute", lambda rows, heads: rows)
    with pytest.raises(ParityError):
        exported(made, tmp_path, "gguf")
    assert not (tmp_path / "out").exists()
