"""What users install."""

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import lowmem_ft

WHEEL_BYTES = 25 * 10**6  # the most that a wheel may have


def test_the_package_is_small_and_brings_what_the_demo_needs() -> None:
    """Not even packed: a wheel is smaller (`benchmarks/results/first_run.json`)."""
    package = Path(str(files("lowmem_ft")))
    held = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in held) < WHEEL_BYTES
    names = {str(path.relative_to(package)) for path in held}
    assert {"assets/doclm-7m/model.safetensors", "assets/whatis-train.jsonl", "assets/whatis-eval.jsonl"} <= names
    assert {"docs/install.md", "docs/train.md"} <= names


def test_the_package_says_its_version() -> None:
    assert lowmem_ft.__version__ == version("lowmem-ft")
