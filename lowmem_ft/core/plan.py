"""Plan and Policy: what was decided, what it will take, and how both are written down.

All sizes are bytes, all times seconds. `Plan.to_dict()` is the JSON form (schema 1) of `plan --json` and `plan.json`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, TypeAdapter, ValidationError

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.plan_html import plan_html
from lowmem_ft.core.plan_words import model_words, speed_words
from lowmem_ft.core.sizes import format_size

SCHEMA = 1
Count = Annotated[int, Field(ge=0)]
BREAKDOWN = ("base_weights", "adapter", "gradients", "optimizer", "activations", "loss", "workspace", "overhead")


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The decisions of a plan. Token counts are per micro-batch; `accumulation` micro-batches make one step."""

    bits: Literal[4, 8, 16]
    quant: Literal["nf4", "fp4", "int8", "none"]
    double_quant: bool
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    micro_batch_tokens: Count
    accumulation: Count
    resident_blocks: Count
    streamed_blocks: Count
    stream_from: Literal["host", "disk"]
    keep_blocks: Count
    recompute_blocks: Count
    offload_blocks: Count
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
    loss_chunk_tokens: Count
    optimizer_on: Literal["device", "host"] = "device"
    stream_embeddings: Literal["none", "input", "both"] = "none"
    keep_attention: bool = False
    mlp_tile_tokens: Count = 0  # of a micro-batch, that an MLP works on at once; 0: all
    experts_together: Annotated[int, Field(ge=1)] = 1  # of a layer, whose products are made at once
    recompute_mlp_act: bool = False

    @property
    def streams(self) -> bool:
        """Whether any weights lie below the device."""
        return self.streamed_blocks > 0 or self.stream_embeddings != "none"

    def describe(self) -> str:
        """The policy in one line."""
        weights = self.quant + (" double-quantized" if self.double_quant and self.bits == 4 else "")
        weights = self.compute_dtype if self.bits == 16 else weights
        again = " but attention" if self.keep_attention else ""
        lean = " but activation functions" if self.recompute_mlp_act else ""
        blocks = [
            f"{count} {name}"
            for name, count in (
                (f"keep{lean}", self.keep_blocks),
                (f"recompute{again}", self.recompute_blocks),
                (f"offload{again}", self.offload_blocks),
            )
            if count
        ]
        streamed = f"{self.streamed_blocks} streamed"
        if self.stream_embeddings != "none":
            head = " and head" if self.stream_embeddings == "both" else ""
            streamed = f"{self.streamed_blocks} and embedding{head} streamed"
        below = f" from {self.stream_from}" if self.streams else ""
        host = " on the host" if self.optimizer_on == "host" else ""
        tiles = f", MLPs in tiles of {self.mlp_tile_tokens}" if self.mlp_tile_tokens else ""
        tiles += f", {self.experts_together} experts together" if self.experts_together > 1 else ""
        return (
            f"{weights} weights, {self.compute_dtype} compute, {self.micro_batch_tokens} tokens x {self.accumulation}, "
            f"blocks: {' + '.join(blocks)}, {streamed}{below}, {self.optimizer}{host}, "
            f"loss chunk {self.loss_chunk_tokens}{tiles}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """Peaks over all phases of the run in bytes, and the speed of a training step.

    Attributes:
        pool_bytes: of what PyTorch's allocator reserves, so much is taken before the first step as one block, from
            which pieces of any size are cut; 0 where its segments grow (the default but on Windows), and on a CPU.
    """

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    process_peak_bytes: int
    host_peak_bytes: int
    pinned_bytes: int
    disk_bytes: int
    step_seconds: float
    tokens_per_second: float
    pool_bytes: Count = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A policy that was weighed, and its price: peak bytes and the speed of a training step."""

    policy: Policy
    allocated_peak_bytes: int
    process_peak_bytes: int
    step_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of the config that makes a run fit which does not, and what its smallest policy then takes.

    The bytes are exact. The speed is at least that: the plan of the changed config may have room for a faster policy.
    """

    key: str  # dotted, as in YAML and on the command line
    value: Any
    process_peak_bytes: int
    tokens_per_second: float


class Sample(NamedTuple):
    """Allocated device bytes at one moment of a training step; `block` is the decoder layer at work."""

    nbytes: int
    phase: str  # load, reference, forward, loss, backward, update
    block: int | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A policy, proven or refused for one model, device and budget.

    Attributes:
        fits: whether `predicted` stays inside `budget`, on the device and on the host; if not, it is the smallest that
            was found.
        model: name, path, architecture, parameters (of the base), trainable_parameters, blocks.
        device: name, kind (`cpu` or `cuda`), memory and the process's bytes before anything is loaded.
        budget: `device_bytes` and `host_bytes`. Of the host 0 says that nothing was given and what is free is unknown,
            because the device is not here: then it does not count. On a CPU the host is the device.
        phases: peak bytes of each phase (`load`, `train`, `eval`, `save`, `merge`) by tier.
        breakdown: allocated bytes at the training peak, by what holds them.
        alternatives: where the plan fits, other policies that take less, each safer (smaller) than the one before.
        reason: why this policy, or what binds where nothing fits; one sentence.
        changes: where nothing fits, the cheapest changes of the config that would make it fit.
        frontier: of all policies that were weighed those that no other beats in both memory and speed, by memory.
            Its figures and those of alternatives are estimates, where `predicted` is exact. Measured on models of 7M
            and 1.1B parameters: tensors -2% to +7%, seconds 0% to +4%; the process on a CPU -1.1% to +0.7%, on CUDA,
            where only `predicted` replays the allocator, -10% to +1%. Of a policy that was weighed exactly and refused
            the bytes are exact here.
        measured: what real steps took, under the keys of `predicted`; empty where none was run.
        timeline: of one training step of the policy, in order; thinned, but every block's peak is in it.
        config: the resolved RunConfig as a mapping.
    """

    fits: bool
    model: dict[str, Any]
    device: dict[str, Any]
    budget: dict[str, int]
    policy: Policy
    predicted: Predicted
    phases: dict[str, dict[str, int]]
    breakdown: dict[str, int]
    alternatives: tuple[Candidate, ...] = ()
    reason: str = ""
    changes: tuple[Change, ...] = ()
    frontier: tuple[Candidate, ...] = ()
    timeline: tuple[Sample, ...] = ()
    measured: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert set(self.breakdown) == set(BREAKDOWN), "a breakdown names every holder of bytes"

    @property
    def host_binds(self) -> bool:
        """Whether it does not fit the host, when that is not the device."""
        taken, allowed = self.predicted.host_peak_bytes, self.budget["host_bytes"]
        return binds_host(self.device.get("kind"), taken=taken, allowed=allowed)

    @property
    def run_config(self) -> RunConfig:
        """The configuration this plan was made for. What it warns of was told when it was given."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return RunConfig.from_dict(self.config)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, in the order of the fields."""
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        if not self.measured:
            del data["measured"]
        return data

    def to_json(self) -> str:
        """`to_dict()` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The plan that `to_dict` wrote.

        Raises:
            ConfigError: another schema, keys missing, or values of another kind.
        """
        if not isinstance(data, dict):
            raise ConfigError("A plan is a mapping of keys.", given=type(data).__name__, fix="plan again")
        if data.get("schema") != SCHEMA:
            raise ConfigError(
                "The plan has another schema.", given=data.get("schema"), allowed=SCHEMA, fix="plan again"
            )
        try:
            fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "measured"}
            fields["measured"] = data.get("measured", {})
            fields["breakdown"] = {name: fields["breakdown"][name] for name in BREAKDOWN}
            fields["policy"] = Policy(**fields["policy"])
            fields["predicted"] = Predicted(**fields["predicted"])
            for name in ("alternatives", "frontier"):
                fields[name] = tuple(_candidate(item) for item in fields[name])
            fields["changes"] = tuple(Change(**item) for item in fields["changes"])
            fields["timeline"] = tuple(Sample(*item) for item in fields["timeline"])
            plan = cls(**fields)
            TypeAdapter(cls).validate_json(json.dumps(data), strict=True)  # whose strictness takes lists for tuples
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            given = f"{first['input']!r:.80} ({first['msg']})"
            raise ConfigError(f"The plan has a value that {key} cannot have.", given=given, fix="plan again") from None
        except (KeyError, TypeError) as error:
            raise ConfigError("The plan is incomplete.", given=f"{error}", fix="plan again") from None
        return plan

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) pairs for every form in which a plan is shown."""
        holders = [(name.replace("_", " "), format_size(size)) for name, size in self.breakdown.items() if size]
        return [
            ("model", model_words(self)),
            ("device", f"{self.device['name']}"),
            ("budget", f"{format_size(self.budget['device_bytes'])}"),
            ("fits", "yes" if self.fits else "no"),
            ("policy", self.policy.describe()),
            ("why", self.reason),
            ("predicted speed", speed_words(self)),
            ("predicted process peak", format_size(self.predicted.process_peak_bytes)),
            ("predicted allocated peak", format_size(self.predicted.allocated_peak_bytes)),
            *(("  " + name, size) for name, size in holders),
        ]

    def __repr__(self) -> str:  # what a prompt and a notebook's text form show: fields would be pages of samples
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _repr_html_(self) -> str:
        return plan_html(self)


def binds_host(kind: str | None, *, taken: int, allowed: int) -> bool:
    """Whether a process on a device of `kind` takes more of the host than is allowed; 0 allows anything."""
    return kind != "cpu" and 0 < allowed < taken


def _candidate(data: dict[str, Any]) -> Candidate:
    return Candidate(**{**data, "policy": Policy(**data["policy"])})
