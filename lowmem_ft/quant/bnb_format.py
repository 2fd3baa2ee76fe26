"""The safetensors layout in which bitsandbytes and transformers store a quantized linear layer, both ways.

4 bits, for a layer P: `P.weight` uint8 (n/2, 1), `P.weight.absmax`, `P.weight.quant_map`, with double quantization
`P.weight.nested_absmax` and `P.weight.nested_quant_map`, and `P.weight.quant_state.bitsandbytes__nf4` (or fp4), JSON as
uint8. 8 bits: `P.weight` int8 (O, I), `P.SCB` float32 (O,), `P.weight_format` uint8 (), 0 for row-major.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from lowmem_ft.core.json_text import read_json
from lowmem_ft.quant.ops import BLOCK, NESTED_BLOCK, Layout, QuantSpec, layout

STATE_BYTES = 256  # the JSON's room: its length depends on the offset's digits, and JSON may end in spaces
RENAMED: Mapping[str, str] = {
    "qweight": "weight", "absmax": "weight.absmax", "nested_absmax": "weight.nested_absmax",
    "nested_code": "weight.nested_quant_map",
}  # fmt: skip


def packed_layout(path: str, shape: tuple[int, int], spec: QuantSpec) -> Layout:
    """Name -> (shape, dtype) of what `pack` returns."""
    storage = layout(shape, spec)
    if spec.kind == "int8":
        return {
            f"{path}.weight": storage["qweight"],
            f"{path}.SCB": storage["scale"],
            f"{path}.weight_format": ((), torch.uint8),
        }
    names = {f"{path}.{RENAMED[name]}": entry for name, entry in storage.items() if name in RENAMED}
    names[f"{path}.weight.quant_map"] = ((16,), torch.float32)
    names[state_name(path, spec.kind)] = ((STATE_BYTES,), torch.uint8)
    return names


def pack(
    path: str, storage: Mapping[str, Tensor], *, shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The storage of a quantized (O, I) matrix under bitsandbytes' names. `dtype`: what it dequantizes to."""
    if spec.kind == "int8":
        row_major = torch.zeros((), dtype=torch.uint8)
        return {f"{path}.weight": storage["qweight"], f"{path}.SCB": storage["scale"],
                f"{path}.weight_format": row_major}  # fmt: skip
    tensors = {f"{path}.{RENAMED[name]}": tensor for name, tensor in storage.items() if name in RENAMED}
    tensors[f"{path}.weight.quant_map"] = bnb.functional.get_4bit_type(spec.type, device="cpu")
    state: dict[str, Any] = {
        "quant_type": spec.type, "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)
    }  # fmt: skip
    if spec.double_quant:
        offset = storage["nested_offset"].item()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    assert len(text) == STATE_BYTES
    tensors[state_name(path, spec.kind)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def unpack(path: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> dict[str, Tensor]:
    """The inverse of `pack`: storage tensors by the names of `quant.ops.layout`."""
    if spec.kind == "int8":
        return {"qweight": tensors[f"{path}.weight"], "scale": tensors[f"{path}.SCB"]}
    storage = {name: tensors[f"{path}.{RENAMED[name]}"] for name in ("qweight", "absmax")}
    # written with another `bnb_4bit_quant_storage`, the same bytes carry another dtype
    storage["qweight"] = storage["qweight"].contiguous().view(-1, 1).view(torch.uint8).view(-1, 1)
    if spec.double_quant:
        storage |= {name: tensors[f"{path}.{RENAMED[name]}"] for name in ("nested_absmax", "nested_code")}
        offset = read_state(tensors[state_name(path, spec.kind)])["nested_offset"]
        storage["nested_offset"] = torch.tensor(offset, dtype=torch.float32)
    return storage


def read_state(packed: Tensor) -> dict[str, Any]:
    """The JSON in a `quant_state` tensor."""
    state: dict[str, Any] = read_json(bytes(packed.cpu().numpy()))
    return state


def state_name(path: str, kind: str) -> str:
    """The name of the `quant_state` tensor of layer `path`."""
    return f"{path}.weight.quant_state.bitsandbytes__{kind}"
