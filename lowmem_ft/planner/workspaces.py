"""What libraries keep of the CUDA allocator's pool: by architecture, by environment, or measured.

PyTorch gives each pair of cuBLAS handle and stream a workspace at its first product and never takes it back. A handle
belongs to a thread, and autograd runs backward on a thread of its own: so there are two (the headers of 2.11.0, 2.12.1
and 2.13.0 all key workspaces by handle and stream). A run finds its device first, which makes all of them.
"""

from __future__ import annotations

import datetime
import gc
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_ft.planner.profile import Bytes, Workspaces

_WHERE = "aten/src/ATen/cuda/CublasHandlePool.cpp"
_READ = datetime.date(2026, 11, 24)


def _derived(value: int, source: str) -> Bytes:
    return Bytes(value=value, how="derived", source=source, date=_READ)


_SMALL = _derived((2 * 4096 + 8 * 16) << 10, f"PyTorch 2.13, {_WHERE}, parseChosenWorkspaceSize")
_LARGE = _derived(32 << 20, f"{_SMALL.source}; older ones give Blackwell less")
# 2.13 lets cuBLASLt have the workspace of cuBLAS; before, one of its own was made
_BIAS = _derived(1 << 20, f"PyTorch up to 2.12, {_WHERE}, parseCUDABlasLtWorkspaceSize")
_NO_BIAS = _derived(0, f"PyTorch 2.13, {_WHERE}, getCUDABlasLtWorkspace")
BLAS: Mapping[str, Bytes] = {
    **dict.fromkeys(("volta", "turing", "ampere", "ada"), _SMALL),
    **dict.fromkeys(("hopper", "blackwell"), _LARGE),
}

Architecture = Literal["volta", "turing", "ampere", "ada", "hopper", "blackwell"]
_ARCHITECTURES: Mapping[Any, Architecture] = {
    (7, 0): "volta", (7, 5): "turing", (8, 9): "ada", 8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell",
}  # fmt: skip


def architecture_of(capability: tuple[int, int]) -> Architecture:
    """NVIDIA's name for cards of a compute capability; of newer ones than are known the newest."""
    return _ARCHITECTURES.get(capability) or _ARCHITECTURES.get(capability[0], "blackwell")


def derived_workspaces(
    architecture: str, *, environ: Mapping[str, str] = os.environ, version: str = torch.__version__
) -> Workspaces:
    """What PyTorch's source says, for cards of an architecture in this environment."""
    blas = BLAS[architecture]
    parts = re.findall(r":(\d+):(\d+)", environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if parts:
        blas = _derived(sum(int(size) * int(count) for size, count in parts) << 10, "CUBLAS_WORKSPACE_CONFIG")
    separate = tuple(int(part) for part in version.split(".")[:2]) < (2, 13)
    return Workspaces(forward=blas, bias=_BIAS if separate else _NO_BIAS, backward=blas)


def measured_workspaces(device: torch.device) -> dict[str, int]:
    """Bytes by the names of `Workspaces`, as the allocator counts them on this card; they stay allocated."""
    a = torch.ones(256, 256, device=device, dtype=torch.float16)
    x, out = a.clone().requires_grad_(), torch.empty_like(a)
    # what was used before must not be freed meanwhile; autograd's thread holds its last pass until the next one
    gc.collect()
    nothing = torch.empty(0, device=device, requires_grad=True)
    torch.autograd.grad(nothing.view(0), nothing, torch.empty_like(nothing))
    torch._C._cuda_clearCublasWorkspaces()
    steps: dict[str, Callable[[], object]] = {
        "forward": lambda: torch.mm(a, a, out=out),
        "bias": lambda: torch.addmm(a[0], a, a, out=out),
        "backward": lambda: torch.autograd.grad(_Product.apply(x, out, False), x, a),  # type: ignore[no-untyped-call]
        "bias in backward": lambda: torch.autograd.grad(_Product.apply(x, out, True), x, a),  # type: ignore[no-untyped-call]
    }
    found = {}
    for name, step in steps.items():
        before = torch.cuda.memory_allocated(device)
        step()
        found[name] = torch.cuda.memory_allocated(device) - before
    assert found.pop("bias in backward") == found["bias"], "each thread has the same"
    return found


class _Product(torch.autograd.Function):
    """Multiplies in backward, into memory that is there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, bias: bool) -> Tensor:
        ctx.out, ctx.bias = out, bias
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.out.zero_()  # gives this thread a context, of which cuBLAS warns where it has to
        if ctx.bias:
            torch.addmm(dy[0], dy, dy, out=ctx.out)
        else:
            torch.mm(dy, dy, out=ctx.out)
        return dy, None, None
