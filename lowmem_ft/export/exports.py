"""What `lowmem-ft export` makes: GGUF files, an adapter for llama.cpp, a folder for vLLM. Each ends with a check."""

from __future__ import annotations

import copy
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from lowmem_ft.assemble import load_tokenizer, require_tokenizer
from lowmem_ft.core.errors import ParityError, UnsupportedError
from lowmem_ft.core.files import write_text
from lowmem_ft.export.adapters import unpack_gguf_adapter, write_gguf_adapter, write_vllm
from lowmem_ft.export.gguf import architecture_of, gguf_header, gguf_tensors, require_gguf, write_gguf
from lowmem_ft.export.gguf_read import unpack_gguf
from lowmem_ft.export.gguf_vocab import adds_bos, differences
from lowmem_ft.export.merge import UNTIED
from lowmem_ft.export.models import TrainedRun
from lowmem_ft.export.ollama import modelfile
from lowmem_ft.export.parity import (
    EIGHT_BITS,
    SIXTEEN_BITS,
    THIRTY_TWO_BITS,
    Bound,
    HeldOut,
    Parity,
    compare,
    four_bits,
    held_out,
)
from lowmem_ft.export.weights import Base, MergedWeights
from lowmem_ft.export.write import new_folder, refuse_filled
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.report.progress import Reporter

SAID = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an export made.

    Attributes:
        check: parity with the trained model, or for a base that was not trained on with the adapter on that base.
        trained: parity with the trained model.
        on_original: of an adapter, the same where it is served on the base as it was before it was quantized.
    """

    folder: Path
    files: tuple[str, ...]
    check: Parity
    bound: Bound
    trained: Parity
    text: str
    notes: tuple[str, ...] = ()
    on_original: Parity | None = None

    def lines(self) -> list[str]:
        """For a person."""
        found = [f"Exported: {self.folder} ({', '.join(self.files)})"]
        found.append(f"Checked on {self.check.tokens} tokens of {self.text}.")
        if self.trained is not self.check:
            found.append(f"Against the adapter on the original base: {self.check}")
        found.append(f"Against the trained model: {self.trained}")
        if self.on_original is not None:
            found.append(f"Served on the original base it is: {self.on_original}")
        return [*found, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """For a program."""
        return {**asdict(self), "folder": str(self.folder)}


def export_gguf(run: TrainedRun, out: Path, *, kind: str, base: Base, text: Path | None, reporter: Reporter) -> Export:
    """The merged model as one GGUF file, with a Modelfile.

    Args:
        kind: one of `gguf_file.TYPES`, of the matrices.

    Raises:
        ParityError: what is read back from the file computes something else.
        LowMemError: as reading, merging and writing find it.
    """
    require_gguf()
    refuse_filled(out)
    weights = MergedWeights(
        run.config, run.policy, run.adapter, base=base, dtype=torch.float32, device=run.device, stored=False
    )
    sizes = gguf_tensors(weights, kind)
    gguf_header(weights, kind, name="")  # a tokenizer that cannot be written is told before anything is computed
    read = held_out(run.config, weights.checkpoint, text)
    slots = [place.slot for places in sizes.values() for place in places]
    nbytes, numel = sum(slot.bytes_of(slot.numel) for slot in slots), sum(slot.numel for slot in slots)
    apart = 0 if _read_whole(run, weights, numel) else 2 * numel  # what is unpacked to be checked
    with new_folder(out, nbytes=nbytes + apart) as folder:
        reporter.say("Computing the trained model's logits ...")
        trained = reference = run.logits(read)
        between = None
        if weights.bases_differ and (base == "original" or kind[:2] in ("q4", "q5")):
            original = run.unquantized_logits(read, nbytes=2 * numel)
            between = compare(trained, original)
            reference = original if base == "original" else trained
            del original
        file = folder / f"model-{kind}.gguf"
        with reporter.task("Writing GGUF", unit="B") as update:
            write_gguf(weights, kind, file, name=Path(run.config.model).name, progress=update)
        tokenizer = require_tokenizer(weights.checkpoint)
        write_text(
            folder / "Modelfile",
            modelfile(tokenizer, weights.checkpoint.folder, source=f"./{file.name}", adds_bos=adds_bos(tokenizer)),
        )
        reporter.say("Checking what is read back from the file ...")
        found = _read_back(run, weights, file, read, numel=numel)
        check = compare(reference, found)
        bound = _bound(run, kind, between)
        check.check(bound, what="The GGUF file")
    against = check if reference is trained else compare(trained, found)
    return Export(
        folder=out, files=(file.name, "Modelfile"), check=check, bound=bound, trained=against, text=read.origin,
        notes=(*differences(tokenizer), *([UNTIED] if weights.is_untied else [])),
    )  # fmt: skip


def export_vllm(run: TrainedRun, out: Path, *, text: Path | None, reporter: Reporter) -> Export:
    """The adapter as a folder that vLLM takes.

    Raises:
        ParityError: the folder computes something else.
        UnsupportedError: what was trained is more than vLLM takes as an adapter.
    """
    refuse_filled(out)
    weights = MergedWeights(run.config, run.policy, run.adapter)
    read = held_out(run.config, weights.checkpoint, text)
    with new_folder(out, nbytes=_size(run.adapter)) as folder:
        rank = write_vllm(weights.trained, weights.model.config, run.adapter, folder)
        check, original = _adapter_checks(run, weights, folder, read, reporter, what="The adapter for vLLM")
    model, where = shlex.quote(run.config.model), shlex.quote(str(out))
    serve = f"vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules NAME={where}"
    return _of_adapter(run, out, check, original, read, note=f"Serve it with: {serve}")


def export_gguf_adapter(run: TrainedRun, out: Path, *, text: Path | None, reporter: Reporter) -> Export:
    """The adapter as a GGUF file for llama.cpp, with a Modelfile.

    Raises:
        ParityError: what is read back from the file computes something else.
        UnsupportedError: what was trained is more than llama.cpp takes as an adapter.
    """
    require_gguf()
    refuse_filled(out)
    weights = MergedWeights(run.config, run.policy, run.adapter)
    config, base = weights.model.config, weights.checkpoint
    read = held_out(run.config, base, text)
    with new_folder(out, nbytes=4 * _size(run.adapter)) as folder:
        file = folder / "adapter.gguf"
        write_gguf_adapter(weights.trained, config, file)
        unpacked = folder / "unpacked"
        unpacked.mkdir()
        unpack_gguf_adapter(file, weights.trained, config, run.adapter, unpacked)
        check, original = _adapter_checks(run, weights, unpacked, read, reporter, what="The GGUF adapter")
        shutil.rmtree(unpacked)
        local = Path(run.config.model)
        source = str(local.resolve()) if local.is_dir() else run.config.model  # else it would be sought beside the file
        write_text(
            folder / "Modelfile", _adapter_modelfile(weights.checkpoint, source=source, adapter=f"./{file.name}")
        )
    note = "FROM in the Modelfile names the base model: put its GGUF file, or Ollama's name of it, there."
    note += " (A folder is converted by Ollama, which may cut text into other tokens.)"
    return _of_adapter(run, out, check, original, read, note=note)


def _adapter_modelfile(base: Checkpoint, *, source: str, adapter: str) -> str:
    """With the base's template: where FROM is a folder, Ollama finds no chat template in it and takes another."""
    tokenizer = load_tokenizer(base)
    try:
        first = tokenizer is not None and adds_bos(tokenizer)
    except UnsupportedError:  # of what it adds around a text
        tokenizer, first = None, False
    return modelfile(tokenizer, base.folder, source=source, adapter=adapter, adds_bos=first)


def _adapter_checks(
    run: TrainedRun, weights: MergedWeights, folder: Path, text: HeldOut, reporter: Reporter, *, what: str
) -> tuple[Parity, Parity | None]:
    """Parity of what was written with the trained model; and, where servers will put it on another base than that which
    it was trained on, what it is there."""
    reporter.say("Checking the adapter ...")
    trained, written = run.logits(text), replace(run, adapter=folder)
    found = compare(trained, written.logits(text))
    found.check(_bound(run, "f32"), what=what)
    if not weights.bases_differ:
        return found, None
    nbytes = sum(tensor.numel() * 2 for tensor in weights.model.state_dict().values())
    return found, compare(trained, written.unquantized_logits(text, nbytes=nbytes))


def _of_adapter(
    run: TrainedRun, out: Path, check: Parity, original: Parity | None, text: HeldOut, *, note: str
) -> Export:
    return Export(
        folder=out,
        files=tuple(sorted(path.name for path in out.iterdir())),
        check=check,
        bound=_bound(run, "f32"),
        trained=check,
        on_original=original,
        text=text.origin,
        notes=(note,),
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _bound(run: TrainedRun, kind: str, between: Parity | None = None) -> Bound:
    if kind == "f32" and run.compute_dtype == torch.float32:
        return THIRTY_TWO_BITS
    if kind in ("f32", "f16", "bf16"):
        return SIXTEEN_BITS
    return EIGHT_BITS if kind == "q8_0" else four_bits(between if run.policy.bits == 4 else None)


def _read_back(run: TrainedRun, weights: MergedWeights, file: Path, text: HeldOut, *, numel: int) -> list[Tensor]:
    """Logits of the file as transformers reads it; where that does not fit, of a folder that it is unpacked into."""
    config = weights.model.config
    _check_said(AutoConfig.from_pretrained(file.parent, gguf_file=file.name), config)
    if _read_whole(run, weights, numel):
        options: dict[str, Any] = {"gguf_file": file.name, "config": _as_gguf_knows_it(config), "dtype": torch.float32}
        if hasattr(transformers, "GgufConfig"):  # newer ones may leave weights packed, and ask for kernels from the hub
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return run.transformers_logits(file.parent, text, **options)
    folder = file.parent / "unpacked"
    folder.mkdir()
    unpack_gguf(file, weights, folder)
    found = run.folder_logits(folder, text, dtype=torch.float32)
    shutil.rmtree(folder)
    return found


def _read_whole(run: TrainedRun, weights: MergedWeights, numel: int) -> bool:
    """Whether transformers can read such a file, which it does in fp32, all of it at once."""
    return architecture_of(weights.model.config).read and run.fits(2 * 4 * numel)


def _as_gguf_knows_it(config: PretrainedConfig) -> PretrainedConfig:
    """The base's configuration, as positions may be scaled by tensors that transformers does not read; of Mistral as a
    Llama, which it is in GGUF."""
    if config.model_type == architecture_of(config).name:
        return copy.deepcopy(config)
    own = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return LlamaConfig(**own)


def _check_said(said: PretrainedConfig, config: PretrainedConfig) -> None:
    """Hold the file's own metadata, as transformers reads it, against the base's configuration."""
    wrong = [key for key in SAID if getattr(said, key) != getattr(config, key)]
    theta, own = said.rope_parameters["rope_theta"], config.rope_parameters["rope_theta"]
    wrong += ["rope_theta"] if abs(theta - own) > 1e-6 * own else []
    wrong += ["rms_norm_eps"] if abs(said.rms_norm_eps - config.rms_norm_eps) > 1e-4 * config.rms_norm_eps else []
    if wrong:
        raise ParityError(
            "The GGUF file says something else of the model than its configuration: nothing was kept.",
            given=", ".join(f"{key} {getattr(said, key, None)}" for key in wrong),
            fix="this is a bug of lowmem-ft: please report it",
        )
