"""How long each operation of a step takes: the roofline of Williams et al. 2009 (doi:10.1145/1498765.1498785).

An operation takes the longer of its arithmetic at the device's rate and its bytes at the device's bandwidth. On a CPU
what every call costs comes on top of it; a card works while the host calls on. Products, attention and dequantization
have rates of their own, because what a device reaches in them is far from its datasheet; so has what is written to new
memory, whose pages a CPU's system clears first. Copies between tiers are in `planner.pipeline`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_ft.planner.profile import Profile, Rate
from lowmem_ft.quant.products import TILE, is_one_of_few, multiplies, pieces, sums_rows

# For profiles without a `measured` section. A large product reaches so much of a datasheet's peak (A100, H100, H200),
# those of a step as much as a large one (836 of 759 TFLOP/s on an H200 with 2048 tokens of Llama-3.1-8B's shape,
# benchmarks/results/gpu_h200.json), and those of low rank what memory does: its four steps are planned 1% below to 12%
# above what they took.
LARGE_PRODUCT_SHARE = 0.8
# What attention reaches of a large product: FlashAttention-2 there 0.28; its paper says 0.6 and more of an A100
# (arXiv:2307.08691). Before Ampere another kernel does it: assumed, as the other shares are.
ATTENTION_SHARES = {"hopper": 0.28, "volta": 0.4, "turing": 0.4}
ATTENTION_SHARE = 0.6
BANDWIDTH_SHARE = 0.75  # what streaming kernels reach of a datasheet's: 3.4 of 4.8 TB/s on an H200
BYTES_PER_DEQUANTIZED = {4: 2.6, 8: 3.0}  # read and written per value, scales included
BYTES_PER_PACKED = 6.0  # of 16 bits: read, written, and read again
BYTES_PER_UPDATE = 24.0  # gradient, moments and parameter, read and written
BYTES_PER_DRAW = 4.0
# Of the host beside a card, Python between calls included: steps of 512 tokens of Llama-3.1-8B's shape beside an H200.
# Those of few tokens of a small model took 33 us there (benchmarks/results/profile_h200.yaml, 2026-11-26).
CALL_SECONDS = 40e-6
_BYTES_PER_SUMMED = 8.0  # fp32 read and written where a product of low rank is added
_CALLS_PER_TILE = 4  # two conversions there, one back, and the product
# Elements per second that the host beside a card updates, by the bits of AdamW's moments. Measured on bf16 parameters
# and one core of an AMD EPYC (Zen 3, AVX2), 2026-11-24: profiles of cards say nothing of the processor beside them.
HOST_UPDATES = {8: 30e6, 32: 105e6}
LOOPS_SHARE = 0.006  # PyTorch's own 16-bit loops on a CPU without such units: 0.8 of 136 GFLOP/s (quant/products.py)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a device reaches; per second but for `call`.

    Attributes:
        products: floating-point operations of large matrix products, by dtype.
        loops: of 16-bit products outside of our operator on a CPU that has no units for them; None where there are.
        attention_forward, attention_backward: floating-point operations of the attention kernel.
        elementwise: bytes that operations read, and write where memory is already.
        fresh: bytes that they write to memory that they allocate.
        exponentials: values of exp, which take arithmetic too; None where memory is slower.
        packing: values of a product's second operand, which a CPU rearranges first.
        dequantize: values, by the bits they were stored in.
        updates: elements that the optimizer updates.
        update_call: seconds that the update of any tensor takes at least.
        draws: random values.
        call: seconds that any operation takes at least.
    """

    products: Mapping[torch.dtype, float]
    loops: float | None
    attention_forward: float
    attention_backward: float
    elementwise: float
    fresh: float
    exponentials: float | None
    packing: float
    dequantize: Mapping[int, float]
    updates: float
    draws: float
    call: float
    update_call: float

    @classmethod
    def of(cls, profile: Profile) -> Rates:
        """The measured rates of a profile, or shares of what is known of the device."""
        flops = {getattr(torch, name): large_product(rate) for name, rate in profile.flops.items()}
        fastest = max(flops.values())
        attention = ATTENTION_SHARES.get(profile.architecture, ATTENTION_SHARE) * fastest
        bandwidth = profile.memory_bandwidth.value
        found = profile.measured
        if found is None:
            return cls(
                products=flops,
                loops=None if profile.kind == "cuda" or multiplies(torch.bfloat16) else LOOPS_SHARE * fastest,
                attention_forward=attention,
                attention_backward=attention,
                elementwise=BANDWIDTH_SHARE * bandwidth,
                fresh=BANDWIDTH_SHARE * bandwidth,
                exponentials=None,
                packing=BANDWIDTH_SHARE * bandwidth / BYTES_PER_PACKED,
                dequantize={bits: BANDWIDTH_SHARE * bandwidth / size for bits, size in BYTES_PER_DEQUANTIZED.items()},
                updates=BANDWIDTH_SHARE * bandwidth / BYTES_PER_UPDATE,
                draws=BANDWIDTH_SHARE * bandwidth / BYTES_PER_DRAW,
                call=CALL_SECONDS,
                update_call=CALL_SECONDS,
            )
        return cls(
            products=flops,
            loops=None if found.loops is None else found.loops.value,
            attention_forward=found.attention_forward.value,
            attention_backward=found.attention_backward.value,
            elementwise=bandwidth,
            fresh=1 / max(3 / found.elementwise.value - 2 / bandwidth, 1 / bandwidth),  # two of three bytes are read
            exponentials=None if found.exponentials is None else found.exponentials.value,
            packing=bandwidth / BYTES_PER_PACKED if found.packing is None else found.packing.value,
            dequantize={4: found.dequantize_4bit.value, 8: found.dequantize_8bit.value},
            updates=found.updates.value,
            draws=found.draws.value,
            call=1 / found.calls.value,
            update_call=1 / (found.update_calls or found.calls).value,
        )

    def of_products(self, dtype: torch.dtype) -> float:
        """Of products in a dtype; of one that profiles do not know, such as fp64, the slowest."""
        return self.products.get(dtype) or min(self.products.values())

    def calls_alone(self) -> Rates:
        """A second for each call, and nothing for work: what is summed is the number of calls."""
        return Rates(
            products=dict.fromkeys(self.products, math.inf), loops=None if self.loops is None else math.inf,
            attention_forward=math.inf, attention_backward=math.inf, elementwise=math.inf, fresh=math.inf,
            exponentials=None, packing=math.inf, dequantize=dict.fromkeys(self.dequantize, math.inf), updates=math.inf,
            draws=math.inf, call=1.0, update_call=0.0,
        )  # fmt: skip


def large_product(figure: Rate) -> float:
    """Floating-point operations per second that a large product reaches, by one of a profile's `flops`."""
    return figure.value * (LARGE_PRODUCT_SHARE if figure.how == "datasheet" else 1.0)


_NORM_PASSES, _NORM_BACKWARD_PASSES = 4.5, 6  # over its values: as measured on a CPU, and as a card reads and writes


_aten = torch.ops.aten
_OVERWRITING = (
    _aten.copy_.default, _aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default, _aten.masked_fill_.Scalar,
)  # fmt: skip
_PICKING = (_aten.gather.default, _aten.index_select.default, _aten.embedding.default, _aten.index.Tensor)
_SCATTERING = (
    _aten.scatter_.src, _aten.scatter_.value, _aten.scatter_add_.default, _aten.index_copy_.default,
    _aten.index_add_.default, _aten.index_put_.default,
)  # fmt: skip
_STACK = _aten.stack.default
_PRODUCT = torch.ops.lowmem_ft.product.default
_EXPONENTIAL = (
    _aten.exp.default, _aten.exp_.default, _aten.exp.out, _aten.silu.default, _aten.silu_backward.default,
    _aten.sigmoid.default, _aten.tanh.default, _aten.tanh_.default, _aten.gelu.default, _aten.gelu_backward.default,
    _aten._softmax.default, _aten._log_softmax.default,
)  # fmt: skip


class CostModel:
    """Seconds of operations on tensors without data, on a device with these rates."""

    def __init__(self, rates: Rates, *, kind: str) -> None:
        self._rates = rates
        self._ahead = kind == "cuda"  # the host calls on while the device works
        self._rules: dict[Any, Callable[..., float] | None] = {
            _PRODUCT: self._product,
            torch.ops.lowmem_ft.dequantize_4bit.default: self._dequantize_4bit,
            torch.ops.lowmem_ft.dequantize_int8.default: self._dequantize_8bit,
            torch.ops.lowmem_ft.rms_norm.default: self._norm,
            torch.ops.lowmem_ft.rms_norm_backward.default: self._norm_backward,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: self._flash,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: self._flash_backward,
            torch.ops.aten._scaled_dot_product_flash_attention.default: self._flash,
            torch.ops.aten._scaled_dot_product_flash_attention_backward.default: self._flash_backward_cuda,
            torch.ops.aten._flash_attention_forward.default: self._documents,
            torch.ops.aten._flash_attention_backward.default: self._documents_backward,
            torch.ops.aten._scaled_dot_product_efficient_attention.default: self._efficient,
            torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: self._efficient_backward,
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default: self._update,
            torch.ops.bitsandbytes.optimizer_update_32bit.default: self._update,
            torch.ops.lowmem_ft.adam_8bit.default: self._update,
            torch.ops.aten.bernoulli_.float: self._draw,
            **dict.fromkeys(_OVERWRITING, self._overwritten),
            **dict.fromkeys(_PICKING, self._picked),
            **dict.fromkeys(_SCATTERING, self._scattered),
            **dict.fromkeys(_EXPONENTIAL, self._exponential),
            torch.ops.aten.mm.default: self._mm,
            torch.ops.aten.bmm.default: self._mm,
            torch.ops.aten.addmm.default: self._addmm,
            torch.ops.aten.baddbmm.default: self._addmm,
        }

    def seconds(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, tiles: float = 1.0
    ) -> complex:
        """What the Tracer adds up, see `trace.Cost`, where the operation stands for so many `tiles` with the same rows
        in all: each of them is a call, and dequantizes its own weights, once those of several are side by side."""
        try:
            rule = self._rules[func]
        except KeyError:
            rule = self._rules[func] = None if _takes_no_time(func) else self._elementwise
        if rule is None:
            return 0.0
        work = rule(out, *args, tiles) if func is _PRODUCT else rule(out, *args)
        if rule in (self._dequantize_4bit, self._dequantize_8bit) or func is _STACK:
            work *= tiles
        calls = tiles * self._rates.call
        return complex(work, calls) if self._ahead else calls + work

    def _elementwise(self, out: Any, *args: Any) -> float:
        """All that is given is read, and all that comes back is written."""
        given = list(_tensors(args))
        return self._moved(sum(it.nbytes for it in given), out, set(map(id, given)))

    def _moved(self, read: int, out: Any, given: Container[int]) -> float:
        """Seconds for bytes that are read, and for `out`, which is written: to new memory but where it was given."""
        fresh = 0
        for tensor in _tensors((out,)):
            if id(tensor) in given:
                read += tensor.nbytes
            else:
                fresh += tensor.nbytes
        return read / self._rates.elementwise + fresh / self._rates.fresh

    def _overwritten(self, out: Tensor, target: Tensor, *args: Any) -> float:
        return self._moved(sum(it.nbytes for it in _tensors(args)), out, {id(target)})

    def _picked(self, out: Tensor, *args: Any) -> float:
        """As many elements as come out, wherever they lie, and their indices."""
        indices = sum(it.nbytes for it in _tensors(args) if it.dtype == torch.int64)
        return self._moved(out.nbytes + indices, out, ())

    def _scattered(self, out: Tensor, target: Tensor, *args: Any) -> float:
        """Into as many elements as are given, which are read and written."""
        put = sum(it.nbytes * (1 if it.dtype == torch.int64 else 3) for it in _tensors(args))
        return put / self._rates.elementwise

    def _exponential(self, out: Tensor, *args: Any) -> float:
        rate = self._rates.exponentials
        return max(self._elementwise(out, *args), 0.0 if rate is None else out.numel() / rate)

    def _product(
        self,
        _: None,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Any,
        c: Tensor | None,
        by: Tensor | None,
        d: Tensor | None,
        alpha: float,
        tiles: float,
    ) -> float:
        (rows, inner), columns, times = a.shape[-2:], b.shape[-1], math.prod(a.shape[:-2])
        summed = not self._ahead and sums_rows(a) and not is_one_of_few(inner)
        if a.dtype != torch.float32 and (self._rates.loops is not None or summed):
            return times * self._in_float32(rows, inner, columns, c, by)
        found = self._multiplied(a, b, out, tiles)
        if c is not None and d is not None:
            found += self._multiplied(c, d, out, tiles) + out.nbytes / self._rates.elementwise
            if by is not None:
                found += self._multiplied(a, by, c, tiles)
        return found

    def _multiplied(self, a: Tensor, b: Tensor, out: Tensor, tiles: float) -> float:
        """One product. A card reads while it multiplies; a CPU packs the second operand first, and multiplies bf16 for
        some numbers of rows only."""
        rows, inner = a.shape[-2:]
        work = 2.0 * out.numel() * inner / self._rates.of_products(a.dtype)
        if self._ahead:
            return max(work, (a.nbytes + tiles * b.nbytes + out.nbytes) / self._rates.elementwise)
        if a.dtype != torch.bfloat16 or sums_rows(a):
            heights = [rows]
        else:
            heights = pieces(math.ceil(rows / tiles))
            work *= tiles * sum(heights) / max(rows, 1)
        return work + tiles * len(heights) * b.numel() / self._rates.packing

    def _in_float32(self, rows: int, inner: int, columns: int, c: Tensor | None, by: Tensor | None) -> float:
        """As quant/products.py does it: tile by tile, whose parts are converted to fp32 and back."""
        work, again = 2.0 * rows * inner * columns, 0
        if c is not None:
            work += 2.0 * rows * c.shape[-1] * (columns + (inner if by is not None else 0))
            again = rows * columns + (rows * inner if by is not None else 0)  # memory binds there
        top, left, along = (math.ceil(size / TILE) for size in (rows, columns, inner))
        into, back = rows * inner * left + inner * columns * top, rows * columns  # of 16 bits to 32, which are new
        moved = 2.0 * into + 6.0 * back + _BYTES_PER_SUMMED * again
        calls = _CALLS_PER_TILE * top * left * along + (0 if c is None else top * (left + along + 1))
        memory = moved / self._rates.elementwise + 4.0 * into / self._rates.fresh
        return work / self._rates.of_products(torch.float32) + memory + calls * self._rates.call

    def _mm(self, out: Tensor, a: Tensor, b: Tensor, *_: Any) -> float:
        work = 2.0 * math.prod(out.shape) * a.shape[-1]
        loops = self._rates.loops
        return work / (self._rates.of_products(a.dtype) if loops is None or a.dtype == torch.float32 else loops)

    def _addmm(self, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, *_: Any) -> float:
        return self._mm(out, a, b)

    def _efficient(self, out: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, *_: Any) -> float:
        return _attention_work(q, causal=bias is None) / self._rates.attention_forward

    def _efficient_backward(self, out: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, *_: Any) -> float:
        return 2.5 * _attention_work(q, causal=bias is None) / self._rates.attention_backward

    def _flash_backward_cuda(self, out: Any, dout: Tensor, q: Tensor, *_: Any) -> float:
        return 2.5 * _attention_work(q, causal=True) / self._rates.attention_backward

    def _flash(self, out: Any, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, causal: bool = False, *_: Any) -> float:
        return _attention_work(q, causal=causal) / self._rates.attention_forward

    def _flash_backward(
        self, out: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Any, lse: Any, p: float, causal: bool
    ) -> float:
        return 2.5 * _attention_work(q, causal=causal) / self._rates.attention_backward

    def _documents(
        self, out: Any, q_THE: Tensor, k: Any, v: Any, begins: Any, _: Any, longest: int, *rest: Any
    ) -> float:
        return _documents_work(q_THE, longest) / self._rates.attention_forward

    def _documents_backward(
        self,
        out: Any,
        dout: Tensor,
        q_THE: Tensor,
        k: Any,
        v: Any,
        o: Any,
        lse: Any,
        begins: Any,
        _: Any,
        longest: int,
        *rest: Any,
    ) -> float:
        return 2.5 * _documents_work(q_THE, longest) / self._rates.attention_backward

    def _dequantize_4bit(self, out: Tensor, *_: Any) -> float:
        return out.numel() / self._rates.dequantize[4]

    def _dequantize_8bit(self, out: Tensor, *_: Any) -> float:
        return out.numel() / self._rates.dequantize[8]

    def _norm(self, out: Any, x: Tensor, *_: Any) -> float:
        return self._passes(_NORM_PASSES, x)

    def _norm_backward(self, out: Any, dy: Tensor, x: Tensor, *_: Any) -> float:
        return self._passes(_NORM_BACKWARD_PASSES, x)

    def _passes(self, count: float, x: Tensor) -> float:
        """Over the values of `x`, the last of which writes to new memory."""
        return x.nbytes * ((count - 1) / self._rates.elementwise + 1 / self._rates.fresh)

    def _update(self, out: Any, name: str, gradient: Tensor, *_: Any) -> float:
        beyond = 0.0 if self._ahead else self._rates.update_call - self._rates.call
        return beyond + gradient.numel() / self._rates.updates

    def _draw(self, out: Tensor, *_: Any) -> float:
        return out.numel() / self._rates.draws


def _attention_work(q: Tensor, *, causal: bool) -> float:
    """Floating-point operations of q k^T and of its product with v; half of them where the future is left out."""
    batch, heads, length, size = q.shape
    return 4.0 * batch * heads * length * length * size * (0.5 if causal else 1.0)


def _documents_work(q_THE: Tensor, longest: int) -> float:
    """The same where documents lie one behind the other, all as long as the longest one."""
    tokens, heads, size = q_THE.shape
    return 2.0 * tokens * heads * longest * size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (it for it in value if isinstance(it, Tensor))


def _takes_no_time(func: Any) -> bool:
    """Whether an op only makes a view, or memory that nothing is written to."""
    if func.name().startswith(("aten::empty", "aten::new_empty", "aten::_local", "profiler::", "prim::")):
        return True
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
