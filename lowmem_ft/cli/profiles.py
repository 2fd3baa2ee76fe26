"""`lowmem-ft profiles list | show | measure`: the devices that a plan can be made for without having one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.files import check_writable
from lowmem_ft.core.printable import printable
from lowmem_ft.core.sizes import format_size
from lowmem_ft.planner.profile import SUFFIXES, Bytes, Profile, Rate, load_profile, profile_names, write_profile
from lowmem_ft.report.columns import columns
from lowmem_ft.report.progress import Printable, Reporter

profiles_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Facts of devices that plans are made for.",
)

# of figures by a part of their key; all others are bytes per second
UNITS = {
    **dict.fromkeys(("flops.", "attention", "loops"), "FLOP/s"),
    **dict.fromkeys(("exponentials", "packing", "dequantize", "updates", "draws", "calls"), "/s"),
}

NARROW = 60  # characters of a line in which columns become too narrow to read

Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


@profiles_app.command("list")
def list_profiles(as_json: Json = False) -> None:
    """The shipped profiles."""
    profiles = [load_profile(name) for name in profile_names()]
    if as_json:
        print(json.dumps([_summary(profile) for profile in profiles]))
        return
    header = ("name", "device", "memory", "dtype", "compute", "bandwidth")
    _print([_row(profile) for profile in profiles], header, title="Device profiles")


@profiles_app.command("measure")
def measure_device(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Default: the profile's name and .yaml.")] = None,
) -> None:
    """Measure this machine in under a minute; `budget.profile` takes the file here, `plan --device` elsewhere."""
    from lowmem_ft.planner.device import find_device
    from lowmem_ft.planner.measure import measure

    if out is not None and out.suffix not in SUFFIXES:  # no plan would take it
        raise ConfigError("A profile is known by its file's ending.", given=out, allowed="NAME.yaml")
    found = find_device(device)
    check_writable(out or Path("profile.yaml"))
    with Reporter().task(f"Measuring {found.name}", unit="figures") as update:
        profile = measure(found, done=update)
    path = out or Path(f"{profile.name}.yaml")
    write_profile(profile, path)
    print(f"{path}: {len(profile.figures())} figures. Plan for it with --device {path}")


@profiles_app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name from `profiles list`, or a YAML file.")], as_json: Json = False
) -> None:
    """Every figure of a profile, with how it was found, when and where."""
    profile = load_profile(name)
    if as_json:
        print(json.dumps(profile.model_dump(mode="json")))
        return
    facts = [profile.title, f"kind {profile.kind}", f"architecture {profile.architecture}"]
    if profile.compute_capability is not None:
        facts += [f"compute capability {profile.compute_capability}", f"{profile.sm_count} SMs"]
    rows = [
        (key, format_figure(key, figure), figure.how, figure.date.isoformat(), figure.source)
        for key, figure in profile.figures().items()
    ]
    print(f"{profile.name}: {', '.join(facts)}")
    _print(rows, ("figure", "value", "how", "date", "source"))


def format_figure(key: str, figure: Bytes | Rate) -> str:
    """A figure with its unit: `11.63 GiB`, `25.5 TFLOP/s`, `360 GB/s`."""
    if isinstance(figure, Bytes):
        return format_size(figure.value)
    unit = next((unit for part, unit in UNITS.items() if part in key), "B/s")
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # bandwidths are compared in GB/s, also above a thousand
        if figure.value >= factor and not (prefix == "T" and unit == "B/s"):
            return f"{figure.value / factor:.4g} {prefix}{unit}"
    return f"{figure.value:.4g} {unit}"


def _row(profile: Profile) -> tuple[str, ...]:
    dtype = profile.fastest_dtype
    return (
        profile.name,
        profile.title,
        format_figure("memory_bytes", profile.memory_bytes),
        dtype,
        format_figure("flops.", profile.flops[dtype]),
        format_figure("memory_bandwidth", profile.memory_bandwidth),
    )


def _summary(profile: Profile) -> dict[str, str | int | float]:
    return {
        "name": profile.name,
        "title": profile.title,
        "kind": profile.kind,
        "architecture": profile.architecture,
        "memory_bytes": profile.memory_bytes.value,
        "dtype": profile.fastest_dtype,
        "flops": profile.flops[profile.fastest_dtype].value,
        "memory_bandwidth": profile.memory_bandwidth.value,
    }


def _print(rows: Sequence[tuple[str, ...]], header: tuple[str, ...], title: str | None = None) -> None:
    """A table on a terminal with room for one; elsewhere one line per row, with tabs between the columns."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal or console.width < NARROW:
        for row in rows:
            print(printable("\t".join(row)))
        return
    table = Table(*columns(*header), title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(Printable(table))
