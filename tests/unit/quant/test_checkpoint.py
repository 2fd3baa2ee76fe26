"""Opening and reading checkpoints: every broken one is refused with a message that names what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, T5Config

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant.checkpoint import CHUNK_BYTES, DTYPES, INDEX, SINGLE, Checkpoint
from lowmem_ft.quant.loader import meta_model
from tests.models import save_tiny

DEEP = "[" * 100_000  # for which `json` has a RecursionError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def truncate(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size - 10)


def cut_header(folder: Path) -> None:
    os.truncate(shard(folder), 20)


def empty(folder: Path) -> None:
    shard(folder).write_bytes(b"")


def spoil_header(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[8:12] = b"####"
    shard(folder).write_bytes(data)


def change_header(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """With the tensors' entries in the order of the file."""
    data = shard(folder).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    change(sorted(entries, key=lambda entry: entry["data_offsets"]))
    text = json.dumps(header).encode()
    shard(folder).write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def share_bytes(folder: Path) -> None:
    change_header(folder, lambda entries: entries[1].update(entries[0]))


def begin_before_the_file(folder: Path) -> None:
    def change(entries: list[dict[str, Any]]) -> None:
        entries[0]["data_offsets"] = [-entries[0]["data_offsets"][1], 0]

    change_header(folder, change)


def half_a_row(folder: Path) -> None:
    change_header(folder, lambda entries: entries[0].update(shape=[0.5]))


def three_offsets(folder: Path) -> None:
    change_header(folder, lambda entries: entries[0]["data_offsets"].append(0))


def write_header(folder: Path, text: str) -> None:
    shard(folder).write_bytes(len(text).to_bytes(8, "little") + text.encode())


def nest_header(folder: Path) -> None:
    write_header(folder, DEEP)


def metadata_is_a_list(folder: Path) -> None:
    write_header(folder, '{"__metadata__": ["format"]}')


def more_bytes(folder: Path) -> None:
    with shard(folder).open("ab") as file:
        file.write(b"more")


def not_safetensors(folder: Path) -> None:
    shard(folder).write_bytes(b"PK\x03\x04" + b"\xff" * 100)


def remove_shard(folder: Path) -> None:
    shard(folder).unlink()


def name_missing_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def name_wrong_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    names = list(index["weight_map"])
    files = index["weight_map"]
    files[names[0]] = next(file for file in files.values() if file != files[names[0]])
    (folder / INDEX).write_text(json.dumps(index))


def spoil_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def nest_index(folder: Path) -> None:
    (folder / INDEX).write_text(DEEP)


def name_too_long(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "x" * 300}}))


def lead_out(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], "../other.safetensors")}))


def only_pickle(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


def no_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2")


def nest_config(folder: Path) -> None:
    (folder / "config.json").write_text(DEEP)


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def many_labels(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_labels": 10**9}))


BROKEN: dict[Callable[[Path], None], str] = {
    truncate: "truncated",
    cut_header: "within its header",
    empty: "within its header",
    spoil_header: "header cannot be read",
    share_bytes: "does not begin where",
    begin_before_the_file: "does not begin where",
    half_a_row: "header cannot be read",
    three_offsets: "header cannot be read",
    nest_header: "header cannot be read",
    metadata_is_a_list: "header cannot be read",
    more_bytes: "no tensor lies at its end",
    not_safetensors: "within its header, or is no safetensors file",
    remove_shard: "files that the index names are missing",
    name_missing_tensor: "names a tensor that its file does not hold",
    name_wrong_shard: "names a tensor that its file does not hold",
    spoil_index: "index of the weight files cannot be read",
    nest_index: "index of the weight files cannot be read",
    name_too_long: "files that the index names are missing",
    lead_out: "leads out of the folder",
    only_pickle: "only pickle files",
    no_weights: "no weights",
    no_config: "no config.json",
    spoil_config: "config.json cannot be read",
    nest_config: "config.json cannot be read",
    many_labels: "config.json has more labels",
    config_is_a_list: "config.json cannot be read",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda function: function.__name__)
def test_broken_folders_are_refused(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, max_shard_size="20KB")
    assert len(Checkpoint.open(folder).files) > 2
    spoil(folder)
    with pytest.raises(CheckpointError, match=BROKEN[spoil]) as caught:
        Checkpoint.open(folder)
    assert caught.value.given is not None


@pytest.mark.parametrize("dtype", ["Q9", 32, ["F32"]])
def test_a_type_that_nobody_knows_is_refused(dtype: Any, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, max_shard_size="20KB")
    change_header(folder, lambda entries: entries[0].update(dtype=dtype))
    with pytest.raises(UnsupportedError, match="a data type that is not supported"):
        Checkpoint.open(folder)


def test_a_folder_that_does_not_exist_and_a_file_are_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)does not exist.*allowed: .*fix: "):
        Checkpoint.open(llama / "nowhere" / "else")
    with pytest.raises(CheckpointError, match="a model is a folder"):
        Checkpoint.open(llama / SINGLE)
    (config := llama.parent / "run.yaml").write_text("model: llama\n")
    with pytest.raises(CheckpointError, match="`lowmem-ft train` takes a config"):
        Checkpoint.open(config)
    with pytest.raises(CheckpointError, match="no model is named"):  # Path takes it for the current folder
        Checkpoint.open("")


def test_where_a_relative_path_begins_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("./nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="does not exist") as caught:
            Checkpoint.open(name)
        assert str(tmp_path) in str(caught.value.given)
        assert "config.yaml" in str(caught.value.fix)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json") as caught:
        Checkpoint.open(tmp_path)
    assert "this is an adapter" in str(caught.value.fix)


@pytest.mark.parametrize("name", ["/" + "x" * 300, "x" * 300])
def test_what_the_system_will_not_look_for_is_told(name: str) -> None:
    """Too long a name stands for a folder that lets nobody look inside, which root may always."""
    with pytest.raises(CheckpointError, match=r"may not be looked at|neither a local folder"):
        Checkpoint.open(name)


def test_a_weight_file_that_may_not_be_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(file: Path, mode: str) -> None:  # root may read everything
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("lowmem_ft.quant.checkpoint.open", denied, raising=False)
    with pytest.raises(CheckpointError, match=r"cannot be read[\s\S]*Permission denied"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("downloaded", [0, 1])
def test_planning_takes_an_index_whose_files_are_still_to_be_downloaded(tmp_path: Path, downloaded: int) -> None:
    folder = save_tiny("llama", tmp_path / "model", max_shard_size="50KB")
    for file in sorted(folder.glob("*.safetensors"))[downloaded:]:
        file.unlink()
    assert Checkpoint.open(folder, weights=False).tensors == {}


@pytest.mark.parametrize(
    ("kind", "asked"), [("llama", "somebody/attention"), ("gemma3", {"text_config": "somebody/attention"})]
)
def test_attention_code_of_the_hub_is_never_run(kind: str, asked: Any, tmp_path: Path) -> None:
    told = {**AutoConfig.for_model(kind).to_dict(), "attn_implementation": asked}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(UnsupportedError, match=r"attention code from the hub[\s\S]*somebody/attention"):
        Checkpoint.open(tmp_path, weights=False)
    assert Checkpoint.open(tmp_path, weights=False, trust_remote_code=True)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedError, match="remote code"):
        Checkpoint.open(folder)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mystery"}))
    with pytest.raises(UnsupportedError, match="mystery"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (T5Config(d_model=16, num_layers=1).to_dict(), "encoder-decoder"),
        ({"model_type": "bert", "is_decoder": False}, "both sides"),
        ({"model_type": "bert-generation"}, "both sides"),
        ({"model_type": "xlnet"}, "both sides"),
        ({"model_type": "nemotron", "hidden_size": 17}, "cannot build this model"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "clip_text_model"}, "no causal language model"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_architectures_without_a_next_token_say_why(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    (folder / "config.json").write_text(json.dumps(changes))
    with pytest.raises(UnsupportedError, match=reason):
        meta_model(Checkpoint.open(folder))


def test_every_data_type_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    bits = torch.randint(0, 100, (6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tensors = {name: (bits % 2).bool() if name == "BOOL" else bits.to(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["nothing"] = torch.empty(0, 4)
    save_file(tensors, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    for name, expected in tensors.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
        assert torch.equal(read.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
        if expected.ndim == 2 and expected.numel():
            row = torch.empty_like(expected[4])
            checkpoint.read_into(name, row, 4)
            assert torch.equal(row.float(), expected[4].float())
    assert torch.equal(checkpoint.read("F32", dtype=torch.bfloat16), tensors["F32"].bfloat16())


def test_tensors_larger_than_a_piece_are_read_right(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    large = torch.arange(CHUNK_BYTES // 4 * 2 + 12345, dtype=torch.int32).view(torch.int16).view(-1, 2)
    save_file({"large": large, "other": large.float()}, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.read("large"), large)
    assert torch.equal(checkpoint.read("other", dtype=torch.bfloat16), large.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, CHUNK_BYTES // 2 + 7, -1])
def test_nan_and_inf_are_found_wherever_they_are(bad: float, position: int, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    values = torch.zeros(CHUNK_BYTES // 2 + 1000, dtype=torch.bfloat16)
    values[position] = bad
    save_file({"good": torch.ones(4), "bad": values}, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.read("good").sum() == 4
    with pytest.raises(CheckpointError, match=r"NaN or Inf(.|\n)*bad"):
        checkpoint.read("bad")


def test_values_that_overflow_when_they_are_cast_are_found(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    save_file({"w": torch.tensor([1.0, 1e5])}, folder / SINGLE)
    with pytest.raises(CheckpointError, match="float16"):
        Checkpoint.open(folder).read("w", dtype=torch.float16)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    checkpoint = Checkpoint.open(folder)
    last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].offset)
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 2)
    with pytest.raises(CheckpointError, match="ended early"):
        checkpoint.read(last)


@pytest.mark.parametrize(
    "use",
    [
        lambda checkpoint, name: checkpoint.read(name),
        lambda checkpoint, name: checkpoint.same_content(name, name),
        lambda checkpoint, name: checkpoint.sample(),
        lambda checkpoint, name: checkpoint.fingerprint(),
    ],
    ids=["read", "same_content", "sample", "fingerprint"],
)
def test_a_file_that_goes_after_opening_is_noticed(use: Callable[[Checkpoint, str], object], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny("llama", tmp_path))
    (tmp_path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        use(checkpoint, next(iter(checkpoint.tensors)))


def test_the_fingerprint_is_that_of_the_content(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, memo = save_tiny("llama", tmp_path / "copy"), tmp_path / "cache" / "memo.json"
    first = Checkpoint.open(llama).fingerprint()
    assert Checkpoint.open(folder).fingerprint(memo) == first
    with monkeypatch.context() as patch:  # asked again, nothing is read
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it is remembered"))
        assert Checkpoint.open(folder).fingerprint(memo) == first
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"][5] += 1
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    changed = Checkpoint.open(folder).fingerprint(memo)
    assert changed != first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert Checkpoint.open(folder).fingerprint(memo) not in (first, changed)
    memo.write_text("{damaged")
    assert Checkpoint.open(llama).fingerprint(memo) == first
