"""The weights of a trained model, adapters merged in, one tensor (or expert) at a time.

A model that was trained on quantized weights can be merged into two bases. The dequantized base is what the adapter was
trained against, so the merged model computes what was trained. The original base is what the quantization
had rounded; it is often the better model, but not the one that was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lowmem_ft.assemble import quant_spec
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.core.plan import Policy
from lowmem_ft.export.trained import TrainedWeights, open_trained
from lowmem_ft.quant.architecture import conversion_plan, template_of
from lowmem_ft.quant.checkpoint import CHUNK_BYTES, Checkpoint, StoredSource
from lowmem_ft.quant.conversion import Plan, Step, arrange, read_sources, rearrange_back, stored_names
from lowmem_ft.quant.loader import check_missing, effective_spec, head_path, meta_model, redundant_names
from lowmem_ft.quant.ops import Layout, QuantSpec, dequantize, quantize
from lowmem_ft.quant.prequantized import open_source, stored_spec
from lowmem_ft.quant.swap import swap_quantized

Base = Literal["original", "dequantized"]
Part = tuple[str, int, Tensor]  # name, first element, values

_EXACT = (torch.float32, torch.bfloat16, torch.float16)


class MergedWeights:
    """The tensors of a merged model. Only headers are read until they are asked for.

    Args:
        config: of the run; of it `model` counts.
        policy: of the run; of it precision and compute dtype count.
        adapter: folder of the trained adapter.
        base: what to merge into. Where nothing was quantized they differ only in the rounding to the compute dtype.
        dtype: of what comes out. What transformers keeps in float32 stays so.
        device: where sums are computed.
        stored: name and lay out tensors as the base checkpoint stores them (an expert apart from the others), which
            every reader of such checkpoints knows; otherwise, and for the text model of a multimodal checkpoint, as the
            model holds them.

    Raises:
        CheckpointError, UnsupportedError: as loading finds them, and adapters that cannot be merged.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        adapter: Path,
        *,
        base: Base = "dequantized",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        stored: bool = True,
    ) -> None:
        self.base, self.dtype, self.device = base, dtype, device or torch.device("cpu")
        self.checkpoint = Checkpoint.open(config.model, trust_remote_code=config.trust_remote_code)
        self.model = meta_model(self.checkpoint, dtype=dtype)
        self.template = template_of(self.checkpoint, self.model.config, dtype=dtype)
        self.source = open_source(self.checkpoint)
        self.prequantized = stored_spec(self.checkpoint) is not None
        plan = conversion_plan(self.checkpoint, self.template)
        redundant = redundant_names(self.model, plan)
        check_missing(self.model, plan, redundant)
        self.steps = [step for step in plan.steps if not set(step.targets) <= redundant]
        self.stored = stored and self.template.model is self.template.text
        self.spec: QuantSpec = effective_spec(self.checkpoint, quant_spec(policy))
        self.compute: torch.dtype = getattr(torch, policy.compute_dtype)
        trained = meta_model(self.checkpoint, dtype=self.compute)
        self._computed = {name: tensor.dtype for name, tensor in trained.state_dict().items()}
        self._dtypes = {name: tensor.dtype for name, tensor in self.template.text.state_dict().items()}
        head = head_path(trained)
        swap_quantized(trained, spec=self.spec, skip=[] if head is None else [head])
        self.trained: TrainedWeights = open_trained(trained, adapter, device=self.device)
        self._added: set[str] = set()  # tensors of their own that the checkpoint does not have, as they were tied
        self.is_untied = bool(self.trained.untied)
        if self.is_untied:
            self._untie(plan)

    @property
    def bases_differ(self) -> bool:
        """Whether quantization lies between the two bases. A checkpoint that is quantized itself has only one."""
        return self.spec.bits != 16 and not self.prequantized

    def _untie(self, plan: Plan) -> None:
        """Let the merged model have embeddings and head of its own, both made from the base's one matrix."""
        config = copy.deepcopy(self.checkpoint.config)
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
        checkpoint = replace(self.checkpoint, config=config)
        tied = self.model.all_tied_weights_keys
        model = meta_model(checkpoint, dtype=self.dtype)
        if model.all_tied_weights_keys:
            raise UnsupportedError(
                "the adapter changes one of two tied modules, and this architecture cannot be untied",
                given=f"{self.trained.untied[0]} of {type(model).__name__}",
                fix="serve it as an adapter; a run with method: lora and train_modules keeps them tied",
            )
        self.model, self.template = model, template_of(checkpoint, model.config, dtype=self.dtype)
        self.steps = list(plan.steps)
        stored = {step.only_target: step for step in plan.steps}
        for name, other in [*tied.items(), *((source, target) for target, source in tied.items())]:
            if name not in stored:
                self.steps.append(replace(stored[other], targets={name: stored[other].targets[other]}))
                self._added.add(name)

    def _name(self, step: Step, source: str) -> str:
        """Under which name what is read as `source` is written, where that is as the checkpoint stores it."""
        return step.only_target if step.only_target in self._added else source

    def tensors(self) -> Layout:
        """Name -> (shape, dtype) of all that `parts` gives, in its order."""
        found: Layout = {}
        for step in self.steps:
            if self.stored:
                names = [name for group in step.sources.values() for name in group]
                found |= {self._name(step, name): (self._shape(step, name), self._dtype(step, name)) for name in names}
            else:
                found |= {name: (self._final_shape(name, shape), self._dtypes[name]) for name, shape in
                          step.targets.items()}  # fmt: skip
        return found

    def parts(self, whole: Collection[str] = ()) -> Iterator[Part]:
        """All tensors, piece by piece, but whole those of the model's tensors that are named.

        What a piece holds may be wider than its dtype, and is valid until the next one.
        """
        for step in self.steps:
            if step.is_plain and not self._changes(step) and step.only_target not in whole:
                yield from self._copied(step)
                continue
            for index in self.indices(step):
                if self.stored:
                    yield from self._in_sources(step, index)
                else:
                    for name, tensor in self.merged(step, index).items():
                        yield name, (index or 0) * tensor.numel(), tensor
            self.trained.forget()
            release_freed_memory()

    def merged(self, step: Step, index: int | None) -> dict[str, Tensor]:
        """The model's own tensors of one step, or the slice `index` of them."""
        pieces = self._read(step, index)
        tensors = arrange(step, pieces, self.template.model, index=index)
        return {name: self._merge(step, name, tensor, index) for name, tensor in tensors.items()}

    def _in_sources(self, step: Step, index: int | None) -> Iterator[Part]:
        pieces = self._read(step, index)
        sources = [tensor for group in pieces.values() for tensor in group]
        tensors = arrange(step, pieces, self.template.model, index=index)
        if step.is_plain:
            ((name, tensor),) = tensors.items()
            sources = [self._merge(step, name, tensor, index)]
        else:
            for name, tensor in tensors.items():
                self._merge(step, name, tensor, index)
            rearrange_back(step, tensors, sources, self.template.model, index=index)
        del pieces, tensors
        for name, at in stored_names(step, index):
            tensor = sources.pop(0)
            yield self._name(step, name), (at or 0) * tensor.numel(), tensor
            del tensor  # before the next one exists

    def _copied(self, step: Step) -> Iterator[Part]:
        """A tensor that stays as it is, or that was trained whole, without ever being whole in memory."""
        key = self.trained.key(step.only_target)
        source, name = (self.source, step.only_source) if key is None else (self.trained.source, key)
        dtype = self._read_dtype(step) if key is None else self._dtype(step, step.only_source)
        given = self._name(step, step.only_source) if self.stored else step.only_target
        if not isinstance(source, Checkpoint):
            for _, start, part in self._in_sources(step, None):
                yield given, start, part
            return
        count, size = source.tensors[name].numel, CHUNK_BYTES // dtype.itemsize
        for start in range(0, count, size):
            part = torch.empty(min(size, count - start), dtype=dtype)
            source.read_elements(name, part, start=start)
            if part.is_floating_point():
                self._check_range(part, step.only_target)
            yield given, start, part
            del part  # before the next one exists

    def _changes(self, step: Step) -> bool:
        """Whether a step does more than to copy what one file holds."""
        return any(
            self.trained.is_adapted(name) or self._rounds(step, name) or self._flips(step, name)
            for name in step.targets
        )

    def _rounds(self, step: Step, name: str) -> bool:
        """Whether quantization has to be done again to get what the adapter was trained against."""
        stored = isinstance(self.source, StoredSource) and self.source.stored(step.only_source) is not None
        return self.base == "dequantized" and self.trained.is_quantized(name) and not (step.is_plain and stored)

    def _read(self, step: Step, index: int | None) -> dict[str, list[Tensor]]:
        """What the base has, in the dtype of the result if that keeps all of it, else in fp32."""
        read, out = self._read_dtype(step), self._dtype(step, step.only_source)
        wide = out if out == read else torch.float32
        pieces = read_sources(step, self.source, dtype=wide, device=self.device, index=index)
        if self.base == "dequantized" and wide != read and wide.is_floating_point:
            for tensor in (tensor for group in pieces.values() for tensor in group):
                for part in torch.split(tensor.view(-1), CHUNK_BYTES // tensor.element_size()):
                    part.copy_(part.to(read))
        return pieces

    def _read_dtype(self, step: Step) -> torch.dtype:
        """The dtype that the base's values have: that of the file, or that in which the model was trained."""
        first = next(iter(step.targets))
        kept: torch.dtype = self._computed[first]
        if self.base == "dequantized" or not kept.is_floating_point:
            return kept
        stored: torch.dtype = self.source.tensors[step.only_source].dtype
        return stored if stored in _EXACT else torch.bfloat16

    def _merge(self, step: Step, name: str, tensor: Tensor, index: int | None) -> Tensor:
        """`tensor` changed in place; a new one only where the file holds it the other way round."""
        flipped = self._flips(step, name)
        matrix = tensor.t().contiguous() if flipped else tensor
        conv = self._is_conv(name)
        for e, part in self._matrices(matrix, index, name):
            if self._rounds(step, name):
                spec = self.trained.spec(name)
                storage = quantize(part.t() if conv else part, spec)
                shape = part.shape[::-1] if conv else part.shape
                rounded = dequantize(storage, kind=spec.kind, shape=shape, dtype=self._read_dtype(step))
                del storage
                part.copy_(rounded.t() if conv else rounded)
                del rounded
            if self.trained.is_adapted(name):
                self.trained.update(name, e).apply(part, transposed=conv or self.trained.is_transposed(name))
        key = self.trained.key(name)
        if key is not None:
            assert index is None, "whole modules hold no stacked experts"
            matrix.copy_(self.trained.source.read(key, dtype=matrix.dtype).view(matrix.shape))
        if matrix.is_floating_point():
            self._check_range(matrix, name)
        return matrix

    def _matrices(self, tensor: Tensor, index: int | None, name: str) -> Iterator[tuple[int | None, Tensor]]:
        if not (self.trained.is_quantized(name) or self.trained.is_adapted(name)):
            return
        if tensor.ndim == 3:
            yield from enumerate(tensor)
        else:
            yield index, tensor

    def _check_range(self, tensor: Tensor, name: str) -> None:
        low, high = torch.aminmax(tensor)
        most = float(max(-low, high))
        if not most <= torch.finfo(self._dtypes[name]).max:
            raise UnsupportedError(
                f"a merged weight is beyond the range of {str(self.dtype).removeprefix('torch.')}",
                given=f"{name}, up to {most:g}",
                fix="merge into bfloat16",
            )

    def indices(self, step: Step) -> list[int | None]:
        """The slices that a step is done in; [None]: it is done at once."""
        stacked = any(self.trained.is_quantized(name) or self.trained.is_adapted(name) for name in step.targets)
        if step.slices is None or (step.is_plain and not stacked):
            return [None]
        return list(range(step.slices))

    def _dtype(self, step: Step, name: str) -> torch.dtype:
        own = self.source.tensors[name].dtype
        kept = self._dtypes[next(iter(step.targets))]
        return kept if kept.is_floating_point else own

    def _shape(self, step: Step, name: str) -> tuple[int, ...]:
        return self._final_shape(step.only_target, step.targets[step.only_target]) if self._flips(
            step, step.only_target
        ) else self.source.tensors[name].shape  # fmt: skip

    def _final_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.template.text.get_parameter_or_buffer(name).shape) if self._is_conv(name) else shape

    def _is_conv(self, name: str) -> bool:
        """Whether the model stores the matrix as (inputs, outputs)."""
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and isinstance(self.template.text.get_submodule(path), Conv1D)

    def _flips(self, step: Step, name: str) -> bool:
        """Whether the file holds such a matrix the other way round, as bitsandbytes quantizes it."""
        source: Any = self.source
        stored = step.is_plain and isinstance(source, StoredSource) and source.stored(step.only_source) is not None
        return stored and self._is_conv(name)
