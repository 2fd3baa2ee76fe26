"""`profiles list | show`: plain lines when piped, a table on a terminal, JSON for programs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowmem_ft.cli.profiles import format_figure, profiles_app
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.planner.profile import Profile, load_profile, profile_names, write_profile


def run(*arguments: str) -> str:
    result = CliRunner().invoke(profiles_app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_list_prints_one_line_per_device_when_piped() -> None:
    lines = [line.split("\t") for line in run("list").splitlines()]
    assert [line[0] for line in lines] == profile_names()
    assert ["colab-t4-16gb", "NVIDIA T4 (Google Colab)", "14.56 GiB", "float16", "24 TFLOP/s", "320 GB/s"] in lines


def test_list_is_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    output = run("list")
    assert "Device profiles" in output
    assert "\t" not in output
    assert all(name in output for name in profile_names())


@pytest.mark.parametrize("width", [80, 60, 40])
def test_names_are_whole_in_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    for output, names in ((run("list"), profile_names()), (run("show", "cpu"), list(load_profile("cpu").figures()))):
        assert set(names) <= set(output.split())
        assert "…" not in output, "nothing is cut"


def test_list_as_json() -> None:
    rows = json.loads(run("list", "--json"))
    assert [row["name"] for row in rows] == profile_names()
    card = next(row for row in rows if row["name"] == "rtx-4090-24gb")
    assert card["dtype"] == "bfloat16"
    assert card["flops"] == 165.0e12
    assert card["memory_bytes"] == load_profile("rtx-4090-24gb").memory_bytes.value


@pytest.mark.parametrize("name", ["cpu", "rtx-3060-12gb", "v100-16gb"])
def test_show_prints_every_figure_with_its_source(name: str) -> None:
    profile = load_profile(name)
    first, *lines = run("show", name).splitlines()
    assert name in first
    assert profile.title in first
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    assert list(rows) == list(profile.figures())
    for key, figure in profile.figures().items():
        assert rows[key] == [format_figure(key, figure), figure.how, figure.date.isoformat(), figure.source]


def test_show_is_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    output = run("show", "rtx-3060-12gb")
    assert "memory_bandwidth" in output
    assert "360 GB/s" in output
    assert "datasheet" in output


def test_show_as_json_reads_back(tmp_path: Path) -> None:
    profile = load_profile("h100-80gb")
    assert Profile.model_validate_json(run("show", "h100-80gb", "--json")) == profile
    write_profile(profile, tmp_path / "mine.yaml")
    assert json.loads(run("show", str(tmp_path / "mine.yaml"), "--json"))["name"] == "h100-80gb"


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_ft.planner.measure.measure", lambda *_, **__: pytest.fail("it measures"))
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    for out, words in (
        (tmp_path / "no" / "x.yaml", "cannot be written"),
        (folder, "cannot be written"),
        (tmp_path / "x.profile", "NAME.yaml"),
    ):
        result = CliRunner().invoke(profiles_app, ["measure", "--device", "cpu", "--out", str(out)])
        assert isinstance(result.exception, ConfigError)
        assert words in str(result.exception)


def test_show_of_an_unknown_name_is_bad_input() -> None:
    result = CliRunner().invoke(profiles_app, ["show", "rtx-4090"])
    assert isinstance(result.exception, ConfigError)  # `main` prints it and exits with 2
    assert "did you mean 'rtx-4090-24gb'?" in str(result.exception)
