"""The machine that a plan is made for: its memory, what the process holds already, and how fast it multiplies."""

from __future__ import annotations

import functools
import gc
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from lowmem_ft.core.errors import ConfigError, UnsupportedError, nearest
from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.data.packing import as_bounds
from lowmem_ft.planner.cost import CostModel, Rates, large_product
from lowmem_ft.planner.pipeline import Links
from lowmem_ft.planner.profile import SUFFIXES, Profile, load_profile, near_profile, profile_names
from lowmem_ft.planner.trace import Cost
from lowmem_ft.planner.workspaces import derived_workspaces, measured_workspaces
from lowmem_ft.quant.ops import QuantSpec, dequantize, quantize
from lowmem_ft.quant.products import mm, multiplies
from lowmem_ft.runtime.attention import attention
from lowmem_ft.runtime.memory import cgroup_bytes, cuda_process_bytes, process_bytes
from lowmem_ft.runtime.optim import AdamW

# The CUDA context takes 290-670 MB by card and driver; the upper end is assumed where nvidia-ml-py (extra `gpu`) is not
# there to measure it.
CUDA_CONTEXT_BYTES = 670 * 10**6
# Kernels that a run loads later than `load_kernels`, and streams for copies: at most 22 MiB were measured on an H200 in
# runs of some twenty architectures, in three dtypes
LATER_BYTES = 24 << 20
# RSS of a process beside a card before it loads a model, and what it takes later for kernels that CUDA loads and their
# tables: an H200's runs took 1.54 GiB after `load_kernels`, and 0.41 to 0.59 more until their end. Beside a card that
# is known from its profile only both are assumed
LATER_HOST_BYTES = 640 << 20
HOST_PROCESS_BYTES = (1600 << 20) + LATER_HOST_BYTES
# Of a row of an embedding on a disk, beside its bytes: 73 to 89 us were measured for 6 KB rows on the machine of
# fit.json; it is the disk's latency, so a profile's bandwidth says nothing of it.
LOOKUP_SECONDS = 75e-6
MATMUL_SECONDS = 0.1  # that products are timed for, at least
SIMILAR_TO_CUDA = "rtx-3090-24gb"  # whose ratios of bandwidth to arithmetic are taken for a card without a profile


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Facts of one device; sizes in bytes, speed in floating-point operations per second.

    Attributes:
        free_bytes: what the process may take in all: what nobody has, and what it has already.
        process_bytes: what the process takes of the device before a model is loaded, beside PyTorch's pool.
        compute_dtype: the fastest dtype that trains there: bfloat16, or float16 on CUDA cards before Ampere.
        profile: name or file of its profile, if that is where the facts come from, or of one that is here its rates.
        present: False for a device that is known from its profile only: one can plan for it, not train on it.
        host_free_bytes: beside a card, what the process may take of RAM; 0 where that is unknown, as for a profile.
        host_process_bytes: beside a card, what the process takes of RAM before a model is loaded.
        compute_capability, sm_count: as in a profile; None and 0 for a CPU.
        forward_workspace, bias_workspace, backward_workspace: see `profile.Workspaces`; 0 for a CPU.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    index: int
    memory_bytes: int
    free_bytes: int
    process_bytes: int
    compute_dtype: Literal["bfloat16", "float16"]
    flops: float
    present: bool = True
    profile: str | None = None
    host_free_bytes: int = 0
    host_process_bytes: int = 0
    compute_capability: str | None = None
    sm_count: int = 0
    forward_workspace: int = 0
    bias_workspace: int = 0
    backward_workspace: int = 0

    @property
    def torch_device(self) -> torch.device:
        """The device as PyTorch names it.

        Raises:
            UnsupportedError: it is known from its profile only.
        """
        if not self.present:
            raise UnsupportedError(
                "This device is known from its profile only: one can plan for it here, not run on it.",
                given=self.name,
                fix="set budget.device: auto",
            )
        return torch.device("cuda", self.index) if self.kind == "cuda" else torch.device("cpu")

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON holds them."""
        return asdict(self)


def find_device(name: str, rates: str | None = None) -> Device:
    """The device called `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda`, `cuda:N`, or a profile's name.

    `cpu` is always this machine's; the profile of that name describes another.

    Args:
        rates: the profile that says how fast a device is that is here, such as a file that was measured on it; by
            default that of a similar one, in proportion to a product of matrices that is timed now.

    Raises:
        UnsupportedError: no such device on this machine, and no such profile.
        ConfigError: the profile's file is not valid, or of another kind of device.
    """
    found = _find(name)
    if rates is None:
        return found
    profile = load_profile(rates)
    if not found.present:
        raise ConfigError(
            "budget.profile is of a device that is here.",
            given=f"budget.device: {name}",
            fix="a profile to plan for has its own rates: leave budget.profile out",
        )
    if profile.kind != found.kind:
        raise ConfigError(
            "The profile is of another kind of device.", given=f"{rates}, kind {profile.kind}", allowed=found.kind
        )
    return replace(found, profile=rates)


def _find(name: str) -> Device:
    kind, _, index = name.partition(":")
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    present = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if kind == "cpu" and not index:
        return _cpu()
    if kind == "cuda" and (index or "0").isdigit() and f"cuda:{index or 0}" in present:
        return _cuda(int(index or 0))
    if name in profile_names() or Path(name).suffix in SUFFIXES:
        return _from_profile(load_profile(name), name)
    close = nearest(name, present) or near_profile(name)
    if kind in ("cuda", "gpu"):
        close = "cuda" if torch.cuda.is_available() else None  # and not `cpu`, which looks like it
    raise UnsupportedError(
        "No such device.",
        given=name,
        allowed=f"{', '.join(present)}, or a profile (`lowmem-ft profiles list`)",
        fix=f"did you mean '{close}'?" if close else "leave it at auto; `lowmem-ft doctor` says what is here",
    )


def cost_of(device: Device) -> Cost:
    """Seconds of operations on `device`."""
    return CostModel(rates_of(device), kind=device.kind).seconds


def rates_of(device: Device) -> Rates:
    """What `device` reaches, by its profile; one without by a similar one's, with products in proportion, and attention
    too where the number of cores is what differs."""
    profile = _profile_of(device)
    rates = Rates.of(profile)
    if device.profile is None:
        faster = device.flops / large_product(profile.flops[device.compute_dtype])
        products = {dtype: rate * faster for dtype, rate in rates.products.items()}
        cores = faster if device.kind == "cpu" else 1.0
        rates = replace(
            rates,
            products=products,
            attention_forward=rates.attention_forward * cores,
            attention_backward=rates.attention_backward * cores,
        )
    return rates


def links_of(device: Device) -> Links:
    """What copies between the device and the tiers below it reach. From disk they go through the host, side by side.

    A disk is assumed to be written as fast as it is read, of which alone profiles have a figure.
    """
    profile = _profile_of(device)
    link, disk = profile.link_to_device.value, profile.disk_read.value
    if device.kind == "cpu":
        return Links(host=link, disk=disk, down=disk, up=disk, lookup=LOOKUP_SECONDS)
    return Links(host=link, disk=min(link, disk), down=profile.link_to_host.value, up=link, lookup=LOOKUP_SECONDS)


def _profile_of(device: Device) -> Profile:
    if device.profile is not None:
        return load_profile(device.profile)
    if device.kind == "cpu":
        return load_profile("cpu-bf16" if multiplies(torch.bfloat16) else "cpu")
    return load_profile(_similar_card(device))


@functools.cache  # which reads all of them
def _similar_card(device: Device) -> str:
    """The profile that ships of a card like this one: of the same architecture, with as many processors and about the
    same memory; else `SIMILAR_TO_CUDA`."""
    for name in profile_names():
        profile = load_profile(name)
        same = (profile.compute_capability, profile.sm_count) == (device.compute_capability, device.sm_count)
        if same and math.isclose(profile.memory_bytes.value, device.memory_bytes, rel_tol=0.1):
            return name
    return SIMILAR_TO_CUDA


def _from_profile(profile: Profile, name: str) -> Device:
    kept = profile.workspaces
    if kept is None and profile.architecture != "cpu":
        kept = derived_workspaces(profile.architecture)
    return Device(
        name=profile.name,
        kind=profile.kind,
        index=0,
        memory_bytes=profile.memory_bytes.value,
        free_bytes=profile.memory_bytes.value - profile.display_bytes.value,
        process_bytes=profile.context_bytes.value,
        compute_dtype=profile.fastest_dtype,
        flops=profile.flops[profile.fastest_dtype].value,
        present=False,
        profile=name,
        host_process_bytes=HOST_PROCESS_BYTES if profile.kind == "cuda" else 0,
        compute_capability=profile.compute_capability,
        sm_count=profile.sm_count or 0,
        forward_workspace=kept.forward.value if kept else 0,
        bias_workspace=kept.bias.value if kept else 0,
        backward_workspace=kept.backward.value if kept else 0,
    )


def _cpu() -> Device:
    flops = _matmul_flops(torch.device("cpu"), torch.bfloat16)  # starts threads and loads kernels, which stay
    release_freed_memory()
    free, taken = _free_and_taken()
    return Device(
        name=f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)",
        kind="cpu",
        index=0,
        memory_bytes=int(psutil.virtual_memory().total),
        free_bytes=free,
        process_bytes=taken,
        compute_dtype="bfloat16",
        flops=flops,
    )


def _cuda(index: int) -> Device:
    where, capability = torch.device("cuda", index), torch.cuda.get_device_capability(index)
    bf16 = capability >= (8, 0)
    dtype = torch.bfloat16 if bf16 else torch.float16
    flops = _matmul_flops(where, dtype)
    kept = measured_workspaces(where)
    load_kernels(where, dtype)
    gc.collect()
    torch.cuda.empty_cache()  # what was taken so far would count as reserved by the run that follows
    taken, reserved = cuda_process_bytes(index), torch.cuda.memory_reserved(index)
    beside = CUDA_CONTEXT_BYTES if taken is None else taken - reserved
    free, total = torch.cuda.mem_get_info(index)
    host_free, host_taken = _free_and_taken()
    return Device(
        name=torch.cuda.get_device_name(index),
        kind="cuda",
        index=index,
        memory_bytes=total,
        free_bytes=min(total, free + beside + reserved),
        process_bytes=beside + LATER_BYTES,
        host_free_bytes=host_free,
        host_process_bytes=host_taken + LATER_HOST_BYTES,
        compute_dtype="bfloat16" if bf16 else "float16",
        flops=flops,
        compute_capability=f"{capability[0]}.{capability[1]}",
        sm_count=torch.cuda.get_device_properties(index).multi_processor_count,
        forward_workspace=kept["forward"],
        bias_workspace=kept["bias"],
        backward_workspace=kept["backward"],
    )


def load_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Run what a step runs, once and small: CUDA loads each kernel into the context when it is first called."""
    x = torch.ones(1, 2, 64, 64, device=device, dtype=dtype).requires_grad_()
    visible = torch.ones(1, 1, 64, 64, device=device, dtype=torch.bool)
    for mask in (None, visible, as_bounds([0, 32, 64]).expand(1, 1, 64, -1)):
        torch.autograd.backward(attention(x, x, x, mask, 0.125).square().sum())
    for bits in (4, 8):
        spec = QuantSpec(bits=bits)
        stored = quantize(x.detach().view(64, -1), spec)
        dequantize(stored, kind=spec.kind, shape=(64, 128), dtype=dtype)
    for size in (8, 32):
        parameter = torch.nn.Parameter(torch.ones(4096, device=device, dtype=dtype))
        AdamW([parameter], lr=0.0, bits=size).step(gradient=lambda p: torch.ones_like(p, dtype=torch.float32))


def _free_and_taken() -> tuple[int, int]:
    """Bytes of this machine's RAM that the process may take, and those of them that it has."""
    taken, limit = process_bytes(), cgroup_bytes()
    free = int(psutil.virtual_memory().available) + taken
    return free if limit is None else min(free, limit), taken


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product of the size of a small model's layer, the best of three or more: where
    others work beside, a product waits for its processors now and then."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best, times, end = float("inf"), 0, time.perf_counter() + MATMUL_SECONDS
    while times < 4 or time.perf_counter() < end:  # the first one warms up
        start = time.perf_counter()
        mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, times = min(best, time.perf_counter() - start), times + 1
    return 2.0 * size**3 / best
