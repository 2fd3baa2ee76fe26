"""RunConfig: one frozen schema for YAML files, command-line overrides and Python."""

from __future__ import annotations

import glob
import os
import typing
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from lowmem_ft.core.config_words import explain, keys_of
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.preference import check_objective
from lowmem_ft.core.section import PathText, Section
from lowmem_ft.core.sizes import parse_duration, parse_size
from lowmem_ft.core.sources import DataFormat, DataRole, DataSource, HeldOut, Part, Sources, listed
from lowmem_ft.core.yaml_text import read_value, read_yaml

Size = Annotated[int, BeforeValidator(parse_size)]
Seconds = Annotated[float, BeforeValidator(parse_duration)]
Positive = Annotated[int, Field(gt=0)]
Rank = Annotated[int, Field(gt=0, le=1 << 16)]  # wider than the layers of any model, which none needs
Seed = Annotated[int, Field(ge=0, lt=2**62)]  # PyTorch takes 64 bits, and epochs and sources count on from it
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Init = Literal["default", "gaussian"]  # of adapters; another one is the folder of a saved adapter
BESIDE_INIT = frozenset({"init", "dropout", "lora_plus_ratio"})  # what counts beside such a folder, which has the rest
PROMPT_METHODS = frozenset({"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"})


def _number(value: Any) -> Any:
    """What stands for a whole number in quotes, as other keys take it too."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class QuantConfig(Section):
    """How the frozen base weights are stored. `type` and `double_quant` concern 4 bits only."""

    bits: Annotated[Literal[4, 8, 16, "auto"], BeforeValidator(_number)] = 4
    type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True

    @model_validator(mode="after")
    def _warn_ignored(self) -> Self:
        ignored = sorted({"type", "double_quant"} & self.changed())
        if self.bits in (8, 16) and ignored:
            warnings.warn(f"quant.{' and quant.'.join(ignored)}: of 4 bits, ignored with {self.bits}", stacklevel=2)
        return self


class AdapterConfig(Section):
    """The trainable weights. `method: peft` passes `peft` through to the peft library."""

    method: Literal["lora", "peft"] = "lora"
    rank: Rank = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Fraction = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False
    init: PathText = "default"
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    train_modules: list[str] = []
    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    peft: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _method_and_keys_agree(self) -> Self:
        if self.method == "peft":
            if not self.peft or "peft_type" not in self.peft:
                raise ConfigError(
                    "adapter.method is peft, but adapter.peft names no method.",
                    given=self.peft,
                    allowed="a peft config with peft_type, for example {peft_type: IA3}",
                    fix="set adapter.peft, or adapter.method: lora",
                )
            unread = sorted(self.changed() - {"method", "peft", "init"})
            if unread:
                warnings.warn(f"adapter.{', adapter.'.join(unread)}: of method lora, ignored", stacklevel=2)
        elif self.peft is not None:
            raise ConfigError("adapter.peft is set, but adapter.method is lora.", fix="set adapter.method: peft")
        return self

    @property
    def prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens (prompt, prefix or P-tuning) instead of weights."""
        return self.peft is not None and str(self.peft["peft_type"]).upper() in PROMPT_METHODS


class BudgetConfig(Section):
    """Bytes the whole process may take. None: what is free when planning.

    `profile`: a file of `lowmem-ft profiles measure`, or the name of a profile: whose rates a device has that is here.
    """

    device: str = "auto"
    memory: Size | None = None
    host: Size | None = None
    profile: PathText | None = None


class DataConfig(Section):
    """Records and how they become token sequences. `seq_len` in tokens.

    `eval` may be a share of the training records that are held out: with 0.05 every twentieth of each source. `columns`
    names the column of a role in the file (dots lead into nested ones). `invalid`: what a record that cannot be used
    does. `order`: of an epoch's steps; longest_first finds out in the first step whether memory suffices.
    `cache`: folder of tokenized data; auto is the user's cache folder; None keeps it in a temporary file.
    """

    train: Sources | None = None
    eval: HeldOut | None = None
    format: DataFormat = "auto"
    columns: dict[DataRole, str] = {}
    invalid: Literal["error", "skip"] = "error"
    seq_len: Annotated[int, Field(ge=8)] = 2048
    packing: bool = True
    assistant_only: bool = True
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    order: Literal["shuffled", "longest_first"] = "shuffled"
    cache: PathText | None = "auto"

    @property
    def trained(self) -> Sources | None:
        """`train`, but for what is held out of it."""
        return self._of_train(self.eval, held_out=False) if isinstance(self.eval, float) else self.train

    @property
    def held_out(self) -> Sources | None:
        """`eval`, or the share of `train` that it is."""
        return self._of_train(self.eval, held_out=True) if isinstance(self.eval, float) else self.eval

    def _of_train(self, share: float, *, held_out: bool) -> Sources | None:
        part = Part(share, held_out)
        return None if self.train is None else [source.parted(part) for source in listed(self.train)]

    @model_validator(mode="after")
    def _warn_weights(self) -> Self:
        held_out = self.eval if isinstance(self.eval, list) else [self.eval]
        if any(isinstance(source, DataSource) and source.weight != 1 for source in held_out):
            warnings.warn("data.eval uses each example once: weights are ignored", stacklevel=2)
        return self


Objective = Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto"]


class TrainConfig(Section):
    """The optimization. `warmup` is a share of the steps below 1, a number of steps from 1 on.

    `objective`: what is learned from; sft learns answers, the others learn from preferences (see `PreferenceConfig`).
    """

    objective: Objective = "sft"
    tokens_per_step: Positive = 16384
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1
    steps: Positive | None = None
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw8bit"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Seed = 0
    eval_every: Positive = 100
    save_every: Positive = 100
    keep_best: bool = True
    max_time: Seconds | None = None
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = []


class PreferenceConfig(Section):
    """How `train.objective` learns from preferences. None: what `core.preference.KEYS` says.

    `beta`: how closely the model is kept to the reference (dpo, ipo, kto), the scale of rewards (simpo), or the weight
    of the odds ratio (orpo). `label_smoothing`: the share of pairs that are taken to be the wrong way round. `gamma`:
    the margin of the rewards. `desirable_weight`, `undesirable_weight`: of good and bad answers in the loss.
    """

    beta: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    gamma: Annotated[float, Field(ge=0)] | None = None
    desirable_weight: Annotated[float, Field(gt=0)] | None = None
    undesirable_weight: Annotated[float, Field(gt=0)] | None = None


class EvalConfig(Section):
    """What an evaluation does beside the held-out loss: answers to `samples` prompts of the held-out data, of at most
    `max_new_tokens` each."""

    samples: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Positive = 64


class PolicyConfig(Section):
    """What the planner goes for, and decisions pinned by the user; None leaves them to the planner.

    `objective`: the fastest step (speed), the longest sequence that fits (context; it takes the place of data.seq_len),
    the largest micro-batch (batch), or the smallest peak (memory). `keep_blocks` counts blocks, the last ones;
    the others do what `activations` says, if that is not keep.
    `keep_attention` has blocks that recompute or offload keep what their attention gave, which then runs once.
    `recompute_mlp_act` has the MLPs of blocks that keep run their activation function again, and keep less.
    `stream_embeddings` puts input embeddings, those of each layer included, or them and the output head, where
    `stream_from` says; a matrix that is both goes with the head. MLPs work on `mlp_tile_tokens` of a micro-batch's
    tokens at a time, or with 0 on all. Of a mixture's experts a card makes the products of `experts_together` at once.
    """

    objective: Literal["speed", "context", "batch", "memory"] = "speed"
    resident_blocks: Annotated[int, Field(ge=0)] | None = None
    keep_blocks: Annotated[int, Field(ge=0)] | None = None
    activations: Literal["keep", "recompute", "offload"] | None = None
    keep_attention: bool | None = None
    recompute_mlp_act: bool | None = None
    micro_batch_tokens: Positive | None = None
    loss_chunk_tokens: Positive | None = None
    stream_from: Literal["host", "disk"] | None = None
    stream_embeddings: Literal["none", "input", "both"] | None = None
    optimizer_on: Literal["device", "host"] | None = None
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    mlp_tile_tokens: Annotated[int, Field(ge=0)] | None = None
    experts_together: Positive | None = None


class RunConfig(Section):
    """Everything that a run is told. Frozen; of a YAML file by `load`, of nested keys by `from_dict`, or of
    keys by name, whose sections are mappings.

    Raises:
        ConfigError: as `from_dict`.
    """

    model: PathText
    quant: QuantConfig = QuantConfig()
    adapter: AdapterConfig = AdapterConfig()
    budget: BudgetConfig = BudgetConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    preference: PreferenceConfig = PreferenceConfig()
    eval: EvalConfig = EvalConfig()
    policy: PolicyConfig = PolicyConfig()
    output: PathText = "runs/default"
    trust_remote_code: bool = False
    cache: PathText | None = None  # folder for quantized weights; None writes no cache

    def __init__(self, **keys: Any) -> None:
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise explain(error, type(self)) from None

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.adapter.prompt_learning:
            method = str(self.adapter.peft["peft_type"]) if self.adapter.peft else ""
            if self.data.packing:
                raise ConfigError(
                    f"{method} puts virtual tokens before each example, which packing cannot isolate.",
                    given="data.packing: true",
                    allowed="data.packing: false",
                    fix="set data.packing: false",
                )
            if "PREFIX" in method.upper() and self.policy.activations not in (None, "keep"):
                raise ConfigError(
                    "Prefix tuning passes its weights through the key-value cache, which recomputation would drop.",
                    given=f"policy.activations: {self.policy.activations}",
                    allowed="keep",
                    fix="remove policy.activations",
                )
        check_objective(self)
        if self.eval.samples and self.eval.max_new_tokens >= self.data.seq_len:
            raise ConfigError(
                "eval.max_new_tokens leaves no room for a prompt.",
                given=self.eval.max_new_tokens,
                allowed=f"less than data.seq_len, which is {self.data.seq_len}",
                fix=f"set eval.max_new_tokens={self.data.seq_len // 2}, or raise data.seq_len",
            )
        if self.train.warmup >= 1 and self.train.warmup != int(self.train.warmup):
            raise ConfigError(
                "train.warmup is neither a share nor a number of steps.",
                given=self.train.warmup,
                allowed="0 <= share < 1, or a whole number of steps",
            )
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
        """A config from nested keys, with `KEY=VALUE` overrides (dotted keys, YAML values) applied last.

        Raises:
            ConfigError: an unknown key (with the nearest valid one), a wrong type or value, an impossible combination.
        """
        if not isinstance(data, Mapping):
            raise ConfigError("A config is a mapping of keys.", given=repr(data), allowed="{'model': ...}, or a path")
        merged: dict[str, Any] = {str(k): dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
        for override in overrides:
            _apply_override(merged, override)
        for name, field in cls.model_fields.items():
            section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            if section and name in merged and merged[name] is None:
                merged[name] = {}  # all of whose keys are commented out
        return cls(**merged)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
        """A config from a YAML file. Raises ConfigError also where the file is missing or no YAML mapping."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            allowed, fix = "a YAML file", "check the path; `lowmem-ft init` writes a config"
            if os.path.isfile(path / "config.yaml"):
                fix = f"it is the folder of a run: give {path / 'config.yaml'}"
            raise ConfigError(
                "The config file cannot be read.", given=f"{path} ({error})", allowed=allowed, fix=fix
            ) from None
        data = read_yaml(text, str(path))
        if not isinstance(data, dict):
            raise ConfigError("The config file holds no keys.", given=str(path), allowed="a YAML mapping with `model:`")
        return cls.from_dict(data, overrides)

    def rooted(self) -> RunConfig:
        """The same for any working folder: paths that are there, or are written to, are absolute. Hub ids stay."""
        adapter, data = self.adapter, self.data
        init = adapter.init if adapter.init in typing.get_args(Init) else _rooted(adapter.init)
        cache = data.cache if data.cache is None or data.cache == "auto" else _absolute(data.cache)
        held_out = data.eval if isinstance(data.eval, float) else _rooted_sources(data.eval)
        sources = {"train": _rooted_sources(data.train), "eval": held_out, "cache": cache}
        profile = self.budget.profile and _rooted(self.budget.profile)
        changed = {
            "model": _rooted(self.model),
            "budget": self.budget.model_copy(update={"profile": profile}),
            "adapter": adapter.model_copy(update={"init": init}),
            "data": data.model_copy(update=sources),
            "output": _absolute(self.output),
            "cache": None if self.cache is None else _absolute(self.cache),
        }
        return self.model_copy(update=changed)

    def to_yaml(self) -> str:
        """The whole config with every default filled in; `load` reads it back equal."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _rooted(path: str) -> str:
    return _absolute(path) if os.path.exists(path) else path


def _rooted_source(source: str | DataSource) -> str | DataSource:
    path = source if isinstance(source, str) else source.path
    if glob.has_magic(path) and not os.path.exists(path):
        path = str(Path(glob.escape(str(Path.cwd()))) / path)
    path = _rooted(path)
    return path if isinstance(source, str) else source.model_copy(update={"path": path})


def _rooted_sources(given: Sources | None) -> Sources | None:
    if isinstance(given, list):
        return [_rooted_source(source) for source in given]
    return None if given is None else _rooted_source(given)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError("An override is not KEY=VALUE.", given=override, allowed="for example train.lr=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        inner = data.get(parent)
        if inner is None:
            inner = data[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"'{parent}' has no keys below it.", given=override, allowed=", ".join(keys_of(RunConfig))
            )
        data = inner
    data[last] = read_value(override, value)
