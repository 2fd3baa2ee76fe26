"""The command line from outside: exit codes, output, interruption, and the demo that the README promises."""

import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lowmem_ft.cli import main
from tests.assets import ASSETS, write_share
from tests.models import save_tiny

COMMAND = [sys.executable, "-m", "lowmem_ft"]


def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=300, check=False
    )


def run_here(
    *arguments: str | Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported already what takes seconds."""
    monkeypatch.setattr(sys, "argv", ["lowmem-ft", *map(str, arguments)])
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # as `main` would, but put back afterwards
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    return subprocess.CompletedProcess(sys.argv, int(stopped.value.code or 0), out, err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file with a small share of the embedded data."""
    folder = tmp_path_factory.mktemp("cli")
    write_share(folder, train=60, eval=8)
    (folder / "config.yaml").write_text(
        f"model: {ASSETS / 'doclm-7m'}\n"
        f"data: {{train: {folder / 'train.jsonl'}, eval: {folder / 'eval.jsonl'}, seq_len: 64}}\n"
        "train: {tokens_per_step: 256, steps: 4, lr: 1e-3, eval_every: 2}\n"
        "policy: {micro_batch_tokens: 128, loss_chunk_tokens: 64, activations: keep}\n"
        f"output: {folder / 'run'}\n"
    )
    return folder


def test_train_eval_generate(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    here = partial(run_here, monkeypatch=monkeypatch, capfd=capfd)
    trained = run("train", folder / "config.yaml", "adapter.rank=4")
    assert trained.returncode == 0, trained.stderr
    told = ["Plan", "\n fits ", "\n policy ", "After the first step: ", "Planned against measured", "process peak"]
    found_at = [trained.stderr.find(it) for it in told]
    assert found_at[0] > -1
    assert found_at == sorted(found_at), trained.stderr
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]

    measured = run("eval", folder / "run", "--json")
    best = min(held_out[1:])
    found = json.loads(measured.stdout)
    assert (found["eval_loss"], found["examples"]) == (best, 8)
    assert found["perplexity"] == pytest.approx(math.exp(best))
    assert {line["eval_perplexity"] for line in lines if line.get("eval_loss") == best} == {found["perplexity"]}
    assert 0 < found["bits_per_byte"] < 8
    accuracies = {line["eval_accuracy"] for line in lines if line.get("eval_loss") == best}
    assert {found["eval_accuracy"]} == accuracies
    without = here("eval", folder / "run", "--adapter", "none", "eval.samples=2", "eval.max_new_tokens=4", "--json")
    told = json.loads(without.stdout)
    assert told["eval_loss"] == held_out[0]
    assert [set(sample) for sample in told["samples"]] == [{"prompt", "answer", "reference"}] * 2

    said = run(
        "generate", folder / "run", "--max-new-tokens", "4", "--json", stdin="What does ls do?\n\nWhat is cat?\n"
    )
    answers = [json.loads(line) for line in said.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["What does ls do?", "What is cat?"]
    assert all(answer["answer"] for answer in answers)

    again = here("train", folder / "config.yaml", "adapter.rank=4", "--resume")
    assert again.returncode == 0
    assert "nothing to do" in again.stderr


def test_interrupting_saves_and_resume_goes_on(folder: Path) -> None:
    output = folder / "interrupted"
    arguments = ["train", str(folder / "config.yaml"), f"output={output}", "train.steps=1000", "train.eval_every=1000"]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert list((output / "checkpoints").glob("step-*.safetensors"))
    steps = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    resumed = run(*arguments[:3], f"train.steps={steps + 1}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Going on from step {steps}" in resumed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.yaml"], "cannot be read"),
        (["train", "CONFIG", "trian.lr=1"], "did you mean 'train'?"),
        (["train", "CONFIG", "train.optimizer=adam"], "adamw | adamw8bit"),
        (["plan", "no/such-model"], "given:   no/such-model"),
        (["plan", "MODEL", "--budget", "6gigs"], "Not a size"),
        (["plan", "MODEL", "--device", "tpu"], "No such device"),
        (["eval", "CONFIG", "--data", "missing.jsonl"], "missing.jsonl"),
        (["eval", "CONFIG", "train.lr=5"], "no effect on a model that is trained"),
        (["generate", "CONFIG", "hello", "--adapter", "/nowhere"], "/nowhere"),
        (["frobnicate"], "frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_exits_2_with_one_message(
    folder: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = {"CONFIG": str(folder / "config.yaml"), "MODEL": str(ASSETS / "doclm-7m")}
    done = run_here(*(names.get(word, word) for word in arguments), monkeypatch=monkeypatch, capfd=capfd)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_output_that_cannot_be_written_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "docs"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lowmem-ft: The output cannot be written.")
    assert "Traceback" not in done.stderr


CLOSED = {
    "<&-": ["init", "config.yaml"],
    ">&-": ["docs", "install"],
    "2>&-": ["train", "config.yaml"],
    "2>/dev/full": ["train", "config.yaml"],
    ">&- 2>&- <&-": ["chat", "nowhere"],
}


@pytest.mark.parametrize("closed", CLOSED)
def test_closed_streams_lead_nowhere(tmp_path: Path, closed: str) -> None:
    line = " ".join(map(shlex.quote, [*COMMAND, *CLOSED[closed]])) + f" {closed}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if closed == ">&-" else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_the_locale_has_no_letters_for_is_written_all_the_same() -> None:
    script = "from lowmem_ft.cli import _prepare_streams; _prepare_streams(); print('\u00e9')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\\xe9\n"


def test_plan_needs_no_tokenizer_and_prints_json_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    fits = run("plan", model, "--budget", "4GiB", "--seq-len", "64", "--json")
    assert fits.returncode == 0, fits.stderr
    assert json.loads(fits.stdout)["fits"] is True
    here = partial(run_here, monkeypatch=monkeypatch, capfd=capfd)
    text = here("plan", model, "--budget", "4GiB", "--seq-len", "64", "quant.bits=8")
    assert "int8 weights" in text.stdout.replace("\n", " ")
    nothing = here("plan", model, "--budget", "10MiB", "--seq-len", "64", "--json")
    assert nothing.returncode == 3
    assert json.loads(nothing.stdout)["fits"] is False
    assert "Nothing fits the budget" in nothing.stderr


def test_plan_as_a_page_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = partial(run_here, monkeypatch=monkeypatch, capfd=capfd)
    model = save_tiny("llama", tmp_path / "model")
    page = tmp_path / "plan.html"
    arguments = ("plan", model, "--device", "cpu", "--budget", "4GiB", "--seq-len", "64", "--tokens-per-step", "256")
    # so that the step has many operators, of which the profiler keeps more than they take
    arguments = (*arguments, "policy.loss_chunk_tokens=1", "policy.micro_batch_tokens=256")
    done = run(*arguments, "--json", "--verify", "--html", page)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    measured, predicted = data["measured"], data["predicted"]
    assert set(measured) == {"allocated_peak_bytes", "process_peak_bytes", "step_seconds", "tokens_per_second"}
    assert 1 <= predicted["allocated_peak_bytes"] / measured["allocated_peak_bytes"] < 1.02
    if Path("/proc/self/clear_refs").exists():
        assert predicted["process_peak_bytes"] >= 0.99 * measured["process_peak_bytes"]
    assert "fits" in page.read_text()
    assert [file.name for file in tmp_path.iterdir() if "plan" in file.name] == ["plan.html"], "no half-written file"
    shown = here(*arguments, "--verify", "--dataset-tokens", "50M", "--price-per-hour", "0.4").stdout
    for words in ("Verified", "What fills it", "50,000,000 tokens take", "an hour"):
        assert words in shown
    for options in (("--price-per-hour", "0.4"), ("--dataset-tokens", "0.1")):
        assert here(*arguments, *options).returncode == 2
    nowhere = here(*arguments, "--html", tmp_path / "no" / "plan.html")
    assert nowhere.returncode == 2
    assert "cannot be written" in nowhere.stderr


def test_demo(tmp_path: Path) -> None:
    done = run("demo", "--out", tmp_path / "demo", "--budget", "2GiB")
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert min(held_out) <= 0.75 * held_out[0]
    for words in ("Plan", "nf4 double-quantized", "before", "after", "Planned against measured", "in a fresh process"):
        assert words in done.stdout
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert result["measured"]["process_peak_bytes"] <= result["plan"]["budget"]["device_bytes"] == 2 * 2**30
    assert result["measured"]["process_peak_bytes"] <= result["plan"]["predicted"]["process_peak_bytes"]


def test_a_run_over_many_lengths_stays_within_its_plan(tmp_path: Path) -> None:
    """Without packing each micro-batch has another number of tokens, and oneDNN keeps kernels for each that it is asked
    for: a run took 18% more than its plan after 200 steps."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 4096, "max_position_embeddings": 1024}
    model = save_tiny("llama", tmp_path / "model", **shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "doclm-7m" / name, model)
    chance = random.Random(0)
    texts = [
        " ".join(chance.choices(["model", "memory", "plan", "step"], k=chance.randint(5, 900))) for _ in range(400)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "config.yaml").write_text(
        f"model: {model}\n"
        f"data: {{train: {tmp_path / 'data.jsonl'}, seq_len: 1024, packing: false}}\n"
        "train: {tokens_per_step: 1024, steps: 150}\n"
        "policy: {micro_batch_tokens: 1024}\n"
        f"output: {tmp_path / 'run'}\n"
    )
    done = run("train", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    planned, measured = result["plan"]["predicted"]["process_peak_bytes"], result["measured"]["process_peak_bytes"]
    assert measured <= planned <= measured + max(64 << 20, measured // 10)


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, lowmem_ft; assert 'torch' not in sys.modules; assert callable(lowmem_ft.plan)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
