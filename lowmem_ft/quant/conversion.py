"""From a checkpoint's names and layout to the model's, by transformers' own conversion mapping.

transformers renames, merges, splits and transposes what older or other layouts store (for example one tensor per
expert becomes one stack of all experts). Its loader does so for whole tensors; here the same rules first run on
tensors without data, which gives a plan with every name and shape checked, and then piece by piece, so that a stack of
experts never exists whole at full precision.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant.checkpoint import Checkpoint, StoredSource, TensorSource

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One unit of loading: tensors that are read together, and what they become.

    Attributes:
        sources: pattern of the converter -> the checkpoint's names, in the order in which the converter wants them.
        targets: the text model's name -> shape (as transformers has it, before any swap).
        converter: transformers' rule, or None where a tensor is taken as it is.
        first: the template's name of the first target, by which the rule finds the others.
        slices: the step runs once for each slice along dimension 0 of its targets; None: it runs once.
        rename: the template's name -> the text model's name.
    """

    sources: Mapping[str, tuple[str, ...]]
    targets: Shapes
    converter: WeightConverter | None
    first: str
    slices: int | None
    rename: Callable[[str], str | None]

    @property
    def is_plain(self) -> bool:
        return self.converter is None

    @property
    def only_source(self) -> str:
        return next(iter(self.sources.values()))[0]

    @property
    def only_target(self) -> str:
        return next(iter(self.targets))


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in the order of reading; `missing` names of the model, `unexpected` and `skipped` names of the file."""

    steps: tuple[Step, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped: tuple[str, ...]  # what belongs to the checkpoint's model, but not to the text model that is served


def plan_conversion(
    template: PreTrainedModel, source: TensorSource, *, rename: Callable[[str], str | None], wanted: Shapes
) -> Plan:
    """Work out how the tensors of `source` become the `wanted` ones, without reading any.

    Args:
        template: the whole model that the checkpoint describes, on meta.
        rename: template's name -> wanted name, or None for what is not wanted.
        wanted: name -> shape of all that the model needs.

    Raises:
        CheckpointError: a tensor whose shape or type is not the model's, or that the conversion cannot take.
    """
    groups, unexpected = _group(template, source)
    state = template.state_dict()
    steps, skipped = [], list[str]()
    for first, (converter, sources) in groups.items():
        step = _plan_step(template, source, first, converter, sources, rename, wanted)
        if step is None:
            skipped += [name for names in sources.values() for name in names]
        else:
            steps.append(step)
            _check_shapes(step, wanted, either_way=isinstance(source, StoredSource))
            if isinstance(source, Checkpoint) and state[first].is_floating_point():
                _check_types(step, source)
    covered = {name for step in steps for name in step.targets}
    missing = [name for name in wanted if name not in covered]
    return Plan(tuple(steps), tuple(missing), tuple(unexpected), tuple(skipped))


def convert(
    step: Step,
    source: TensorSource,
    template: PreTrainedModel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    index: int | None = None,
    scratch: Tensor | None = None,
) -> dict[str, Tensor]:
    """Read and convert one step, or its slice `index`: the text model's name -> tensor, slices without dimension 0.

    At no time does more exist than what is returned, but for rules that reorder elements within a tensor.

    Args:
        scratch: uint8 memory to read into, at least `input_numel` x the size of `dtype`; what is returned may then be
            views of it, valid until it is used again. None: new memory.
    """
    pieces = read_sources(step, source, dtype=dtype, device=device, index=index, scratch=scratch)
    return arrange(step, pieces, template, index=index)


def read_sources(
    step: Step,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    index: int | None = None,
    scratch: Tensor | None = None,
) -> dict[str, list[Tensor]]:
    """The first part of `convert`: pattern -> tensors as they are stored, which lie one behind the other."""
    shapes = _source_shapes(step.sources, source, step.slices if index is not None else None)
    size = input_numel(step, source, sliced=index is not None)
    if scratch is None:
        buffer = torch.empty(size, dtype=dtype, device=device)
    else:
        buffer = scratch[: size * dtype.itemsize].view(dtype)
    pieces: dict[str, list[Tensor]] = {}
    begin = 0
    for pattern, names in step.sources.items():
        for name, shape in zip(_slice_names(names, index), shapes[pattern], strict=True):
            piece = buffer[begin : begin + math.prod(shape)].view(shape)
            source.read_into(name, piece, _slice_index(names, index))
            pieces.setdefault(pattern, []).append(piece)
            begin += piece.numel()
    return pieces


def arrange(
    step: Step, pieces: dict[str, list[Tensor]], template: PreTrainedModel, *, index: int | None = None
) -> dict[str, Tensor]:
    """The second part of `convert`; takes what is in `pieces` out of it."""
    if step.converter is None:
        tensor = pieces.popitem()[1][0]
        return {step.only_target: tensor[0] if index is not None else tensor}
    result = _run(step.converter, step.first, pieces, template, slice_only=index is not None)
    named = ((step.rename(name), tensor[0] if index is not None else tensor) for name, tensor in result.items())
    return {name: tensor for name, tensor in named if name is not None and name in step.targets}


def rearrange_back(
    step: Step,
    tensors: Mapping[str, Tensor],
    sources: list[Tensor],
    template: PreTrainedModel,
    *,
    index: int | None = None,
) -> None:
    """Write `tensors`, changed results of `arrange`, back into the `sources` that `read_sources` made.

    Rules only move elements, so where each one goes is seen by letting them move the elements' numbers. Where results
    are views of the sources, as nearly all are, nothing is left to do.

    Raises:
        UnsupportedError: a rule that does more.
    """
    storage = sources[0].untyped_storage().data_ptr()
    if all(tensor.untyped_storage().data_ptr() == storage for tensor in tensors.values()):
        return
    count = sum(piece.numel() for piece in sources)
    if count != sum(tensor.numel() for tensor in tensors.values()) or count >= 2**31:
        raise UnsupportedError(
            "this architecture's tensors cannot be written as its checkpoints store them",
            given=f"{step.first}, of {sum(map(len, step.sources.values()))} stored tensors",
        )
    numbers = torch.arange(count, dtype=torch.int32, device=sources[0].device)
    numbered: dict[str, list[Tensor]] = {}
    begin = 0
    queue = list(sources)
    for pattern, names in step.sources.items():
        for _ in _slice_names(names, index):
            piece = queue.pop(0)
            numbered.setdefault(pattern, []).append(numbers[begin : begin + piece.numel()].view(piece.shape))
            begin += piece.numel()
    flat = sources[0].as_strided((count,), (1,))
    for name, places in arrange(step, numbered, template, index=index).items():
        flat.index_copy_(0, places.reshape(-1), tensors[name].reshape(-1))


def stored_names(step: Step, index: int | None) -> list[tuple[str, int | None]]:
    """(name, slice of it or None) of each tensor of `read_sources`, in their order."""
    return [
        (name, _slice_index(names, index)) for names in step.sources.values() for name in _slice_names(names, index)
    ]


def input_numel(step: Step, source: TensorSource, *, sliced: bool) -> int:
    """Elements of all sources of a step, or of those of one slice."""
    shapes = _source_shapes(step.sources, source, step.slices if sliced else None)
    return sum(math.prod(shape) for group in shapes.values() for shape in group)


def _group(
    template: PreTrainedModel, source: TensorSource
) -> tuple[dict[str, tuple[WeightConverter | None, dict[str, tuple[str, ...]]]], list[str]]:
    """Template name of the first target -> (rule, sources by pattern), in the same way as transformers groups them."""
    mapping = get_model_conversion_mapping(template)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, state = template.base_model_prefix, template.state_dict()
    groups: dict[str, tuple[WeightConverter | None, dict[str, tuple[str, ...]]]] = {}
    unexpected = []
    for name in sorted(source.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            unexpected.append(name)
        elif pattern is None:
            groups[target] = (None, {name: (name,)})
        else:
            _, sources = groups.setdefault(target, (by_pattern[pattern], {}))
            sources[pattern] = (*sources.get(pattern, ()), name)
    return groups, unexpected


def _plan_step(
    template: PreTrainedModel,
    source: TensorSource,
    first: str,
    converter: WeightConverter | None,
    sources: dict[str, tuple[str, ...]],
    rename: Callable[[str], str | None],
    wanted: Shapes,
) -> Step | None:
    if converter is None:
        targets: dict[str, tuple[int, ...]] = {first: source.tensors[next(iter(sources))].shape}
        slices = targets[first][0] if len(targets[first]) == 3 else None
    else:
        # the rules take their sources in the order of their patterns, which is then also the order in memory
        sources = {pattern: sources[pattern] for pattern in converter.source_patterns if pattern in sources}
        converter = copy.deepcopy(converter)
        targets = _dry_run(converter, first, sources, source, template)
        slices = _slices(converter, first, sources, source, template, targets)
    kept = {new: shape for name, shape in targets.items() if (new := rename(name)) is not None and new in wanted}
    if not kept:
        return None
    return Step(sources=sources, targets=kept, converter=converter, first=first, slices=slices, rename=rename)


def _check_shapes(step: Step, wanted: Shapes, *, either_way: bool) -> None:
    for name, shape in step.targets.items():
        # bitsandbytes turns Conv1D's (I, O) round when it quantizes
        allowed = {wanted[name], wanted[name][::-1]} if either_way else {wanted[name]}
        if shape not in allowed:
            names = [name for group in step.sources.values() for name in group]
            raise CheckpointError(
                "a tensor's shape is not the one that the configuration asks for",
                given=f"{name}: {list(shape)}, from {names[0]}" + (f" and {len(names) - 1} more" * (len(names) > 1)),
                allowed=list(wanted[name]),
                fix="config.json and weights belong to different models, or one was changed: get both again",
            )


def _check_types(step: Step, source: Checkpoint) -> None:
    """Integers in the place of weights are codes: without what says how to read them they would be taken as values."""
    for name in (name for group in step.sources.values() for name in group):
        dtype = source.tensors[name].dtype
        if not dtype.is_floating_point:
            raise CheckpointError(
                "a weight is stored as integers, and config.json does not say how they are quantized",
                given=f"{name}: {str(dtype).removeprefix('torch.')} in {source.tensors[name].file}",
                fix="get config.json with its quantization_config again, or the original checkpoint",
            )


def _slices(
    converter: WeightConverter,
    first: str,
    sources: dict[str, tuple[str, ...]],
    source: TensorSource,
    template: PreTrainedModel,
    targets: Shapes,
) -> int | None:
    """Number of slices if the rule gives the same when it is fed slice by slice, else None.

    That is so if every target is a stack, the sources are one tensor per slice (or stacks themselves), and a dry run
    on the sources of one slice gives exactly one slice of every target.
    """
    counts = {shape[0] if len(shape) >= 3 else 0 for shape in targets.values()}
    lengths = {len(names) for names in sources.values()}
    if len(counts) != 1 or len(lengths) != 1:
        return None
    (count,), (length,) = counts, lengths
    if length == 1:
        shapes = [source.tensors[names[0]].shape for names in sources.values()]
        stacked = all(len(shape) >= 3 and shape[0] == count for shape in shapes)
    else:
        merge = converter.operations[0]
        stacked = length == count and isinstance(merge, MergeModulelist) and merge.dim == 0
    if not stacked:
        return None
    try:
        one = _dry_run(converter, first, sources, source, template, slices=count)
    except CheckpointError:
        return None
    return count if one == {name: (1, *shape[1:]) for name, shape in targets.items()} else None


def _dry_run(
    converter: WeightConverter,
    first: str,
    sources: Mapping[str, tuple[str, ...]],
    source: TensorSource,
    template: PreTrainedModel,
    slices: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Shapes of a rule's results by the template's names, found by running it on meta tensors."""
    shapes = _source_shapes(sources, source, slices)
    pieces = {p: [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in group] for p, group in shapes.items()}
    try:
        result = _run(converter, first, pieces, template, slice_only=slices is not None)
    except Exception as error:  # the rules are transformers' and raise whatever torch raises for shapes that do not fit
        names = [name for group in sources.values() for name in group]
        raise CheckpointError(
            "tensors of the checkpoint do not fit together as this architecture stores them",
            given=f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} for {first}: {error}",
            fix="the checkpoint is incomplete, or config.json belongs to another one",
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in result.items()}


def _run(
    converter: WeightConverter,
    first: str,
    pieces: dict[str, list[Tensor]],
    template: PreTrainedModel,
    *,
    slice_only: bool,
) -> dict[str, Tensor]:
    for pattern in list(pieces):
        for piece in pieces.pop(pattern):
            converter.add_tensor(first, pattern, pattern, piece)
    with _Neighbours():
        result: dict[str, Any] = converter.convert(
            first, model=_ShapesOnly(template, slice_only=slice_only), config=template.config
        )
    return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


class _ShapesOnly:
    """What rules ask of a model: shape and type of each parameter; of a slice of it while running slice by slice."""

    def __init__(self, template: PreTrainedModel, *, slice_only: bool) -> None:
        self._template, self._slice_only = template, slice_only

    def get_parameter(self, name: str) -> SimpleNamespace:
        parameter = self._template.get_parameter(name)
        shape = torch.Size((1, *parameter.shape[1:])) if self._slice_only else parameter.shape
        return SimpleNamespace(shape=shape, dtype=parameter.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._template, name)


class _Neighbours(TorchFunctionMode):
    """Within it, stacking or concatenating tensors that already lie one behind the other in memory copies nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.cat, torch.stack) and args and set(kwargs) <= {"dim"}:
            tensors = list(args[0])
            dim = int(kwargs.get("dim", args[1] if len(args) > 1 else 0))
            if func is torch.stack:
                dim %= tensors[0].dim() + 1
                tensors = [tensor.unsqueeze(dim) for tensor in tensors]
            joined = _join(tensors, dim % tensors[0].dim())
            if joined is not None:
                return joined
        return func(*args, **kwargs)


def _join(tensors: list[Tensor], dim: int) -> Tensor | None:
    """The concatenation along `dim` as a view, or None where the tensors are no neighbours or `dim` interleaves."""
    first = tensors[0]
    rest = first.shape[dim + 1 :]
    end = first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and not tensor.is_meta
        fits = all(size == 1 for size in tensor.shape[:dim]) and tensor.shape[dim + 1 :] == rest
        if not (same and fits and tensor.is_contiguous() and tensor.storage_offset() == end):
            return None
        end += tensor.numel()
    length = sum(tensor.shape[dim] for tensor in tensors)
    flat = first.as_strided((end - first.storage_offset(),), (1,))
    return flat.view(*first.shape[:dim], length, *rest)


def _source_shapes(
    sources: Mapping[str, tuple[str, ...]], source: TensorSource, slices: int | None
) -> dict[str, list[tuple[int, ...]]]:
    """Shape of every source; with `slices`, of those that one slice needs: one tensor of each list, or (1, ...)."""
    shapes = {pattern: [source.tensors[name].shape for name in names] for pattern, names in sources.items()}
    if slices is None:
        return shapes
    return {p: [(1, *group[0][1:])] if len(group) == 1 else group[:1] for p, group in shapes.items()}


def _slice_names(names: tuple[str, ...], index: int | None) -> Iterable[str]:
    return names if index is None or len(names) == 1 else names[index : index + 1]


def _slice_index(names: tuple[str, ...], index: int | None) -> int | None:
    return index if len(names) == 1 else None


def matcher(patterns: Iterable[str] | None) -> re.Pattern[str] | None:
    """One expression for a set of them, None for none."""
    joined = "|".join(f"(?:{pattern})" for pattern in sorted(patterns or ()))
    return re.compile(joined) if joined else None
