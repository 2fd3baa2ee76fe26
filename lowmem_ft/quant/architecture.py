"""From a checkpoint's configuration to models without data: the text model that is served, and the template that
says how the checkpoint's own names and shapes become the model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.core.mode import ONE_FOR_ALL
from lowmem_ft.quant.checkpoint import Checkpoint, first_line
from lowmem_ft.quant.conversion import Plan, matcher, plan_conversion
from lowmem_ft.quant.prequantized import open_source

# Beyond what any model has: a config.json that was damaged, or made to do so, would be built and planned for hours
MOST_LAYERS = 1000
MOST_VALUES = 1 << 24  # along a dimension of a weight: a vocabulary has 262144 tokens, stacked experts some hundred


@dataclass(frozen=True, slots=True)
class Template:
    """What the checkpoint's tensors mean.

    Attributes:
        model: the whole model that the checkpoint describes, on meta and never swapped. For a multimodal checkpoint
            this is more than the text model.
        text: the text model, on meta and never swapped; of other checkpoints the same as `model`.
        rename: name in `model` -> name in the text model, or None for what the text model does not have.
    """

    model: PreTrainedModel
    text: PreTrainedModel
    rename: Callable[[str], str | None]


def meta_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype = torch.bfloat16, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The causal language model of a checkpoint, without data (every tensor on meta).

    Of a multimodal checkpoint only the language model is built. Experts use transformers' "eager" implementation, the
    only one that goes through quantized stacks. Where the configuration ties two weights but the checkpoint holds two
    that differ, they are not tied, as in transformers.

    Args:
        dtype: of the parameters; those that transformers keeps in float32 are float32 here too.
        attn_implementation: a name that transformers knows, or None for its own choice.

    Raises:
        UnsupportedError: the architecture is no causal language model that transformers has, or it lacks the attention
            implementation.
        CheckpointError: generation_config.json is broken.
    """
    config = text_config(checkpoint)
    model = _build(checkpoint, config, dtype, attn_implementation)
    if model.all_tied_weights_keys and checkpoint.tensors:
        plan = conversion_plan(checkpoint, template_of(checkpoint, model.config, dtype=dtype))
        if not _stored_ties_agree(checkpoint, model, plan):
            config.tie_word_embeddings = False
            model = _build(checkpoint, config, dtype, attn_implementation)
    model.config._name_or_path = checkpoint.name
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(checkpoint.folder)
    return model.eval()


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        config = GenerationConfig.from_pretrained(folder)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(config, name)
            if not all(it is None or type(it) is int for it in (ids if isinstance(ids, list) else [ids])):
                raise TypeError(f"{name}: {ids!r}")
    except Exception as error:  # of any kind: transformers trusts what it reads
        raise CheckpointError(
            "generation_config.json cannot be read",
            given=f"{folder / 'generation_config.json'}: {first_line(error)}",
            fix="mend it, or delete it: then config.json says which tokens begin and end text",
        ) from error
    return config


def conversion_plan(checkpoint: Checkpoint, template: Template) -> Plan:
    """How the tensors of `checkpoint` (dequantized names and shapes) become those of the text model."""
    wanted = {name: tuple(tensor.shape) for name, tensor in template.text.state_dict().items()}
    return plan_conversion(template.model, open_source(checkpoint), rename=template.rename, wanted=wanted)


def text_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """A copy of the configuration of the language model in a checkpoint.

    Raises:
        UnsupportedError: there is none that predicts the next token.
    """
    whole = checkpoint.config
    given = f"{whole.model_type} ({', '.join(map(str, _architectures(whole))) or '?'})"
    allowed = "decoder-only language models that transformers' AutoModelForCausalLM can build"
    if whole.is_encoder_decoder:
        raise UnsupportedError(
            "an encoder-decoder model cannot be trained here: its decoder needs an encoder's output, and the "
            "toolkit's loss, packing and memory plan are those of a next-token model",
            given=given, allowed=allowed,
        )  # fmt: skip
    for part in (whole, *(getattr(whole, name, None) for name in whole.sub_configs)):
        layers = getattr(part, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise _too_large(checkpoint, f"{layers} layers", MOST_LAYERS)
    config: PretrainedConfig = copy.deepcopy(whole).get_text_config(decoder=True)
    remote = checkpoint.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise UnsupportedError("transformers has no causal language model for this architecture",
                               given=given, allowed=allowed)  # fmt: skip
    # BERT and its kin are decoders only if they are told so; XLM and XLNet have switches of their own
    kin = type(config) in MODEL_FOR_MASKED_LM_MAPPING or hasattr(config, "add_cross_attention")
    switches = (getattr(config, "causal", True) is False, getattr(config, "attn_type", None) == "bi")
    if any(switches) or (kin and getattr(config, "is_decoder", None) is False):
        raise UnsupportedError(
            "this model reads to both sides, so it has no next token to predict", given=given, allowed=allowed
        )
    if config.model_type != whole.model_type:  # what the whole model ties is said by its own configuration
        config.tie_word_embeddings = getattr(whole, "tie_word_embeddings", False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # how it was stored is the loader's matter, not the served model's
    return config


def template_of(checkpoint: Checkpoint, config: PretrainedConfig, *, dtype: torch.dtype) -> Template:
    """The checkpoint's template for the text model of `config`, that of the model which `meta_model` built.

    Raises:
        UnsupportedError: a multimodal model whose language model cannot be told apart.
    """
    whole = checkpoint.config
    text = _build(checkpoint, copy.deepcopy(config), dtype, "eager")
    if whole.model_type == config.model_type:
        return Template(text, text, lambda name: name)
    model_class: Any = getattr(transformers, str((_architectures(whole) or [""])[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        model_class = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(whole), None)
    if model_class is None:
        raise UnsupportedError("transformers has no class for this multimodal model", given=whole.architectures)
    full = _construct(
        lambda: model_class._from_config(copy.deepcopy(whole), dtype=dtype, attn_implementation="eager"), dtype
    )
    return Template(full, text, _language_part(full, text))


def _language_part(full: PreTrainedModel, text_model: PreTrainedModel) -> Callable[[str], str | None]:
    """Name in a multimodal model -> name in its text model, by finding the text model's classes within."""
    decoder = text_model.get_decoder()
    base = next(path for path, module in text_model.named_modules() if module is decoder)
    for found, kept in ((type(text_model), ""), (type(decoder), f"{base}.")):
        paths = [path for path, module in full.named_modules() if type(module) is found]
        if len(paths) == 1:
            inner = f"{paths[0]}."
            own = {name for name in text_model.state_dict() if not name.startswith(f"{base}.")}
            return lambda name: (
                kept + name.removeprefix(inner) if name.startswith(inner) else name if name in own else None
            )
    raise UnsupportedError(
        "the language model within this multimodal model cannot be found",
        given=f"{type(full).__name__}, looked for one {type(text_model).__name__} or {type(decoder).__name__}",
    )


def _architectures(config: PretrainedConfig) -> list[Any]:
    """Which config.json may give in any form: transformers looks at the first, if it is a list."""
    return config.architectures if isinstance(config.architectures, list) else []


def _too_large(checkpoint: Checkpoint, given: str, allowed: int) -> CheckpointError:
    return CheckpointError(
        "config.json asks for more than any model has",
        given=f"{given} in {checkpoint.folder / 'config.json'}",
        allowed=f"{allowed} at most",
        fix="download or copy config.json again",
    )


def _build(
    checkpoint: Checkpoint, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    model = _construct(
        lambda: AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            trust_remote_code=checkpoint.trust_remote_code,
            experts_implementation="eager",
            **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
        ),
        dtype,
        attention=attn_implementation or "eager",
    )
    for name, weight in model.named_parameters():
        if max(weight.shape, default=0) > MOST_VALUES:
            raise _too_large(checkpoint, f"{name} of {list(weight.shape)}", MOST_VALUES)
    return model


def _construct(make: Callable[[], PreTrainedModel], dtype: torch.dtype, attention: str = "eager") -> PreTrainedModel:
    try:
        with ONE_FOR_ALL, torch.device("meta"):
            model = make()
    except Exception as error:  # of any kind: each architecture's own code runs here, on whatever config.json says
        what = "transformers cannot build this model"
        if isinstance(error, ImportError):
            what = "this model needs a package that is not installed"
        elif attention != "eager" and "attention" in str(error).lower():
            what = f"this model cannot use the attention implementation {attention!r}"
        raise UnsupportedError(what, given=f"{type(error).__name__}: {first_line(error)}",
                               fix="see what the message names: a setting in config.json, a package, or an option "
                               "(eager attention works everywhere)") from error  # fmt: skip
    _keep_in_fp32(model, dtype)
    return model


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the tensors that transformers loads as float32 that dtype (from_pretrained does it while it loads)."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    pattern = matcher(key.replace("*", ".*") for key in plan)
    if pattern is None:
        return
    for name in [name for name in model.state_dict() if pattern.search(name)]:
        tensor = model.get_parameter_or_buffer(name)
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32)


def _stored_ties_agree(checkpoint: Checkpoint, model: PreTrainedModel, plan: Plan) -> bool:
    stored = {step.only_target: step.only_source for step in plan.steps if step.is_plain}
    pairs = [(stored.get(target), stored.get(source)) for target, source in model.all_tied_weights_keys.items()]
    return all(a is None or b is None or checkpoint.same_content(a, b) for a, b in pairs)
