"""RunConfig: every kind of bad input is named, with the nearest valid key, before anything runs."""

import glob
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.sources import DataSource

# (override, words that the message must hold)
REFUSED = [
    ("trian.lr=1", ["Unknown key 'trian'", "did you mean 'train'"]),
    ("train.lrr=1", ["Unknown key 'train.lrr'", "did you mean 'train.lr'"]),
    ("budget.memry=1GiB", ["did you mean 'budget.memory'"]),
    ("quant.bits=5", ["'quant.bits'", "4 | 8 | 16 | auto", "5"]),
    ("adapter.rank=0", ["'adapter.rank'", "> 0"]),
    ("adapter.rank=1000000000", ["'adapter.rank'", "<= 65536"]),
    ("adapter.rank=true", ["takes no boolean"]),
    ("adapter.rank_pattern={q_proj: yes}", ["'rank_pattern' takes no boolean", "q_proj"]),
    ("adapter.layers=[0, true]", ["'layers' takes no boolean"]),
    ("adapter.dropout=1.0", ["'adapter.dropout'", "< 1"]),
    ("budget.memory=6gigs", ["budget.memory", "Not a size", "6gigs", "8GiB"]),
    ("budget.memory=0GiB", ["Not a size"]),
    ("budget.memory=1.5", ["Not a size", "whole bytes", "1.5GiB, if that is what you mean"]),
    ("budget.memory=true", ["takes no boolean", "a size such as 8GiB, or bytes | null"]),
    ("train.max_time=yes", ["takes no boolean", "a time such as 3h or 90m, or seconds | null"]),
    ("quant.bits='five'", ["'quant.bits'", "4 | 8 | 16 | auto"]),
    ("policy.activations=kep", ["keep | recompute | offload"]),
    ("train.max_time=3x", ["Not a duration", "1h30m"]),
    ("train.lr=nan", ["'train.lr'"]),
    ("train.warmup=2.5", ["train.warmup"]),
    ("train.seed=99999999999999999999", ["'train.seed'", ">= 0 and < 46"]),
    ("quant=3", ["'quant'", "keys bits, type, double_quant"]),
    ("adapter.method=peft", ["names no method", "peft_type"]),
    ("adapter.peft={peft_type: IA3}", ["adapter.method: peft"]),
    ("model.x=1", ["'model' has no keys below it"]),
    ("data.train=3", ["'data.train'", "a list of", "3"]),
    ("data.eval=3", ["data.eval", "no share of the training records", "0 < share < 1"]),
    ("data.eval='2'", ["data.eval", "no share of the training records"]),
    ("data.eval=-0.1", ["data.eval", "no share of the training records"]),
    ("data.eval=true", ["data.eval", "no share of the training records"]),
    ("data.train=[]", ["data.train", "list of sources is empty"]),
    ("data.train={weight: 2}", ["data.train", "'path' is missing"]),
    ("data.train=[a, {path: b, weigth: 2}]", ["data.train", "Unknown key 'weigth'", "did you mean 'weight'"]),
    ("data.train={path: b, 3: 1}", ["data.train", "Unknown key '3'"]),
    ("data.train={path: b, weight: 0}", ["data.train", "'weight'", "> 0"]),
    ("data.columns.promt=a", ["'data.columns'", "messages | prompt | completion"]),
    ("data.order=longest", ["shuffled | longest_first"]),
    ("train.lr", ["not KEY=VALUE"]),
    ("train.lr=[", ["not YAML", "in quotes"]),
    ("train.learning_rate=1", ["did you mean 'train.lr'"]),
    ("lora_r=1", ["did you mean 'adapter.rank'"]),
    ("train.batch_size=1", ["did you mean 'train.tokens_per_step'"]),
    ("train.xyzzy=1", ["fix:     remove it"]),
    ("lr=1", ["Unknown key 'lr'", "did you mean 'train.lr'"]),
    ("budget.rank=4", ["did you mean 'adapter.rank'"]),
    ("train={lr: 1, lr: 2}", ["'lr' is given twice", "line 1 and line 1"]),
    ("train=3", ["'train'", "keys objective, tokens_per_step", "fix:     write keys below `train:`"]),
    ("train={1: 2}", ["Unknown key 'train.1'"]),
    ("output=2026", ["'output'", "2026", "in quotes"]),
    ("output=on", ["'output' takes no boolean", "in quotes"]),
    ("train.steps=0b_", ["not YAML"]),
    ("train.lr=@x", ["'train.lr'", "'@x'", "a number"]),
    ("output=~nosuchuser/x", ["output", "home folder", "~nosuchuser/x"]),
    ("data.train=[~nosuchuser/x]", ["data.train", "home folder"]),
    ('output="a\\0b"', ["output", "NUL", r"'a\x00b'"]),
    ('data.train={path: "a\\0b"}', ["data.train", "NUL"]),
]


@pytest.mark.parametrize(("override", "words"), REFUSED)
def test_bad_input_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({"model": "m"}, [override])
    for word in words:
        assert word in str(caught.value)


def test_what_is_allowed_is_said_in_this_projects_words() -> None:
    """pydantic's own sentence, which would say it once more, tells nobody what to do."""
    for override, allowed in (
        ("adapter.rank=x", "a whole number > 0 and <= 65536"),
        ("adapter.rank_pattern={q: 0}", "a mapping of text to a whole number > 0 and <= 65536"),
        ("data.packing=maybe", "true | false"),
        ("train.lr=inf", "a number > 0, and finite"),
    ):
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_dict({"model": "m"}, [override])
        assert (caught.value.allowed, caught.value.fix) == (allowed, None)


REPEATS = "\n".join(f"x{i}: &{i} [{', '.join([f'*{i - 1}' if i else 'x'] * 10)}]" for i in range(9))
ENDLESS = {
    "repeated": f"model: m\n{REPEATS}\ndata: {{train: *8}}\n",
    "within itself": "model: m\ndata: &d {train: *d}\n",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_aliases_that_stand_for_billions_are_refused_at_once(case: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(ENDLESS[case])
    with pytest.raises(ConfigError, match=r"(?s)Aliases repeat.*run\.yaml.*allowed: 100000 values"):
        RunConfig.load(tmp_path / "run.yaml")


def test_yaml_that_is_nested_too_deeply_is_told() -> None:
    with pytest.raises(ConfigError, match=r"not YAML[\s\S]*nested too deeply"):
        RunConfig.from_dict({"model": "m"}, ["data.train=" + "[" * 3000])


def test_aliases_that_save_writing_are_read(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: &files [a.jsonl, b.jsonl], eval: *files}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert RunConfig.load(tmp_path / "run.yaml").data.eval == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("text", ["@x", "#x", "%x", "*.jsonl", "2026-11-26", "2026-13-45", "runs/my #3", "two\nlines"])
def test_text_that_yaml_would_not_read_as_text(text: str) -> None:
    config = RunConfig.from_dict({"model": "m"}, [f"output={text}"])
    assert config.output == text
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("data", [None, 3, "model", ["model"], {1: 2, "model": "m"}])
def test_keys_are_text_in_a_mapping(data: Any) -> None:
    with pytest.raises(ConfigError, match=r"mapping of keys|Unknown key '1'"):
        RunConfig.from_dict(data)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "p_tuning"])
def test_virtual_tokens_refuse_packing(method: str) -> None:
    adapter = {"method": "peft", "peft": {"peft_type": method}}
    with pytest.raises(ConfigError, match="packing: false"):
        RunConfig.from_dict({"model": "m", "adapter": adapter})
    config = RunConfig.from_dict({"model": "m", "adapter": adapter, "data": {"packing": False}})
    assert config.adapter.prompt_learning


def test_prefix_tuning_refuses_recomputation() -> None:
    keys = {"model": "m", "adapter": {"method": "peft", "peft": {"peft_type": "PREFIX_TUNING"}}}
    with pytest.raises(ConfigError, match="key-value cache"):
        RunConfig.from_dict(keys, ["data.packing=false", "policy.activations=recompute"])


def test_sources() -> None:
    assert RunConfig.from_dict({"model": "m", "data": {"train": "a.jsonl"}}).data.train == "a.jsonl"
    keys = {
        "train": ["a.jsonl", {"path": "b.csv", "weight": 2, "columns": {"prompt": "question"}}],
        "eval": {"path": "c"},
    }
    config = RunConfig.from_dict({"model": "m", "data": keys})
    assert isinstance(config.data.train, list)
    second = config.data.train[1]
    assert isinstance(second, DataSource)
    assert (second.path, second.weight, second.columns, second.format) == ("b.csv", 2, {"prompt": "question"}, None)
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


RECORD = {"text": "A record."}
TABLE = Dataset.from_list([RECORD])


@pytest.mark.parametrize(
    "data",
    [RECORD, [RECORD], TABLE, TABLE.to_pandas(), iter([RECORD])],
    ids=["record", "list", "Dataset", "DataFrame", "iterator"],
)
def test_records_of_python_are_no_files(data: Any) -> None:
    """Of a table the names of its columns would be taken for files."""
    with pytest.raises(ConfigError, match=r"data\.train: Data is read from files[\s\S]*fix: .*write a file"):
        RunConfig.from_dict({"model": "m", "data": {"train": data}})


def test_numbers_in_quotes_are_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"quant": {"bits": "8"}, "adapter": {"rank": "4"}, "data": {"eval": "0.2"}, "train": {"lr": "1e-4"}}
    config = RunConfig.from_dict({"model": "m", **keys})
    assert (config.quant.bits, config.adapter.rank, config.data.eval, config.train.lr) == (8, 4, 0.2, 1e-4)
    monkeypatch.chdir(tmp_path)
    Path("0.2").touch()  # of a file, however it is called, it is the path
    assert RunConfig.from_dict({"model": "m", **keys}).data.eval == "0.2"


def test_ignored_options_are_said() -> None:
    with pytest.warns(UserWarning, match=r"data\.eval uses each example once"):
        RunConfig.from_dict({"model": "m", "data": {"eval": [{"path": "a", "weight": 2}]}})
    with pytest.warns(UserWarning, match=r"quant\.type: of 4 bits"):
        RunConfig.from_dict({"model": "m", "quant": {"bits": 8, "type": "fp4"}})
    with pytest.warns(UserWarning, match=r"adapter\.rank: of method lora"):
        RunConfig.from_dict({"model": "m", "adapter": {"method": "peft", "peft": {"peft_type": "IA3"}, "rank": 4}})


@pytest.mark.parametrize(
    "sections", [{"quant": {"bits": 8}}, {"adapter": {"method": "peft", "peft": {"peft_type": "IA3"}}}]
)
def test_a_resolved_config_warns_of_nothing(sections: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    """It has every key, also those that the user never set."""
    config = RunConfig.from_dict({"model": "m", **sections})
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert [str(it.message) for it in recwarn] == []


def test_yaml_overrides_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: m\ntrain: {lr: 2e-4, steps: 10}\nbudget: {memory: 6GiB}\n")
    config = RunConfig.load(path, ["train.steps=20", "adapter.targets=[q_proj, v_proj]", "train.max_time=1h30m"])
    assert config.train.lr == 2e-4  # PyYAML reads 2e-4 as text, which users do write
    assert config.train.steps == 20
    assert config.budget.memory == 6 * 2**30
    assert config.adapter.targets == ["q_proj", "v_proj"]
    assert config.train.max_time == 5400
    path.write_text(config.to_yaml())
    assert RunConfig.load(path) == config


def test_paths_are_taken_where_a_path_is_meant() -> None:
    """As Python users have them."""
    keys = {"model": "m", "output": "a/b", "cache": "c", "adapter": {"init": "d"}}
    data = {"train": ["e", {"path": "f"}], "eval": "g", "cache": "h"}
    paths = {"train": [Path("e"), {"path": Path("f")}], "eval": Path("g"), "cache": Path("h")}
    given = {"model": Path("m"), "output": Path("a/b"), "cache": Path("c"), "adapter": {"init": Path("d")}}
    assert RunConfig.from_dict({**given, "data": paths}) == RunConfig.from_dict({**keys, "data": data})
    with pytest.raises(ConfigError, match="'output'"):
        RunConfig.from_dict({"model": "m", "output": 3})


def test_a_config_for_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there stays as it is: it may be a hub id."""
    monkeypatch.chdir(tmp_path)
    for name in ("m", "t", "e", "default"):
        (tmp_path / name).mkdir()
    data = {"train": ["t", {"path": "t"}, "owner/name", {"path": "owner/name"}], "eval": "e", "cache": "c"}
    config = RunConfig.from_dict({"model": "m", "data": data, "adapter": {"init": "t"}, "output": "o", "cache": "q"})
    rooted = config.rooted()
    here = {name: str(tmp_path / name) for name in ("m", "t", "e", "c", "o", "q")}
    sources = [here["t"], DataSource(path=here["t"]), "owner/name", DataSource(path="owner/name")]
    assert (rooted.model, rooted.adapter.init, rooted.output, rooted.cache) == (
        here["m"],
        here["t"],
        here["o"],
        here["q"],
    )
    assert (rooted.data.train, rooted.data.eval, rooted.data.cache) == (sources, here["e"], here["c"])
    assert rooted.rooted() == rooted
    hub = RunConfig.from_dict({"model": "owner/name", "output": str(tmp_path / "o")})
    assert hub.rooted() == hub


def test_patterns_of_files_for_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "a[1]"  # what is a pattern in the config only is one
    here.mkdir()
    (here / "b.jsonl").touch()
    (here / "[c].jsonl").touch()
    monkeypatch.chdir(here)
    config = RunConfig.from_dict({"model": "m", "data": {"train": ["[c].jsonl", {"path": "?.jsonl"}], "eval": "*.csv"}})
    data = config.rooted().data
    monkeypatch.chdir(tmp_path)
    assert isinstance(data.train, list)
    named, pattern = data.train
    assert named == str(here / "[c].jsonl")
    assert isinstance(pattern, DataSource)
    assert glob.glob(pattern.path) == [str(here / "b.jsonl")]
    assert config.rooted().rooted() == config.rooted()
    assert isinstance(data.eval, str)
    assert Path(data.eval).is_absolute()


def test_paths_of_which_nobody_may_know_whether_they_exist() -> None:
    """As in a folder that lets nobody look inside, but also for root. Whoever reads them says what is wrong."""
    path = "x" * 300
    config = RunConfig.from_dict({"model": path, "data": {"train": [path, {"path": f"{path}*"}]}})
    assert config.rooted().model == path


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config file has seen no shell that would replace the sign for it."""
    monkeypatch.setenv("HOME", "/home/me")
    data = {"train": "~/t", "eval": ["~/e", "e~"]}
    config = RunConfig.from_dict({"model": "~/m", "output": "~/runs/a", "data": data})
    assert (config.model, config.output, config.data.train) == ("/home/me/m", "/home/me/runs/a", "/home/me/t")
    assert config.data.eval == ["/home/me/e", "e~"]


def test_a_section_without_keys_has_its_defaults(tmp_path: Path) -> None:
    """As one has all of whose keys are commented out."""
    path = tmp_path / "config.yaml"
    path.write_text("model: m\nquant:\n  # bits: 8\ntrain:\ncache:\n")
    assert RunConfig.load(path) == RunConfig(model="m")
    assert RunConfig.load(path, ["train.lr=1e-3", "eval=null"]).train.lr == 1e-3


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)cannot be read.*allowed: .*fix: .*lowmem-ft init"):
        RunConfig.load(tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "model: [", "\x00"])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        RunConfig.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        RunConfig.load(tmp_path / "missing.yaml")


def test_a_key_that_is_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: m\ntrain:\n  lr: 1\n  steps: 3\n  lr: 2\n")
    with pytest.raises(ConfigError, match="'lr' is given twice") as caught:
        RunConfig.load(path)
    assert caught.value.given == f"{path}, line 3 and line 5"
    path.write_text("model: m\ndata: &a {seq_len: 8, train: x}\ntrain: {<<: {lr: 1, steps: 3}, lr: 2}\n")
    assert RunConfig.load(path).train.lr == 2  # of a merged mapping a key may be replaced


def test_a_model_is_required_and_configs_are_frozen() -> None:
    with pytest.raises(ConfigError, match="'model' is missing"):
        RunConfig.from_dict({})
    for name in ("modle", "base_model"):
        with pytest.raises(ConfigError, match=rf"Unknown key '{name}'(.|\n)*did you mean 'model'"):
            RunConfig.from_dict({name: "m"})
    config = RunConfig.from_dict({"model": "m"})
    with pytest.raises(Exception, match="frozen"):
        config.model = "other"


def test_keys_by_name_are_those_of_a_mapping() -> None:
    """Python users call the class itself: its errors are no other ones."""
    keys: dict[str, Any] = {"model": Path("m"), "train": {"lr": 1e-3}}
    assert RunConfig(**keys) == RunConfig.from_dict(keys)
    wrong: list[dict[str, Any]] = [
        {},
        {"model": "m", "trian": {}},
        {"model": "m", "train": {"lr": -1}},
        {"model": "m", "train": {"warmup": 2.5}},
        {"model": "m", "data": {"train": [{"path": "b", "weigth": 2}]}},
    ]
    for keys in wrong:
        with pytest.raises(ConfigError) as expected:
            RunConfig.from_dict(keys)
        with pytest.raises(ConfigError) as found:
            RunConfig(**keys)
        assert str(found.value) == str(expected.value)


def test_a_run_in_place_of_its_config_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m")
    with pytest.raises(ConfigError, match=r"folder of a run: give .*config\.yaml"):
        RunConfig.load(tmp_path)
