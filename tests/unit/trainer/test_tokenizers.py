"""Tokenizers of models that are trained: tokens without a row, files that cannot be read, and code that comes along."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowmem_ft.assemble import load_tokenizer
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import CheckpointError, DataError, UnsupportedError
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.trainer import loop
from tests.assets import ASSETS
from tests.unit.trainer.runs import QUIET, config


def test_tokens_that_the_model_does_not_know(data: Path) -> None:
    """A tokenizer may have some: it is refused where the data uses one."""
    model = data / "model"
    shutil.copytree(ASSETS / "doclm-7m", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(model)
    settings = config(data, model=str(model), train={"steps": 1}, data={"packing": False})
    assert loop.train(settings, reporter=QUIET).status == "finished"
    (data / "train.jsonl").write_text('{"text": "what is <extra>"}\n')
    with pytest.raises(DataError, match="no row") as caught:
        loop.train(config(data, "other", model=str(model)), reporter=QUIET)
    assert "'<extra>'" in str(caught.value.given)
    assert not (data / "other").exists()


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "doclm-7m", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "9.0", "model": {"type": "new"}}')
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(Checkpoint.open(tmp_path / "model"))


def test_a_tokenizer_that_no_text_goes_through(tmp_path: Path) -> None:
    folder = model_with(tmp_path, model_max_length="many")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(Checkpoint.open(folder))


def test_code_of_a_tokenizer_runs_only_where_the_config_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal, and take the first line of a pipe for the answer."""
    folder = model_with(tmp_path, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    ran = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    # a class of its own: transformers marks it, and would mark its own class for all tests that follow
    code = f"from transformers import PreTrainedTokenizerFast\n{ran}class Own(PreTrainedTokenizerFast): ...\n"
    (folder / "own.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    train = str(data / "train.jsonl")
    with pytest.raises(UnsupportedError, match="tokenizer is remote code"):
        loop.read_split(RunConfig(model=str(folder)), train, QUIET)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    assert loop.read_split(RunConfig(model=str(folder), trust_remote_code=True), train, QUIET)
    assert (tmp_path / "ran").exists()


def model_with(parent: Path, **settings: Any) -> Path:
    """The embedded model with these settings in tokenizer_config.json."""
    folder = parent / "model"
    shutil.copytree(ASSETS / "doclm-7m", folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder
