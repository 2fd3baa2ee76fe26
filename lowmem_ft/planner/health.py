"""The machine, looked at before a run: what it has, what works, and what would bind first."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from lowmem_ft.core.checks import Check
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.plan_words import model_words
from lowmem_ft.core.sizes import format_size
from lowmem_ft.data.store import cache_path
from lowmem_ft.planner.alloc_conf import VARIABLES, expandable_segments
from lowmem_ft.planner.device import Device
from lowmem_ft.planner.probes import check_kernels, check_streaming
from lowmem_ft.planner.profile import load_profile
from lowmem_ft.planner.solver import make_plan
from lowmem_ft.quant.products import multiplies
from lowmem_ft.runtime.memory import cgroup_bytes

FEW_BYTES = 2 << 30  # of a disk, below which a warning says so: checkpoints, adapters and tokenized data go there
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What would bind a training run here, as a sentence, and whether it fits."""

    sentence: str
    fits: bool


def check_machine(config: RunConfig) -> Iterator[Check]:
    """Everything that can be known without a model, for runs that write where `config` says.

    A card is not opened as a run would open it (`find_device`), which fails where a kernel does not work.
    """
    yield check_build()
    cuda = torch.cuda.is_available()
    yield from check_cards() if cuda else [check_cpu()]
    native = not cuda or torch.cuda.get_device_capability(0) >= (8, 0)
    where = torch.device("cuda", 0) if cuda else torch.device("cpu")
    yield from check_kernels(where, torch.bfloat16 if native else torch.float16)
    yield from check_memory()
    yield check_folder("disk: runs", Path(config.output), "output")
    tokens = None if config.data.cache is None else cache_path(config.data.cache)
    if tokens is not None:
        yield check_folder("disk: tokenized data", tokens, "data.cache")
    yield check_folder("disk: downloaded models", Path(HF_HUB_CACHE), "HF_HUB_CACHE")
    yield check_streaming(Path(config.cache or config.output))
    yield check_allocator()
    yield check_profile(where.type)


def check_build() -> Check:
    """Whether PyTorch's build and the machine's driver go together."""
    name, driver = "CUDA", _has_driver()
    build = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch's build has no CUDA"
    if torch.cuda.is_available():
        return Check(name=name, status="ok", found=build)
    if not driver:
        return Check(name=name, status="ok", found=f"{build}, and no NVIDIA driver is here: runs use the CPU")
    fix = (
        "update the driver, or install a PyTorch for an older CUDA; CUDA_VISIBLE_DEVICES may hide the card"
        if torch.version.cuda
        else "install a CUDA build of PyTorch, from its own index: https://pytorch.org"
    )
    return Check(
        name=name, status="warning", found=f"{build}, but an NVIDIA driver is here that it cannot use", fix=fix
    )


def _has_driver() -> bool:
    return any(path.exists() for path in DRIVERS) or shutil.which("nvidia-smi") is not None


def check_cpu() -> Check:
    """The CPU, where there is no card."""
    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    units = "multiplies bfloat16 itself" if multiplies(torch.bfloat16) else "no bfloat16 units: multiplies in float32"
    return Check(name="device", status="ok", found=f"cpu ({name}), {units}")


def check_cards() -> Iterator[Check]:
    """Memory and dtypes of every card."""
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        how = "native bfloat16" if major >= 8 else "no native bfloat16: computes in float16 with loss scaling"
        found = (
            f"{torch.cuda.get_device_name(index)}, {format_size(free)} of {format_size(total)} free, "
            f"compute capability {major}.{minor}, {how}"
        )
        if free < total * 0.8:
            fix = "close what else uses the card (`nvidia-smi` lists it)"
            yield Check(name=f"device cuda:{index}", status="warning", found=found, fix=fix)
        else:
            yield Check(name=f"device cuda:{index}", status="ok", found=found)
    if find_spec("pynvml") is None:
        yield Check(
            name="nvidia-ml-py",
            status="warning",
            found="not installed, so plans assume what the CUDA context takes",
            fix="pip install 'lowmem-ft[gpu]'",
        )


def check_memory() -> Iterator[Check]:
    """RAM, and what limits a process to less than the machine has."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    found = f"{format_size(memory.available)} of {format_size(memory.total)} free, swap {format_size(swap.total)}"
    if memory.available < memory.total * 0.2:
        yield Check(name="RAM", status="warning", found=found, fix="close what else runs, or set budget.host")
    else:
        yield Check(name="RAM", status="ok", found=found)
    group = cgroup_bytes()
    if group is not None and group < memory.total:
        found = f"a control group allows {format_size(group)}, within which plans stay"
        yield Check(name="RAM limit", status="ok", found=found)
    if sys.platform != "win32":
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY and soft < memory.total:
            yield Check(
                name="RAM limit",
                status="warning",
                found=f"ulimit -v allows {format_size(soft)}, which plans do not look at",
                fix=f"set budget.host (on a CPU budget.memory) to less than {format_size(soft)}",
            )
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        text = "unlimited" if locked == resource.RLIM_INFINITY else format_size(locked)
        # the driver locks what it registers by itself; whether it does is tried on a card
        yield Check(name="locked memory", status="ok", found=f"ulimit -l {text}; only cards use pinned memory")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def check_folder(name: str, folder: Path, key: str) -> Check:
    """Whether `folder`, or the one in which it would be made, can be written, and how much room its disk has."""
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        found = f"{place} cannot be written: {error.strerror}"
        fix = f"let {key} name a folder that you may write"
        if key != "output":  # local models need no downloads, and tokenized data then lies in a temporary file
            return Check(name=name, status="warning", found=found, fix=fix)
        return Check(name=name, status="problem", found=found, fix=fix)
    free = shutil.disk_usage(place).free
    found = f"{format_size(free)} free at {place}"
    if free < FEW_BYTES:
        return Check(name=name, status="warning", found=found, fix=f"free some space, or let {key} name another disk")
    return Check(name=name, status="ok", found=found)


def check_allocator() -> Check:
    """The settings of PyTorch's allocator on CUDA, as plans read them."""
    name = next((name for name in VARIABLES if name in os.environ), None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        grows = expandable_segments()
    if name is None:
        return Check(name="allocator settings", status="ok", found="PyTorch's own (PYTORCH_ALLOC_CONF is not set)")
    found = f"{name}={os.environ[name]}"
    if told:
        return Check(
            name="allocator settings",
            status="warning",
            found="; ".join([found, *(str(it.message) for it in told)]),
            fix=f"leave out of {name} what plans do not model",
        )
    return Check(name="allocator settings", status="ok", found=found + ("; segments grow" if grows else ""))


def check_profile(kind: str) -> Check:
    """Whether the speed of this machine (`cpu` or `cuda`) was measured, into a profile in the current folder."""
    for path in sorted(Path().glob("*.yaml")):
        try:
            profile = load_profile(path)
        except ConfigError:
            continue  # some other file
        if profile.kind == kind and any(figure.how == "measured" for figure in profile.figures().values()):
            return Check(name="profile", status="ok", found=f"{path}: `budget.profile={path}` plans with its rates")
    found = "none in this folder: times are estimates; `lowmem-ft profiles measure` makes them better"
    return Check(name="profile", status="ok", found=found)


def what_limits(config: RunConfig, device: Device) -> Limit:
    """Plan the run of `config` on `device`, and say which of memory, host RAM and disk would run short first.

    Raises:
        LowMemError: as planning does, but for what does not fit.
    """
    plan = make_plan(config, device=device)
    free = shutil.disk_usage(existing(Path(config.cache or config.output))).free
    predicted = plan.predicted
    memory = "the device's memory" if device.kind == "cuda" else "RAM"
    needs = [(memory, predicted.process_peak_bytes, plan.budget["device_bytes"])]
    if device.kind == "cuda" and plan.budget["host_bytes"]:
        needs.append(("host RAM", predicted.host_peak_bytes, plan.budget["host_bytes"]))
    needs.append(("the disk", predicted.disk_bytes, free))
    what, taken, allowed = max(needs, key=lambda need: need[1] / max(need[2], 1))
    of = f"{format_size(taken)} of {format_size(allowed)} ({taken / max(allowed, 1):.0%})"
    run = f"{model_words(plan)} with sequences of {plan.run_config.data.seq_len} tokens"
    if plan.fits and taken <= allowed:
        return Limit(sentence=f"{run} fits; {what} would bind first: {of}.", fits=True)
    changes = " or ".join(f"{change.key}={change.value}" for change in plan.changes)
    more = f" What would make it fit: {changes}." if changes else ""
    return Limit(sentence=f"{run} does not fit; {what} binds: {of}.{more}", fits=False)
