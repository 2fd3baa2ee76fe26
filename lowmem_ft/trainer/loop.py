"""The training loop: config in, run folder out."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem_ft.adapters.peft_format import save_adapter
from lowmem_ft.assemble import Assembled, assemble, require_tokenizer
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import CheckpointError, ConfigError, SpillError
from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.core.interrupt import first_interrupt
from lowmem_ft.core.plan import Plan
from lowmem_ft.core.plan_words import planned_against_measured
from lowmem_ft.core.preference import learns_preferences
from lowmem_ft.core.run import Run
from lowmem_ft.core.sources import Sources
from lowmem_ft.core.token_ids import check_ids, goes_beyond, pad_id_of
from lowmem_ft.data.loader import BatchLoader, eval_batches
from lowmem_ft.data.mixture import Mixture, content_of, count_shared
from lowmem_ft.data.pairs import balance_note, preferences_of
from lowmem_ft.data.reading import Wanted, check_sources, read_preferences, read_sources
from lowmem_ft.data.sources import Use
from lowmem_ft.data.store import cache_folder, writes_date
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.solver import make_plan, require_fit
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.report.card import model_card
from lowmem_ft.report.page import run_page
from lowmem_ft.report.progress import Reporter
from lowmem_ft.report.tables import plan_facts
from lowmem_ft.runtime import state
from lowmem_ft.runtime.budget import Watch, capped_allocator
from lowmem_ft.runtime.memory import device_peak_bytes, process_peak_bytes
from lowmem_ft.step import diverged
from lowmem_ft.trainer.folder import RunFolder
from lowmem_ft.trainer.identity import check_identity, held_out_identity, identity_of, same_held_out
from lowmem_ft.trainer.recovery import NoSaferPolicyError, Recovery
from lowmem_ft.trainer.replan import plan_again
from lowmem_ft.trainer.samples import in_one_line, samples
from lowmem_ft.trainer.schedule import learning_rate
from lowmem_ft.trainer.trackers import Trackers, check_trackers, tracking

_LESS = "lower data.seq_len or adapter.rank, and start over in another output folder"


def train(
    config: RunConfig, *, resume: bool = False, plan: Plan | None = None, reporter: Reporter | None = None
) -> Run:
    """Fine-tune as `config` says and leave everything in the run folder `config.output`.

    Args:
        resume: go on from the newest complete checkpoint of the run folder; without one, start over; a finished
            run is returned as it is.
        plan: the plan to follow; made from `config` if it is None.
        reporter: told what goes on; None prints to stderr.

    Returns:
        the Run; its status is `interrupted` after Ctrl-C and `out_of_time` after `train.max_time`, both with a
        checkpoint from which `resume` continues.

    Raises:
        LowMemError: bad input, in any of its kinds; BudgetError where nothing fits.
    """
    reporter = reporter or Reporter()
    folder = RunFolder(Path(config.output))
    if resume and os.path.exists(folder.finished):
        run = folder.result()
        further = f"`adapter.init={folder.path}` with another output trains its adapter further"
        reporter.say(f"{folder.path} is finished: nothing to do; {further}.")
        return run
    if config.data.train is None:
        raise ConfigError("'data.train' is missing.", allowed="a data file", fix="add `data: {train: FILE}`")
    if config.eval.samples and not config.data.eval:
        warnings.warn("eval.samples has no effect without data.eval", stacklevel=2)
    if not resume:
        folder.refuse_another()
    _check_before_planning(config, folder)
    newest = state.checkpoints(folder.checkpoints)[-1:] if resume else []
    if resume and not newest:
        reporter.say(f"{folder.path} has no checkpoint to go on from: the run starts over.")
    before = folder.plan() if newest else None
    followed = require_fit(plan or (make_plan(config) if before is None else plan_again(config, before)))
    if plan is None:  # else the caller has it
        reporter.say(plan_facts(followed))
    planned = config
    if config.policy.objective == "context":  # then the plan decides how long sequences are
        its = followed.run_config
        planned = config.model_copy(update={"data": its.data, "train": its.train})
    examples = load_examples(planned, reporter)
    with folder.alone():
        if not resume:
            folder.refuse_another()  # which may have come while this one was planned
        elsewhere = os.path.exists(folder.finished) or state.checkpoints(folder.checkpoints)[-1:] != newest
        if not (resume and elsewhere):
            return _run(planned, followed, folder, newest[0] if newest else None, examples, reporter)
    # from where another process has come to meanwhile, as one that was told to end and took its time
    return train(config, resume=True, plan=plan, reporter=reporter)


def _run(
    config: RunConfig,
    plan: Plan,
    folder: RunFolder,
    newest: Path | None,
    examples: tuple[Sequence[Any], Sequence[Any]],
    reporter: Reporter,
) -> Run:
    """Train from the checkpoint `newest` on, in a folder that is this process's alone."""
    if newest is None:
        folder.start(config, plan)
    torch.manual_seed(config.train.seed)  # decides how fresh adapters start
    device = device_of(plan)
    with capped_allocator(device, plan.budget["device_bytes"], beside=plan.device["process_bytes"]):
        with reporter.task("Loading weights", unit="B") as update:
            ready = assemble(config, plan.policy, device, progress=update)
        with tracking(config, folder.path) as trackers:
            return _Loop(config, plan, ready, folder, trackers, *examples, reporter).run(newest)


def _check_before_planning(config: RunConfig, folder: RunFolder) -> None:
    """What need not wait for the plan, which takes its time."""
    folder.refuse_unwritable()
    check_trackers(config)
    cache_folder(config.data.cache)
    uses: tuple[tuple[Use, Sources | None], ...] = (("train", config.data.trained), ("eval", config.data.held_out))
    for use, sources in uses:
        if sources is not None:
            check_sources(sources, config.data, use=use)


def load_examples(config: RunConfig, reporter: Reporter) -> tuple[Sequence[Any], Sequence[Any]]:
    """Training and held-out examples, or preferences, of a run; the second is empty without `data.eval`.

    Raises:
        DataError: records that cannot be used.
    """
    trained, kept = config.data.trained, config.data.held_out
    assert trained is not None, "refused before the plan"
    examples = read_split(config, trained, reporter, use="train")
    held_out = read_split(config, kept, reporter) if kept else []
    if shared := count_shared(examples, held_out):
        reporter.say(
            f"Warning: {shared} held-out documents are also trained on, token for token: "
            "the held-out loss is lower than that of new ones, and keep_best goes by it."
        )
    return examples, held_out


def read_split(config: RunConfig, sources: Sources, reporter: Reporter, *, use: Use = "eval") -> Mixture[Any]:
    """The examples of `sources`, tokenized as `config.data` says, on disk; preferences where the run learns these.

    Raises:
        DataError: records that cannot be used, or tokens that the model does not know.
    """
    checkpoint = Checkpoint.open(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer = require_tokenizer(checkpoint)
    preferences = preferences_of(config)
    examples: Mixture[Any]
    common: dict[str, Any] = {"use": use, "task": lambda name: reporter.task(name, unit="B")}
    if preferences is None:
        examples, notes = read_sources(sources, config.data, tokenizer, **common)
    else:
        wanted: Wanted = "pairs" if preferences.lanes == 2 else "verdicts"
        examples, notes = read_preferences(sources, config.data, tokenizer, wanted=wanted, **common)
        balance = balance_note(config, examples) if use == "train" else None
        notes += [balance] if balance else []
    if goes_beyond(tokenizer, checkpoint.config):
        documents = (it for example in examples for it in getattr(example, "documents", [example]))  # or a pair's
        check_ids(max(max(it.input_ids) for it in documents), tokenizer, checkpoint.config)
    for note in notes:
        reporter.say(note)
    return examples


def evaluate(
    recovery: Recovery, config: RunConfig, examples: Sequence[Any], reporter: Reporter
) -> tuple[float, dict[str, float]]:
    """Mean loss over `examples`, in nats per loss token or, of preferences, per pair or answer, in the micro-batches of
    the policy in force; and `accuracy` of tokens with their `perplexity`, where that is not too large for a number (of
    a model that diverged), or, of preferences, means of rewards and log-probabilities."""
    batches = eval_batches(
        examples,
        seq_len=config.data.seq_len,
        packing=config.data.packing,
        micro_batch_tokens=recovery.policy.micro_batch_tokens,
        pad_id=pad_id_of(recovery.ready.tokenizer, recovery.ready.model.config),
        preferences=preferences_of(config),
    )
    with reporter.task("Evaluating", unit="batches") as progress:
        loss, metrics = recovery.evaluate(batches, progress)
    if not learns_preferences(config) and loss < math.log(sys.float_info.max):
        metrics = {"perplexity": math.exp(loss), **metrics}
    return loss, metrics


def device_of(plan: Plan) -> torch.device:
    """The device that a plan was made for. Raises UnsupportedError if it is not on this machine."""
    return Device(**plan.device).torch_device


@dataclass
class _Loop:
    config: RunConfig
    plan: Plan
    ready: Assembled
    folder: RunFolder
    trackers: Trackers
    train_examples: Sequence[Any]
    eval_examples: Sequence[Any]
    reporter: Reporter
    step: int = 0
    lost: bool = False  # the newest step's loss was not finite, which fp16 bears for some steps
    eval_loss: float | None = None  # of the newest evaluation
    evaluated: int | None = None  # at which step that was
    best_loss: float = math.inf
    started: float = field(default_factory=time.monotonic)
    dated: bool = False  # the chat template writes the day's date
    compared: bool = False  # the plan with what the first step took
    held_out_changed: bool = False  # since the checkpoint, and nothing was evaluated on it yet
    watch: Watch | None = None  # of the budget, on a CPU

    def __post_init__(self) -> None:
        self.identity = identity_of(self.config, self.plan.policy)
        self.dated = writes_date(self.ready.tokenizer)
        self.held_out = held_out_identity(self.config, self.eval_examples, dated=self.dated)
        self.content = content_of(self.train_examples)
        if self.ready.device.type == "cpu":
            self.watch = Watch(self.ready.model, self.plan.budget["device_bytes"])
        self.recovery = Recovery(
            self.ready,
            self.plan.policy,
            alternatives=[it.policy for it in self.plan.alternatives],
            may_recompute=not self.config.adapter.prompt_learning,
            watch=self.watch,
            host_budget=self.plan.budget["host_bytes"],
            pool=self.plan.predicted.pool_bytes,
            say=self.reporter.say,
        )

    def run(self, newest: Path | None) -> Run:
        """Train from the beginning, or from the checkpoint `newest` on."""
        settings = self.config.train
        loader = BatchLoader(
            self.train_examples,
            seq_len=self.config.data.seq_len,
            packing=self.config.data.packing,
            micro_batch_tokens=self.plan.policy.micro_batch_tokens,
            tokens_per_step=settings.tokens_per_step,
            seed=settings.seed,
            pad_id=pad_id_of(self.ready.tokenizer, self.ready.model.config),
            order=self.config.data.order,
            preferences=preferences_of(self.config),
        )
        total = settings.steps or max(1, math.ceil(loader.steps_per_epoch * settings.epochs))
        if newest:
            with state.restoring(newest):
                self._restore(newest, loader)
            self.folder.start(self.config, self.plan)  # now that it is known to be the same run
        else:
            self.folder.best.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        self.folder.forget_after(self.step if newest else -1)
        try:
            if self.held_out_changed or (self.step % settings.eval_every == 0 and self.evaluated != self.step):
                self._evaluate()
            return self._steps(loader, total)
        except (NoSaferPolicyError, SpillError) as error:
            loader.steps = self.step  # what a step was handed that is not done
            where = f"from the checkpoint of step {self.step}"
            try:
                self._save(loader)
            except (NoSaferPolicyError, CheckpointError):
                where = "from the last checkpoint"
            again = f"and go on {where} with --resume"
            # what else would help where memory ran out makes another run, with which a checkpoint does not go on
            out_of_memory = f"raise budget.memory, {again}; or {_LESS}"
            fix = f"{error.fix}, {again}" if isinstance(error, SpillError) else out_of_memory
            raise type(error)(error.what, given=error.given, allowed=error.allowed, fix=fix) from error

    def _steps(self, loader: BatchLoader, total: int) -> Run:
        settings = self.config.train
        training = self.reporter.task("Training", unit="steps", done=self.step)
        with first_interrupt(ending=True) as stop, training as update:
            update(self.step, total)
            while self.step < total:
                self._train_step(loader, total, update)
                done = self.step == total
                if done or self.step % settings.eval_every == 0:
                    self._evaluate()
                stopped: Literal["interrupted", "out_of_time"] | None = None
                if stop:
                    stopped = "interrupted"
                elif settings.max_time is not None and self._seconds() >= settings.max_time:
                    stopped = "out_of_time"
                due = done or self.step % settings.save_every == 0
                if (stopped and not done) or (due and not self.lost):
                    self._save(loader)
                if stopped and not done:
                    self.reporter.say(f"Stopped at step {self.step} of {total} with a checkpoint; --resume goes on.")
                    return self._result(stopped)
        return self._finish()

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _train_step(self, loader: BatchLoader, total: int, update: Any) -> None:
        settings = self.config.train
        start = time.perf_counter()
        rate = learning_rate(
            self.step, total=total, peak=settings.lr, schedule=settings.schedule, warmup=settings.warmup
        )
        repeated = self.recovery.repeated
        batches = next(loader)
        self._release()
        result = self.recovery.step(batches, lr=rate)
        seconds = time.perf_counter() - start
        self.step += 1
        self.lost = not math.isfinite(result.loss)
        self._log(
            {
                "step": self.step,
                "loss": result.loss,
                "tokens": result.tokens,
                "lr": rate,
                "grad_norm": result.grad_norm,
                "seconds": seconds,
                "tokens_per_second": result.tokens / seconds,
                "device_peak_bytes": device_peak_bytes(self.ready.device),
                "host_peak_bytes": process_peak_bytes(),
                **result.metrics,
                **({"skipped": True} if result.skipped else {}),
                **({"repeated": times} if (times := self.recovery.repeated - repeated) else {}),
            }
        )
        update(self.step, total, f"loss {result.loss:.4f}")
        if not self.compared:
            self.compared = True
            self.reporter.say(planned_against_measured(self.plan, device_peak_bytes(self.ready.device)))

    def _log(self, line: dict[str, Any]) -> None:
        self.folder.log(line)
        self.trackers.log(line)

    def _release(self) -> None:
        """Give back what was done before left in glibc's heap: a step or an evaluation would come on top of its holes.

        TinyLlama at 512 tokens peaked at 1264, 1342 and 1354 MiB in its first steps without this, at 1274 and 1254 MiB
        with it.
        """
        if self.ready.device.type == "cpu":
            release_freed_memory()

    def _evaluate(self) -> None:
        if not self.eval_examples:
            return
        self._release()
        loss, metrics = evaluate(self.recovery, self.config, self.eval_examples, self.reporter)
        if self.config.train.keep_best and self.step > 0 and loss < self.best_loss:
            self._keep_best(loss)  # first: where it cannot be, this is evaluated again when the run goes on
        self.eval_loss, self.evaluated = loss, self.step
        named = {f"eval_{name}": value for name, value in metrics.items()}
        changed = {"held_out_changed": True} if self.held_out_changed else {}
        self.held_out_changed = False
        self._log({"step": self.step, "eval_loss": self.eval_loss, **named, **changed})
        words = {
            "perplexity": "perplexity {:.4g}",
            "accuracy": "token accuracy {:.1%}",
            "rewards/accuracies": "pairs won {:.1%}",
        }
        shown = [f", {form.format(metrics[name])}" for name, form in words.items() if name in metrics]
        self.reporter.say(f"step {self.step}: held-out loss {self.eval_loss:.4f}{''.join(shown)}")
        answers = samples(self.recovery, self.config, self.eval_examples)
        for answer in answers:
            self.reporter.say(f"  {in_one_line(answer)}")
        if answers:
            self.folder.log_samples([{"step": self.step, **answer} for answer in answers])

    def _keep_best(self, loss: float) -> None:
        weights = {f"weights/{name}": parameter.data for name, parameter in self.ready.trainable.items()}
        told = {"state": json.dumps({"eval_loss": loss})}
        self.recovery.once_more(lambda: state.write_tensors(self.folder.best, weights, told))
        self.best_loss = loss

    def _save(self, loader: BatchLoader) -> None:
        optimizer = self.ready.optimizer
        assert optimizer is not None, "training assembles an optimizer"
        meta = {
            "optimizer": optimizer.state_meta(),
            "data": loader.state_dict(),
            "content": self.content,
            "scaler": self.ready.scaler.state_dict() if self.ready.scaler else None,
            "recovery": self.recovery.state_dict(),
            "eval_loss": self.eval_loss,
            "evaluated": self.evaluated,
            "held_out": self.held_out,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "identity": self.identity,
        }

        def save() -> None:
            state.save_checkpoint(
                self.folder.checkpoints,
                step=self.step,
                weights=self.ready.trainable,
                optimizer_tensors=optimizer.state_tensors(),
                device=self.ready.device,
                meta=meta,
            )

        self.recovery.once_more(save)

    def _restore(self, checkpoint: Path, loader: BatchLoader) -> None:
        assert self.ready.optimizer is not None, "training assembles an optimizer"
        tensors, meta = state.read_checkpoint(checkpoint)
        if "step" not in meta:  # as in the file of the best weights
            raise CheckpointError("A checkpoint tells nothing of its run.", given=str(checkpoint), fix=state.WITHOUT)
        steps = {meta["step"], meta["data"]["steps"], state.step_of(checkpoint)}
        if len(steps) > 1:
            raise ValueError(f"it is of several steps: {', '.join(map(str, steps))}")
        check_identity(meta["identity"], self.identity)
        state.restore_weights(self.ready.trainable, tensors)
        # learning rate, weight decay and such are those of the config
        self.ready.optimizer.load_state(state.below(tensors, "optimizer"), meta["optimizer"], settings=False)
        if self.ready.scaler is not None and meta["scaler"] is not None:
            self.ready.scaler.load_state_dict(meta["scaler"])
        loader.load_state_dict(meta["data"])
        if meta["content"] != self.content:
            other = "as many tokens in each example, but other ones, or others of them in the loss"
            if not self.dated:
                fix = "put the data back, and data.assistant_only; or start over in another output folder"
                what = "The training data is not what it was, so the run cannot go on."
                raise CheckpointError(what, given=other, fix=fix)
            date = "The chat template writes the day's date, which does that, too."
            self.reporter.say(f"Warning: the training data is not what it was: {other}. {date}")
        self.recovery.load_state_dict(meta["recovery"])
        state.restore_random(tensors, self.ready.device)
        self.step = int(meta["step"])
        if same_held_out(meta["held_out"], self.held_out):
            self.eval_loss, self.evaluated = meta["eval_loss"], meta["evaluated"]
            self.best_loss = math.inf if meta["best_loss"] is None else meta["best_loss"]
        else:
            self.held_out_changed = True
            self.reporter.say("The held-out data is another: which step was the best so far is forgotten.")
        if self._best_on_disk() != self.best_loss:  # it may be of a step that is done again, with other settings
            self.folder.best.unlink(missing_ok=True)
            self.best_loss = math.inf
        self.reporter.say(f"Going on from step {self.step}.")

    def _best_on_disk(self) -> float:
        """The held-out loss of the best weights that are kept."""
        if not self.folder.best.exists():
            return math.inf
        return float(state.read_checkpoint(self.folder.best)[1]["eval_loss"])

    def _finish(self) -> Run:
        if self.lost:
            raise diverged(f"the loss of step {self.step}")
        if self.evaluated != self.step:  # as when a run ends where it was stopped
            self._evaluate()
        if self.eval_examples and self.config.train.keep_best and self.folder.best.exists():
            state.restore_weights(self.ready.trainable, state.read_checkpoint(self.folder.best)[0])
            self.eval_loss = self.best_loss
        save_adapter(self.ready.model, self.folder.adapter, base_model=self.config.rooted().model)
        run = self._result("finished")
        self.folder.write("report.html", run_page(run))
        self.folder.write("adapter/README.md", model_card(run))
        base = self.identity["model"]
        result = {"plan": self.plan.to_dict(), "base": base, "status": run.status, "step": run.step}
        self.folder.write_result({**result, "eval_loss": run.eval_loss, "measured": run.measured})
        return run

    def _result(self, status: Literal["finished", "interrupted", "out_of_time"]) -> Run:
        peak = max(process_peak_bytes(), self.watch.peak if self.watch is not None else 0)
        measured = {"process_peak_bytes": peak, "host_peak_bytes": peak}
        if self.ready.device.type == "cuda":
            measured["reserved_peak_bytes"] = torch.cuda.max_memory_reserved(self.ready.device)
            measured["allocated_peak_bytes"] = torch.cuda.max_memory_allocated(self.ready.device)
            del measured["process_peak_bytes"]  # on CUDA the process's share of the card, which PyTorch cannot tell
        return Run(
            folder=self.folder.path,
            plan=self.plan,
            status=status,
            step=self.step,
            eval_loss=self.eval_loss,
            measured=measured,
        )
