"""What programs in `benchmarks/` share, where a mistake would falsify what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.break_even import break_even
from benchmarks.random_weights import write_model
from benchmarks.timeline_plot import lanes, share_covered
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.linear import get_base_weight
from lowmem_ft.quant.loader import load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec

SHAPE = {
    "model_type": "qwen3", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


ROOT = Path(__file__).parents[2]


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_what_the_readme_says_of_budgets_is_what_was_planned():
    plans = {plan["what"]: plan for plan in result("limits")["plans"]}
    readme = (ROOT / "README.md").read_text()
    for model in ("Llama-3.1-8B", "Qwen3-14B", "Qwen3-32B", "Llama-3-70B", "Qwen3-30B-A3B", "gpt-oss-20b"):
        smallest = plans[f"{model}, 512 tokens, the smallest"]
        within = [plans[f"{model}, 512 tokens in {gib} GiB"] for gib in (4, 8, 12, 24)]
        cells = [f"{smallest['process_peak_bytes'] / 1e9:.2f} GB, {smallest['tokens_per_second']:.0f}/s"]
        cells += [f"{it['tokens_per_second']:.0f}/s" if it["fits"] else "–" for it in within]
        assert f"| {model} | {' | '.join(cells)} |" in readme


def test_what_is_said_beside_peers_on_a_card_is_what_was_measured():
    names = {
        "peer": "peer",
        "peer with Liger": "peer with Liger's kernels",
        "ours, recompute": "activations recomputed",
    }
    names["ours, fastest"] = "the plan without a budget"
    peers = result("gpu_h200")["peers"]
    for file, ours in (("README.md", "lowmem-ft"), ("benchmarks/MEASURED.md", "ours")):
        text = (ROOT / file).read_text()
        for side, name in names.items():
            runs = [run for run in peers[side] if not run.get("packing")]
            cells = [f"{it['peaks']['process'] / 1e9:.1f} GB, {it['tokens_per_second']:.0f}/s" for it in runs]
            name = f"{ours}, {name}" if side.startswith("ours") else name
            assert f"| {name} | {' | '.join(cells)} |" in text


def test_what_is_said_of_the_accuracy_of_plans_is_what_was_found():
    seeds = [result(f"plan_accuracy_seed{seed}")["configurations"] for seed in (1, 2, 3)]
    errors = {key: [[it[f"{key}_error"] for it in seed] for seed in seeds] for key in ("train", "eval")}
    readme, measured = (ROOT / "README.md").read_text(), (ROOT / "benchmarks" / "MEASURED.md").read_text()
    for label, key in (("bytes in tensors, training step", "train"), ("the same, evaluation", "eval")):
        every = [error for seed in errors[key] for error in seed]
        under = sum(error < 0 for error in every)
        assert f"| CPU: {label} | {len(every)} | {under} | +{median(every):.2%} | +{max(every):.1%}" in readme
    processes = [it["process"] for seed in seeds for it in seed if "process" in it]
    above = [it["error"] for it in processes]
    assert f"once rows had every length | {len(above)} | 0 | +{median(above):.0%} | +{max(above):.0%} |" in readme
    assert min(above) > 0
    assert all(it["error"] <= 0.1 or it["planned"] - it["measured"] <= 64 << 20 for it in processes)
    first = errors["train"][0] + errors["train"][1]
    assert f"never under, +{median(first):.2%} in the median and +{max(first):.1%} at\nmost" in measured


def test_what_is_said_of_predicted_seconds_is_what_was_found():
    drawn = [it for name in ("step_time", "step_time_seed7") for it in result(name)["configurations"]]
    off = [abs(it["ratio"] - 1) for it in drawn]
    near = f"within 20% for {sum(error <= 0.2 for error in off)} of {len(off)} configurations"
    readme, measured = (" ".join((ROOT / file).read_text().split()) for file in ("README.md", "benchmarks/MEASURED.md"))
    assert near in readme
    assert f"{near}, off by {median(off):.0%} in the median and {max(off):.0%} at most" in measured
    below = [abs(it["ratio"] - 1) <= 0.2 for it in drawn if it["resident"] < 1 or it["activations"] == "offload"]
    assert f"of the {len(below)} that stream blocks or offload inputs {sum(below)} are within 20%" in measured


def test_break_even_is_where_it_was_predicted():
    sweeps = result("break_even")["sweeps"]
    for sweep in sweeps:
        for name, key in {"predicted_break_even": "predicted_slowdown", "break_even": "slowdown"}.items():
            assert sweep[name] == break_even(sweep["steps"], key)
        assert sweep["predicted_break_even"] == sweep["break_even"] is not None
    tokens = sorted(sweep["break_even"] for sweep in sweeps)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"from {tokens[0]}, {tokens[1]} and {tokens[2]} tokens a step on" in readme


@pytest.mark.parametrize("quantized", [False, True])
def test_random_checkpoints_are_read_as_transformers_reads_them(tmp_path, quantized):
    folder = write_model(tmp_path / "model", SHAPE, device="cpu", quantized=quantized)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(folder)
    ours = meta_model(checkpoint)
    spec = QuantSpec(bits=4 if quantized else 16)
    report = load_weights(ours, checkpoint, spec=spec, place=lambda _, tensor: tensor)
    assert report.spec == spec
    assert all("rotary_emb" in name for name in report.initialised), "all else is stored"
    tokens_BT = torch.arange(24).reshape(2, 12)
    assert torch.allclose(ours(tokens_BT).logits, theirs(tokens_BT).logits, atol=2e-2)
    if quantized:
        layers = [block.mlp.up_proj for block in ours.model.layers]
        assert torch.equal(*(get_base_weight(layer) for layer in layers)), "one matrix of each shape"


def test_copies_are_told_from_computing_in_a_timeline():
    busy = [
        ["compute", 7, 0.0, 10e3], ["compute", 9, 8e3, 9e3], ["copy", 20, 2e3, 4e3], ["copy", 20, 9e3, 12e3],
        ["compute", 7, 11e3, 15e3],
    ]  # fmt: skip
    assert share_covered(busy) == pytest.approx((2 + 1 + 1) / 5)
    assert lanes(busy)["copy", 20] == [(2.0, 2.0), (9.0, 3.0)]


@pytest.mark.parametrize("name", ["gpu", "gpu_kernels", "gpu_limits"])
def test_programs_for_a_card_find_the_package_that_is_not_installed(tmp_path, name):
    file = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    # without what is installed, and what a variable names
    done = subprocess.run([sys.executable, "-S", "-E", file, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_known_is_kept_before_the_end(tmp_path):
    program = "import common, pathlib; common.keep({'found': [1]}, pathlib.Path('out/it.json')); import lowmem_ft.core"
    folder = Path(__file__).parents[2] / "benchmarks"
    packages = Path(torch.__file__).parents[1]  # a folder of PYTHONPATH alone: what installed this one says is not read
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{packages}"}
    subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "out" / "it.json").read_text() == '{\n "found": [\n  1\n ]\n}\n'
