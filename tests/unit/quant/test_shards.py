"""Safetensors files of our own writing."""

from pathlib import Path

import torch
from safetensors import safe_open

from lowmem_ft.quant.checkpoint import DTYPE_NAMES, read_header
from lowmem_ft.quant.shards import write_file


def test_a_file_is_read_by_safetensors_and_is_the_same_each_time(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "turned": torch.randn(3, 7).t()}
    tensors["tied"] = tensors["turned"]
    metadata = {"format": "pt", "checksum": "0", "ä": "é"}
    write_file(tmp_path / "a", tensors, metadata)
    write_file(tmp_path / "b", dict(reversed(tensors.items())), metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read.float(), tensor.float())
    for info in read_header(tmp_path / "a")[0].values():
        assert info.offset % info.dtype.itemsize == 0
