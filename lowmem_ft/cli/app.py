"""The commands. Each turns its arguments into a RunConfig and calls what Python users call.

What pulls in PyTorch is imported when a command needs it, so that help and wrong arguments answer at once.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lowmem_ft.cli.chat import chat, piped_lines
from lowmem_ft.cli.data import data_preview
from lowmem_ft.cli.docs import docs
from lowmem_ft.cli.doctor import doctor
from lowmem_ft.cli.export import export, merge
from lowmem_ft.cli.harness import run_harness
from lowmem_ft.cli.init import init
from lowmem_ft.cli.profiles import profiles_app
from lowmem_ft.cli.push import push
from lowmem_ft.cli.runs import DeviceOption, assemble_run, on_device, open_run
from lowmem_ft.core.checks import PACKAGE, installed_version
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.files import check_writable, write_text
from lowmem_ft.core.printable import for_output
from lowmem_ft.core.sizes import parse_count
from lowmem_ft.report.progress import Reporter, show

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune large language models inside the memory budget you name.",
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config keys, such as train.lr=1e-4.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


def _tell_versions(asked: bool) -> None:
    if asked:
        for name in (PACKAGE, "torch", "transformers"):
            print(name, installed_version(name) or "is not installed as a package")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_versions, is_eager=True, help="Print versions, and exit.")
    ] = False,
) -> None:
    """Of the command line itself; what `version` asks for has been told."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("lowmem-ft-demo"),
    budget: Annotated[str, typer.Option(help="Memory for the whole process.")] = "2GiB",
) -> None:
    """The whole job, offline, on the embedded model: quantize, fine-tune, save, reload, compare."""
    from lowmem_ft.cli.demo import run_demo

    run_demo(out, budget, Reporter(console=Console()))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model folder or hub id, or the YAML file of a run.")],
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="Memory of the device, such as 8GiB.")] = None,
    host_budget: Annotated[str | None, typer.Option(help="RAM, when the device is a GPU.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N, or a profile's name.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Tokens of an optimizer update.")] = None,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Write the plan to this file as a page.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Run one real step here, and compare.")] = False,
    dataset_tokens: Annotated[
        str | None, typer.Option(help="Tokens of an epoch, such as 50M: how long it takes.")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0.0, help="Of the device: what an epoch costs.")] = None,
) -> None:
    """Say whether a model can be fine-tuned within a budget, and how. Reads no weights, but with --verify."""
    options = {
        "budget.memory": budget,
        "budget.host": host_budget,
        "budget.device": device,
        "data.seq_len": seq_len,
        "train.tokens_per_step": tokens_per_step,
    }
    tokens = None if dataset_tokens is None else parse_count(dataset_tokens)
    if price_per_hour is not None and tokens is None:
        raise ConfigError(
            "--price-per-hour says what an epoch costs.", given=price_per_hour, fix="add --dataset-tokens, such as 50M"
        )
    if "" in options.values():  # as of a shell's variable that is not set, which would lift the budget
        raise ConfigError("An option is empty.", given='""', fix="leave it out, or give it a value")
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    changes = [*given, *(overrides or [])]
    if Path(model).suffix in (".yaml", ".yml") and os.path.isfile(model):
        config = RunConfig.load(model, changes)
    else:
        config = RunConfig.from_dict({"model": model}, changes)
    if html is not None:
        check_writable(html)

    from lowmem_ft.planner.solver import make_plan, require_fit
    from lowmem_ft.report.plan_page import plan_page
    from lowmem_ft.report.tables import plan_table

    made = make_plan(config)
    if verify and made.fits:
        from lowmem_ft.planner.verify import verified

        made = verified(made)
    if as_json:
        print(made.to_json())
    else:
        show(Console(), plan_table(made, dataset_tokens=tokens, price_per_hour=price_per_hour))
    if html is not None:
        write_text(html, plan_page(made, dataset_tokens=tokens, price_per_hour=price_per_hour))
    require_fit(made)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
) -> None:
    """Fine-tune as a config file says."""
    reporter = Reporter()
    settings = RunConfig.load(config, overrides or [])
    folder = config.absolute().parent
    named = any(it.partition("=")[0].strip() == "output" for it in overrides or [])
    own = resume and not named and config.name == "config.yaml" and os.path.isfile(folder / "plan.json")
    if own and os.path.realpath(settings.output) != os.path.realpath(folder):  # a run that was moved, or renamed
        reporter.say(f"Going on in {folder}, where this config.yaml lies, instead of in {settings.output}.")
        settings = settings.model_copy(update={"output": str(folder)})

    from lowmem_ft.report.tables import measured_table
    from lowmem_ft.trainer import loop

    run = loop.train(settings, resume=resume, reporter=reporter)
    if run.status != "finished":
        raise typer.Exit(130)
    reporter.say(measured_table(run))
    reporter.say(f"Adapter: {run.adapter}")


@app.command("eval")
def evaluate(
    target: Annotated[Path, typer.Argument(help="A run folder, or a config file.")],
    overrides: Overrides = None,
    adapter: Annotated[str | None, typer.Option(help="An adapter folder, or `none`.")] = None,
    data: Annotated[Path | None, typer.Option(help="Records; default: the config's data.eval.")] = None,
    harness: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task of the lm-evaluation-harness instead; repeatable.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="With --harness: a folder of further tasks.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="With --harness: examples before a question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --harness: questions of each task.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat", help="With --harness: questions go through the chat template.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Held-out loss of a run's adapter, perplexity, bits per byte and token accuracy; or tasks of a harness."""
    config, made, chosen = open_run(target, overrides or [], adapter)
    if harness:
        run_harness(
            config, made, chosen, harness,
            include=include, fewshot=fewshot, limit=limit, chat=chat_template, as_json=as_json,
        )  # fmt: skip
        return
    if include is not None or fewshot is not None or limit is not None or chat_template:
        raise ConfigError(
            "--include, --fewshot, --limit and --chat go with --harness.", fix="name a task: --harness TASK"
        )
    sources = str(data) if data is not None else config.data.held_out
    if sources is None:
        raise ConfigError("There is nothing to evaluate on.", allowed="a data file", fix="--data FILE, or data.eval")

    from lowmem_ft.core.preference import counted, learns_preferences
    from lowmem_ft.data.examples import bytes_in_loss
    from lowmem_ft.trainer import loop
    from lowmem_ft.trainer.recovery import Recovery
    from lowmem_ft.trainer.samples import samples

    reporter = Reporter(quiet=as_json)
    examples = loop.read_split(config, sources, reporter)
    ready = assemble_run(config, made, chosen, reporter)
    recovery = Recovery(ready, made.policy, host_budget=made.budget["host_bytes"], say=reporter.say)
    loss, metrics = loop.evaluate(recovery, config, examples, reporter)
    answers = samples(recovery, config, examples)
    unit = counted(config)
    found: dict[str, Any] = {"eval_loss": loss, "examples": len(examples), "unit": unit}
    if learns_preferences(config):
        lines = [f"eval_loss {loss:.6g}", f"{unit} {len(examples)}"]
        lines += [f"{name} {value:.6g}" for name, value in metrics.items()]
        found |= metrics
    else:
        accuracy = metrics["accuracy"]
        perplexity = metrics.get("perplexity")
        found |= {"perplexity": perplexity, "eval_accuracy": accuracy}
        told = "beyond all numbers" if perplexity is None else f"{perplexity:.4f}"
        lines = [f"held-out loss {loss:.6f}, perplexity {told}, token accuracy {accuracy:.2%}"]
        tokens, size = sum(it.loss_tokens for it in examples), bytes_in_loss(examples, ready.tokenizer)
        if size:
            found["bits_per_byte"] = loss * tokens / math.log(2) / size
            lines.append(f"bits per byte {found['bits_per_byte']:.4f}, of {size} bytes of text in the loss")
    if as_json:
        print(json.dumps({**found, **({"samples": answers} if answers else {})}))
        return
    print("\n".join(lines))
    for answer in answers:
        lines = [f"{name + ':':10} {answer[name]}" for name in ("prompt", "answer", "reference")]
        print(for_output("\n".join(["", *lines])))


@app.command()
def generate(
    target: Annotated[Path, typer.Argument(help="A run folder, or a config file.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Default: one prompt per line of stdin.")] = None,
    adapter: Annotated[str | None, typer.Option(help="An adapter folder, or `none`.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**62)] = 0,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print answers as they are generated.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as they are, not as messages of the chat template.")
    ] = False,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Answers of a run's model to prompts."""
    from lowmem_ft.generate import Sampling
    from lowmem_ft.generate import generate as generate_texts

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config, made, chosen = open_run(target, on_device(device), adapter)
    texts = prompts or list(piped_lines())
    if stream and as_json:
        raise ConfigError("--stream and --json do not go together.", allowed="one of them", fix="leave one out")
    shown = -1

    def say(index: int, text: str) -> None:
        nonlocal shown
        print("\n" * (index - max(shown, 0)) + for_output(text), end="", flush=True)
        shown = index

    ready = assemble_run(config, made, chosen, Reporter(quiet=as_json))
    told = say if stream else None
    answers = generate_texts(ready.model, ready.tokenizer, texts, **asdict(sampling), say=told, raw=raw)
    if stream:
        say(len(texts), "")
        return
    for prompt, answer in zip(texts, answers, strict=True):
        print(json.dumps({"prompt": prompt, "answer": answer}) if as_json else for_output(answer))


for command in (chat, merge, export, push, init, doctor, docs):
    app.command()(command)
app.command("data")(data_preview)
app.add_typer(profiles_app, name="profiles")
