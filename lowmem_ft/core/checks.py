"""What a check of the machine found, and the checks that need no more than the standard library: versions."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PACKAGE = "lowmem-ft"
FIX = {
    "torch": "install a PyTorch of these versions, from PyTorch's own index for a CUDA build: https://pytorch.org",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: what was looked at.
        status: `problem` where no run can work, `warning` where some run may not or is slower than it could be.
        found: in words.
        fix: what to do about it; empty where all is well.
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.fix, f"{self.name}: what is not well has a fix"

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def check_versions(package: str = PACKAGE) -> Iterator[Check]:
    """Python and every package that `package` requires, against the versions that its own metadata allows."""
    try:
        info = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        yield Check(
            name="versions",
            status="warning",
            found=f"{package} is not installed as a package, so nothing says which versions it needs",
            fix="pip install .",
        )
        return
    yield _compared("python", platform.python_version(), SpecifierSet(info["Requires-Python"] or ""), package)
    for text in metadata.requires(package) or ():
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield _compared(wanted.name, installed_version(wanted.name), wanted.specifier, package)


def installed_version(name: str) -> str | None:
    """None where no package of this name is installed, as where its folder alone is on the path."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _compared(name: str, found: str | None, allowed: SpecifierSet, package: str) -> Check:
    text = str(allowed).replace(",", ", ") or "any version"
    if found is None:
        return Check(name=name, status="problem", found="not installed", fix=f"pip install '{name}{allowed}'")
    # a build made from sources says 2.13.0a0+git...: that it is a pre-release says nothing of what it can do
    if allowed.contains(found, prereleases=True):
        return Check(name=name, status="ok", found=f"{found} (allowed: {text})")
    fix = FIX.get(name, f"install Python {text}" if name == "python" else f"pip install '{name}{allowed}'")
    return Check(name=name, status="problem", found=f"{found}, where {package} needs {text}", fix=fix)
