"""Sampling from an assembled model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.errors import UnsupportedError


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """What `model` says to each prompt.

    A tokenizer with a chat template gets each prompt as one user message, another one gets it as it is.

    Args:
        model: as `lowmem_ft.load` returns it; its mode (train or eval) is restored afterwards.
        temperature: 0 takes the likeliest token each time; above, tokens are sampled, from the smallest set that holds
            `top_p` of the probability (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
        seed: of the sampling; the caller's random numbers are left as they are.

    Returns:
        one text per prompt, special tokens removed.

    Raises:
        UnsupportedError: there is no tokenizer.
    """
    if tokenizer is None:
        raise UnsupportedError("The model folder holds no tokenizer, which generating text needs.")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            return [_answer(model, tokenizer, prompt, max_new_tokens, sampling) for prompt in prompts]
    finally:
        model.train(training)


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, sampling: dict[str, Any]
) -> str:
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].to(model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        use_cache=True,
        **sampling,
    )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()
