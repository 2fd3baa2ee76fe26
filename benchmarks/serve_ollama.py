"""What Ollama itself makes of what `lowmem-ft export` writes: Modelfiles, prompts, answers, adapters, on the CPU.

It needs the program `ollama` with its llama-server (`ollama --version` of a release, or built from its sources); it
runs `ollama serve` with a store of its own and leaves nothing in yours.

    python benchmarks/serve_ollama.py --ollama FOLDER/bin/ollama --out benchmarks/results/ollama.json
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.exported import QUESTIONS, arguments, base_alone, report, trained_embedded, with_templates

ANSWER = 48  # tokens at most
TALKS: tuple[tuple[str, ...], ...] = (
    ("user",), ("user", "assistant", "user"), ("system", "user"), ("system", "user", "assistant", "user"),
)  # fmt: skip


class Ollama:
    """A server that is up, and its command line."""

    def __init__(self, program: Path, address: str, environment: dict[str, str]) -> None:
        self.program, self.address, self._environment = program, address, environment

    @property
    def version(self) -> str:
        return str(self.ask("/api/version")["version"])

    def create(self, name: str, modelfile: Path) -> dict[str, Any]:
        """`ollama create NAME -f MODELFILE`, in the Modelfile's folder. Returns what Ollama read of it."""
        self._run("create", name, "-f", modelfile.name, folder=modelfile.parent)
        shown = self.ask("/api/show", model=name)
        lines = [line.split(maxsplit=1) for line in shown.get("parameters", "").splitlines()]
        stops = [json.loads(value) for key, value in lines if key == "stop"]
        others = {key: value for key, value in lines if key != "stop"}
        return {
            "template": shown.get("template"), "stop": stops, "parameters": others,
            "adapter": "\nADAPTER " in shown["modelfile"],
        }  # fmt: skip

    def prompt(self, name: str, messages: Sequence[dict[str, str]]) -> str:
        """What a conversation is rendered to."""
        said = self.ask("/api/chat", model=name, messages=list(messages), stream=False, _debug_render_only=True)
        return str(said["_debug_info"]["rendered_template"])

    def answer(self, name: str, messages: Sequence[dict[str, str]], count: int, **options: Any) -> dict[str, Any]:
        """The likeliest token each time; all else as the model and Ollama have it."""
        options = {"temperature": 0, "num_predict": count, **options}
        said: dict[str, Any] = self.ask("/api/chat", model=name, messages=list(messages), stream=False, options=options)
        return said

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode(errors='replace')}") from None

    def _run(self, *arguments: str, folder: Path) -> str:
        done = subprocess.run(
            [str(self.program), *arguments], cwd=folder, env=self._environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"ollama {arguments[0]}: {re.sub(chr(27) + '[^A-Za-z]*[A-Za-z]', '', done.stderr)[-600:]}"
            )
        return done.stdout


@contextmanager
def serving(program: Path, folder: Path) -> Iterator[Ollama]:
    """`ollama serve` on a free port, with models, keys and log below `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": str(folder / "models"), "HOME": str(folder),
        "OLLAMA_MAX_LOADED_MODELS": "1", "OLLAMA_NUM_PARALLEL": "1", "OLLAMA_CONTEXT_LENGTH": "512",
        "OLLAMA_NO_CLOUD": "1", "OLLAMA_NOHISTORY": "1",
    }  # fmt: skip
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen([str(program), "serve"], env=environment, stdout=log, stderr=log)
    server = Ollama(program, f"http://{host}", environment)
    try:
        for _ in range(300):
            try:
                server.ask("/api/version")
                break
            except OSError:
                if process.poll() is not None:
                    break
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def talk(roles: Sequence[str]) -> list[dict[str, str]]:
    """A conversation of these roles, each of whose messages is another."""
    return [{"role": role, "content": f"{role} {i}  é"} for i, role in enumerate(roles)]


def rendered(server: Ollama, name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Conversations as the server renders them beside the chat template, and the tokens that it then counts."""
    from jinja2 import TemplateError

    found = []
    for roles in TALKS:
        messages = talk(roles)
        try:
            ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            continue  # it takes no system message
        theirs = server.prompt(name, messages)
        try:
            counted = server.answer(name, messages, 1)["prompt_eval_count"]
        except RuntimeError as error:  # a random model's first token may be none that the template's format begins with
            counted = str(error)[:200]
        expected = len(tokenizer(ours, add_special_tokens=False)["input_ids"])
        # where the tokenizer adds the first token, Ollama leaves that to it
        bare = ours.removeprefix(tokenizer.bos_token or "")
        found.append({"roles": list(roles), "text": theirs in (ours, bare), "tokens": counted == expected})
        if not all(found[-1][key] for key in ("text", "tokens")):
            found[-1] |= {"ours": ours, "Ollama": theirs, "counted": counted, "expected": expected}
    return found


def answers(server: Ollama, name: str, model: Any, tokenizer: Any, questions: Sequence[str]) -> list[dict[str, Any]]:
    """Greedy answers beside those of `lowmem-ft generate`, nothing but the temperature asked for."""
    from lowmem_ft.generate import converse

    found = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        ours = converse(model, tokenizer, messages, max_new_tokens=ANSWER)
        said = server.answer(name, messages, ANSWER)
        theirs = said["message"]["content"].strip()
        found.append({"question": question, "equal": theirs == ours.text, "ended": said["done_reason"]})
        if theirs != ours.text:
            found[-1] |= {"ours": ours.text, "Ollama": theirs}
    return found


def as_written(read: dict[str, Any], modelfile: str) -> bool:
    """Whether Ollama read the template and the words that end an answer as they were meant."""
    template = re.search(r'^TEMPLATE """(.*)"""$', modelfile, re.DOTALL | re.MULTILINE)
    stops = re.findall(r'^PARAMETER stop "(?:"")?(.*?)"(?:"")?$', modelfile, re.MULTILINE)
    return (template is None or read["template"] == template.group(1)) and sorted(read["stop"]) == sorted(stops)


def embedded(server: Ollama, folder: Path, steps: int) -> dict[str, Any]:
    """The package's own model after a short training run: merged in three types, and its adapter."""
    from lowmem_ft.assemble import assemble
    from lowmem_ft.export.gguf import write_gguf
    from lowmem_ft.export.weights import MergedWeights
    from tests.unit.export.runs import CPU

    run = trained_embedded(folder, steps)
    trained = assemble(run.config, run.policy, CPU, adapter=run.adapter, optimizer=False)
    tokenizer = trained.tokenizer
    assert tokenizer is not None, "it comes with the model"
    trained.model.eval()
    found: dict[str, Any] = {}

    def compared(name: str, modelfile: Path, model: Any) -> None:
        read = server.create(name, modelfile)
        found[name] = {
            "read": read, "prompts": rendered(server, name, tokenizer),
            "answers": answers(server, name, model, tokenizer, QUESTIONS),
        }  # fmt: skip
        report(name, found[name])

    for kind in ("f32", "f16", "q8_0"):
        export(folder / "run", folder / kind, "--gguf", kind)
        compared(kind, folder / kind / "Modelfile", trained.model)
    export(folder / "run", folder / "adapter", "--gguf-adapter")
    original = assemble(
        run.config, replace(run.policy, bits=16, quant="none"), CPU, adapter=run.adapter, optimizer=False
    )
    original.model.eval()
    compared("adapter-on-folder", folder / "adapter" / "Modelfile", original.model)
    alone = base_alone(run.adapter, folder / "alone")
    for base, model in (("original", original.model), ("dequantized", trained.model)):
        weights = MergedWeights(run.config, run.policy, alone, base=base, stored=False)  # type: ignore[arg-type]
        write_gguf(weights, "f32", folder / "adapter" / f"{base}.gguf", name="base")
        text = (folder / "adapter" / "Modelfile").read_text()
        file = folder / "adapter" / f"Modelfile.{base}"
        file.write_text(re.sub("^FROM .*", f"FROM ./{base}.gguf", text))
        compared(f"adapter-on-{base}", file, model)
    return found


def export(run: Path, out: Path, *options: str) -> None:
    """`lowmem-ft export RUN`."""
    command = [sys.executable, "-m", "lowmem_ft", "export", str(run), "--out", str(out), *options]
    subprocess.run(command, check=True, stdout=sys.stderr)


def templates(server: Ollama, folder: Path) -> dict[str, Any]:
    """The chat templates that the tests have, each in a file of a tiny model, with the Modelfile that we write."""
    from lowmem_ft.export.gguf_vocab import adds_bos
    from lowmem_ft.export.ollama import modelfile

    found = {}
    for name, file, tokenizer, base in with_templates(folder):
        text = modelfile(tokenizer, base, source=f"./{file.name}", adds_bos=adds_bos(tokenizer))
        path = file.parent / "Modelfile"
        path.write_text(text)
        key = re.sub("[^a-z0-9]", "-", name)
        read = server.create(key, path)
        found[name] = {
            "TEMPLATE": 'TEMPLATE """' in text, "as written": as_written(read, text),
            "prompts": rendered(server, key, tokenizer),
        }  # fmt: skip
        report(name, found[name])
    return found


def main() -> None:
    parser = arguments("exported files in Ollama, on the CPU")
    parser.add_argument("--ollama", type=Path, default=shutil.which("ollama"), help="the program")
    options = parser.parse_args()
    if options.ollama is None:
        parser.error("there is no program `ollama`: say --ollama PATH")
    from common import leave, on_cpu, stamp  # beside this file, where scripts are run

    on_cpu(options.threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lowmem-ft-ollama-") as name:
        folder = Path(name)
        with serving(options.ollama.resolve(), folder / "home") as server:
            result = {
                **stamp(options.threads),
                "embedded": embedded(server, folder, options.steps),
                "templates": templates(server, folder / "templates"),
            }
            result["versions"]["ollama"] = server.version
    leave({**result, "seconds": round(time.perf_counter() - start)}, options.out)


if __name__ == "__main__":
    main()
