"""Checkpoints that are already quantized, seen as if they held full-precision tensors under the usual names.

bitsandbytes 4-bit and 8-bit matrices can also be taken as they are stored. FP8 and MXFP4 are dequantized while they
are read, in pieces, so that what exists at any time is the bf16 tensor that was asked for and a few MiB.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from torch import Tensor

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant.bnb_format import RENAMED, packed_layout, read_state, unpack
from lowmem_ft.quant.checkpoint import CHUNK_BYTES, Checkpoint, TensorInfo, TensorSource, check_finite
from lowmem_ft.quant.ops import BLOCK, NESTED_BLOCK, QuantSpec, dequantize, layout_bytes

# The values of a 4-bit float of the OCP Microscaling formats (MX specification v1.0, section 5.3.3: E2M1), by code
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_NAMES = ("weight_scale_inv", "scale", "qscale_weight")  # of FP8 weights: DeepSeek-V3's, and two rarer ones
ACTIVATION_NAMES = ("activation_scale", "qscale_act", "input_scale")


def open_source(checkpoint: Checkpoint) -> TensorSource:
    """The checkpoint itself, or its dequantized view where it has a `quantization_config`.

    Raises:
        UnsupportedError: a quantization method, or a variant of one, that cannot be read.
    """
    config = quantization_config(checkpoint)
    if config is None:
        return checkpoint
    method = str(config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config else None))
    readers: Mapping[str, Callable[[Checkpoint, Mapping[str, Any]], TensorSource]] = {
        "bitsandbytes": BitsAndBytesSource,
        "fp8": Fp8Source,
        "mxfp4": Mxfp4Source,
    }
    if method not in readers:
        raise UnsupportedError(
            "this checkpoint is already quantized by a method that cannot be trained here",
            given=f"{method} in {checkpoint.name}",
            allowed="full precision, bitsandbytes (4 or 8 bits), fp8 (block scales), mxfp4",
            fix="use the original full-precision checkpoint of the same model; it is quantized while it loads",
        )
    return readers[method](checkpoint, config)


def stored_spec(checkpoint: Checkpoint) -> QuantSpec | None:
    """The format of a bitsandbytes checkpoint, which is used as it is; None for all others."""
    config = quantization_config(checkpoint)
    if config is None or not (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return None
    if config.get("load_in_8bit"):
        return QuantSpec(bits=8)
    return QuantSpec(
        bits=4,
        type=config.get("bnb_4bit_quant_type", "fp4"),  # transformers' default
        double_quant=bool(config.get("bnb_4bit_use_double_quant", False)),
    )


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint or of the language model in it, as a dictionary."""
    for config in (checkpoint.config, checkpoint.config.get_text_config()):
        found = getattr(config, "quantization_config", None)
        if found is not None:
            return dict(found) if isinstance(found, dict) else dict(found.to_dict())
    return None


class BitsAndBytesSource:
    """A bitsandbytes checkpoint; its matrices can be had as they are stored, or dequantized."""

    scratch_per_value: ClassVar[int] = 0  # dequantized are only a head, and what was asked for in 16 bits

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._stored: dict[str, tuple[QuantSpec, tuple[int, int]]] = {}
        self._parts: dict[str, dict[str, str]] = {}  # weight's name -> name of each part as `unpack` wants -> as stored
        for name, info in checkpoint.tensors.items():
            if ".weight.quant_state.bitsandbytes__" in name:
                self._add_4bit(name)
            elif name.endswith(".weight") and info.dtype == torch.int8:
                self._add_8bit(name)
        hidden = {part for parts in self._parts.values() for part in parts.values()}
        # other things that belong to quantized layers and that nothing here needs
        hidden |= {f"{n.removesuffix('.weight')}.weight_format" for n in self._stored}
        hidden |= {f"{n}.quant_map" for n in self._stored}
        self.tensors: Mapping[str, TensorInfo] = {n: i for n, i in checkpoint.tensors.items() if n not in hidden} | {
            name: replace(checkpoint.tensors[name], shape=shape, dtype=torch.bfloat16)
            for name, (_, shape) in self._stored.items()
        }

    def stored(self, name: str) -> tuple[QuantSpec, tuple[int, int]] | None:
        """See `StoredSource`."""
        return self._stored.get(name)

    def read_storage(self, name: str) -> dict[str, Tensor]:
        """See `StoredSource`."""
        spec, _ = self._stored[name]
        parts = {part: self._checkpoint.read(at, check=at != name) for part, at in self._parts[name].items()}
        return unpack(name.removesuffix(".weight"), parts, spec)

    def read_into(self, name: str, out: Tensor, index: int | None = None) -> None:
        """See `TensorSource`."""
        if name not in self._stored:
            return self._checkpoint.read_into(name, out, index)
        assert index is None  # quantized tensors are matrices, never stacks
        spec, shape = self._stored[name]
        storage = {part: tensor.to(out.device) for part, tensor in self.read_storage(name).items()}
        out.copy_(dequantize(storage, kind=spec.kind, shape=shape, dtype=out.dtype).view(out.shape))
        return check_finite(out, name, self._checkpoint.tensors[name].file)

    def _add_4bit(self, state_name: str) -> None:
        name, _, kind = state_name.partition(".quant_state.bitsandbytes__")
        path = name.removesuffix(".weight")
        try:
            state = read_state(self._checkpoint.read(state_name))
            rows, cols = map(operator.index, state["shape"])
            float(state.get("nested_offset", 0))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError("what is said of a quantized weight cannot be read", given=f"{state_name} ({error})",
                                  fix="get the checkpoint again") from error  # fmt: skip
        double = "nested_offset" in state
        formats = {"blocksize": (state.get("blocksize"), BLOCK), "quant_type": (state.get("quant_type"), kind)}
        if double:
            formats["nested_blocksize"] = (state.get("nested_blocksize"), NESTED_BLOCK)
            formats["nested_dtype"] = (state.get("nested_dtype"), "float32")
        known = kind in ("nf4", "fp4") and f"{name}.quant_map" in self._checkpoint.tensors
        code = self._checkpoint.read(f"{name}.quant_map") if known else None
        if code is None or not torch.equal(code, bnb.functional.get_4bit_type(kind, device="cpu")):
            formats["quant_map"] = ("another code than bitsandbytes' own", "its own")
        wrong = [f"{key} {given}" for key, (given, wanted) in formats.items() if given != wanted]
        if wrong:
            raise UnsupportedError(
                "a bitsandbytes checkpoint in a variant that cannot be read",
                given=f"{name}: {', '.join(wrong)}",
                allowed=f"nf4 or fp4 in blocks of {BLOCK}, scales plain or nested in blocks of {NESTED_BLOCK}",
                fix="use the full-precision checkpoint of the same model",
            )
        spec = QuantSpec(bits=4, type=state["quant_type"], double_quant=double)
        self._stored[name] = (spec, (rows, cols))
        wanted = [RENAMED[part] for part in (RENAMED if double else ("qweight", "absmax"))]
        self._parts[name] = {f"{path}.{part}": f"{path}.{part}" for part in wanted} | {state_name: state_name}
        self._require(name)

    def _add_8bit(self, name: str) -> None:
        path = name.removesuffix(".weight")
        rows, cols = self._checkpoint.tensors[name].shape
        self._stored[name] = (QuantSpec(bits=8), (rows, cols))
        self._parts[name] = {name: name, f"{path}.SCB": f"{path}.SCB"}
        self._require(name)
        layout_name = f"{path}.weight_format"
        if layout_name in self._checkpoint.tensors and self._checkpoint.read(layout_name).item() != 0:
            raise UnsupportedError("an 8-bit weight is stored for one kind of GPU only", given=name, allowed="rows",
                                   fix="save it again with a current bitsandbytes")  # fmt: skip

    def _require(self, name: str) -> None:
        missing = [part for part in self._parts[name].values() if part not in self._checkpoint.tensors]
        if missing:
            raise CheckpointError("a quantized weight is incomplete", given=f"{name} lacks {', '.join(missing)}",
                                  fix="get the checkpoint again")  # fmt: skip
        spec, shape = self._stored[name]
        wanted = packed_layout(name.removesuffix(".weight"), shape, spec)
        for part in self._parts[name].values():  # kernels read as many bytes as the shape asks for, and look no further
            size, due = self._checkpoint.tensors[part].nbytes, layout_bytes({part: wanted[part]})
            if size != due and "quant_state" not in part:
                raise CheckpointError("a part of a quantized weight has another size than its shape asks for",
                                      given=f"{part} of {size} bytes", allowed=f"{due} bytes for {list(shape)}",
                                      fix="get the checkpoint again")  # fmt: skip


class Fp8Source:
    """Fine-grained FP8 (DeepSeek-V3, arXiv:2412.19437, section 3.3): e4m3 weights, one scale per block of them.

    A weight of R x C with blocks of M x N has scales of ceil(R/M) x ceil(C/N); value = code x scale. Per-tensor scales
    are blocks as large as the tensor. Stacks have a leading dimension in both.
    """

    scratch_per_value: ClassVar[int] = 9  # its code 1, the same in fp32 4, its scale 4

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._block = tuple(config.get("weight_block_size") or ())
        self._scales: dict[str, str] = {}
        hidden = set()
        for name, info in checkpoint.tensors.items():
            if name.endswith(ACTIVATION_NAMES):
                hidden.add(name)  # for FP8 activations, which training does not use
            elif info.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                self._scales[name] = self._find_scale(name)
        hidden |= set(self._scales.values())
        self.tensors: Mapping[str, TensorInfo] = {
            name: replace(info, dtype=torch.bfloat16) if name in self._scales else info
            for name, info in checkpoint.tensors.items()
            if name not in hidden
        }

    def read_into(self, name: str, out: Tensor, index: int | None = None) -> None:
        """See `TensorSource`."""
        if name not in self._scales:
            return self._checkpoint.read_into(name, out, index)
        shape, scales = self.tensors[name].shape, self._read_scales(name)
        *stack, rows, cols = shape
        block_rows, block_cols = self._block_of(name, scales, rows, cols)
        matrices = range(math.prod(stack)) if index is None else range(index, index + 1)
        step = max(1, CHUNK_BYTES // 4 // (cols * block_rows)) * block_rows
        out_XRC = out.view(-1, rows, cols)
        for position, matrix in enumerate(matrices):
            for row in range(0, rows, step):
                out_RC = out_XRC[position, row : row + step]
                code_RC = torch.empty(out_RC.shape, dtype=self._checkpoint.tensors[name].dtype)
                self._checkpoint.read_elements(name, code_RC, start=(matrix * rows + row) * cols)
                first = row // block_rows
                part = scales[matrix, first : first + -(-out_RC.shape[0] // block_rows)]
                scale_RC = part.repeat_interleave(block_rows, 0)[: out_RC.shape[0]]
                scale_RC = scale_RC.repeat_interleave(block_cols, 1)[:, :cols]
                out_RC.copy_(code_RC.float().mul_(scale_RC))
        return check_finite(out, name, self._checkpoint.tensors[name].file)

    def _find_scale(self, name: str) -> str:
        candidates = [f"{name}_scale_inv", *(f"{name.removesuffix('weight')}{scale}" for scale in SCALE_NAMES)]
        found = next((scale for scale in candidates if scale in self._checkpoint.tensors), None)
        if found is None:
            raise UnsupportedError(
                "an FP8 tensor has no scales that can be read",
                given=f"{name} in {self._checkpoint.name}",
                allowed=f"{name}_scale_inv, one scale per block",
                fix="use the full-precision checkpoint of the same model",
            )
        return found

    def _read_scales(self, name: str) -> Tensor:
        """(matrices, block rows, block columns) float32."""
        raw = self._checkpoint.read(self._scales[name])
        # exponents alone (E8M0), also when they are stored as plain bytes
        values = torch.exp2(raw.float() - 127) if raw.dtype == torch.uint8 else raw.float()
        matrices = math.prod(self.tensors[name].shape[:-2])
        return values.view(matrices, *(values.shape[-2:] if values.numel() > matrices else (1, 1)))

    def _block_of(self, name: str, scales: Tensor, rows: int, cols: int) -> tuple[int, int]:
        grid_rows, grid_cols = scales.shape[1:]
        if len(self._block) == 2:
            block_rows, block_cols = self._block
            if (grid_rows, grid_cols) == (-(-rows // block_rows), -(-cols // block_cols)):
                return block_rows, block_cols
        if rows % grid_rows or cols % grid_cols:
            raise CheckpointError("FP8 scales do not fit their weight", given=f"{name}: {rows} x {cols} with "
                                  f"{grid_rows} x {grid_cols} scales", allowed=f"blocks of {self._block}")  # fmt: skip
        return rows // grid_rows, cols // grid_cols


class Mxfp4Source:
    """MXFP4 experts as gpt-oss stores them: 4-bit floats in groups of 32 with a power-of-two scale each.

    A stack N of (E, C, R) is stored as `N_blocks` uint8 (E, R, C/32, 16), low half first, and `N_scales` uint8
    (E, R, C/32), the exponent plus 127 (MX specification v1.0); it is held transposed to how it is stored.
    """

    scratch_per_value: ClassVar[int] = 22  # its code in uint8, int32 and int64, values of this piece and the last

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        tensors = dict(checkpoint.tensors)
        self._packed: set[str] = set()
        for blocks_name in [name for name in tensors if name.endswith("_blocks")]:
            name = blocks_name.removesuffix("_blocks")
            blocks, scales = tensors.pop(blocks_name), tensors.pop(f"{name}_scales", None)
            experts, rows, groups, width = blocks.shape if len(blocks.shape) == 4 else (0, 0, 0, 0)
            if scales is None or scales.shape != (experts, rows, groups) or width != 16:
                raise CheckpointError(
                    "an MXFP4 tensor is incomplete or has another form than (E, R, groups, 16)",
                    given=f"{blocks_name} {list(blocks.shape)}, {name}_scales "
                    + ("missing" if scales is None else str(list(scales.shape))),
                    fix="get the checkpoint again",
                )
            tensors[name] = replace(blocks, shape=(experts, groups * 32, rows), dtype=torch.bfloat16)
            self._packed.add(name)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read_into(self, name: str, out: Tensor, index: int | None = None) -> None:
        """See `TensorSource`."""
        if name not in self._packed:
            return self._checkpoint.read_into(name, out, index)
        experts, cols, rows = self.tensors[name].shape
        groups = cols // 32
        code = torch.tensor(E2M1, dtype=torch.float32)
        step = max(1, CHUNK_BYTES // 4 // cols)
        out_ECR = out.view(-1, cols, rows)
        for position, expert in enumerate(range(experts) if index is None else range(index, index + 1)):
            for row in range(0, rows, step):
                count = min(step, rows - row)
                bytes_RGW = torch.empty((count, groups, 16), dtype=torch.uint8)
                scales_RG1 = torch.empty((count, groups, 1), dtype=torch.uint8)
                first = (expert * rows + row) * groups
                self._checkpoint.read_elements(f"{name}_blocks", bytes_RGW, start=first * 16)
                self._checkpoint.read_elements(f"{name}_scales", scales_RG1, start=first)
                halves = torch.stack([bytes_RGW & 15, bytes_RGW >> 4], dim=-1).view(count, groups, 32)
                values_RC = torch.ldexp(code[halves.int()], scales_RG1.int() - 127).view(count, cols)
                out_ECR[position, :, row : row + count].copy_(values_RC.t())
        return check_finite(out, name, self._checkpoint.tensors[f"{name}_blocks"].file)
