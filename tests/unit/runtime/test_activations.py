"""Recomputed blocks give the gradients of kept ones, bit by bit, and hold less memory."""

import errno
import re
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from lowmem_ft.adapters.inject import inject_lora
from lowmem_ft.adapters.lora import LoraLinear
from lowmem_ft.core.errors import ConfigError, LowMemError, UnsupportedError
from lowmem_ft.data.isolation import ATTENTION
from lowmem_ft.runtime.activations import apply_activation_policy, unread_layers
from lowmem_ft.runtime.attend import use_attention
from lowmem_ft.runtime.below import Below
from lowmem_ft.runtime.blocks import find_blocks, find_decoder
from lowmem_ft.runtime.gradients import GradientAccumulator
from lowmem_ft.runtime.rerun import random_states, with_random
from lowmem_ft.runtime.shelf import Shelf
from lowmem_ft.runtime.tiers import DiskTier
from tests.models import ARCHITECTURES, tiny_config, tiny_model, without_dropout
from tests.unit.adapters.helpers import quantized_model, shake
from tests.unit.runtime.memory import peak_bytes

# every key under which the architectures know dropout; a config ignores those of others
DROPOUT_KEYS = ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop")
DROPOUT = dict.fromkeys(DROPOUT_KEYS, 0.2)


def trainable(name: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model in training mode whose embeddings are frozen, and half of whose other weights are."""
    model = tiny_model(name, **overrides).train().requires_grad_(False)
    _, blocks = find_blocks(model)
    for number, (_, parameter) in enumerate(blocks.named_parameters()):
        parameter.requires_grad_(number % 2 == 0)
    return model


def gradients(model: PreTrainedModel, **inputs: Any) -> dict[str, Tensor]:
    """Gradients of the trainable parameters, through an accumulator's hooks, with dropout from one seed."""
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    accumulator = GradientAccumulator(names.values())
    ids = torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    hidden = find_decoder(model)(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    after_forward = torch.get_rng_state()
    (hidden.float() * torch.arange(hidden.shape[-1])).sum().backward()
    assert torch.equal(torch.get_rng_state(), after_forward), "recomputing must not use up random numbers"
    found = {name: accumulator.gradient(p) for name, p in names.items()}
    accumulator.remove()
    assert any(g is not None and bool(g.any()) for g in found.values())
    return {name: g for name, g in found.items() if g is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recompute_equals_keep(name: str) -> None:
    model = trainable(name, **DROPOUT)
    kept = gradients(model)
    _, blocks = find_blocks(model)
    for keep in {0, 1, len(blocks)}:
        policy = apply_activation_policy(model, keep=keep)
        recomputed = gradients(model)
        policy.remove()
        assert recomputed.keys() == kept.keys()
        for parameter, gradient in kept.items():
            assert torch.equal(gradient, recomputed[parameter]), f"{parameter} with {keep} blocks kept"


class _Counted(TorchDispatchMode):
    """Counts attention's forward runs."""

    times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func is torch.ops.lowmem_ft.attention.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kept_attention_gives_the_same_bits_and_runs_once(name: str) -> None:
    """Where models call it themselves; those that call PyTorch's function attend again, also where that is served by
    ours; what attends in another way is not touched."""
    model = trainable(name)
    use_attention(model)
    depth = len(find_blocks(model)[1])
    kept_once = model.config._attn_implementation == ATTENTION
    with _Counted() as once:
        kept = gradients(model)
    assert once.times == depth or (once.times == 0 and name not in ("llama", "qwen3", "mixtral"))
    for keep in {0, depth - 1}:
        policy = apply_activation_policy(model, keep=keep, keep_attention=True)
        with _Counted() as counted:
            recomputed = gradients(model)
        policy.remove()
        assert counted.times == once.times * (1 if kept_once else 2 - keep / depth)
        for parameter, gradient in kept.items():
            assert torch.equal(gradient, recomputed[parameter]), f"{parameter} with {keep} blocks kept"
    assert not any("attended" in vars(module) for module in model.modules())


LAST = {  # the layers that feed the sum at a block's end; Falcon adds both branches at once
    "llama": {"mlp.down_proj"},
    "gpt2": {"mlp.c_proj"},
    "gemma2": set(),  # a norm reads the down projection
    "granite": {"mlp.down_proj"},  # a number multiplies it first
    "falcon": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "mixtral": set(),
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("targets", ["all-linear", ".*(q_proj|query_key_value|c_attn|Wqkv|qkv_proj|q_b_proj)"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_that_nobody_reads_are_left_out(name: str, targets: str) -> None:
    model = quantized_model(name, dtype=torch.bfloat16)
    without_dropout(model)
    if targets != "all-linear" and not any(re.fullmatch(targets, path) for path, _ in model.named_modules()):
        pytest.skip("the architecture has no layer of these names")
    inject_lora(model, targets=targets, rank=2)
    shake(model)
    model.train()
    kept = gradients(model)
    policy = apply_activation_policy(model, keep=0)
    first, second = gradients(model), gradients(model)
    left_out = [layer for unread in policy.unread for layer in unread.layers or ()]
    policy.remove()
    for found in (first, second):
        assert all(torch.equal(found[key], gradient) for key, gradient in kept.items())
    if name in LAST and targets == "all-linear":
        paths = {path for path, module in model.named_modules() if any(module is layer for layer in left_out)}
        assert {path.split(".", 3)[-1] for path in paths} == LAST[name]
        assert len(paths) == 2 * len(LAST[name])
    assert not any(getattr(module, "unread", False) for module in model.modules())


def test_products_with_numbers_read_nothing_and_those_with_tensors_might() -> None:
    layer = LoraLinear(torch.nn.Linear(4, 4), rank=2, alpha=2.0)
    x = torch.randn(3, 4, requires_grad=True)
    for use in (lambda y: 0.5 * y, lambda y: y / 2, lambda y: -1 * (2 * y).view(4, 3).view(3, 4)):
        assert unread_layers([x + use(layer(x))]) == [layer]
    for use in (lambda y: y * (y > 0), lambda y: y * y.detach().abs().max(), lambda y: y * y, lambda y: 1 / y):
        assert unread_layers([x + use(layer(x))]) == []


def test_dropout_is_really_on() -> None:
    model = trainable("gpt2", **DROPOUT)
    with_dropout = gradients(model)
    without = gradients(model.eval())
    assert any(not torch.equal(with_dropout[name], without[name]) for name in without)


def test_explicit_masks_and_positions_pass_through() -> None:
    model = trainable("llama")
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(2, 1, 9, 9)
    inputs = {"attention_mask": mask, "position_ids": torch.arange(9).expand(2, 9) % 4}
    kept = gradients(model, **inputs)
    apply_activation_policy(model, keep=0)
    recomputed = gradients(model, **inputs)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("keep", [-1, 3])
def test_more_blocks_than_there_are(keep: int) -> None:
    with pytest.raises(ConfigError, match="not so many blocks"):
        apply_activation_policy(tiny_model("llama"), keep=keep)


def graph_nodes(tensor: Tensor) -> set[str]:
    """Names of all nodes of the autograd graph behind `tensor`."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


def test_the_last_blocks_keep() -> None:
    model = trainable("llama", num_hidden_layers=3)
    calls: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    apply_activation_policy(model, keep=1)
    gradients(model)
    assert calls == [0, 1, 2, 1, 0]


def test_off_in_evaluation_without_gradients_and_after_removal() -> None:
    model = trainable("llama")
    before = [block.forward for block in model.model.layers]
    policy = apply_activation_policy(model, keep=0)
    ids = torch.randint(0, 131, (1, 5))
    assert "_RecomputeBackward" in graph_nodes(model(input_ids=ids, use_cache=False).logits)
    assert "_RecomputeBackward" not in graph_nodes(model.eval()(input_ids=ids, use_cache=False).logits)
    with torch.no_grad():
        assert not model.train()(input_ids=ids, use_cache=False).logits.requires_grad
    model.requires_grad_(False)
    assert not model(input_ids=ids, use_cache=False).logits.requires_grad
    policy.remove()
    assert [block.forward for block in model.model.layers] == before
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_a_forward_that_was_on_the_instance_comes_back() -> None:
    model = trainable("llama")
    block = model.model.layers[0]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    hooked = block.forward
    apply_activation_policy(model, keep=0).remove()
    assert vars(block)["forward"] is hooked


class Block(nn.Module):
    """Takes and returns structures, with and without gradients in them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.runs = 0

    def forward(self, pair: tuple[Tensor, Tensor | None], *, extra: dict[str, Tensor], word: str) -> Any:
        self.runs += 1
        assert word == "as it was"
        hidden, nothing = pair
        assert nothing is None
        out = hidden * self.scale + extra["weight"]
        return {"hidden": out, "index": out.argmax(), "unused": hidden * 2, "none": None}, [out.exp(), "text"]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    monkeypatch.setattr("lowmem_ft.runtime.activations.find_blocks", lambda model: ("layers", model.layers))
    return model


@pytest.mark.parametrize("input_requires_grad", [False, True])
def test_structures_pass_through(blocks: nn.Module, input_requires_grad: bool) -> None:
    def run() -> tuple[Any, Tensor | None, Tensor, Tensor]:
        block = blocks.layers[0]
        block.scale.grad = None
        hidden = torch.arange(4.0).requires_grad_(input_requires_grad)
        weight = torch.ones(4, requires_grad=True)
        out, (exponent, text) = block((hidden, None), extra={"weight": weight}, word="as it was")
        assert text == "text"
        assert out["none"] is None
        assert not out["index"].requires_grad
        (out["hidden"].sum() + exponent.sum()).backward()
        return out["hidden"].detach(), hidden.grad, weight.grad, block.scale.grad

    plain = run()
    apply_activation_policy(blocks, keep=0)
    blocks.layers[0].runs = 0
    recomputed = run()
    assert blocks.layers[0].runs == 2
    for ours, theirs in zip(recomputed, plain, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_autocast_is_as_it_was(blocks: nn.Module) -> None:
    seen: list[torch.dtype] = []

    class Matmul(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            seen.append(y.dtype)
            return y

    blocks.layers[0] = Matmul()
    apply_activation_policy(blocks, keep=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = blocks.layers[0](torch.ones(2, 4))
    out.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


class Shares(nn.Module):
    """Leaves what it computed with the others, or uses what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor, *, shared: Any, store: bool) -> Tensor:
        out = x * self.scale
        if isinstance(shared, Cache):
            if store:
                shared.update(out.view(1, 1, 1, -1), out.view(1, 1, 1, -1), 0)
        elif store:
            shared["keys"] = (out, x.exp())
        else:
            out = out * shared["keys"][0] + shared["keys"][1]
        return out


def test_blocks_use_what_others_have_left_for_them(blocks: nn.Module) -> None:
    """As layers of Gemma 3n and 4 share keys and values."""
    blocks.layers = nn.ModuleList([Shares(), Shares(), Shares()])

    def gradients() -> list[Tensor | None]:
        x = torch.tensor([0.5, -1.0], requires_grad=True)
        shared: UserDict[str, Any] = UserDict()
        h = blocks.layers[0](x, shared=shared, store=True)
        for at in (1, 2):
            h = blocks.layers[at](h, shared=shared, store=False)
        assert list(shared) == ["keys"]
        h.sum().backward()
        found = [x.grad, *(it.scale.grad for it in blocks.layers)]
        blocks.zero_grad()
        return found

    expected = gradients()
    apply_activation_policy(blocks, keep=0)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_a_cache_is_refused_only_if_it_is_used(blocks: nn.Module) -> None:
    blocks.layers[0] = Shares()
    apply_activation_policy(blocks, keep=0)
    blocks.layers[0](torch.ones(2), shared=DynamicCache(), store=False).sum().backward()
    with pytest.raises(UnsupportedError, match="cannot recompute"):
        blocks.layers[0](torch.ones(2), shared=DynamicCache(), store=True)


def test_recomputing_holds_one_block_at_a_time() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256}

    def peak(layers: int, keep: int) -> int:
        model = trainable("llama", num_hidden_layers=layers, **sizes)
        apply_activation_policy(model, keep=keep)
        ids, decoder = torch.randint(0, 131, (4, 64)), find_decoder(model)
        return peak_bytes(lambda: decoder(input_ids=ids, use_cache=False).last_hidden_state.sum().backward())

    input_of_block = 4 * 64 * 64 * 2
    trained = sum(p.numel() * 2 for p in trainable("llama", **sizes).model.layers[0].parameters() if p.requires_grad)
    kept = (peak(8, 8) - peak(4, 4)) / 4
    recomputed = (peak(8, 0) - peak(4, 0)) / 4
    # beside its input, a block more holds the gradients of its own parameters and 5 KB of generator state
    assert recomputed < input_of_block + trained + 8_000
    assert kept > 10 * input_of_block


def test_runs_on_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16).train()
        model.requires_grad_(False)
        model.model.layers[0].mlp.down_proj.weight.requires_grad_()
        apply_activation_policy(model, keep=1)
        ids = torch.zeros(2, 8, dtype=torch.int64)
        mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
        find_decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.shape == (48, 80)


def test_device_generators_are_restored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for an accelerator's generator, since dropout there draws from it."""
    state = {"now": torch.tensor([1])}

    def set_state(new: Tensor, device: Any = None) -> None:
        state["now"] = new

    generator = SimpleNamespace(get_rng_state=lambda device=None: state["now"], set_rng_state=set_state)
    monkeypatch.setattr(torch, "get_device_module", lambda device: generator)
    monkeypatch.setattr(torch, "cuda", generator)
    states = random_states(torch.device("cuda", 0))
    state["now"] = torch.tensor([2])
    with with_random(torch.device("cuda", 0), states):
        assert state["now"].item() == 1
        state["now"] = torch.tensor([99])
    assert state["now"].item() == 2


def test_a_disk_that_is_full_of_inputs_is_not_told_as_full_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    below: Any = SimpleNamespace(_device=torch.device("cpu"), _folder=tmp_path)
    with pytest.raises(LowMemError, match=r"No space left for inputs of blocks[\s\S]*policy.activations: recompute"):
        Below.shelf(below, 2).put(0, torch.ones(4))


def test_an_offloaded_input_serves_the_forward_that_it_is_of(tmp_path: Path) -> None:
    """There is one place for each block: a backward after another forward would differentiate that one's inputs."""
    model = tiny_model("llama").requires_grad_(False)
    inject_lora(model, dtype=torch.float32)
    model.train()
    shelf = Shelf(2, lambda sizes: DiskTier(tmp_path, sizes))
    policy = apply_activation_policy(model, keep=0, offload=2, shelf=shelf)
    one, other = (torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(it)) for it in (1, 2))

    def loss(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    first, _second = loss(one), loss(other)
    with pytest.raises(UnsupportedError, match=r"another forward came[\s\S]*no_grad"):
        first.backward()
    again = loss(one)
    again.backward(retain_graph=True)
    with pytest.raises(UnsupportedError, match="another backward"):
        again.backward()
    model.zero_grad()
    last = loss(one)
    with torch.no_grad():
        loss(other)
    last.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    policy.remove()
    model.zero_grad()
    loss(one).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
