"""Checkpoint -> quantized weights in a model: read one tensor, convert, quantize, place, free."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.core.host import Trimmer
from lowmem_ft.quant.architecture import Template, conversion_plan, meta_model, template_of
from lowmem_ft.quant.cache import CacheEntry, CacheWriter
from lowmem_ft.quant.checkpoint import CHUNK_BYTES, Checkpoint, StoredSource, TensorSource
from lowmem_ft.quant.conversion import Plan, Step, convert, input_numel, matcher
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.ops import QuantSpec, layout, layout_bytes, quantize, quantize_scratch
from lowmem_ft.quant.prequantized import open_source, stored_spec
from lowmem_ft.quant.swap import swap_quantized

__all__ = ["LoadReport", "Place", "Progress", "effective_spec", "head_path", "load_weights", "meta_model"]

Place = Callable[[str, Tensor], Tensor]
Progress = Callable[[int, int], None]
_DROPPED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # buffers that older versions of transformers stored


@dataclass(kw_only=True)
class LoadReport:
    """What a load did.

    Attributes:
        spec: the format of the quantized weights: what was asked for, or what a bitsandbytes checkpoint is stored in.
        quantized: paths of the quantized layers and stacks.
        nbytes: bytes of all tensors that the model holds now.
        from_cache: the weights were read from the cache; nothing was quantized.
        cache: the cache entry that was read or written.
        unexpected: tensors of the checkpoint that the model has no place for, ignored as transformers ignores them.
        skipped: tensors of the parts that are not trained (vision tower).
        initialised: tensors that no checkpoint holds and that the architecture computes itself.
    """

    spec: QuantSpec
    quantized: list[str] = field(default_factory=list)
    nbytes: int = 0
    from_cache: bool = False
    cache: Path | None = None
    unexpected: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)


def effective_spec(checkpoint: Checkpoint, spec: QuantSpec) -> QuantSpec:
    """`spec`, or the format that a bitsandbytes checkpoint is already stored in, which is kept."""
    return stored_spec(checkpoint) or spec


def head_path(model: PreTrainedModel) -> str | None:
    """The path of the output embedding (`lm_head`), which stays in full precision."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def load_weights(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    *,
    spec: QuantSpec,
    dtype: torch.dtype = torch.bfloat16,
    place: Place,
    progress: Progress | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    tables: Collection[str] = (),
) -> LoadReport:
    """Fill a meta model with the weights of a checkpoint, quantized. Afterwards it is frozen and in eval mode.

    At any time there exist the tensors placed so far and one tensor at full precision (of stacked experts: one
    expert's slice), plus a few MiB. Everything that can be checked without reading weights is checked first.

    Args:
        model: from `meta_model` with the same `dtype`; not swapped yet, or swapped with `effective_spec`.
        spec: storage of the linear layers and experts; head, embeddings, norms and routers stay in full precision.
        place: called with the name and each final tensor once, before the next one is made; returns the tensor that
            the model shall hold (moved to its tier). Stacks of experts are placed when all their slices are there.
        progress: called with bytes done and bytes in total, of the checkpoint or of the cache.
        cache: folder of the cache of quantized weights; None: no cache. Nothing is cached where nothing is quantized.
        device: where conversion and quantization are computed.
        tables: names of tensors that do not stay on the device, and may be large: they are read on the CPU all the
            same, and first.

    Raises:
        CheckpointError: missing tensors, wrong shapes, NaN or Inf, damaged files or cache, no space for the cache.
        UnsupportedError: a quantization or an architecture that cannot be served.
    """
    stored = stored_spec(checkpoint)
    report = LoadReport(spec=stored or spec)
    template = template_of(checkpoint, model.config, dtype=dtype)
    plan = conversion_plan(checkpoint, template)
    report.unexpected, report.skipped = list(plan.unexpected), list(plan.skipped)
    redundant = redundant_names(model, plan)
    check_missing(model, plan, redundant)
    _warn_of_unexpected(model, plan)
    absent = {*plan.missing, *redundant}
    head = head_path(model)
    swap_quantized(model, spec=report.spec, skip=[] if head is None else [head])
    report.quantized = [path for path, module in model.named_modules() if isinstance(module, QuantLinear | QuantStack)]
    holder = ModelHolder(model, place)
    if cache is None or stored is not None or not report.quantized:
        _read_all(plan, template, checkpoint, holder, redundant, progress, torch.device(device), tables)
    else:
        entry = CacheEntry.of(
            cache, checkpoint, model, unswapped=template.text, spec=report.spec, dtype=dtype, absent=absent
        )
        report.cache, report.from_cache = entry.folder, entry.is_complete()
        if report.from_cache:
            entry.load(holder, progress, first=tables)
        else:
            with entry.writer() as writer:
                holder.writer = writer
                _read_all(plan, template, checkpoint, holder, redundant, progress, torch.device(device), tables)
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    report.initialised = _initialise_rest(model, place)
    model.requires_grad_(False).eval()
    report.nbytes = sum(tensor.nbytes for tensor in {id(t): t for _, t in _tensors(model)}.values())
    return report


class ModelHolder:
    """Puts finished tensors into the model, by way of the cache's writer and `place`."""

    writer: CacheWriter | None = None

    def __init__(self, model: PreTrainedModel, place: Place) -> None:
        self.model, self._place = model, place

    def hold_storage(self, path: str, storage: Mapping[str, Tensor]) -> None:
        """Hold the storage of the quantized layer or stack at `path`."""
        module = self.model.get_submodule(path)
        assert isinstance(module, QuantLinear | QuantStack)
        if self.writer is not None:
            self.writer.write_storage(path, module, storage)
        for name, tensor in storage.items():
            module._buffers[name] = self._place(f"{path}.{name}", tensor)

    def hold_tensor(self, name: str, tensor: Tensor) -> None:
        """Hold a parameter or buffer that is not quantized."""
        if self.writer is not None:
            self.writer.write_tensor(name, tensor)
        _set_tensor(self.model, name, self._place(name, tensor))


class StepLoader:
    """Loads one step of the plan."""

    def __init__(
        self,
        step: Step,
        template: Template,
        source: TensorSource,
        holder: ModelHolder,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self.step, self.template, self.source, self.holder = step, template, source, holder
        self._partial: dict[str, Tensor] = {}
        self.dtype = next(dtypes[name] for name in step.targets)
        self.nbytes = sum(source.tensors[name].nbytes for names in step.sources.values() for name in names)
        stacks = [isinstance(self._module(name), QuantStack) for name in step.targets]
        # a stack that is neither quantized nor converted is read in one piece: it is the final tensor
        self.sliced = step.slices is not None and (any(stacks) or not step.is_plain)
        self.all_quantized = all(map(self._is_quantized, step.targets))

    @property
    def scratch_bytes(self) -> int:
        """Bytes of full precision that this step needs beside what the model will hold."""
        return input_numel(self.step, self.source, sliced=self.sliced) * self.dtype.itemsize * self.all_quantized

    def footprint(self, skip: Collection[str]) -> tuple[int, int]:
        """Of `load` on the CPU: bytes that the model holds more afterwards, and that it takes meanwhile beside them.

        The scratch that all steps share is in neither.
        """
        sources = [self.source.tensors[name] for names in self.step.sources.values() for name in names]
        casts = [min(info.nbytes // self._slices, CHUNK_BYTES) for info in sources if info.dtype != self.dtype]
        values = min(max(math.prod(info.shape[-2:]) for info in sources), CHUNK_BYTES // 4)  # matrix by matrix
        kept, work = 0, max([values * self.source.scratch_per_value, *casts])
        for name, shape in self.step.targets.items():
            module = self._module(name)
            if name in skip:
                continue
            if isinstance(module, QuantStack):
                one = layout(module.shape[1:], module.spec)
                kept += sum(tensor.nbytes for tensor in module.storage().values())
                work = max(work, layout_bytes(one) + quantize_scratch(module.shape[1:], module.spec, self.dtype))
            elif isinstance(module, QuantLinear) and self._is_quantized(name):
                kept += layout_bytes(layout(module.shape, module.spec))
                if self._held_as_stored():
                    continue
                transposed = self._is_transposed(name)
                work = max(work, quantize_scratch(module.shape, module.spec, self.dtype, transposed=transposed))
            else:
                kept += layout_bytes({name: (shape, self.dtype)})
        as_read = self.step.is_plain and not self.sliced  # and the model holds the very tensor that was read into
        whole = 0 if self.all_quantized or as_read else input_numel(self.step, self.source, sliced=self.sliced)
        return kept, work + whole * self.dtype.itemsize

    def load(self, skip: Collection[str], scratch: Tensor, trimmer: Trimmer) -> None:
        """Read, convert, quantize and hold everything but the targets in `skip`."""
        step, device = self.step, scratch.device
        if self._take_stored(device):
            return
        indices = list(range(step.slices)) if self.sliced and step.slices is not None else [None]
        for index in indices:
            tensors = convert(
                step, self.source, self.template.model, dtype=self.dtype, device=device, index=index,
                scratch=scratch if self.all_quantized else None,
            )  # fmt: skip
            for name in list(tensors):
                tensor = tensors.pop(name)
                if name not in skip:
                    self._take(name, tensor, index)
                del tensor
            trimmer.worked(self.nbytes // len(indices))
        if self.sliced:
            for name in step.targets:
                self._finish(name)

    def _take_stored(self, device: torch.device) -> bool:
        """Take a matrix as it is stored, if it is stored just as it shall be held."""
        if not self._held_as_stored():
            return False
        assert isinstance(self.source, StoredSource)
        path = self.step.only_target.removesuffix(".weight")
        storage = self.source.read_storage(self.step.only_source)
        self.holder.hold_storage(path, {name: tensor.to(device) for name, tensor in storage.items()})
        return True

    def _held_as_stored(self) -> bool:
        path, _, leaf = self.step.only_target.rpartition(".")
        module = self.holder.model.get_submodule(path) if leaf == "weight" else None
        return isinstance(module, QuantLinear) and self._stored() == (module.spec, module.shape)

    def _stored(self) -> tuple[QuantSpec, tuple[int, int]] | None:
        """How the step's matrix is stored, if it is quantized already."""
        if not self.step.is_plain or not isinstance(self.source, StoredSource):
            return None
        return self.source.stored(self.step.only_source)

    def _take(self, name: str, tensor: Tensor, index: int | None) -> None:
        module = self._module(name)
        if isinstance(module, QuantStack):
            for e, matrix in enumerate(tensor) if index is None else [(index, tensor)]:
                module.load_slice(e, quantize(matrix, module.spec))
            if index is None:
                self._finish(name)
        elif self._is_quantized(name):
            assert isinstance(module, QuantLinear)
            matrix = tensor.t() if self._is_transposed(name) else tensor
            self.holder.hold_storage(name.removesuffix(".weight"), quantize(matrix, module.spec))
        elif index is None:
            # a piece of something larger would keep all of it alive
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            self.holder.hold_tensor(name, tensor if whole else tensor.clone(memory_format=torch.contiguous_format))
        else:
            if name not in self._partial:
                self._partial[name] = tensor.new_empty(self.step.targets[name])
            self._partial[name][index].copy_(tensor)

    def _finish(self, name: str) -> None:
        module = self._module(name)
        if isinstance(module, QuantStack):
            self.holder.hold_storage(name, module.storage())
        elif name in self._partial:
            self.holder.hold_tensor(name, self._partial.pop(name))

    def _module(self, name: str) -> nn.Module:
        """The stack of this name, else the module that owns the tensor of this name."""
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self.holder.model.get_submodule(path)
        stack = owner._modules.get(leaf)
        return owner if stack is None else stack

    @property
    def _slices(self) -> int:
        return self.step.slices or 1 if self.sliced else 1

    def _is_transposed(self, name: str) -> bool:
        """Whether the matrix is stored as (I, O): Conv1D's, but what bitsandbytes has quantized is (O, I)."""
        layer = self.template.text.get_submodule(name.removesuffix(".weight"))
        return isinstance(layer, Conv1D) and self._stored() is None

    def _is_quantized(self, name: str) -> bool:
        module = self._module(name)
        return isinstance(module, QuantStack) or (isinstance(module, QuantLinear) and name.endswith(".weight"))


def _read_all(
    plan: Plan,
    template: Template,
    checkpoint: Checkpoint,
    holder: ModelHolder,
    redundant: Collection[str],
    progress: Progress | None,
    device: torch.device,
    tables: Collection[str],
) -> None:
    steps = loading_steps(plan, template, checkpoint, holder, redundant)
    total, done = sum(loader.nbytes for loader in steps), 0
    # one piece of memory for all that is quantized: the same room freed and asked for again ends in fragments
    scratch = torch.empty(max((loader.scratch_bytes for loader in steps), default=0), dtype=torch.uint8, device=device)
    trimmer = Trimmer()
    apart = [loader for loader in steps if set(loader.step.targets) <= set(tables)]
    for loader in apart + [loader for loader in steps if loader not in apart]:
        loader.load(redundant, torch.empty(0) if loader in apart else scratch, trimmer)
        done += loader.nbytes
        if progress is not None:
            progress(done, total)


def loading_steps(
    plan: Plan, template: Template, checkpoint: Checkpoint, holder: ModelHolder, redundant: Collection[str]
) -> list[StepLoader]:
    """The steps of loading, in order, without those whose results are all `redundant`."""
    source = open_source(checkpoint)
    dtypes = {name: tensor.dtype for name, tensor in template.text.state_dict().items()}
    needed = [step for step in plan.steps if not set(step.targets) <= set(redundant)]
    return [StepLoader(step, template, source, holder, dtypes) for step in needed]


def redundant_names(model: PreTrainedModel, plan: Plan) -> set[str]:
    """Tied tensors that need not be read, because what they are tied to is stored."""
    missing = set(plan.missing)
    return {target for target, source in model.all_tied_weights_keys.items() if source not in missing}


def check_missing(model: PreTrainedModel, plan: Plan, redundant: Collection[str]) -> None:
    """Raise CheckpointError where the checkpoint lacks what the model needs."""
    tied_to = {source: target for target, source in model.all_tied_weights_keys.items()}
    computed = matcher(model._keys_to_ignore_on_load_missing)
    missing = [
        name
        for name in plan.missing
        if name not in redundant
        and (tied_to.get(name) is None or tied_to[name] in plan.missing)
        and not (computed is not None and computed.search(name))
    ]
    if missing:
        raise CheckpointError(
            "the checkpoint lacks tensors that the model needs",
            given=f"{', '.join(missing[:4])}{f' and {len(missing) - 4} more' * (len(missing) > 4)}",
            allowed=f"all tensors of {type(model).__name__}",
            fix="config.json and weights belong to different models, or the checkpoint is incomplete: get both again"
            + (f" (unknown to the model: {', '.join(plan.unexpected[:3])})" if plan.unexpected else ""),
        )


def _warn_of_unexpected(model: PreTrainedModel, plan: Plan) -> None:
    """Say what is left out, but for what the architecture itself, or every one of transformers, has dropped."""
    dropped = matcher({*(model._keys_to_ignore_on_load_unexpected or ()), *_DROPPED})
    assert dropped is not None
    names = [name for name in plan.unexpected if not dropped.search(name)]
    if names:
        some = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
        warnings.warn(
            f"The checkpoint has tensors for which {type(model).__name__} has no place under its config.json; they are "
            f"left out: {some}",
            stacklevel=2,
        )


def _initialise_rest(model: PreTrainedModel, place: Place) -> list[str]:
    """Let the architecture compute what no checkpoint holds (rotary frequencies and the like), as from_pretrained does.

    Raises:
        UnsupportedError: something stays without data.
    """
    absent = [name for name, tensor in _tensors(model) if tensor.is_meta]
    for name in absent:
        tensor = model.get_parameter_or_buffer(name)
        # NaN shows afterwards what nothing has computed
        empty = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0, device="cpu")
        _set_tensor(model, name, empty)
    _initialise(model, absent, {name.rpartition(".")[0] for name in absent})
    if missing := [name for name in absent if _is_unknown(model.get_parameter_or_buffer(name))]:
        # what holds their owners may be what computes them
        above = (name.split(".")[:count] for name in missing for count in range(name.count(".")))
        _initialise(model, missing, {".".join(parts) for parts in above})
    for name in absent:
        tensor = model.get_parameter_or_buffer(name)
        if _is_unknown(tensor):
            raise UnsupportedError("a tensor of this architecture is in no checkpoint, and nothing computes it",
                                   given=f"{name} of {type(model).__name__}")  # fmt: skip
        _set_tensor(model, name, place(name, tensor.detach()))
    hidden = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
    if hidden:
        raise UnsupportedError(
            "this architecture keeps tensors where no loader can fill them",
            given=f"{', '.join(hidden[:3])} of {type(model).__name__}",
        )
    return absent


def _initialise(model: PreTrainedModel, names: Collection[str], paths: Collection[str]) -> None:
    """Let the modules at `paths`, and no others, compute the tensors of these names, and no others."""
    for path, module in model.named_modules():
        module._is_hf_initialized = path not in paths
    for name, tensor in _tensors(model):
        tensor._is_hf_initialized = name not in names  # type: ignore[attr-defined]
    model.initialize_weights()


def _is_unknown(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
