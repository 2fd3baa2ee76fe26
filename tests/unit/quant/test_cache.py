"""The cache of quantized weights: complete or not there, readable by transformers where it can be, never stale."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem_ft.quant.cache as cache_module
import lowmem_ft.quant.loader as loader_module
from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.core.files import writing_prefix
from lowmem_ft.quant import shards
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.ops import QuantSpec
from tests.models import ARCHITECTURES, MOE_ARCHITECTURES, save_tiny
from tests.unit.quant.loading import BF16, NF4, TOKENS, load, logits, relative
from tests.unit.quant.test_prequantized import FORMATS, ROUND, save_bitsandbytes, save_fp8

NOT_FOR_TRANSFORMERS = MOE_ARCHITECTURES | {"falcon"}
WIDE = {**ROUND, "gemma2": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}, "mpt": {"d_model": 64},
        "starcoder2": {"hidden_size": 64, "intermediate_size": 128}}  # fmt: skip


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "quantize", lambda *_: pytest.fail("nothing is to be quantized"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_second_load_quantizes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = save_tiny(name, tmp_path / "model"), tmp_path / "cache"
    without, _ = load(folder)
    first, wrote = load(folder, cache=cache)
    forbid_quantizing(monkeypatch)
    second, read = load(folder, cache=cache)
    assert (wrote.from_cache, read.from_cache) == (False, True)
    assert wrote.cache == read.cache
    for one, other in ((first, without), (second, without)):
        tensors = dict(other.state_dict(keep_vars=True))
        assert {k: v.dtype for k, v in one.state_dict().items()} == {k: v.dtype for k, v in tensors.items()}
        for key, value in one.state_dict().items():
            assert torch.equal(value, tensors[key]), key
        assert one.all_tied_weights_keys == other.all_tied_weights_keys
    assert torch.equal(logits(second), logits(without))


@pytest.mark.parametrize("kind", ["nf4-double", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", WIDE)
def test_transformers_loads_the_cache(name: str, kind: str, tmp_path: Path) -> None:
    model, report = load(save_tiny(name, tmp_path / "model", **WIDE[name]), FORMATS[kind][0], cache=tmp_path / "cache")
    assert report.cache is not None
    theirs = _from_cache(report.cache)
    converted = {path for path, m in theirs.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert converted == set(report.quantized)
    for path in report.quantized:  # the very same codes
        ours = model.get_submodule(path).qweight.view(-1)
        assert torch.equal(theirs.get_submodule(path).weight.data.view(-1).view(ours.dtype), ours)
    # Measured: equal, in 4 bits and, since in train mode theirs is weight-only too, in 8 bits.
    assert relative(logits(model), logits(theirs)) < 1e-2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", sorted(NOT_FOR_TRANSFORMERS))
def test_what_transformers_cannot_read_it_refuses(name: str, bits: Any, tmp_path: Path) -> None:
    _, report = load(save_tiny(name, tmp_path / "model"), QuantSpec(bits=bits), cache=tmp_path / "cache")
    assert report.cache is not None
    with pytest.raises(OSError, match="no file named"):
        _from_cache(report.cache)
    with pytest.raises(UnsupportedError, match="entry of the cache"):
        load(report.cache)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - NOT_FOR_TRANSFORMERS))
def test_a_cache_entry_is_itself_a_bitsandbytes_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, report = load(save_tiny(name, tmp_path / "model"), cache=tmp_path / "cache")
    assert report.cache is not None
    forbid_quantizing(monkeypatch)
    again, second = load(report.cache, QuantSpec(bits=8))
    assert second.spec == NF4
    assert torch.equal(logits(again), logits(model))


def test_entries_differ_by_content_format_and_type(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, two = save_tiny("llama", tmp_path / "one"), save_tiny("llama", tmp_path / "two", seed=1)
    specs = [NF4, QuantSpec(double_quant=False), QuantSpec(type="fp4"), QuantSpec(bits=8)]
    entries = {load(folder, spec, cache=cache)[1].cache for folder in (one, two) for spec in specs}
    assert len(entries) == 8
    assert load(save_tiny("llama", tmp_path / "same"), cache=cache)[1].from_cache, "the same content elsewhere"


def test_nothing_is_cached_where_nothing_is_quantized(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    assert load(folder, BF16, cache=tmp_path / "cache")[1].cache is None
    prequantized = save_bitsandbytes("llama", tmp_path / "bnb", FORMATS["nf4"][1], **ROUND["llama"])
    assert load(prequantized, cache=tmp_path / "cache")[1].cache is None
    assert not (tmp_path / "cache").exists()


def test_what_is_dequantized_first_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_fp8("llama", tmp_path / "model", (16, 16))
    first, _ = load(tmp_path / "model", cache=tmp_path / "cache")
    forbid_quantizing(monkeypatch)
    second, report = load(tmp_path / "model", cache=tmp_path / "cache")
    assert report.from_cache
    assert torch.equal(logits(first), logits(second))


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    folder = save_tiny("llama", tmp_path / "model", **WIDE["llama"])
    first, report = load(folder, cache=tmp_path / "cache")
    assert report.cache is not None
    assert len(list(report.cache.glob("*.safetensors"))) > 3
    second, again = load(folder, cache=tmp_path / "cache")
    assert again.from_cache
    assert torch.equal(logits(first), logits(second))
    assert relative(logits(first), logits(_from_cache(report.cache))) < 1e-2


def truncate(entry: Path) -> None:
    file = next(entry.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)


def lose_a_file(entry: Path) -> None:
    next(entry.glob("*.safetensors")).unlink()


def lose_the_marker(entry: Path) -> None:
    (entry / cache_module.MARKER).unlink()


def spoil_the_marker(entry: Path) -> None:
    (entry / cache_module.MARKER).write_text("{")


def come_from_another_version(entry: Path) -> None:
    marker = json.loads((entry / cache_module.MARKER).read_text())
    (entry / cache_module.MARKER).write_text(json.dumps(marker | {"transformers": "4.0.0"}))


def hold_something_else(entry: Path) -> None:
    (entry / "model.safetensors.index.json").unlink()
    next(entry.glob("*.safetensors")).rename(entry / "model.safetensors")
    marker = json.loads((entry / cache_module.MARKER).read_text())
    del marker["checksums"]["model.norm.weight"]
    (entry / cache_module.MARKER).write_text(json.dumps(marker))


def list_for_marker(entry: Path) -> None:
    (entry / cache_module.MARKER).write_text("[]")


def file_for_folder(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("a copy that went wrong")


@pytest.mark.parametrize(
    "damage",
    [
        truncate, lose_a_file, lose_the_marker, spoil_the_marker, list_for_marker, file_for_folder,
        come_from_another_version, hold_something_else,
    ],
)  # fmt: skip
def test_a_damaged_entry_is_made_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    model, report = load(folder, cache=tmp_path / "cache")
    assert report.cache is not None
    damage(report.cache)
    again, second = load(folder, cache=tmp_path / "cache")
    assert not second.from_cache
    assert torch.equal(logits(model), logits(again))
    assert load(folder, cache=tmp_path / "cache")[1].from_cache


def test_an_entry_that_may_not_be_removed_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache that several share, of whom one has another transformers."""
    folder = save_tiny("llama", tmp_path / "model")
    _, report = load(folder, cache=tmp_path / "cache")
    assert report.cache is not None
    come_from_another_version(report.cache)
    remove = shutil.rmtree

    def denied(path: Path, ignore_errors: bool = False) -> None:  # root may remove everything
        if path != report.cache:
            remove(path, ignore_errors)
        elif not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", denied)
    assert not load(folder, cache=tmp_path / "cache")[1].from_cache


def test_damaged_content_is_refused_and_then_made_again(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    _, report = load(folder, cache=tmp_path / "cache")
    assert report.cache is not None
    file = next(report.cache.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="cache of quantized weights was damaged"):
        load(folder, cache=tmp_path / "cache")
    assert not load(folder, cache=tmp_path / "cache")[1].from_cache
    assert load(folder, cache=tmp_path / "cache")[1].from_cache


def test_no_space_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = save_tiny("llama", tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(loader_module, "quantize", lambda *_: pytest.fail("too late"))
    with pytest.raises(CheckpointError, match="no space left"):
        load(folder, cache=cache)
    assert [path.name for path in cache.iterdir()] == ["fingerprints.json"]


FULL = """
import resource, signal, sys
from pathlib import Path
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.loader import load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec

checkpoint = Checkpoint.open(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a file that cannot grow: EFBIG, as a full quota
load_weights(meta_model(checkpoint), checkpoint, spec=QuantSpec(), place=lambda _, t: t, cache=Path(sys.argv[2]))
"""


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    folder, cache = save_tiny("llama", tmp_path / "model"), tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", FULL, str(folder), str(cache)], capture_output=True, text=True)
    assert "CheckpointError: no space left for the cache" in done.stderr
    assert [path.name for path in cache.iterdir()] == ["fingerprints.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_midway_leaves_nothing_behind(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = save_tiny("llama", tmp_path / "model"), tmp_path / "cache"
    pieces, calls = shards.pieces, 0

    def fail_later(tensor: torch.Tensor, dtype: torch.dtype) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise error
        return pieces(tensor, dtype)

    monkeypatch.setattr(shards, "pieces", fail_later)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        load(folder, cache=cache)
    assert [path.name for path in cache.iterdir()] == ["fingerprints.json"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """A folder that several hosts share has processes of other ones, too, whose numbers say nothing here."""
    cache, now = _made(tmp_path / "cache"), time.time()
    here = writing_prefix(".writing-").removesuffix(f"{os.getpid()}-")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ages = {
        f"{here}{os.getpid()}-alive": 0,
        f"{here}{os.getpid()}-of the one before": 3 * 3600,  # whose number this process has now
        f"{here}{dead.pid}-dead": 0,
        f".writing-elsewhere-{dead.pid}-alive": 3600,
        f".writing-elsewhere-{os.getpid()}-dead": 3 * 24 * 3600,
    }
    for name, age in ages.items():
        _made(cache / name).joinpath("part").write_text("x")
        os.utime(cache / name, (now - age, now - age))
    load(save_tiny("llama", tmp_path / "model"), cache=cache)
    assert all(path.name.endswith("-alive") for path in cache.glob(".writing-*"))
    assert len(list(cache.glob(".writing-*"))) == 2


def test_the_first_of_two_writers_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = save_tiny("llama", tmp_path / "model"), tmp_path / "cache"
    finish = cache_module.CacheWriter.finish

    def finish_second(writer: cache_module.CacheWriter) -> None:
        monkeypatch.setattr(cache_module.CacheWriter, "finish", finish)
        load(folder, cache=cache)  # another process, in between
        finish(writer)

    monkeypatch.setattr(cache_module.CacheWriter, "finish", finish_second)
    model, report = load(folder, cache=cache)
    assert not report.from_cache
    assert not list(cache.glob(".writing-*"))
    assert torch.equal(logits(load(folder, cache=cache)[0]), logits(model))


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        load(folder, cache=tmp_path / "file" / "cache")


def test_the_entry_is_laid_out_as_bitsandbytes_writes_it(tmp_path: Path) -> None:
    """Compared with what transformers itself saves of the same model in the same format."""
    saved = save_bitsandbytes("llama", tmp_path, FORMATS["nf4-double"][1], **ROUND["llama"])
    theirs = load_file(saved / "model.safetensors")
    _, report = load(tmp_path / "plain", NF4, cache=tmp_path / "cache")
    assert report.cache is not None
    ours = load_file(next(report.cache.glob("*.safetensors")))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(ours[key].numpy())) == json.loads(bytes(value.numpy()))
        else:
            assert ours[key].dtype == value.dtype
            assert torch.equal(ours[key], value), key


def _from_cache(entry: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(entry, dtype=torch.bfloat16).train()
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or (key == "p" and isinstance(module, torch.nn.Dropout))):
                setattr(module, key, 0.0)
    return model


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_the_checkpoint_of_an_entry_opens(tmp_path: Path) -> None:
    _, report = load(save_tiny("gpt2", tmp_path / "model"), cache=tmp_path / "cache")
    assert report.cache is not None
    checkpoint = Checkpoint.open(report.cache)
    assert checkpoint.config.quantization_config["quant_method"] == "bitsandbytes"
    assert checkpoint.config.architectures == ["GPT2LMHeadModel"]
    assert load(report.cache)[0].generate(TOKENS, max_new_tokens=1).shape == (2, 25)
