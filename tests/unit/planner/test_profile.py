"""Device profiles: the shipped figures are plausible and say where they are from; bad files are named, not guessed."""

import datetime
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem_ft.core.errors import ConfigError
from lowmem_ft.planner.profile import Profile, load_profile, profile_names, write_profile

ROOT = Path(__file__).parents[3]
NAMES = profile_names()
CAPABILITY = {  # architecture -> major of its compute capability
    "volta": "7",
    "turing": "7",
    "ampere": "8",
    "ada": "8",
    "hopper": "9",
    "blackwell": "12",
}
# FLOP per clock and SM of dense 16-bit products with fp32 accumulation, by the whitepapers; GeForce has half the rate
# of the data-centre cards of its architecture. Peak over (rate x SMs) is a clock, which lies between 1.1 and 2.7 GHz.
RATE = {
    "volta": 1024,
    "turing": 1024,
    "ampere geforce": 512,
    "ampere": 1024,
    "ampere a100": 2048,
    "ada geforce": 512,
    "ada": 1024,
    "hopper": 4096,
    "blackwell geforce": 512,
}
# (name, what of it, between)
PLAUSIBLE: list[tuple[str, Any, float, float]] = [
    ("memory bandwidth", lambda p: p.memory_bandwidth.value, 1e9, 1e13),
    ("link to the device", lambda p: p.link_to_device.value, 1e9, 64e9),
    ("link to the host", lambda p: p.link_to_host.value, 1e9, 64e9),
    ("disk", lambda p: p.disk_read.value, 1e8, 15e9),
    ("context", lambda p: p.context_bytes.value, 290e6, 800e6),
    ("display", lambda p: p.display_bytes.value, 0, 2**30),
    ("fp32", lambda p: p.flops["float32"].value, 1e10, 2e14),
    ("16 bits over 32 bits", lambda p: p.flops[p.fastest_dtype].value / p.flops["float32"].value, 0.5, 17),
    ("memory in GiB", lambda p: p.memory_bytes.value / 2**30, 3, 142),
]


def facts(name: str = "rtx-4060-8gb") -> dict[str, Any]:
    """A valid profile as plain data, to be broken by a test."""
    return load_profile(name).model_dump()


def load(data: object, folder: Path) -> Profile:
    file = folder / "profile.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_profile(file)


def test_the_devices_that_plans_are_asked_for_are_there() -> None:
    assert len(NAMES) >= 19
    assert {"cpu", "cpu-bf16", "colab-t4-16gb", "rtx-3060-12gb", "rtx-4090-24gb", "h100-80gb"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_says_how_it_was_found_where_and_when(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    figures = profile.figures()
    measured = 0 if profile.measured is None else len(profile.measured.model_dump(exclude_none=True))
    assert len(figures) == 7 + len(profile.flops) + measured
    for key, figure in figures.items():
        assert figure.how in ("datasheet", "measured", "estimated"), key
        assert len(figure.source) > 20, key
        assert datetime.date(2017, 1, 1) < figure.date, key


@pytest.mark.parametrize(("what", "take", "low", "high"), PLAUSIBLE, ids=[row[0] for row in PLAUSIBLE])
def test_figures_are_plausible(what: str, take: Any, low: float, high: float) -> None:
    off = {name: take(profile) for name in NAMES if not low <= take(profile := load_profile(name)) <= high}
    assert off == {}, what


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("cpu")])
def test_a_card_agrees_with_its_name_and_generation(name: str) -> None:
    card = load_profile(name)
    assert card.kind == "cuda"
    assert card.compute_capability is not None
    assert card.sm_count is not None
    assert card.compute_capability.split(".")[0] == CAPABILITY[card.architecture]
    assert ("bfloat16" in card.flops) == (int(card.compute_capability.split(".")[0]) >= 8)
    assert card.fastest_dtype == ("bfloat16" if "bfloat16" in card.flops else "float16")
    if "bfloat16" in card.flops:
        assert card.flops["bfloat16"].value == pytest.approx(card.flops["float16"].value, rel=0.08)

    label = re.search(r"-(\d+)gb$", name)
    assert label is not None
    assert 0.9 < card.memory_bytes.value / (int(label[1]) * 2**30) <= 1, "drivers keep up to a tenth (ECC on GDDR6)"

    kind = " geforce" if name.startswith("rtx") else " a100" if "a100" in name else ""
    rate = RATE[f"{card.architecture}{kind}"]
    hertz = card.flops["float16"].value / (rate * card.sm_count)  # if they work in every clock
    slowest = 0.55e9 if name in ("colab-t4-16gb", "colab-l4-24gb") else 1.0e9  # these two are held back to 70 W
    assert slowest < hertz < 2.8e9, "not the figure with sparsity"


def test_the_context_is_what_was_measured_where_it_was() -> None:
    """Else a plan that is made elsewhere promises what the card cannot keep."""
    measured = load_profile(ROOT / "benchmarks" / "results" / "profile_h200.yaml").context_bytes.value
    for name in ("h200-141gb", "h100-80gb"):
        assert load_profile(name).context_bytes.value >= measured, name


def test_only_cards_with_a_display_give_memory_to_it() -> None:
    for name in NAMES:
        assert (load_profile(name).display_bytes.value > 0) == name.startswith("rtx"), name


def test_plain_numbers_and_the_dtype_to_compute_in() -> None:
    t4, ada, cpu = load_profile("colab-t4-16gb"), load_profile("rtx-4090-24gb"), load_profile("cpu")
    assert ada.memory_bytes.value == 24081 * 2**20  # written as 24081MiB
    assert ada.flops["bfloat16"].value == 165.0e12
    assert (t4.fastest_dtype, ada.fastest_dtype, cpu.fastest_dtype) == ("float16", "bfloat16", "bfloat16")
    with pytest.raises(Exception, match="frozen"):
        ada.kind = "cpu"


# (path of the key, its new value, words that the message must hold); ... removes the key
BROKEN: list[tuple[str, Any, list[str]]] = [
    ("memory_byte", {}, ["Unknown key 'memory_byte'", "did you mean 'memory_bytes'"]),
    ("memory_bytes.vale", 1, ["Unknown key 'memory_bytes.vale'", "did you mean 'value'"]),
    ("flops.bfloat", {}, ["Unknown key 'flops.bfloat'", "bfloat16, float16, float32", "did you mean 'bfloat16'"]),
    ("memory_bandwidth", ..., ["'memory_bandwidth' is missing", "how, source, date, value", "add"]),
    ("disk_read.source", ..., ["'disk_read.source' is missing"]),
    ("flops.float16.date", ..., ["'flops.float16.date' is missing"]),
    ("flops.float16", ..., ["flops does not hold", "bfloat16, float16, float32"]),
    ("disk_read", 3e9, ["'disk_read'", "3000000000", "a mapping with how, source, date, value"]),
    ("flops", [1], ["'flops'", "a mapping with bfloat16, float16, float32"]),
    ("kind", "rocm", ["'kind'", "'cuda' or 'cpu'", "rocm"]),
    ("kind", "cpu", ["do not agree", "cpu, ada, 8.9, 24"]),
    ("architecture", "adda", ["'architecture'", "adda", "'ada'"]),
    ("compute_capability", 8.9, ["'compute_capability'", "put it in quotes"]),
    ("compute_capability", None, ["do not agree"]),
    ("compute_capability", "7.5", ["flops does not hold", "compute capability 8.0"]),
    ("sm_count", 0, ["'sm_count'", "greater than 0"]),
    ("sm_count", True, ["'sm_count' takes no boolean"]),
    ("sm_count", "many", ["'sm_count'", "many"]),
    ("memory_bytes.value", "8gigs", ["memory_bytes.value", "Not a size", "8gigs"]),
    ("memory_bytes.value", -1, ["memory_bytes.value", "Not a size"]),
    ("memory_bytes.value", float("nan"), ["memory_bytes.value", "Not a size"]),
    ("memory_bytes.value", 0, ["leave no memory"]),
    ("display_bytes.value", "8GiB", ["leave no memory"]),
    ("link_to_host.value", -1.0, ["'link_to_host.value'", "greater than 0"]),
    ("link_to_host.value", float("nan"), ["'link_to_host.value'", "a finite number"]),
    ("link_to_host.value", float("inf"), ["'link_to_host.value'", "a finite number"]),
    ("link_to_host.value", "fast", ["'link_to_host.value'", "fast"]),
    ("link_to_host.value", True, ["link_to_host", "takes no boolean"]),
    ("disk_read.how", "guessed", ["'disk_read.how'", "'datasheet', 'measured', 'estimated' or 'derived'"]),
    ("disk_read.source", "  ", ["'disk_read.source'"]),
    ("disk_read.date", "yesterday", ["'disk_read.date'", "yesterday"]),
    ("name", "RTX 4060", ["'name'", "RTX 4060"]),
]


def test_a_profile_that_is_nested_too_deeply_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("[" * 3000)
    with pytest.raises(ConfigError, match="not YAML"):
        load_profile(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "'name' is given twice"),
        (
            "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [{', '.join(10 * [f'*{a}'])}]\n" for a, b in pairwise("abcdefg")),
            "Aliases",
        ),
    ],
)
def test_a_profile_is_read_as_strictly_as_a_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_profile(tmp_path / "mine.yaml")


def test_a_source_may_be_a_date(tmp_path: Path) -> None:
    data = facts()
    data["disk_read"]["source"] = data["disk_read"]["date"]
    assert load(data, tmp_path).disk_read.source == str(data["disk_read"]["date"])


@pytest.mark.parametrize(("path", "value", "words"), BROKEN, ids=[f"{row[0]}={row[1]}" for row in BROKEN])
def test_a_broken_profile_is_named(path: str, value: Any, words: list[str], tmp_path: Path) -> None:
    data = facts()
    *parents, last = path.split(".")
    section = data
    for parent in parents:
        section = section[parent]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    with pytest.raises(ConfigError) as caught:
        load(data, tmp_path)
    for word in [*words, "profile.yaml"]:
        assert word in str(caught.value)


def test_a_misspelt_key_is_not_called_missing(tmp_path: Path) -> None:
    data = facts()
    data["disk_raed"] = data.pop("disk_read")
    with pytest.raises(ConfigError, match=r"Unknown key 'disk_raed'(.|\n)*did you mean 'disk_read'"):
        load(data, tmp_path)


def test_a_key_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown key '1'"):
        load({**facts(), 1: 2}, tmp_path)


@pytest.mark.parametrize("text", ["", "- a\n", "name: [", "\x00", "name: x\ndate: 2026-13-01\n", "1: 2\n"])
def test_a_file_that_is_no_profile(text: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_profile(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("rtx-4090", "rtx-4090-24gb"), ("RTX 3060", "rtx-3060-12gb"), ("colab_t4_16gb", "colab-t4-16gb")],
)
def test_an_unknown_name_is_answered_with_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'") as caught:
        load_profile(given)
    assert str(caught.value.given) == given
    assert "a10-24gb" in str(caught.value.allowed)


def test_a_name_like_nothing_is_answered_with_the_list() -> None:
    with pytest.raises(ConfigError, match="profiles list"):
        load_profile("zzz")


@pytest.mark.parametrize("name", ["cpu", "colab-t4-16gb", "rtx-5090-32gb"])
def test_written_and_read_back(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    file = tmp_path / "mine.yaml"
    write_profile(profile, file)
    write_profile(profile, file)  # over an older one
    assert load_profile(str(file)) == profile
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_profile_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for target in (tmp_path / "missing" / "a.yaml", tmp_path / "folder.yaml"):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_profile(load_profile("cpu"), target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.yaml"]


def test_every_folder_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "lowmem_ft").rglob("__init__.py")
        if "assets" not in file.parts
    }
    assert set(settings["packages"]) == folders | {"lowmem_ft.profiles"}
    assert settings["package-dir"] == {"lowmem_ft.profiles": "profiles"}
    assert sorted(file.stem for file in (ROOT / "profiles").glob("*.yaml")) == NAMES
