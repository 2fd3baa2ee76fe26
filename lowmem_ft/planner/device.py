"""The machine that a plan is made for: its memory, what the process holds already, and how fast it multiplies."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from lowmem_ft.core.errors import UnsupportedError, nearest
from lowmem_ft.core.host import release_freed_memory
from lowmem_ft.planner.cost import CostModel, Rates
from lowmem_ft.planner.profile import Profile, load_profile, profile_names
from lowmem_ft.planner.trace import Cost
from lowmem_ft.quant.products import mm
from lowmem_ft.runtime.memory import cuda_process_bytes, process_bytes

# The CUDA context takes 290-670 MB by card and driver (design.md, "Facts already measured"); the upper end is assumed
# where nvidia-ml-py (extra `gpu`) is not there to measure it.
CUDA_CONTEXT_BYTES = 670 * 10**6
# RSS of a process before it loads a model, beside a card that is known from its profile only. An assumption: 440 MiB
# were measured with PyTorch's CPU build (torch, transformers and this package imported, one plan made); the rest is for
# the libraries and the context of CUDA. Where the card is here, this process is measured.
HOST_PROCESS_BYTES = 1 << 30
SIMILAR_TO_CUDA = "rtx-3090-24gb"  # whose ratios of bandwidth to arithmetic are taken for a card without a profile


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Facts of one device; sizes in bytes, speed in floating-point operations per second.

    Attributes:
        process_bytes: what the process takes of the device before a model is loaded.
        compute_dtype: the fastest dtype that trains there: bfloat16, or float16 on CUDA cards before Ampere.
        profile: name or file of its profile, if that is where the facts come from.
        present: False for a device that is known from its profile only: one can plan for it, not train on it.
        host_free_bytes: beside a card, what the process may take of RAM; 0 where that is unknown, as for a profile.
        host_process_bytes: beside a card, what the process takes of RAM before a model is loaded.
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


def find_device(name: str) -> Device:
    """The device called `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda`, `cuda:N`, or a profile's name.

    `cpu` is always this machine's; the profile of that name describes another.

    Raises:
        UnsupportedError: no such device on this machine, and no such profile.
        ConfigError: the profile's file is not valid.
    """
    kind, _, index = name.partition(":")
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    present = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if kind == "cpu" and not index:
        return _cpu()
    if kind == "cuda" and (index or "0").isdigit() and f"cuda:{index or 0}" in present:
        return _cuda(int(index or 0))
    if name in profile_names() or Path(name).suffix in (".yaml", ".yml"):
        return _from_profile(load_profile(name), name)
    close = nearest(name, [*present, *profile_names()])
    raise UnsupportedError(
        "No such device.",
        given=name,
        allowed=f"{', '.join(present)}, or a profile (`lowmem-ft profiles list`)",
        fix=f"did you mean '{close}'?" if close else "set budget.device, or leave it at auto",
    )


def cost_of(device: Device) -> Cost:
    """Seconds of operations on `device`, by its profile; of a device without one by a similar one's, in proportion."""
    profile = load_profile(device.profile or ("cpu" if device.kind == "cpu" else SIMILAR_TO_CUDA))
    rates = Rates.of(profile)
    if device.profile is None:
        faster = device.flops / profile.flops[device.compute_dtype].value
        products = {dtype: rate * faster for dtype, rate in rates.products.items()}
        rates = replace(rates, products=products)
    return CostModel(rates, kind=device.kind).seconds


def _from_profile(profile: Profile, name: str) -> Device:
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
    free, total = torch.cuda.mem_get_info(index)
    bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
    flops = _matmul_flops(torch.device("cuda", index), torch.bfloat16 if bf16 else torch.float16)  # makes the context
    host_free, host_taken = _free_and_taken()
    return Device(
        name=torch.cuda.get_device_name(index),
        kind="cuda",
        index=index,
        memory_bytes=total,
        free_bytes=free,
        process_bytes=(cuda_process_bytes(index) or CUDA_CONTEXT_BYTES) - torch.cuda.memory_reserved(index),
        host_free_bytes=host_free,
        host_process_bytes=host_taken,
        compute_dtype="bfloat16" if bf16 else "float16",
        flops=flops,
    )


def _free_and_taken() -> tuple[int, int]:
    """Bytes of this machine's RAM that the process may take, and those of them that it has."""
    taken = process_bytes()
    return int(psutil.virtual_memory().available) + taken, taken


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product of the size of a small model's layer, the best of three."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
