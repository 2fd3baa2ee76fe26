"""Measure the machine at hand: a profile whose figures are what a training step's operations reach on it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.host import map_large_tensors
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.examples import Example
from lowmem_ft.data.packing import collate
from lowmem_ft.planner.choices import first_policy
from lowmem_ft.planner.cost import CostModel, Rates
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.profile import Bytes, Dtype, Measured, Profile, Rate, Workspaces
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.workspaces import architecture_of
from lowmem_ft.quant.ops import QuantSpec, dequantize, quantize
from lowmem_ft.quant.products import ROWS, mm, multiplies
from lowmem_ft.runtime.attention import attention
from lowmem_ft.runtime.memory import cuda_process_bytes
from lowmem_ft.runtime.optim import AdamW
from lowmem_ft.step import train_step

Done = Callable[[int, int], None]  # measurements done, in all

# Shapes of a 7B model's layer on a GPU, and of a 0.5B model's on a CPU: rows, inputs and outputs of a product; rows,
# heads, positions and size of attention; elements of what streams through memory
SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {"product": (2048, 4096, 4096), "attention": (1, 32, 2048, 128), "stream": 1 << 26},
    "cpu": {"product": (1024, 1024, 4096), "attention": (1, 12, 512, 64), "stream": 1 << 25},
}
EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "doclm-7m"
FEW_ROWS = (ROWS, 1024, 4096)  # of a product on a CPU
DISK_BYTES = 256 << 20
_SMALL = 4096  # elements of the smallest tensor whose moments are kept in 8 bits
_UNCOUNTED = 1e12  # calls per second, before they are measured
SECONDS = 0.75  # for each of about eighteen figures in each round, but that each is taken three times at least
ROUNDS = 2  # half a minute apart, since other work beside may take seconds


def measure(device: Device, *, done: Done = lambda at, of: None) -> Profile:
    """The profile of a device of this machine.

    Args:
        done: told how far it is.

    Returns:
        a profile in which all figures are measured, for `profile.write_profile`.
    """
    if device.kind == "cpu":
        map_large_tensors()  # as runs do, which pay for the pages of what they allocate
    bench = _Bench(device.torch_device)
    capability = torch.cuda.get_device_capability(device.index) if device.kind == "cuda" else None
    steps: dict[str, Callable[[], float]] = {
        **{f"flops.{name}": bench.product_of(name) for name in _dtypes(capability)},
        "memory_bandwidth": bench.reading,
        "link_to_device": bench.to_device,
        "link_to_host": bench.to_host,
        "disk_read": bench.disk,
        "attention_forward": bench.attention_forward,
        "attention_backward": bench.attention_backward,
        "elementwise": bench.elementwise,
        "dequantize_4bit": lambda: bench.dequantizing(4),
        "dequantize_8bit": lambda: bench.dequantizing(8),
        "updates": bench.updates,
        "small_updates": bench.small_updates,
        "draws": bench.draws,
        "small_steps": lambda: bench.small_steps(device),
    }
    if device.kind == "cpu":
        steps["exponentials"] = bench.exponentials
        if multiplies(torch.bfloat16):
            steps["few_rows"] = bench.few_rows
        else:
            steps["loops"] = bench.loops
    found: dict[str, float] = {}
    for at, (name, step) in enumerate([*steps.items()] * ROUNDS):
        done(at, len(steps) * ROUNDS)
        found[name] = max(step(), found.get(name, 0.0))
    if "few_rows" in found:
        rows, inputs, outputs = FEW_ROWS
        work = 2.0 * rows * inputs * outputs / found["flops.bfloat16"]
        found["packing"] = inputs * outputs * _beyond(1 / found["few_rows"], work)
    found["update_calls"] = _beyond(1 / found["small_updates"], _SMALL / found["updates"])
    done(len(steps) * ROUNDS, len(steps) * ROUNDS)
    where = f"measured on {device.name} with PyTorch {torch.__version__}: the best of several"
    today = datetime.datetime.now(datetime.UTC).date()

    def rate(name: str) -> Rate:
        return Rate(value=found[name], how="measured", source=f"{where}; lowmem_ft/planner/measure.py", date=today)

    def measured() -> Measured:
        return Measured(**{name: rate(name) for name in Measured.model_fields if name in found})

    def size(value: int, what: str) -> Bytes:
        return Bytes(value=value, how="measured", source=f"{what} on {device.name}", date=today)

    found["calls"] = _UNCOUNTED
    profile = Profile(
        name=re.sub(r"[^a-z0-9]+", "-", f"{platform.node()}-{device.name}".lower()).strip("-")[:60].strip("-"),
        title=device.name,
        kind=device.kind,
        architecture="cpu" if capability is None else architecture_of(capability),
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        sm_count=None if capability is None else torch.cuda.get_device_properties(device.index).multi_processor_count,
        memory_bytes=size(device.memory_bytes, "what the driver lets programs have"),
        display_bytes=size(device.memory_bytes - device.free_bytes, "what was taken by others"),
        context_bytes=size(_context_bytes(device), "what the process took beside tensors"),
        flops={name: rate(f"flops.{name}") for name in _dtypes(capability)},
        memory_bandwidth=rate("memory_bandwidth"),
        link_to_device=rate("link_to_device"),
        link_to_host=rate("link_to_host"),
        disk_read=rate("disk_read"),
        workspaces=_workspaces(device),
        measured=measured(),
    )
    work, count = _small_step(device, Rates.of(profile))
    found["calls"] = count * _beyond(1 / found["small_steps"], work)
    return profile.model_copy(update={"measured": measured()})


def _dtypes(capability: tuple[int, int] | None) -> tuple[Dtype, ...]:
    return ("bfloat16", "float16", "float32") if capability is None or capability >= (8, 0) else ("float16", "float32")


def _context_bytes(device: Device) -> int:
    """What the process takes beside tensors, on CUDA with the kernels that measuring has loaded."""
    if device.kind == "cpu":
        return device.process_bytes
    torch.cuda.empty_cache()
    now = (cuda_process_bytes(device.index) or 0) - torch.cuda.memory_reserved(device.index)
    return max(device.process_bytes, now)


def _workspaces(device: Device) -> Workspaces | None:
    """As they were found with the device; a run with the profile plans with them."""
    if device.kind == "cpu":
        return None
    today = datetime.datetime.now(datetime.UTC).date()
    source = (
        f"torch.cuda.memory_allocated before and after a first product on {device.name}, PyTorch {torch.__version__}"
    )
    found = {
        name: Bytes(value=getattr(device, f"{name}_workspace"), how="measured", source=source, date=today)
        for name in Workspaces.model_fields
    }
    return Workspaces(**found)


class _Bench:
    """The single measurements, each of which returns operations, values or bytes per second."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shapes = SHAPES[device.type]

    def _best(self, function: Callable[[], object]) -> float:
        """The shortest of its times, after one that warms up."""
        times: list[float] = []
        end = time.perf_counter() + SECONDS
        while len(times) < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            function()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def _random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self._device, dtype=torch.float32).to(dtype)

    @property
    def _dtype(self) -> torch.dtype:
        if self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) < (8, 0):
            return torch.float16
        return torch.bfloat16

    def product_of(self, name: str) -> Callable[[], float]:
        dtype: torch.dtype = getattr(torch, name)

        def run() -> float:
            rows, inputs, outputs = self._shapes["product"]
            a, b = self._random(rows, inputs, dtype=dtype), self._random(outputs, inputs, dtype=dtype).t()
            out = torch.empty(rows, outputs, dtype=dtype, device=self._device)
            return float(2.0 * rows * inputs * outputs / self._best(lambda: mm(a, b, out=out)))

        return run

    def few_rows(self) -> float:
        """Products per second of so few rows that the second operand counts: with a matrix as it lies and turned, as
        backward and forward have it."""
        rows, inputs, outputs = FEW_ROWS
        weights = [(self._random(outputs, inputs), self._random(inputs, outputs)) for _ in range(4)]  # beyond caches
        a = self._random(rows, inputs)

        def run() -> None:
            for turned, lying in weights:
                mm(a, turned.t())
                mm(a, lying)

        return 2 * len(weights) / self._best(run)

    def loops(self) -> float:
        a = self._random(64, 256)
        return 2.0 * 64 * 256 * 64 / self._best(lambda: torch.mm(a, a.t()))

    def reading(self) -> float:
        x = self._random(self._shapes["stream"], dtype=torch.float32)
        return float(x.nbytes / self._best(x.sum))

    def elementwise(self) -> float:
        a, b = (self._random(self._shapes["stream"], dtype=self._dtype) for _ in range(2))
        return float(3.0 * a.nbytes / self._best(lambda: a * b))

    def exponentials(self) -> float:
        x = self._random(1 << 21, dtype=torch.float32)  # so many at a time are in the loss of a CPU (runtime/loss.py)
        out = torch.empty_like(x)
        return x.numel() / self._best(lambda: torch.exp(x, out=out))

    def to_device(self) -> float:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        there = torch.empty_like(host, device=self._device)
        return host.nbytes / self._best(lambda: there.copy_(host, non_blocking=True))

    def to_host(self) -> float:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        there = torch.empty_like(host, device=self._device)
        return host.nbytes / self._best(lambda: host.copy_(there, non_blocking=True))

    def disk(self) -> float:
        block = os.urandom(1 << 20) * 8
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "read"
            with path.open("wb") as file:
                for _ in range(DISK_BYTES // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            best = 0.0
            for _ in range(2):
                with path.open("rb", buffering=0) as file:
                    if hasattr(os, "posix_fadvise"):  # else the page cache may answer
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    start = time.perf_counter()
                    while file.read(len(block)):
                        continue
                    best = max(best, DISK_BYTES / (time.perf_counter() - start))
        return best

    def _attention_step(self, *, backward: bool) -> float:
        batch, heads, length, size = self._shapes["attention"]
        q, k, v = (self._random(batch, heads, length, size, dtype=self._dtype).requires_grad_() for _ in range(3))
        out = attention(q, k, v, None, size**-0.5)
        work = 2.0 * batch * heads * length * length * size  # causal: half of q k^T and of its product with v
        if not backward:
            with torch.no_grad():
                return float(work) / self._best(lambda: attention(q, k, v, None, size**-0.5))
        gradient = torch.ones_like(out)
        return float(2.5 * work) / self._best(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))

    def attention_forward(self) -> float:
        return self._attention_step(backward=False)

    def attention_backward(self) -> float:
        return self._attention_step(backward=True)

    def dequantizing(self, bits: Any) -> float:
        _, inputs, outputs = self._shapes["product"]
        spec = QuantSpec(bits=bits)
        stored = quantize(self._random(outputs, inputs, dtype=self._dtype), spec)
        shape, dtype = (outputs, inputs), self._dtype
        return float(outputs * inputs) / self._best(
            lambda: dequantize(stored, kind=spec.kind, shape=shape, dtype=dtype)
        )

    def updates(self) -> float:
        parameter = nn.Parameter(self._random(1 << 20))
        optimizer = AdamW([parameter], lr=1e-4, bits=8)
        gradient = torch.ones_like(parameter, dtype=torch.float32)
        return parameter.numel() / self._best(lambda: optimizer.step(gradient=lambda _: gradient))

    def small_updates(self) -> float:
        """Tensors per second, of so few elements that their number counts."""
        parameters = [nn.Parameter(self._random(_SMALL)) for _ in range(16)]
        optimizer = AdamW(parameters, lr=1e-4, bits=8)
        gradient = torch.ones_like(parameters[0], dtype=torch.float32)
        return len(parameters) / self._best(lambda: optimizer.step(gradient=lambda _: gradient))

    def draws(self) -> float:
        x = self._random(self._shapes["stream"] // 4, dtype=self._dtype)
        return x.numel() / self._best(lambda: x.bernoulli_(0.9))  # a dropout of 0.1: even odds take twice as long

    def small_steps(self, device: Device) -> float:
        """Training steps per second, of so few tokens that little but calls counts: Python between them, autograd and
        what kernels take at least."""
        config, policy = _small(device)
        ready = assemble(config, policy, self._device)
        batch = collate([[Example(range(8), range(8))]], pad_id=0)
        return 1 / self._best(lambda: train_step(ready, [batch], lr=1e-4))


def _small(device: Device) -> tuple[RunConfig, Policy]:
    config = RunConfig.from_dict({"model": str(EMBEDDED_MODEL), "data": {"seq_len": 8, "packing": False}})
    return config, first_policy(config, device, 4)


def _small_step(device: Device, rates: Rates) -> tuple[float, float]:
    """Of such a step the seconds that its work takes by `rates`, and how many calls it has, whatever stands for others
    in it."""
    config, policy = _small(device)
    found = []
    for each in (rates, rates.calls_alone()):
        stage = Stage(config, policy, kind=device.kind, cost=CostModel(each, kind="cpu").seconds)
        stage.step(policy, keep=0)
        found.append(sum(stage.tracer.seconds.values()))
    return found[0], found[1]


def _beyond(seconds: float, work: float) -> float:
    """How often per second that goes, whose work takes `work` of the `seconds`, without its work."""
    return 1 / max(seconds - work, seconds / 2)
