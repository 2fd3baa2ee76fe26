"""The output head of a model: its matrix, and what the model's forward does to the logits.

Letters in shapes: V vocabulary, D hidden size, T rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.runtime.blocks import causal_model, find_decoder
from lowmem_ft.runtime.vocabulary import Table, TiledLinear, row_tiles, table_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """logits = softcap(scale * (h W^T + b)), softcap(z) = cap * tanh(z / cap).

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        softcap: `cap`, or None where the model has none.
        scale: factor on the logits before the cap; where a model scales the hidden states instead, that factor.
        table: where the rows of `weight` lie, if that is below the device.
        keeps: whether a chunk's logits are kept until their gradients are made of them, or computed again.
        on_card: whether it lies on one, or will in the run that is planned.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    table: Table | None = None
    keeps: bool = True
    on_card: bool = False

    @property
    def tiles(self) -> list[slice]:
        """The rows that are multiplied at a time: all of them on a card, where each tile costs fifteen calls."""
        if self.on_card and self.keeps:
            return [slice(0, self.weight.shape[0])]
        return row_tiles(self.weight.shape[0], self.weight.shape[1] * self.weight.element_size())

    def tile(self, at: int, *, returns: bool) -> Tensor:
        """The rows `tiles[at]`, (T, D); see `Table.tile`."""
        return self.weight[self.tiles[at]] if self.table is None else self.table.tile(at, returns=returns)


def head_of(model: nn.Module) -> Head:
    """The output head of `model`, with the scale and soft cap that its forward applies.

    These are measured, not looked up: architectures name them differently (of two with `logits_scaling` one divides by
    it and one multiplies). The model's own forward runs with known hidden states in place of its decoder's and known
    logits in place of the head's, on the CPU and without touching a weight, so it works on meta and fake models too.

    Raises:
        UnsupportedError: the head is no plain linear layer or has an adapter, or the forward does something else to
            hidden states or logits than a scale and a soft cap.
    """
    causal = causal_model(model)
    linear = causal.get_output_embeddings()
    if hasattr(linear, "modules_to_save"):  # peft trains a copy
        linear = linear.modules_to_save[linear.active_adapters[0]]
    if hasattr(linear, "base_layer") or hasattr(linear, "token_adapter"):
        raise UnsupportedError(
            "An adapter on the output head cannot be trained: the loss is computed from the head's own matrix.",
            given=f"peft's {type(linear).__name__}, which is also put on the head where that is tied to what it adapts",
            fix="leave the head out, or train it whole: train_modules with method: lora, modules_to_save with peft",
        )
    if type(linear) not in (nn.Linear, TiledLinear):
        raise _unsupported(causal, f"its head is {type(linear).__name__}, not a plain linear layer")
    with torch.no_grad():
        factor, softcap = _measure(causal, find_decoder(model), linear)
    table = table_of(linear)
    return Head(weight=linear.weight, bias=linear.bias, softcap=softcap, scale=factor, table=table, keeps=table is None)


def multiply_rows_together(head: nn.Module) -> None:
    """Let a model's own head, which answers are generated with, multiply the last positions of all rows at once.

    They lie apart, also where there is one: PyTorch then makes a product for each row. Of 16-bit floats a CPU copies
    the head's matrix for that: 250 MiB and 2.6 s a row of 64128 x 2048, where one product of all takes 0.1 MiB and
    50 ms (torch 2.13, one Zen 4 core, 2026-11-28).
    """
    head.register_forward_pre_hook(_close_together)


def _close_together(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(it.clone(memory_format=torch.contiguous_format) if _lies_apart(it) else it for it in args)


def _lies_apart(x: Tensor) -> bool:
    """Whether its rows make no matrix as they lie."""
    return any(x.stride(at) != x.shape[at + 1] * x.stride(at + 1) for at in range(x.ndim - 2))


class _Hidden(MoeModelOutputWithPast):  # type: ignore[misc]
    """A decoder's output of which only the last hidden states are known."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _measure(causal: nn.Module, decoder: nn.Module, linear: nn.Linear) -> tuple[float, float | None]:
    """(scale, soft cap) of the forward of `causal` between decoder, head and returned logits."""
    generator = torch.Generator("cpu").manual_seed(0)
    # eighths are exact in every dtype that a forward may cast to; the second token is larger, to show a norm
    hidden = (
        torch.randint(-16, 17, (1, 2, linear.in_features), generator=generator, dtype=torch.float32, device="cpu") / 8
    )
    hidden[:, 1] *= 4.0
    noise = torch.randn(1, 2, linear.out_features, generator=generator, dtype=torch.float32, device="cpu")
    before, small = _probe(causal, decoder, linear, hidden, noise * 1e-4)  # a cap leaves these alone
    _, large = _probe(causal, decoder, linear, hidden, noise.sign() * 1e6)
    _, middle = _probe(causal, decoder, linear, hidden, noise * 20.0)
    scale_before, scale_after = _slope(hidden, before), _slope(noise * 1e-4, small)
    capped = bool(large.abs().max() < 1e5 * abs(scale_after))
    softcap = float(large.abs().max()) if capped else None
    ours = noise * 20.0 * scale_after
    ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
    # hidden states may be cast to bf16 on their way (2^-9); logits are fp32 on both sides: a few roundings of 6e-8
    if not (torch.allclose(before, hidden * scale_before, rtol=2**-8) and torch.allclose(middle, ours, rtol=1e-5)):
        raise _unsupported(causal, "its forward changes the logits by more than a scale and a soft cap")
    if scale_before != 1.0 and linear.bias is not None:
        raise _unsupported(causal, "it scales the hidden states of a head that has a bias")
    return scale_before * scale_after, softcap


def _probe(causal: Any, decoder: Any, linear: Any, hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(what the head was given, what the model returned), fp32, for these hidden states and these raw logits."""
    received: list[Tensor] = []

    def run_decoder(*args: object, **kwargs: object) -> _Hidden:
        return _Hidden(last_hidden_state=hidden)

    def run_head(given: Tensor) -> Tensor:
        received.append(given)
        return logits.clone()

    before = [(module, vars(module).get("forward")) for module in (decoder, linear)]
    try:
        decoder.forward, linear.forward = run_decoder, run_head
        returned = causal(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="cpu"), use_cache=False).logits
        return received[0].float(), returned.float()
    except Exception as error:  # whatever a foreign forward may raise on input that is not its own
        raise _unsupported(causal, _needed(causal, decoder, linear, error)) from error
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


def _needed(causal: nn.Module, decoder: nn.Module, linear: nn.Module, error: Exception) -> str:
    """Why the forward of `causal` fails if only its decoder's last hidden states and its head's logits are known."""
    known = {*decoder.parameters(), *linear.parameters()}
    own = (name for name, parameter in causal.named_parameters() if parameter not in known)
    first = next(own, None)
    if first is not None:
        return f"between the decoder and the head's matrix it has layers of its own, such as {first.rpartition('.')[0]}"
    what = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    return f"of the decoder's last hidden states alone it makes no logits ({what})"


def _slope(given: Tensor, returned: Tensor) -> float:
    """The factor between two tensors, by least squares, to fp32 precision."""
    x, y = given.double().flatten(), returned.double().flatten()
    return float((x.dot(y) / x.dot(x)).float()) if x.shape == y.shape else 1.0


def _unsupported(causal: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"The output head of this architecture cannot be served: {why}.",
        given=type(causal).__name__,
        allowed="logits = softcap(scale * (hidden @ weight.T + bias))",
    )
