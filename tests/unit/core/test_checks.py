"""Versions against what a package's own metadata allows."""

from pathlib import Path

import pytest

from lowmem_ft.core.checks import Check, check_versions


def dist(folder: Path, name: str, version: str, *requires: str, python: str = ">=3.8") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {it}" for it in requires)]) + "\n")


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    needs = ["old-one>=2", "new-one<2,>=1", "fine-one>=1", "local-one>=1,<3", "gone-one>=1", 'extra-one; extra == "x"']
    dist(tmp_path, "burdened_package", "1", *needs, python=">=3.99")
    for name, version in (("old_one", "1.9"), ("new_one", "2.0"), ("fine_one", "1"), ("local_one", "2.0a0+git1")):
        dist(tmp_path, name, version)
    found = {check.name: check for check in check_versions("burdened-package")}
    assert {name: check.status for name, check in found.items()} == {
        "python": "problem",
        "old-one": "problem",
        "new-one": "problem",
        "fine-one": "ok",
        "local-one": "ok",
        "gone-one": "problem",
    }
    assert found["old-one"].found == "1.9, where burdened-package needs >=2"
    assert found["old-one"].fix == "pip install 'old-one>=2'"
    assert found["gone-one"].found == "not installed"
    assert found["python"].fix == "install Python >=3.99"


def test_a_package_that_is_not_installed() -> None:
    (found,) = check_versions("never-installed-package")
    assert (found.status, found.fix) == ("warning", "pip install .")


def test_this_package_finds_its_own() -> None:
    found = {check.name: check for check in check_versions()}
    assert {"python", "torch", "transformers", "bitsandbytes", "safetensors", "peft"} <= found.keys()
    assert found["torch"].to_dict() == {"name": "torch", "status": "ok", "found": found["torch"].found, "fix": ""}


def test_what_is_not_well_says_how_to_fix_it() -> None:
    with pytest.raises(AssertionError, match="has a fix"):
        Check(name="a", status="warning", found="b")
