#!/usr/bin/env bash
# Fill .unsloth/ in the repository's root with the Python 3.12 x86-64 wheels of Unsloth, and of what it needs beside
# PyTorch, transformers, peft and this project's own requirements, for a GPU machine without a network. There:
#   python3 -m pip install --no-index --no-deps --target /tmp/unsloth .unsloth/*.whl
#   python3 benchmarks/gpu.py --unsloth /tmp/unsloth ...
# Its wheel is repacked without its web interface, which is most of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -rf .unsloth && mkdir .unsloth
platforms=()
for version in manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${version}_x86_64")
done
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  -d .unsloth unsloth unsloth_zoo 'trl<=1.15.0' 'datasets<5' cut_cross_entropy torchao tyro json5 nest_asyncio structlog \
  hf_transfer msgspec diffusers docstring_parser typeguard 'dill<0.4.2' 'multiprocess<0.70.20'
python3 - <<'P'
import pathlib, zipfile
[wheel] = pathlib.Path(".unsloth").glob("unsloth-*.whl")
whole = wheel.rename(wheel.with_suffix(".whole"))
with zipfile.ZipFile(whole) as old, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
    for name in old.namelist():
        if not name.startswith("studio/"):
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                data = b"\n".join(line for line in data.splitlines() if not line.startswith(b"studio/"))
            new.writestr(name, data)
whole.unlink()
P
ls -la .unsloth && du -sh .unsloth
