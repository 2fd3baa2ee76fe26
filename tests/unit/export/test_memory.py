"""What a merge takes of the host's memory, seen from outside in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_ft.adapters.peft_format import save_adapter
from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from tests.models import save_tiny
from tests.unit.export.runs import CPU, policy_of

MIB = 1 << 20
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 8000}
MATRIX = 1024 * 2816  # values
PEAK = """
import json, sys
from pathlib import Path
import torch
import lowmem_ft.export.merge as merge, lowmem_ft.export.weights as weights
from lowmem_ft.core.config import RunConfig
from tests.unit.export.runs import policy_of

def high_water():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10

config = RunConfig.from_dict({"model": sys.argv[1]})
Path("/proc/self/clear_refs").write_text("5")
made = weights.MergedWeights(config, policy_of(4, "bfloat16", 6), Path(sys.argv[2]), base=sys.argv[4])
before = high_water()
merge.write_merged(made, Path(sys.argv[3]))
print(json.dumps([before, high_water()]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("large")
    save_tiny("llama", folder / "base", **SIZES)
    config = RunConfig.from_dict({"model": str(folder / "base"), "output": str(folder)})
    ready = assemble(config, policy_of(4, "bfloat16", 6), CPU, optimizer=False)
    save_adapter(ready.model, folder / "adapter", base_model="base")
    return folder / "base", folder / "adapter"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_a_merge_holds_a_matrix_at_a_time(model: tuple[Path, Path], base: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, model), str(tmp_path), base],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, most = json.loads(done.stdout)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 130 * MIB
    assert most < size + 1024 * MIB, "the promise: the largest shard and 1 GiB; here there is one"
    # what it really takes: a matrix as it is read and once more as it is dequantized (2 bytes a value each), its codes,
    # and pieces of 8 MiB. Measured: 34 MiB (dequantized), 17 MiB (original) above 418 MiB
    assert most - before < 5 * MATRIX + 40 * MIB
