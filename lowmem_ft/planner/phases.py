"""What the phases of a run take of each tier of memory: load, train, evaluate, save, and the merge afterwards.

Sizes are bytes. Training and evaluation are traced (`planner.weigh`); the others follow from shapes and headers. On a
CPU the device is the host, so nothing is said of the host there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem_ft.adapters.inject import adapter_at, adapters_disabled, injection_of, is_injected
from lowmem_ft.adapters.peft_format import adapter_tensors
from lowmem_ft.adapters.stack import DenseStack, LoraStack
from lowmem_ft.assemble import quant_spec
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.isolation import attention_inputs, isolation_fault, probe_batch
from lowmem_ft.export.through_peft import untied_by_peft
from lowmem_ft.export.trained import MERGE_VALUES
from lowmem_ft.export.write import COPIED
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.reserve import process_estimate
from lowmem_ft.planner.simulate import UNSEEN_BYTES, Stage
from lowmem_ft.planner.weigh import Scales
from lowmem_ft.quant.checkpoint import CHUNK_BYTES, safetensors_header
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.footprint import LISTED_BYTES, LoadFootprint
from lowmem_ft.quant.linear import QuantLinear, get_base_weight
from lowmem_ft.quant.loader import effective_spec
from lowmem_ft.quant.ops import QuantSpec, layout, layout_bytes, quantize_scratch
from lowmem_ft.quant.swap import has_conv1d
from lowmem_ft.runtime.blocks import causal_model
from lowmem_ft.runtime.head import head_of
from lowmem_ft.runtime.optim import HOST_WORK_BYTES
from lowmem_ft.runtime.ring import SLOTS
from lowmem_ft.runtime.state import MAPPED
from lowmem_ft.runtime.streaming import Moved, Piece
from lowmem_ft.runtime.tiers import STAGES
from lowmem_ft.runtime.vocabulary import Matrix

OF_A_RUN = ("load", "train", "eval", "save")  # the merge is a command of its own
META_BYTES = 2 << 10  # of a checkpoint's header beside the optimizer's settings: where the data stands, losses
ADAPTER_TEXT_BYTES = 8 << 10  # adapter_config.json; and the README that peft writes of its other methods
RANDOM_BYTES = 16  # the state of CUDA's generator


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiers:
    """Peak bytes of a phase beside what the process takes anyway; `host` only where that is not the device."""

    device: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the base model alone decides, in one precision, whatever it is trained with.

    Attributes:
        check: bytes of the device that the check of packing takes beside the model.
        casts: and a piece that is read, in the dtype of its file.
        copied: bytes of the files that a merged checkpoint takes over.
        streamable: what can be streamed of each block.
        matrices: and of the vocabulary.
        spec: how the weights are stored.
    """

    spec: QuantSpec
    footprint: LoadFootprint
    check: int
    casts: int
    copied: int
    streamable: Sequence[list[Piece]]
    matrices: Sequence[Matrix]

    @classmethod
    def of(cls, config: RunConfig, policy: Policy, stage: Stage) -> Base:
        """Predict it, see `Aside.of`."""
        small = {file for pattern in COPIED for file in stage.checkpoint.folder.glob(pattern)}
        return cls(
            spec=effective_spec(stage.checkpoint, quant_spec(policy)),
            footprint=stage.footprint,
            check=_isolation_work(stage) if config.data.packing and not config.adapter.prompt_learning else 0,
            casts=0 if stage.kind == "cpu" else CHUNK_BYTES,
            copied=sum(file.stat().st_size for file in small if not file.name.endswith(".index.json")),
            streamable=stage.ready.below.streamable,
            matrices=stage.ready.below.matrices,
        )

    def reading(self, moved: Moved) -> int:
        """Bytes of the device that reading and quantizing take at most, and then the check of packing."""
        tables = {name for matrix in moved.matrices for name in matrix.names}
        below = set()
        for index in moved.blocks:
            for piece in self.streamable[index]:
                layer = piece.path.rpartition(".")[0]
                below |= {piece.path, layer, f"{layer}.weight"}
        apart = self.casts + sum(moved.slots) + sum(moved.stubs)
        read = self.footprint.peak(below, tables=tables, on_host=self.casts > 0) + apart
        return max(read, self.footprint.held - moved.saved + self.check) + UNSEEN_BYTES

    @cached_property
    def least(self) -> int:
        """The same with everything below the device, or on it if that takes less."""
        every = ((count, these) for count in (0, len(self.streamable)) for these in ((), self.matrices))
        return min(self.reading(Moved.of(self.streamable, count, these)) for count, these in every)


@dataclass(frozen=True, kw_only=True, slots=True)
class Aside:
    """The phases that are no steps. Of a policy only precision, compute dtype, what is streamed and the optimizer's
    place matter to them.

    Attributes:
        starting: bytes of the device that what follows on loading takes beside the model, before the optimizer.
        drawn: of the host while an adapter is.
        cache: of the disk, for the cache of quantized weights.
        save, merge: with every block resident, and the optimizer on the device.
    """

    scales: Scales
    base: Base
    starting: int
    drawn: int
    cache: int
    save: Tiers
    merge: Tiers

    @classmethod
    def of(cls, config: RunConfig, policy: Policy, scales: Scales, base: Base | None = None) -> Aside:
        """Predict them.

        The cache of quantized weights is taken to be empty: whether it is would take reading the whole checkpoint, and
        a load from the cache takes less. Pages of mapped files are no allocations; weights are read, not mapped.

        Args:
            policy: of it precision and compute dtype count.
            base: if it is known from another adapter or optimizer.

        Raises:
            CheckpointError, UnsupportedError: what loading finds in headers.
        """
        base = base or Base.of(config, policy, scales.stage)
        model = scales.stage.ready.model
        merged = base.footprint.merged + base.copied + _untied_bytes(model)
        adapters = _adapters(model)
        return cls(
            scales=scales,
            base=base,
            starting=_starting(config, scales.stage, adapters),
            drawn=max((4 * adapter.lora_A.numel() for adapter in adapters), default=0),  # in fp32
            cache=base.footprint.cache if config.cache else 0,
            save=_save(config, scales),
            merge=Tiers(device=_merge_work(scales.stage, base.spec), host=2 * CHUNK_BYTES, disk=merged),
        )

    def load(self, policy: Policy) -> Tiers:
        """While `assemble` runs: reading and quantizing, then the check of packing and adapters, then all is held."""
        moved = self.scales.moved(policy)
        starting = self.base.footprint.held - moved.saved + self.starting
        most = max(starting, self.scales.held_by(policy)) + UNSEEN_BYTES
        return Tiers(
            device=max(self.base.reading(moved), most),
            host=max(self.base.footprint.copied, self.drawn, *(matrix.nbytes for matrix in moved.matrices)),
            disk=self.cache + (moved.stored if self._on_disk(policy) else 0),
        )

    @property
    def host(self) -> int:
        """Bytes of the host that loading or saving takes, without what is streamed from there."""
        return max(self.base.footprint.copied, self.drawn, self.save.host)

    def most(self, policy: Policy) -> int:
        """Bytes of the device's tensors while loading and saving."""
        return max(self.load(policy).device, self._save(policy).device)

    def _save(self, policy: Policy) -> Tiers:
        below = self.scales.held - self.scales.held_by(policy)
        return replace(self.save, device=self.save.device - below)

    def phases(self, device: Device, policy: Policy, *, train: int, evaluation: int) -> dict[str, dict[str, int]]:
        """All phases as a plan holds them, with what the process takes anyway.

        Args:
            train, evaluation: bytes that the process takes of the device.
        """
        moved, inputs = self.scales.moved(policy), self.scales.inputs_stored(policy)
        own = {"load": self.load(policy), "save": self._save(policy), "merge": self.merge}
        state = self.scales.optimizer_stored(policy)
        rows = policy.micro_batch_tokens * sum(it.row_bytes for it in moved.matrices if it.embedding is not None)
        updating = HOST_WORK_BYTES if state else 0
        working = {"load": state, "train": state + max(updating, rows), "eval": state + rows}  # saved as it lies
        heap = self.scales.heap_held(policy)
        kernels = self.scales.kernels(policy)
        sizes = {name: process_estimate(device, tiers.device, heap, kernels) for name, tiers in own.items()}
        sizes |= {"train": train, "eval": evaluation}
        found: dict[str, dict[str, int]] = {}
        for name in (*OF_A_RUN, "merge"):
            tiers = own.get(name, Tiers(device=0))
            found[name] = {"device_bytes": sizes[name]}
            pinned, disk = 0, tiers.disk
            if device.kind == "cpu":
                disk += inputs if name == "train" else 0  # with the first step, and then until the process ends
            else:
                if name != "merge":
                    pinned = STAGES * sum(moved.slots) // SLOTS if self._on_disk(policy) else moved.stored
                    pinned += inputs if name != "load" else 0
                found[name]["host_bytes"] = device.host_process_bytes + tiers.host + working.get(name, 0) + pinned
            found[name] |= {"pinned_bytes": pinned, "disk_bytes": disk}
        return found

    def _on_disk(self, policy: Policy) -> bool:
        return policy.stream_from == "disk" or self.scales.stage.kind == "cpu"


def _starting(config: RunConfig, stage: Stage, adapters: list[Any]) -> int:
    """What the adapters, their start, and the look at the head, which is on the CPU, take of the device beside the
    model."""
    trained = sum(parameter.nbytes for parameter in stage.ready.trainable.values())
    norms = _work(stage, lambda: _norms(max(adapters, key=_elements))) if config.adapter.dora else 0
    head = _work(stage, lambda: head_of(stage.ready.model)) if stage.kind == "cpu" else 0
    return trained + max(norms, head)


def _save(config: RunConfig, scales: Scales) -> Tiers:
    """While checkpoints, the best weights and the adapter are written, and read again.

    On the disk: the two checkpoints that are retained, and the one that is written before the oldest goes. The text
    files of the run folder (metrics, plan, report) are not counted. safetensors writes tensors from where they lie on
    the host; those on another device it first copies to the host, all of them. So an optimizer whose
    state lies there takes no more of the host than one whose state is copied.
    """
    ready = scales.stage.ready
    assert ready.optimizer is not None, "a plan is made for training"
    weights = {f"weights/{name}": parameter for name, parameter in ready.trainable.items()}
    random = {"random/cpu": torch.get_rng_state(), "random/cuda": torch.empty(RANDOM_BYTES, dtype=torch.uint8)}
    states = {f"optimizer/{name}": tensor for name, tensor in ready.optimizer.state_tensors().items()}
    meta = ready.optimizer.state_meta()
    meta["steps"] = [config.train.steps or 10**6] * len(meta["steps"])
    checkpoint = safetensors_bytes({**weights, **states, **random}, {"state": json.dumps(meta)}) + META_BYTES
    best = safetensors_bytes(weights) if config.data.eval and config.train.keep_best else 0
    trained = adapter_tensors(ready.model) if is_injected(ready.model) else ready.trainable
    adapter = safetensors_bytes(trained, {"format": "pt"}) + ADAPTER_TEXT_BYTES
    read = min(checkpoint, 2 * MAPPED)
    return Tiers(
        device=scales.held + (read if scales.stage.kind == "cpu" else 0) + META_BYTES + random["random/cpu"].nbytes,
        host=checkpoint,
        disk=max(3 * checkpoint + best, 2 * checkpoint + 2 * best, 2 * checkpoint + best + adapter),
    )


def _merge_work(stage: Stage, spec: QuantSpec) -> int:
    """For the `merge` command with its defaults, which works on one matrix at a time (`export.weights`).

    It reads a matrix, quantizes and dequantizes it as the run's loading did, adds the adapter's product to some rows at
    a time, in fp32, and writes it in bf16. What is not quantized and not adapted passes in pieces. The check afterwards
    is not in it: it evaluates the trained model as the run does, and streams the merged one where it does not fit.
    """
    model, compute = stage.ready.model, stage.ready.compute_dtype
    wide = 2 if compute == torch.bfloat16 else 4  # what is rounded to bf16 in the end is not rounded before
    turned = has_conv1d(causal_model(model))
    adapters = {id(_base(it)): it for it in _adapters(model)}
    matrices = [it for it in model.modules() if isinstance(it, (QuantLinear, QuantStack))]
    matrices += [base for it in adapters.values() if not isinstance(base := _base(it), (QuantLinear, QuantStack))]
    most = 0
    dequantizing: dict[Hashable, int] = {}  # the same for equal matrices
    for base in matrices:
        held, work = wide * _elements(base), 0
        if isinstance(base, (QuantLinear, QuantStack)):
            alike = type(base), tuple(base.shape), base.spec, base.dtype
            if alike not in dequantizing:
                dequantizing[alike] = _dequantizing(stage, base)
            shape = base.shape[-2:]
            stored = layout_bytes(layout(shape, spec))
            dtype = torch.bfloat16 if wide == 2 else torch.float32
            scratch = quantize_scratch(shape, spec, dtype, transposed=turned)
            work = max(scratch, dequantizing[alike]) + stored
            if isinstance(it := adapters.get(id(base)), LoraStack):
                work += 4 * it.lora_B.numel()  # kept for all slices
        if id(base) in adapters:
            work = max(work, _updating(adapters[id(base)]))
        most = max(most, held + work)
    quantized = {id(it) for it in matrices}
    plain = max((it.numel() for module in model.modules() if id(module) not in quantized
                 for it in module.parameters(recurse=False)), default=0)  # fmt: skip
    return max(most, min(CHUNK_BYTES, compute.itemsize * plain))


def _updating(adapter: Any) -> int:
    """Factors in fp32 (of stacked experts all of B, and those of one expert), and the rows that are summed."""
    rows, columns = _sizes(adapter)
    factors: int = 4 * adapter.rank * (rows + columns)
    if isinstance(adapter, LoraStack):
        factors += 4 * adapter.lora_B.numel()
    at_once = min(_elements(adapter), max(1, MERGE_VALUES // columns) * columns)
    return factors + 4 * at_once


def _base(adapter: Any) -> Any:
    return adapter.__dict__["stack"] if isinstance(adapter, LoraStack) else adapter.base_layer


def _dequantizing(stage: Stage, module: nn.Module) -> int:
    return _work(stage, lambda: _matrix(module))


def _isolation_work(stage: Stage) -> int:
    """Bytes that `check_isolation` takes, which runs the whole model before there are adapters.

    It grows by the same number of bytes with each further block of a kind.
    """
    kinds = stage.kinds
    few = stage.showing(kinds)
    least = total = _isolation_peak(stage, few)
    for kind in set(kinds):
        others = [at for at, other in enumerate(kinds) if other == kind and at not in few]
        if others:
            total += len(others) * (_isolation_peak(stage, sorted([*few, others[0]])) - least)
    return total


def _isolation_peak(stage: Stage, only: list[int]) -> int:
    whole = stage.ready.model
    model = causal_model(whole)
    batch = probe_batch(model)

    def check() -> object:
        inputs = attention_inputs(model, batch, dtype=stage.ready.compute_dtype)
        return isolation_fault(model, batch, inputs)  # which it cannot find without data

    with stage.only(only), stage.attending(), adapters_disabled(whole):
        return _work(stage, check)


def _work(stage: Stage, function: Callable[[], object]) -> int:
    """Peak bytes of `function` on tensors without data, beyond what is held."""
    tracer = stage.tracer
    tracer.begin()
    before = sum(event.nbytes for event in tracer.trace.events)
    with tracer:
        tracer.phase, tracer.block = "load", None
        kept = function()
    del kept
    return max(tracer.trace.curve(), default=before) - before


def _norms(adapter: nn.Module) -> Tensor:
    """What DoRA starts from."""
    with torch.no_grad():
        norm_O: Tensor = torch.linalg.vector_norm(_matrix(adapter), dim=1, dtype=torch.float32)
    return norm_O


def _untied_bytes(model: nn.Module) -> int:
    """In 16 bits, of the matrix that a merge writes once more where peft changes one of two tied ones."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sizes = [
        2 * parameter.numel() + LISTED_BYTES + 2 * len(name)
        for name in untied_by_peft(base)
        for parameter in base.get_submodule(name.rpartition(".")[0]).parameters()
    ]
    return max(sizes, default=0)


def _adapters(model: nn.Module) -> list[Any]:
    return [adapter_at(model, path) for path in injection_of(model).paths] if is_injected(model) else []


def _matrix(module: nn.Module) -> Tensor:
    """The base weight below a linear layer or its adapter; of a stack or its adapter the first slice."""
    base = module.__dict__["stack"] if isinstance(module, LoraStack) else module
    return get_base_weight(base, index=0 if isinstance(base, (QuantStack, DenseStack)) else None)


def _sizes(module: Any) -> tuple[int, int]:
    """Rows and columns of that matrix, in either order."""
    if isinstance(module, (QuantStack, DenseStack)):
        _, rows, columns = module.shape
        return rows, columns
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def _elements(module: nn.Module) -> int:
    return math.prod(_sizes(module))


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Size of a safetensors file with these tensors, a few bytes more or less for the order in which it holds them."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in ordered}
    text = json.dumps(safetensors_header(stored, metadata), separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + layout_bytes(stored)
