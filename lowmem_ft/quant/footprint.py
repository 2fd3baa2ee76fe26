"""What loading a checkpoint will take, from its headers; without weight files, from its config alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch

from lowmem_ft.quant.architecture import Template, conversion_plan, meta_model, template_of
from lowmem_ft.quant.cache import entry_bytes
from lowmem_ft.quant.checkpoint import CHUNK_BYTES, Checkpoint, TensorInfo
from lowmem_ft.quant.loader import (
    ModelHolder,
    StepLoader,
    effective_spec,
    head_path,
    loading_steps,
    redundant_names,
)
from lowmem_ft.quant.ops import Layout, QuantSpec, layout_bytes
from lowmem_ft.quant.prequantized import stored_spec
from lowmem_ft.quant.swap import swap_quantized

LISTED_BYTES = 128  # of a tensor in a header and an index beside its two names
# Tensors of its size that exist while a model makes a buffer that no file holds (measured with GPT-Neo's masks)
_MAKING = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadFootprint:
    """Sizes in bytes.

    Attributes:
        held: of all tensors of the loaded model.
        scratch: that all steps of reading share.
        steps: of each the tensors that it makes, what the model holds more afterwards, and what it takes meanwhile.
        computed: the most while buffers are made that no file holds, beside the model.
        copied: the most that lies on the host on its way to another device.
        cache: of the entry in the cache of quantized weights.
        merged: of a checkpoint with the same tensors in 16 bits.
    """

    held: int
    scratch: int
    steps: tuple[tuple[frozenset[str], int, int], ...]
    computed: int
    copied: int
    cache: int
    merged: int

    def peak(self, below: Collection[str] = (), *, tables: Collection[str] = (), on_host: bool = False) -> int:
        """The most in tensors while they are read and quantized, those that stay on the device included.

        Args:
            below: names of tensors that leave the device as soon as they are made.
            tables: of others that do, which are read first.
            on_host: whether those are read on the host, which is not the device.
        """
        read = most = left = 0
        gone, first = frozenset(below), frozenset(tables)
        for names, kept, work in self.steps:
            if names <= first:
                left += kept
                most = max(most, 0 if on_host else kept + work)
        for names, kept, work in self.steps:
            if names <= first:
                continue
            most = max(most, read + kept + work)
            if names <= gone:
                left += kept
            else:
                read += kept
        return max(self.scratch + most, self.held - left + self.computed)


def load_footprint(checkpoint: Checkpoint, *, spec: QuantSpec, dtype: torch.dtype) -> LoadFootprint:
    """What `load_weights` with `spec` and `dtype` takes for `checkpoint`.

    A load that reads the cache takes less of the device, but on the way to it whole tensors.

    Raises:
        CheckpointError, UnsupportedError: as `load_weights` finds them in headers.
    """
    model = meta_model(checkpoint, dtype=dtype)
    template = template_of(checkpoint, model.config, dtype=dtype)
    if not checkpoint.tensors:
        checkpoint = _presumed(checkpoint, template)
    plan = conversion_plan(checkpoint, template)
    redundant = redundant_names(model, plan)
    head = head_path(model)
    swapped = swap_quantized(model, spec=effective_spec(checkpoint, spec), skip=[] if head is None else [head])
    steps = loading_steps(plan, template, checkpoint, ModelHolder(model, lambda name, tensor: tensor), redundant)
    scratch = max((step.scratch_bytes for step in steps), default=0)
    sizes = tuple((frozenset(step.step.targets), *step.footprint(redundant)) for step in steps)
    held = sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    state = model.state_dict()
    computed = max((tensor.nbytes for name, tensor in model.named_buffers() if name not in state), default=0)
    cached = bool(swapped) and stored_spec(checkpoint) is None
    return LoadFootprint(
        held=held,
        scratch=scratch,
        steps=sizes,
        computed=_MAKING * computed,
        copied=max([CHUNK_BYTES, *(tensor.nbytes for tensor in state.values() if cached)]),
        cache=entry_bytes(model, absent={*plan.missing, *redundant}) if cached else 0,
        merged=_merged_bytes(steps, dtype),
    )


def _presumed(checkpoint: Checkpoint, template: Template) -> Checkpoint:
    """`checkpoint` with the tensors that it must have, as the model of its config has them."""
    tied = template.model.all_tied_weights_keys
    stored: torch.dtype = getattr(checkpoint.config, "dtype", None) or torch.float32
    tensors = {
        name: TensorInfo(checkpoint.folder, 0, tuple(tensor.shape), stored)
        for name, tensor in template.model.state_dict().items()
        if name not in tied
    }
    return replace(checkpoint, tensors=tensors)


def _merged_bytes(steps: Iterable[StepLoader], dtype: torch.dtype) -> int:
    """Of the steps' sources in 16 bits, but in fp32 those that transformers keeps so; with an index."""
    tensors: Layout = {}
    listed = 0
    for step in steps:
        kept = torch.float32 if step.dtype != dtype else torch.bfloat16
        names = [name for group in step.step.sources.values() for name in group]
        tensors |= {name: (step.source.tensors[name].shape, kept) for name in names}
        times = step.step.slices or 1 if len(names) == 1 else 1  # each expert of a stack is written for itself
        listed += times * sum(2 * len(name) + LISTED_BYTES for name in names)
    return layout_bytes(tensors) + listed
