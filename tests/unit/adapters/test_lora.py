"""The LoRA Function against plain autograd and against peft's own layer.

Letters: N tokens, I in, O out, R rank; all different, so that a tensor's size tells what it is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lowmem_ft.adapters.lora import LoraLinear, lora_linear, lora_scaling
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.quant.linear import QuantLinear, get_base_weight
from lowmem_ft.quant.ops import QuantSpec, quantize
from tests.unit.adapters.helpers import error
from tests.unit.quant.multiplied import multiplied_shapes

B, T, I, O, R = 3, 7, 37, 53, 5  # noqa: E741
N = B * T

# Against a float64 reference. Measured over all cases below: float32 at most 3e-7, bfloat16 at most 5e-3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.3},
    "dora_dropout": {"dora": True, "dropout": 0.3},
}


def base_layer(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    weight_OI, bias_O = torch.randn(O, I) * 0.2, torch.randn(O).to(dtype)
    layer: nn.Module
    if kind == "linear":
        layer = nn.Linear(I, O, dtype=dtype)
        layer.weight.data.copy_(weight_OI)
    elif kind == "conv1d":
        layer = Conv1D(O, I).to(dtype)
        layer.weight.data.copy_(weight_OI.t())
    else:
        spec = QuantSpec(bits=8 if kind == "int8" else 4)
        layer = QuantLinear(I, O, bias=True, spec=spec, dtype=dtype)
        layer.load_storage(quantize(weight_OI, spec))
    layer.bias.data.copy_(bias_O)
    layer.requires_grad_(False)
    layer.bias.requires_grad_(True)
    return layer


def adapted(kind: str, dtype: torch.dtype, *, adapter_dtype: torch.dtype | None = None, **options: Any) -> LoraLinear:
    """An adapter whose B is not zero and whose magnitude is not the norm."""
    layer = LoraLinear(base_layer(kind, dtype), rank=R, alpha=9, dtype=adapter_dtype or dtype, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        if layer.magnitude is not None:
            layer.magnitude.mul_(1 + 0.2 * torch.randn(O))
    return layer.train()


def leaves(layer: LoraLinear) -> list[nn.Parameter]:
    assert isinstance(layer.bias, nn.Parameter)
    return [layer.lora_A, layer.lora_B, layer.bias, *([] if layer.magnitude is None else [layer.magnitude])]


def reference(layer: LoraLinear, x: Tensor, dy: Tensor, mask: Tensor | float) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients by plain autograd in float64, on the dequantized weight."""
    W = get_base_weight(layer.base_layer, dtype=torch.float32).double()
    x, A, B_, b, *m = (t.detach().double().requires_grad_() for t in (x, *leaves(layer)))
    kept, s = x * mask, layer.scaling
    if m:
        c = m[0] / (W + s * B_ @ A).norm(dim=1).detach()
        y = x @ W.t() + b + (c - 1) * (kept @ W.t()) + c * s * (kept @ A.t() @ B_.t())
    else:
        y = x @ W.t() + b + s * (kept @ A.t() @ B_.t())
    return y, list(torch.autograd.grad(y, [x, A, B_, b, *m], dy.double()))


def seeded_mask(x: Tensor, p: float) -> Tensor | float:
    """The mask that the layer draws after `torch.manual_seed(5)`."""
    torch.manual_seed(5)
    drawn = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
    mask = torch.empty_like(x.reshape(N, I)).bernoulli_(1 - p, generator=drawn)
    return mask.div_(1 - p).double().view(x.shape) if p else 1.0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_are_those_of_plain_autograd(variant: str, kind: str, dtype: torch.dtype) -> None:
    layer = adapted(kind, dtype, **VARIANTS[variant])
    x = torch.randn(B, T, I, dtype=dtype, requires_grad=True)
    dy = torch.randn(B, T, O, dtype=dtype)
    mask = seeded_mask(x, layer.dropout)
    torch.manual_seed(5)
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *leaves(layer)], dy)
    expected, expected_gradients = reference(layer, x, dy, mask)
    assert y.dtype == dtype
    assert y.shape == (B, T, O)
    assert error(y, expected) < TOLERANCE[dtype]
    for got, want, leaf in zip(gradients, expected_gradients, [x, *leaves(layer)], strict=True):
        assert got.dtype == leaf.dtype
        assert got.shape == leaf.shape
        assert error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapters_may_have_another_dtype_than_the_computation(variant: str) -> None:
    layer = adapted("nf4", torch.bfloat16, adapter_dtype=torch.float32, **VARIANTS[variant])
    x, dy = torch.randn(B, T, I, dtype=torch.bfloat16), torch.randn(B, T, O, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(dy)
    expected, (_, want_A, want_B, *_) = reference(layer, x, dy, 1.0)
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    assert error(y, expected) < 2e-2  # bfloat16 computation: as TOLERANCE
    assert error(layer.lora_A.grad, want_A) < 2e-2
    assert error(layer.lora_B.grad, want_B) < 2e-2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_output_and_gradients_are_those_of_peft(variant: str, dtype: torch.dtype) -> None:
    ours = adapted("linear", dtype, **VARIANTS[variant])
    config = LoraConfig(r=R, lora_alpha=9, use_rslora=ours.rslora, use_dora=ours.magnitude is not None)
    theirs = PeftLinear(base_layer("linear", dtype), "a", config=config, r=R, lora_alpha=9).to(dtype)
    pairs = [(ours.lora_A, theirs.lora_A["a"].weight), (ours.lora_B, theirs.lora_B["a"].weight)]
    if ours.magnitude is not None:
        pairs.append((ours.magnitude, theirs.lora_magnitude_vector["a"].weight))
    for mine, other in pairs:
        other.data.copy_(mine.detach())
    x, dy = torch.randn(B, T, I, dtype=dtype), torch.randn(B, T, O, dtype=dtype)
    (x1, x2) = (x.clone().requires_grad_(), x.clone().requires_grad_())
    y1, y2 = ours(x1), theirs(x2)
    y1.backward(dy)
    y2.backward(dy)
    # measured: float32 at most 3e-7, bfloat16 at most 5e-3, to which peft's own rounding adds
    assert error(y1, y2) < TOLERANCE[dtype]
    for mine, other in [(x1, x2), *pairs]:
        assert mine.grad is not None
        assert error(mine.grad, other.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["linear", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_siblings_save_their_input_once_and_nothing_wide_besides(variant: str, kind: str) -> None:
    layers = [adapted(kind, torch.float32, **VARIANTS[variant]) for _ in range(3)]  # q, k, v
    x = torch.randn(B, T, I, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    factors = {t.untyped_storage().data_ptr() for layer in layers for t in (layer.lora_A, layer.lora_B)}
    vectors = [size for storage, size in saved.items() if storage not in factors | {x.untyped_storage().data_ptr()}]
    assert x.untyped_storage().data_ptr() in saved
    assert factors <= saved.keys()
    assert vectors == ([O] * 6 if layers[0].magnitude is not None else [])  # DoRA's magnitudes and norms
    assert len(outputs) == 3


class Allocations(TorchDispatchMode):
    """Numbers of elements of all storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._held: list[Tensor] = []  # so that no address is used twice
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._held += known
        self._seen |= {t.untyped_storage().data_ptr() for t in known}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._seen:
                self._held.append(tensor)
                self._seen.add(tensor.untyped_storage().data_ptr())
                self.sizes.append(tensor.numel())
        return result


def test_the_output_is_the_only_wide_tensor_and_the_base_weight_the_only_matrix() -> None:
    layer = adapted("nf4", torch.bfloat16)
    x = torch.randn(N, I, dtype=torch.bfloat16, requires_grad=True)
    with Allocations() as forward:
        y = layer(x)
    dy = torch.randn_like(y)
    with Allocations() as backward:
        y.backward(dy)
    assert forward.sizes.count(N * O) == 1
    assert forward.sizes.count(O * I) <= 1
    assert backward.sizes.count(N * O) == 0
    assert backward.sizes.count(N * I) == 1  # the input's gradient
    assert backward.sizes.count(O * I) <= 1
    assert max(forward.sizes + backward.sizes) <= -(-O * I // 64) * 64  # nothing else is larger than a matrix


def test_dora_never_forms_the_merged_weight() -> None:
    layer = adapted("linear", torch.float32, dora=True)
    with Allocations() as forward, torch.no_grad():
        layer(torch.randn(N, I))
    assert forward.sizes.count(O * I) == 0


def test_the_weight_may_move_between_forward_and_backward() -> None:
    layer, x = adapted("nf4", torch.float32), torch.randn(N, I, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    base = layer.base_layer
    assert isinstance(base, QuantLinear)
    y = layer(x)
    before = base.storage()
    base.load_storage({name: tensor.clone() for name, tensor in before.items()})
    for tensor in before.values():
        tensor.zero_()  # as a streaming slot that something else was copied into
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_the_weight_is_not_read_in_backward_where_the_input_needs_no_gradient() -> None:
    calls: list[torch.dtype] = []
    weight_OI = torch.randn(O, I)

    def weight(dtype: torch.dtype) -> Tensor:
        calls.append(dtype)
        return weight_OI

    A, B_ = torch.randn(R, I, requires_grad=True), torch.randn(O, R, requires_grad=True)
    for x, reads in ((torch.randn(N, I), 1), (torch.randn(N, I, requires_grad=True), 2)):
        calls.clear()
        lora_linear(x, A, B_, None, None, weight=weight, scaling=2.0, p=0.0).sum().backward()
        assert calls == [torch.float32] * reads


@pytest.mark.parametrize("variant", ["dropout", "dora_dropout"])
def test_activation_checkpointing_replays_dropout(variant: str) -> None:
    layer = adapted("nf4", torch.float32, **VARIANTS[variant])
    x, dy = torch.randn(N, I, requires_grad=True), torch.randn(N, O)
    torch.manual_seed(3)
    plain = torch.autograd.grad(layer(layer(x)[:, :I]), [x, *leaves(layer)], dy)
    torch.manual_seed(3)
    y = checkpoint(lambda x: layer(layer(x)[:, :I]), x, use_reentrant=False)
    torch.rand(100)  # the generator moves on before the recomputation
    replayed = torch.autograd.grad(y, [x, *leaves(layer)], dy)
    for one, other in zip(plain, replayed, strict=True):
        assert torch.equal(one, other)


def test_dropout_drops_in_training_only_and_at_its_rate() -> None:
    layer, x = adapted("linear", torch.float32, dropout=0.25), torch.ones(4000, I)
    base = layer.base_layer(x)
    assert not torch.equal(layer(x), layer(x))
    kept = (layer(x) - base).mean(0), (layer.eval()(x) - base).mean(0)
    assert torch.equal(layer(x), layer(x))
    assert error(*kept) < 0.1  # the mean is kept; measured 0.02 over 4000 x 37 draws


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    x = torch.randn(N, I)
    for dora in (False, True):
        layer = LoraLinear(base_layer(kind, torch.float32), rank=R, alpha=9, dora=dora)
        # DoRA divides the norm by itself, which may be rounded differently; measured 0
        assert error(layer(x), layer.base_layer(x)) < (1e-6 if dora else 1e-9)


def test_a_disabled_adapter_leaves_the_base_layer_alone() -> None:
    layer, x = adapted("nf4", torch.float32), torch.randn(N, I)
    assert error(layer(x), layer.base_layer(x)) > 0.1
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("adapts", [True, False], ids=["adapted", "frozen"])
def test_what_lies_column_by_column_is_multiplied_in_few_shapes(monkeypatch: pytest.MonkeyPatch, adapts: bool) -> None:
    """As next to a convolution, where a product must not be taken for one that sums over rows."""
    shapes = multiplied_shapes(monkeypatch)
    plain = QuantLinear(64, 128, bias=False, spec=QuantSpec(bits=8))
    plain.load_storage(quantize(torch.randn(128, 64), QuantSpec(bits=8)))
    layer = LoraLinear(plain, rank=64, alpha=9, dtype=torch.bfloat16) if adapts else plain
    for length in (40, 65, 104):
        x, dy = (torch.randn(1, width, length).bfloat16().transpose(1, 2) for width in (64, 128))
        layer(x.requires_grad_()).backward(dy)
    assert shapes == {(64, 64), (64, 128)}


def test_the_output_may_be_changed_in_place() -> None:
    layer, x = adapted("nf4", torch.float32), torch.randn(B, T, I, requires_grad=True)
    expected = torch.autograd.grad((layer(x) + 1).square().sum(), x)[0]
    y = layer(x)
    y += 1  # as Falcon does
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_runs_without_data(variant: str) -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        base = nn.Linear(I, O, dtype=torch.bfloat16).requires_grad_(False)
        layer = LoraLinear(base, rank=R, alpha=9, **VARIANTS[variant]).train()
        x = torch.randn(B, T, I, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state), "planning draws no numbers"
    assert x.grad is not None
    assert x.grad.shape == (B, T, I)
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.shape == (O, R)


def test_delegates_and_starts() -> None:
    layer = LoraLinear(base_layer("conv1d", torch.float32), rank=R, alpha=10, init="gaussian", dtype=torch.float32)
    assert (layer.in_features, layer.out_features) == (I, O)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert 0.5 / R < layer.lora_A.std().item() < 2 / R
    assert lora_scaling(16, 32, rslora=False) == 2
    assert lora_scaling(16, 32, rslora=True) == 8
    first, second = (
        (torch.manual_seed(4), LoraLinear(base_layer("linear", torch.float32), rank=R, alpha=1))[1].lora_A
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.dtype == torch.bfloat16


def test_a_layer_without_a_matrix_is_refused() -> None:
    with pytest.raises(TypeError, match="not a linear layer"):
        LoraLinear(nn.LayerNorm(4), rank=R, alpha=1)
    with pytest.raises(UnsupportedError, match="no base weight"):
        get_base_weight(nn.LayerNorm(4))
