"""From a trained run to models that others load, through the command line, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.assets import ASSETS, write_share
from tests.integration.test_cli import run, run_here

QUESTION = "What does ls do?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run: 12 steps of NF4 and rank 8."""
    folder = tmp_path_factory.mktemp("export")
    write_share(folder, train=200, eval=40)
    (folder / "config.yaml").write_text(
        f"model: {ASSETS / 'doclm-7m'}\n"
        f"data: {{train: {folder / 'train.jsonl'}, eval: {folder / 'eval.jsonl'}, seq_len: 64}}\n"
        "adapter: {rank: 8}\n"
        "train: {tokens_per_step: 512, steps: 12, lr: 4e-3, eval_every: 12}\n"
        "policy: {micro_batch_tokens: 256, loss_chunk_tokens: 64, activations: keep, compute_dtype: float32}\n"
        f"output: {folder / 'run'}\n"
    )
    done = run("train", folder / "config.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def answer(folder: Path) -> str:
    """Greedy, of a model that transformers alone loads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_a_merged_model_answers_as_the_run_does(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    merged = run("merge", trained, "--dtype", "float32", "--json")
    assert merged.returncode == 0, merged.stderr
    found = json.loads(merged.stdout)
    assert found["check"]["kl"] < 1e-6
    assert found["other"]["kl"] > found["check"]["kl"], "4 bits lie between the bases"
    asked = run_here("generate", trained, QUESTION, "--max-new-tokens", "16", monkeypatch=monkeypatch, capfd=capfd)
    assert answer(trained / "merged") == asked.stdout.strip()
    again = run_here("merge", trained, monkeypatch=monkeypatch, capfd=capfd)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_merged_into_the_original_base_it_is_what_peft_merges(trained: Path) -> None:
    out = trained.parent / "original"
    merged = run("merge", trained, "--base", "original", "--dtype", "float32", "--out", out)
    assert merged.returncode == 0, merged.stderr
    assert "Merged into the dequantized base it would be" in merged.stdout
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "doclm-7m", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, trained / "adapter").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--gguf", "f16"], {"Modelfile", "model-f16.gguf"}),
        (["--gguf", "q4_0", "--base", "original"], {"Modelfile", "model-q4_0.gguf"}),
        (["--gguf-adapter"], {"Modelfile", "adapter.gguf"}),
        (["--vllm"], {"adapter_config.json", "adapter_model.safetensors"}),
    ],
    ids=["gguf", "gguf-q4", "gguf-adapter", "vllm"],
)
def test_exports(
    trained: Path, arguments: list[str], names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    done = run_here("export", trained, *arguments, "--out", out, "--json", monkeypatch=monkeypatch, capfd=capfd)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {path.name for path in out.iterdir()} == names == set(found["files"])
    assert found["check"]["kl"] <= found["bound"]["kl"]


def test_with_a_config_it_goes_to_the_run_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (trained.parent / "config.yaml").read_text().replace(str(trained), str(tmp_path / "runs" / "other"))
    (tmp_path / "config.yaml").write_text(text)
    options = ["--adapter", trained / "adapter", "--json"]
    done = run_here("merge", tmp_path / "config.yaml", *options, monkeypatch=monkeypatch, capfd=capfd)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "runs" / "other" / "merged")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "--base", "orginal"], "did you mean original?"),
        (["merge", "--dtype", "int8"], "bfloat16 | float16 | float32"),
        (["merge", "--dtype", "float16", "--quantize", "nf4"], "--dtype has no effect"),
        (["merge", "--adapter", "/nowhere"], "/nowhere"),
        (["export"], "One export at a time"),
        (["export", "--gguf", "q4_k_m"], "q4_0"),
        (["export", "--vllm", "--base", "original"], "--base concerns merged models"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(
    trained: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = trained.parent / "none"
    done = run_here(arguments[0], trained, *arguments[1:], "--out", out, monkeypatch=monkeypatch, capfd=capfd)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
