"""What the host's allocator gives back, seen from the process's own size."""

from __future__ import annotations

import subprocess
import sys

import pytest

GLIBC = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux only")
HOLES = """
import torch
from lowmem_ft.core.host import LARGE, map_large_tensors
from lowmem_ft.runtime.memory import process_bytes
map_large_tensors()
start = process_bytes()
small = []
large = []
for _ in range(40):  # each large tensor is followed by one that stays
    large.append(torch.ones(LARGE // 4))
    small.append(torch.ones(1000))
assert process_bytes() - start > 39 * LARGE, "the tensors are there"
large.clear()
print(process_bytes() - start)
"""


NORMS = """
import gc
import torch
from torch import nn
from lowmem_ft.adapters.inject import inject_lora
from lowmem_ft.core.host import map_large_tensors, release_freed_memory
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.ops import QuantSpec, quantize
from lowmem_ft.runtime.memory import process_bytes

def left_by_dora(sizes):
    spec = QuantSpec(bits=8)
    model = nn.Sequential(*(QuantLinear(size, 1024, bias=False, spec=spec) for size in sizes))
    for layer in model:
        layer.load_storage(quantize(torch.ones(layer.shape), spec))
    gc.collect()
    release_freed_memory()
    start = process_bytes()
    inject_lora(model, dora=True)
    return process_bytes() - start - sum(it.nbytes for it in model.parameters() if it.requires_grad)

map_large_tensors()
left_by_dora([512])  # what libraries allocate once is nobody's
print(left_by_dora(range(512, 1536, 8)))  # matrices of 1 to 3 MiB, dequantized one by one between the adapters
"""


@GLIBC
def test_freed_tensors_leave_no_holes() -> None:
    assert printed(HOLES) < 8 << 20


@GLIBC
def test_norms_for_dora_leave_no_holes() -> None:
    """Measured: 10 MiB, and 97 where the holes stay."""
    assert printed(NORMS) < 32 << 20


def printed(program: str) -> int:
    """The number that a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
