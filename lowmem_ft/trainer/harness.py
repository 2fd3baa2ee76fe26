"""Tasks of EleutherAI's lm-evaluation-harness, answered by an assembled model within its policy.

Scores come from the same step as the held-out loss: in chunks, streamed where the policy streams, smaller where memory
runs out. This module needs the `lm-eval` extra and is imported where a task is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from lowmem_ft.core.errors import ConfigError, LowMemError, UnsupportedError, nearest
from lowmem_ft.core.token_ids import check_ids, pad_id_of
from lowmem_ft.data.chat import ChatRenderer
from lowmem_ft.data.examples import IGNORE_INDEX, Example
from lowmem_ft.data.loader import MicroBatches
from lowmem_ft.data.packing import Rows
from lowmem_ft.generate import answer_ends, complete, prompt_ids
from lowmem_ft.report.progress import Reporter
from lowmem_ft.trainer.recovery import Recovery

SAMPLED = frozenset({"do_sample", "temperature", "top_p"})  # of a task's generation_kwargs, beside lengths and stops
MAX_NEW_TOKENS = 256  # where a task says nothing, as the harness's own models have it


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks. It accepts nothing but subclasses of its own; this one brings how pairs are split.

    Args:
        recovery: of the assembled model, which has a tokenizer.
        length: tokens that a context and what follows it have at most; of longer ones the beginning is left out.
        reporter: told how far it is.

    Attributes:
        length: as given.
        shortened: requests whose beginning was left out.
        chat: whether questions are texts of the chat template, which writes its own special tokens: as in training none
            are added.
    """

    def __init__(self, recovery: Recovery, length: int, reporter: Reporter) -> None:
        super().__init__()
        self._recovery, self.length, self._reporter = recovery, length, reporter
        self.tokenizer: Any = recovery.ready.tokenizer
        if self.tokenizer is None:
            raise UnsupportedError("The model folder holds no tokenizer, which the harness needs.")
        self._renderer, self._ends = ChatRenderer(self.tokenizer), answer_ends(self.tokenizer)
        self.shortened, self.chat = 0, False

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default with what the tokenizer puts in front, but for a BOS where the text has one already."""
        if add_special_tokens is None:
            begins = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not self.chat and (not begins or not string.startswith(begins))
        # none has what some put behind: it would stand between a question and its answer
        if add_special_tokens:
            return prompt_ids(self.tokenizer, string)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text of its template; without a generation prompt its last message is left open."""
        text: str = self.tokenizer.apply_chat_template(
            self._renderer.as_wanted(chat_history),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether each token is the likeliest) of each continuation."""
        return self._score([request[1:] for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each text, in windows that do not overlap."""
        windows: list[tuple[list[int], list[int]]] = []
        ends = []
        for request in requests:
            # a text is no question
            ids = self.tok_encode(request.args[0], add_special_tokens=True if self.chat else None)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.length - 1, 1)
            windows += map(make_disjoint_window, rolling)
            ends.append(len(windows))
        scores = [score for score, _ in self._score(windows)]
        return [sum(scores[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says to each context, one after the other."""
        answers: list[str] = []
        with self._reporter.task("Generating", unit="answers") as progress:
            for request in requests:
                answers.append(self._generate(*request.args))
                progress(len(answers), len(requests))
        return answers

    def _generate(self, context: str, asked: Mapping[str, Any]) -> str:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), MAX_NEW_TOKENS))
        until, new = options.pop("until"), options.pop("max_gen_toks")
        if unknown := sorted(set(options) - SAMPLED):
            raise UnsupportedError(
                "The task asks for a way to generate that is not known.",
                given=", ".join(unknown),
                allowed=", ".join(sorted({"until", "max_gen_toks", *SAMPLED})),
            )
        if new >= self.length:
            raise ConfigError(
                "The task's answers are longer than the run's sequences.",
                given=f"max_gen_toks {new}",
                allowed=f"less than data.seq_len, which is {self.length}",
                fix=f"set data.seq_len above {new}, and more for the questions",
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.shortened += len(tokens) > self.length - new
        samples = options.get("do_sample", False)
        return self._recovery.once_more(
            lambda: complete(
                self._recovery.ready.model,
                self.tokenizer,
                [tokens[-(self.length - new) :]],
                max_new_tokens=new,
                temperature=float(options.get("temperature", 1.0)) if samples else 0.0,
                top_p=float(options.get("top_p", 1.0)) if samples else 1.0,
                until=[stop for stop in until if stop],
                ends=self._ends,
            )
        )[0]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihoods of the second of each pair behind the first, each pair in a row of its own."""
        examples = []
        for context, continuation in pairs:
            ids = [*context, *continuation]
            labels = [IGNORE_INDEX] * len(context) + continuation
            self.shortened += len(ids) > self.length
            examples.append(Example(ids[-self.length :], labels[-self.length :]))
        if not examples:
            return []
        config = self._recovery.ready.model.config
        check_ids(max(max(it.input_ids) for it in examples), self.tokenizer, config)
        batches = MicroBatches(
            examples,
            Rows.single(np.arange(len(examples))),
            np.asarray([len(example) for example in examples], np.int32),
            micro_batch_tokens=self._recovery.policy.micro_batch_tokens,
            pad_id=pad_id_of(self.tokenizer, config),
            packed=False,
            width=None,
            most=self.length,
        )
        with self._reporter.task("Scoring", unit="batches") as progress:
            found = self._recovery.evaluate_rows(batches, progress)
        answers = dict(zip((row[0] for row in batches.rows), found, strict=True))
        in_order = (answers[at] for at in range(len(examples)))
        return [(-it.loss, it.correct == it.loss_tokens) for it in in_order]


def find_tasks(tasks: Sequence[str], include: Path | None) -> tuple[TaskManager, list[str]]:
    """Who loads tasks, and the names of those that are meant.

    Args:
        tasks: names of tasks, groups or tags, with wildcards.
        include: a folder of further tasks (YAML). Tasks may run Python code of that folder.

    Raises:
        ConfigError: no such task or folder.
    """
    if include is not None and not os.path.isdir(include):
        raise ConfigError("The folder of tasks is not there.", given=str(include), allowed="a folder with YAML files")
    manager = TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if not manager.match_tasks([task]):
            close = nearest(task, manager.all_tasks)
            fix = f"did you mean {close}?" if close else "`lm-eval ls tasks` lists them; --include adds a folder"
            raise ConfigError("There is no such task.", given=task, fix=fix)
    return manager, list(manager.match_tasks([*tasks]))


def run_tasks(
    model: HarnessModel,
    manager: TaskManager,
    tasks: Sequence[str],
    *,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
) -> dict[str, Any]:
    """What the harness says of `model` in tasks that `find_tasks` found.

    Args:
        fewshot: examples before each question; None leaves it to the task.
        limit: the first so many questions of each task.
        chat: whether questions go through the chat template.

    Raises:
        ConfigError: questions through a template that does not exist.
        LowMemError: a task cannot be loaded or run.
    """
    if chat and not model.tokenizer.chat_template:
        raise ConfigError("The model's tokenizer has no chat template.", given="--chat", fix="leave --chat out")
    model.chat = chat
    try:
        results: dict[str, Any] = simple_evaluate(
            model,
            tasks=[*tasks],
            num_fewshot=fewshot,
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=False,
        )
    # data or a package that is not there, a task that is broken
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if isinstance(error, LowMemError):
            raise
        raise LowMemError("The harness could not run the task.", given=f"{type(error).__name__}: {error}") from error
    return results


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of the results what a program reads: values by task and metric, and how they were got."""
    return {key: results[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in results}


def table(results: Mapping[str, Any]) -> str:
    """The same as the harness's own table, in Markdown."""
    text: str = make_table(dict(results))
    return text
