"""A trained model as a folder that transformers loads without this package or peft: `lowmem-ft merge`."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lowmem_ft.assemble import load_tokenizer
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.export.models import TrainedRun
from lowmem_ft.export.parity import (
    EIGHT_BITS,
    SIXTEEN_BITS,
    THIRTY_TWO_BITS,
    Bound,
    HeldOut,
    Parity,
    compare,
    few,
    four_bits,
    held_out,
    sixteen_bits,
    tidy,
)
from lowmem_ft.export.weights import Base, MergedWeights
from lowmem_ft.export.write import copy_small_files, new_folder, refuse_filled, small_files
from lowmem_ft.generate import answer_ends, known_ends
from lowmem_ft.quant.bnb_format import pack, packed_layout
from lowmem_ft.quant.cache import skipped_by_transformers
from lowmem_ft.quant.checkpoint import INDEX, write_json
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.loader import head_path, meta_model
from lowmem_ft.quant.ops import Layout, QuantSpec, layout_bytes, quantize
from lowmem_ft.quant.shards import ShardFiles
from lowmem_ft.quant.swap import swap_quantized
from lowmem_ft.report.progress import Reporter

Progress = Callable[[int, int], None]
FROM_ORIGINAL = (
    "quantize from the original base (--base original): values that lie on a grid of 4 bits go back to where they were "
    "before training when they are quantized again"
)
ON_A_GRID = (
    "the base's values lie on a grid of 4 bits: quantized to 4 bits again most of them go back to where they were "
    "before training; int8, or 16 bits, keep what it added"
)
UNTIED = (
    "Embeddings and output head, one matrix in the base, are two in what was written (tie_word_embeddings: false), as "
    "training has changed them apart."
)
OTHER = "other-base"  # a folder for what is written only to be compared
CONFIG_BYTES = 8 << 10  # config.json and generation_config.json
LISTED_BYTES = 160  # of a tensor in a header and in the index, beside its two names


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What a merge did.

    Attributes:
        check: parity with what the merge had to reproduce: the trained model; for the original base the adapter, not
            merged, on that base.
        trained: parity with the trained model.
        other: the same of a merge into the other base (of the original one, not merged); None where nothing lies
            between the bases, or if this one was quantized again from the original.
        untied: embeddings and head were one matrix in the base, and are two now.
        text: what was compared on.
    """

    folder: Path
    base: Base
    dtype: str
    quantized: str | None
    check: Parity
    bound: Bound
    trained: Parity
    other: Parity | None
    text: str
    untied: bool = False

    def lines(self) -> list[str]:
        """For a person."""
        into = f"{self.quantized} of the {self.base} base" if self.quantized else f"{self.dtype}, {self.base} base"
        found = [f"Merged ({into}): {self.folder}", f"Checked on {self.check.tokens} tokens of {self.text}."]
        if self.trained is not self.check:
            found.append(f"Against the adapter on the original base: {self.check}")
        found.append(f"Against the trained model: {self.trained}")
        if self.other is not None:
            name = "original" if self.base == "dequantized" else "dequantized"
            found.append(f"Merged into the {name} base it would be: {self.other}")
        return [*found, UNTIED] if self.untied else found

    def to_dict(self) -> dict[str, Any]:
        """For a program."""
        return {**asdict(self), "folder": str(self.folder)}


def merge(
    run: TrainedRun,
    out: Path,
    *,
    base: Base = "dequantized",
    dtype: torch.dtype = torch.bfloat16,
    quantize_to: QuantSpec | None = None,
    text: Path | None = None,
    reporter: Reporter,
) -> Merge:
    """Merge a run's adapter, check the result, and put it into the folder `out`, which appears complete or not at all.

    Args:
        dtype: of the weights; with `quantize_to` of those that stay unquantized the run's own is taken.
        text: what to check on, see `parity.held_out`.

    Raises:
        ParityError: the merged model computes something else.
        LowMemError: as reading, merging and writing find it.
    """
    refuse_filled(out)
    weights = MergedWeights(
        run.config, run.policy, run.adapter, base=base, device=run.device,
        dtype=torch.float32 if quantize_to else dtype, stored=quantize_to is None,
    )  # fmt: skip
    # what cannot be written is told before anything is computed
    form = None if quantize_to is None else quantized_form(weights, quantize_to)
    tensors = weights.tensors() if form is None else form.tensors
    from_a_grid = weights.spec.bits == 4 and (weights.prequantized or base == "dequantized")
    if from_a_grid and quantize_to is not None and quantize_to.bits == 4:
        warnings.warn(ON_A_GRID, stacklevel=2)
    read = held_out(run.config, weights.checkpoint, text)
    with new_folder(out, nbytes=folder_bytes(weights, tensors)) as folder:
        reporter.say("Computing the trained model's logits ...")
        trained = run.logits(read)
        reference, other, between = trained, None, None
        if weights.bases_differ:
            reporter.say("Computing those of the other base ...")
            values = sum(math.prod(shape) for shape, _ in weights.tensors().values())
            original = run.unquantized_logits(read, nbytes=values * run.compute_dtype.itemsize)
            between = compare(trained, original)
            if base == "original":
                reference = original
            if base == "original" and quantize_to is None:
                other = _compared_with_dequantized(run, folder / OTHER, dtype, read, trained, reporter)
            elif base == "dequantized":
                other = between
            del original
        with reporter.task("Merging", unit="B") as update:
            if form is None:
                write_merged(weights, folder, progress=update)
            else:
                write_quantized(weights, form, folder, progress=update)
        tidy()
        reporter.say("Checking the merged model ...")
        result = run.folder_logits(folder, read)
        check = compare(reference, result)
        bound = _bound(run, dtype, quantize_to, between)
        if bound == SIXTEEN_BITS and not check.is_within(bound):
            reporter.say("Measuring what rounding alone does to the merged model ...")
            bound = sixteen_bits(_rounding(run, folder, read, result))
        again = quantize_to is not None and weights.bases_differ and base == "dequantized"
        check.check(bound, what="The merged model", fix=FROM_ORIGINAL if again else None)
        against = check if reference is trained else compare(trained, result)
    return Merge(
        folder=out,
        base=base,
        dtype=str(dtype).removeprefix("torch."),
        quantized=quantize_to.kind if quantize_to else None,
        check=check,
        bound=bound,
        trained=against,
        other=other,
        text=read.origin,
        untied=weights.is_untied,
    )


def _bound(run: TrainedRun, dtype: torch.dtype, quantize_to: QuantSpec | None, between: Parity | None) -> Bound:
    if quantize_to is not None and quantize_to.bits != 16:
        return four_bits(between if run.policy.bits == 4 else None) if quantize_to.bits == 4 else EIGHT_BITS
    exact = dtype == run.compute_dtype == torch.float32
    return THIRTY_TWO_BITS if exact else SIXTEEN_BITS


def _rounding(run: TrainedRun, folder: Path, text: HeldOut, result: list[Tensor]) -> Parity:
    """How far the folder's logits are from those in fp32, on half of the tokens, as the latter are twice as large."""
    half = HeldOut(sequences=few(text.sequences, sum(map(len, text.sequences)) // 2), origin=text.origin)
    exact = run.exact_logits(folder, half)
    return compare(exact, [some[: len(whole)] for some, whole in zip(result, exact, strict=False)])


def _compared_with_dequantized(
    run: TrainedRun, folder: Path, dtype: torch.dtype, text: HeldOut, trained: list[Tensor], reporter: Reporter
) -> Parity:
    """Of a merge into the dequantized base, which is written for that and removed again."""
    folder.mkdir()
    with reporter.task("Merging into the dequantized base, to compare", unit="B") as update:
        weights = MergedWeights(run.config, run.policy, run.adapter, dtype=dtype, device=run.device)
        write_merged(weights, folder, progress=update)
    found = compare(trained, run.folder_logits(folder, text))
    shutil.rmtree(folder)
    return found


@torch.no_grad()
def write_merged(weights: MergedWeights, folder: Path, *, progress: Progress | None = None) -> None:
    """Write the merged model in the dtype of `weights` into `folder`, with tokenizer and configuration.

    At any time there exist one matrix (of stacked experts one slice) and a few MiB.

    Raises:
        CheckpointError, UnsupportedError, OSError: as reading and writing find them.
    """
    tensors = weights.tensors()
    total, done = layout_bytes(tensors), 0
    files = ShardFiles(folder, tensors, index_name=INDEX)
    for name, start, part in weights.parts():
        files.write(name, part, start=start)
        done += part.numel() * tensors[name][1].itemsize
        del part  # before the next one exists
        if progress is not None:
            progress(done, total)
    assert done == total, "every value is written once"
    write_configs(weights, folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedForm:
    """How a merged model lies in a folder in bitsandbytes' format.

    Attributes:
        dtype: of what stays unquantized.
        layers: of the tensors that are quantized, by their names.
        skip: what transformers must leave alone.
        tensors: of the folder.
    """

    spec: QuantSpec
    dtype: torch.dtype
    layers: dict[str, QuantLinear]
    skip: tuple[str, ...]
    tensors: Layout


def quantized_form(weights: MergedWeights, spec: QuantSpec) -> QuantizedForm:
    """What `write_quantized` writes; no weight is read.

    Args:
        weights: as the model holds them (`stored=False`).

    Raises:
        UnsupportedError: stacked experts, or layers that transformers does not quantize.
    """
    assert not weights.stored, "quantized tensors have the model's names"
    dtype = torch.bfloat16 if weights.compute == torch.float32 else weights.compute
    model = meta_model(weights.checkpoint, dtype=dtype)
    head = head_path(model)
    swap_quantized(model, spec=spec, skip=[] if head is None else [head])
    skip = skipped_by_transformers(model, weights.template.text)
    if skip is None:
        raise UnsupportedError(
            "transformers has no quantized form of this architecture (stacked experts, or linear layers of its own)",
            given=type(model).__name__,
            fix="merge without --quantize",
        )
    state = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.template.text.state_dict().items()}
    plain = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    layers = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    tensors: Layout = {}
    for name in weights.tensors():
        if name in layers:
            tensors |= packed_layout(name.removesuffix(".weight"), layers[name].shape, spec)
        else:
            tensors[name] = (state[name][0], plain[name])
    return QuantizedForm(spec=spec, dtype=dtype, layers=layers, skip=skip, tensors=tensors)


@torch.no_grad()
def write_quantized(
    weights: MergedWeights, form: QuantizedForm, folder: Path, *, progress: Progress | None = None
) -> None:
    """Write the merged model quantized again, in bitsandbytes' format, as transformers loads it.

    Args:
        weights: in float32, so that nothing is rounded before.
        form: of these weights.
    """
    spec, layers, tensors = form.spec, form.layers, form.tensors
    total, done = layout_bytes(tensors), 0
    files = ShardFiles(folder, tensors, index_name=INDEX)
    for name, start, tensor in weights.parts(whole=layers):
        if name not in layers:
            files.write(name, tensor, start=start)
            done += tensor.numel() * tensors[name][1].itemsize
        else:
            path, layer = name.removesuffix(".weight"), layers[name]
            conv = isinstance(weights.template.text.get_submodule(path), Conv1D)
            storage = quantize(tensor.t() if conv else tensor, spec)
            for part, values in pack(path, storage, shape=layer.shape, spec=spec, dtype=form.dtype).items():
                files.write(part, values)
                done += values.nbytes
        if progress is not None:
            progress(done, total)
    assert done == total, "every value is written once"
    write_configs(weights, folder, quantized=(spec, form.dtype, form.skip))


def folder_bytes(weights: MergedWeights, tensors: Layout) -> int:
    """Size of the folder with these tensors, rounded up by a few KiB."""
    listed = sum(2 * len(name) + LISTED_BYTES for name in tensors)
    copied = sum(file.stat().st_size for file in small_files(weights.checkpoint.folder))
    return layout_bytes(tensors) + listed + copied + CONFIG_BYTES


def write_configs(
    weights: MergedWeights, folder: Path, *, quantized: tuple[QuantSpec, torch.dtype, tuple[str, ...]] | None = None
) -> None:
    """config.json, generation_config.json, and copies of tokenizer and chat template."""
    config = copy.deepcopy(weights.model.config)
    config.architectures = [type(weights.model).__name__]
    config.dtype = weights.dtype
    config.use_cache = True
    if quantized is not None:
        spec, dtype, skip = quantized
        config.dtype = dtype
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=spec.bits == 4,
            load_in_8bit=spec.bits == 8,
            bnb_4bit_quant_type=spec.type,
            bnb_4bit_use_double_quant=spec.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(skip),
        ).to_dict()
    config.save_pretrained(folder)
    source = weights.checkpoint.folder
    generation = copy.deepcopy(weights.model.generation_config)
    assert generation is not None
    tokenizer = load_tokenizer(weights.checkpoint)
    known = known_ends(generation)
    learned = [it for it in (answer_ends(tokenizer) if tokenizer is not None else []) if it not in known]
    if learned:  # else what was trained to end there would go on for ever in transformers
        generation.eos_token_id = [*known, *learned]
    if learned or (source / "generation_config.json").is_file():
        write_json(folder / "generation_config.json", generation.to_diff_dict())
    copy_small_files(source, folder)
    if weights.checkpoint.trust_remote_code:
        for file in source.glob("*.py"):
            (folder / file.name).write_bytes(file.read_bytes())
