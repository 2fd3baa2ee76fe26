"""What the host's allocator gives back, seen from the process's own size."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux only")
def test_freed_tensors_leave_no_holes() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 20
