"""(config, policy, device) -> ready model. Used by training and by planning, so that the two cannot drift."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_ft.adapters.inject import (
    inject_lora,
    injection_of,
    is_injected,
    parameter_groups,
    trainable_parameters,
)
from lowmem_ft.adapters.peft_format import adapter_folder, load_adapter, read_adapter_config, warn_of_other_base
from lowmem_ft.adapters.peft_methods import check_served, inject_peft
from lowmem_ft.core.config import AdapterConfig, Init, RunConfig
from lowmem_ft.core.errors import CheckpointError, ConfigError, UnsupportedError
from lowmem_ft.core.host import map_large_tensors, release_freed_memory
from lowmem_ft.core.json_text import read_json_file
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.isolation import check_isolation
from lowmem_ft.quant.checkpoint import Checkpoint, first_line
from lowmem_ft.quant.loader import effective_spec, head_path, load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.quant.swap import swap_quantized
from lowmem_ft.runtime.activations import ActivationPolicy, apply_activation_policy
from lowmem_ft.runtime.attend import use_attention
from lowmem_ft.runtime.below import Below
from lowmem_ft.runtime.experts import ExpertLayers
from lowmem_ft.runtime.gradients import GradientAccumulator
from lowmem_ft.runtime.head import Head, head_of, multiply_rows_together
from lowmem_ft.runtime.norms import use_norms
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.runtime.preference import Objective, objective_of
from lowmem_ft.runtime.scaler import LossScaler
from lowmem_ft.runtime.tiled_mlp import TiledMlps
from lowmem_ft.runtime.together import lay_together

Progress = Callable[[int, int], None]  # (done, total) bytes or steps


@dataclass(kw_only=True)
class Assembled:
    """A model under its policy, with what a step needs. `optimizer` and `accumulator` are None without training.

    `streamable` says of each block what could be streamed of it, whether it is or not; `matrices` of the vocabulary.
    """

    model: Any  # a transformers causal language model, or the peft wrapper of one
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    compute_dtype: torch.dtype
    attn_implementation: str
    head: Head
    loss_chunk_tokens: int
    grad_clip: float | None
    activations: ActivationPolicy
    mlps: TiledMlps
    experts: ExpertLayers
    below: Below
    activate: Callable[[Policy], ActivationPolicy]  # wraps the blocks as a policy says
    optimizer: AdamW | None = None
    accumulator: GradientAccumulator | None = None
    scaler: LossScaler | None = None
    objective: Objective | None = None  # of preferences

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the model's order."""
        return dict(trainable_parameters(self.model))

    def follow(self, policy: Policy) -> None:
        """Go on with another policy, of other activations, other tiles or another loss chunk, all of whose blocks are
        streamed, or more of whose embeddings are.

        Raises:
            UnsupportedError: weights are trained that it streams; nothing has changed then.
        """
        self.below.follow(policy)
        self.head = replace(head_of(self.model), on_card=self.head.on_card)
        self.activations.remove()
        self.activations = self.activate(policy)
        self.work_as(policy)
        self.loss_chunk_tokens = policy.loss_chunk_tokens

    def work_as(self, policy: Policy) -> None:
        """Let MLPs and experts work in the pieces that `policy` says."""
        self.mlps.work_in(policy.mlp_tile_tokens, recompute_act=policy.recompute_mlp_act)
        self.experts.work_on(policy.experts_together)


def assemble(
    config: RunConfig,
    policy: Policy,
    device: torch.device,
    *,
    adapter: bool | str | Path = True,
    optimizer: bool = True,
    progress: Progress | None = None,
    on_card: bool | None = None,
    loaded: Callable[[], None] | None = None,
) -> Assembled:
    """Build, load and equip the model of `config` as `policy` says.

    Args:
        device: where the model lives. On `meta` no weight is read and no byte is taken: that is how planning
            counts what training will hold. Only config.json is needed then.
        adapter: True for a fresh one (or `adapter.init`), False for none, or the folder of a saved one or of its run.
        optimizer: whether optimizer state and gradient buffers are made.
        progress: called with (bytes done, bytes in all) while weights load.
        on_card: whether `device` is a card; on `meta`, whether it stands for one.
        loaded: called when the weights are there, and nothing else is.

    Raises:
        CheckpointError, UnsupportedError, ConfigError: as the parts find them.
    """
    if device.type == "cpu":
        map_large_tensors()
        gc.collect()  # what planning leaves would stay in the process
        release_freed_memory()
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # kernels of Triton and of bitsandbytes are launched on the current card
    dtype: torch.dtype = getattr(torch, policy.compute_dtype)
    simulated = device.type == "meta"
    on_card = device.type == "cuda" if on_card is None else on_card
    checkpoint = Checkpoint.open(config.model, trust_remote_code=config.trust_remote_code, weights=not simulated)
    model = meta_model(checkpoint, dtype=dtype, attn_implementation=attention_of(checkpoint.config))
    use_attention(model, on_card=device.type == "cuda")
    experts = ExpertLayers(model)
    use_norms(model)
    if model.get_output_embeddings() is not None:
        multiply_rows_together(model.get_output_embeddings())
    objective = objective_of(config)
    if objective is not None:
        drop_nothing(model)  # or a model would differ from its own reference
    spec = quant_spec(policy)
    head_module = head_path(model)
    stored = effective_spec(checkpoint, spec)  # a checkpoint that is quantized already keeps its own
    swap_quantized(model, spec=stored, skip=[] if head_module is None else [head_module])
    below = Below(model, policy, device, Path(config.cache or config.output))
    if not simulated:
        load_weights(
            model,
            checkpoint,
            spec=spec,
            dtype=dtype,
            place=below.place,
            progress=progress,
            cache=Path(config.cache) if config.cache else None,
            device=device,
            tables=below.tables,
        )
    below.attach()
    model.config.use_cache = False
    if optimizer and config.data.packing and not simulated:
        check_isolation(model)  # now: adapters and recomputation would only blur what it sees
    attention = model.config._attn_implementation
    if loaded is not None:
        loaded()
    equipped = _equip(model, config.adapter, adapter, dtype, base=None if simulated else config.model)
    if objective is not None and objective.has_reference:
        _refuse_trained_reference(equipped)
    below.attach_to_adapters(equipped)

    def activate(policy: Policy) -> ActivationPolicy:
        count = policy.offload_blocks
        kept, shelf = policy.keep_attention, below.shelf(count)
        return apply_activation_policy(model, keep=policy.keep_blocks, offload=count, shelf=shelf, keep_attention=kept)

    ready = Assembled(
        model=equipped,
        tokenizer=None if simulated else load_tokenizer(checkpoint),
        device=device,
        compute_dtype=dtype,
        attn_implementation=attention,
        # after the adapter, which may have put a trained copy in its place
        head=replace(head_of(equipped), on_card=on_card),
        loss_chunk_tokens=policy.loss_chunk_tokens,
        grad_clip=config.train.grad_clip,
        activations=activate(policy),
        mlps=TiledMlps(model),
        experts=experts,
        below=below,
        activate=activate,
        objective=objective,
    )
    ready.work_as(policy)
    if optimizer:
        _add_optimizer(ready, config, policy, on_card=on_card)
    ready.model.train()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading took for a moment would count as reserved while training
    if device.type == "cpu":
        release_freed_memory()
    return ready


def _refuse_trained_reference(model: Any) -> None:
    """Of a saved adapter that is gone on from; the config says the same of a fresh one."""
    saved: Any = injection_of(model) if is_injected(model) else getattr(model, "active_peft_config", None)
    trained = getattr(saved, "trained_modules", None) or getattr(saved, "modules_to_save", None)
    bias = getattr(saved, "bias", "none")
    if trained or bias != "none":
        raise ConfigError(
            "The adapter to go on from trains parts of the base in place, and with them the reference.",
            given=f"modules {', '.join(trained)}" if trained else f"bias {bias}",
            fix="set train.objective to simpo or orpo, which have no reference; or merge the adapter, and start anew",
        )


def drop_nothing(model: PreTrainedModel) -> None:
    """Turn the model's own dropout off, whichever way it says that."""
    for module in model.modules():
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def quant_spec(policy: Policy) -> QuantSpec:
    """How the base weights are stored under `policy`."""
    return QuantSpec(bits=policy.bits, type="fp4" if policy.quant == "fp4" else "nf4", double_quant=policy.double_quant)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model folder, or None where the folder holds none.

    Of a multimodal model it has the processor's chat template, which older ones keep in a file of its own.

    Raises:
        CheckpointError: it is broken.
        UnsupportedError: it is remote code that is not trusted.
    """
    folder, trusted = checkpoint.folder, checkpoint.trust_remote_code
    if not any(
        os.path.isfile(folder / name) for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        return None
    try:
        # in so many words: left to itself transformers asks on the terminal, and takes a line of a pipe for the answer
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        older = folder / "chat_template.json"
        if not tokenizer.chat_template and older.is_file():
            tokenizer.chat_template = read_json_file(older)["chat_template"]
        tokenizer("a", verbose=False)  # what its settings make impossible shows here
        return tokenizer
    except Exception as error:  # the tokenizers library has no class of its own for a file that it cannot read
        if not trusted and "trust_remote_code" in str(error):
            raise UnsupportedError(
                "The tokenizer is remote code: Python files that come with the model, which are not run.",
                given=folder,
                fix="trust_remote_code: true runs them; do so only if you have read them",
            ) from error
        fix = "download or copy its files again; a newer version of transformers and tokenizers may know its format"
        given = f"{folder} ({first_line(error)})"
        raise CheckpointError("The tokenizer cannot be loaded.", given=given, fix=fix) from error


def require_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises:
        CheckpointError: as `load_tokenizer`.
        UnsupportedError: there is none, or as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UnsupportedError(
            "The model folder holds no tokenizer, without which text means nothing.",
            given=checkpoint.name,
            allowed="a folder with tokenizer.json, tokenizer_config.json or tokenizer.model",
            fix="copy the files of the tokenizer there, which lie beside the original weights",
        )
    return tokenizer


def attention_of(config: Any) -> str | None:
    """transformers' own choice, but eager where scores are soft-capped, which its SDPA path leaves out."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _equip(
    model: PreTrainedModel,
    settings: AdapterConfig,
    adapter: bool | str | Path,
    compute_dtype: torch.dtype,
    *,
    base: str | None,
) -> Any:
    """Put the adapter that was asked for into `model`, and warn if it names another base than `base`."""
    if adapter is False:
        return model
    # fp16 keeps too few digits for weights that learn by small steps; fp32 runs keep everything in fp32
    dtype = torch.float32 if compute_dtype == torch.float32 else torch.bfloat16
    saved = adapter if isinstance(adapter, (str, Path)) else settings.init
    if saved not in get_args(Init):
        if adapter is True and not os.path.exists(saved):
            raise ConfigError(
                "adapter.init is neither a way to begin nor a folder.",
                given=saved,
                allowed=f"{', '.join(get_args(Init))}, or the folder of a saved adapter",
                fix="check the path, if it is one; PiSSA and others that change the base are not possible here",
            )
        folder = adapter_folder(saved)
        saved_as = read_adapter_config(folder)
        if adapter is True:  # it is trained on
            check_served(saved_as)
        if base is not None:
            warn_of_other_base(saved_as, folder, base)
        return load_adapter(model, folder, settings=saved_as, dropout=settings.dropout, dtype=dtype)
    if settings.method == "peft":
        assert settings.peft is not None, "the config refuses method peft without its keys"
        return inject_peft(model, settings.peft)
    inject_lora(
        model,
        targets=settings.targets,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        rslora=settings.rslora,
        dora=settings.dora,
        init=cast(Init, settings.init),
        bias=settings.bias,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        layers=settings.layers,
        train_modules=settings.train_modules,
        dtype=dtype,
    )
    return model


def _add_optimizer(ready: Assembled, config: RunConfig, policy: Policy, *, on_card: bool) -> None:
    train = config.train
    groups = parameter_groups(
        ready.model, lr=train.lr, lora_plus_ratio=config.adapter.lora_plus_ratio, weight_decay=train.weight_decay
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    lay_together(parameters)
    paged = policy.optimizer.startswith("paged_")
    if paged and ready.device.type == "cpu":
        warnings.warn(f"{policy.optimizer}: paging needs CUDA; on the CPU the state stays in RAM", stacklevel=3)
        paged = False
    ready.optimizer = AdamW(
        groups,
        lr=train.lr,
        bits=8 if policy.optimizer.endswith("8bit") else 32,
        paged=paged,
        on_host=policy.optimizer_on == "host" and ready.device.type != "cpu",
        on_card=on_card,
    )
    ready.accumulator = GradientAccumulator(parameters)
    ready.scaler = LossScaler() if ready.compute_dtype == torch.float16 else None
