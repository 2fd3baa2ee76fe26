"""A plan in a notebook: what it says, that nothing in it can break out, and that it is seen in any theme."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lowmem_ft.core.plan import Change, Plan
from lowmem_ft.core.plan_words import speed_words
from lowmem_ft.report.plan_page import plan_page
from lowmem_ft.report.tables import plan_table
from tests.pages import Parsed, in_browser, needs_browser
from tests.unit.core.test_plan import CANDIDATE, PLAN

GIB = 2**30
FITTING = dataclasses.replace(
    PLAN,
    device={"name": "rtx-3060-12gb", "kind": "cuda"},
    budget={"device_bytes": 10 * GIB, "host_bytes": GIB},
    predicted=dataclasses.replace(PLAN.predicted, process_peak_bytes=8 * GIB),
    breakdown=dict(zip(PLAN.breakdown, (4 * GIB, 0, 0, 0, 2 * GIB, GIB, 0, GIB), strict=True)),
    phases={"load": {"device_bytes": 5 * GIB, "host_bytes": GIB}, "train": {"device_bytes": 8 * GIB}, "merge": {}},
    alternatives=tuple(
        dataclasses.replace(CANDIDATE, process_peak_bytes=(7 - at) * GIB, step_seconds=0.5 + at / 10) for at in range(6)
    ),
    changes=(),
)
REFUSED = dataclasses.replace(
    FITTING,
    fits=False,
    budget={"device_bytes": 2 * GIB, "host_bytes": GIB},
    reason="None of 3 policies fits 2.00 GiB.",
    changes=(Change(key="data.seq_len", value=512, process_peak_bytes=GIB, tokens_per_second=99.0),),
)
VERIFIED = dataclasses.replace(FITTING, measured={"process_peak_bytes": 10 * GIB, "step_seconds": 0.4})
HOSTILE = "</td><script>alert(1)</script>\"'<img src=x onerror=y>&amp;"


def titles(plan: Plan) -> list[str]:
    """What the tables of a plan are about: all that is bold but the model, whose tag has a style."""
    return re.findall(r"<b>(.*?)</b>", plan._repr_html_())


def bars(plan: Plan) -> list[float]:
    """Per cent of each bar that is filled."""
    return [float(share) for share in re.findall(r";width:([\d.]+)%;height:100%", plan._repr_html_())]


def test_a_plan_that_fits_says_how_well_and_what_else_there_is() -> None:
    text = Parsed(FITTING._repr_html_()).text
    assert "m (LlamaForCausalLM, 7.0M)" in text
    assert "rtx-3060-12gb: peak 8.00 GiB of 10.00 GiB, 80%" in text
    for words in (
        FITTING.policy.describe(),
        "Because.",
        "0.5 s per step, 4,096 tokens per second.",
        "weights 4.00 GiB",
    ):
        assert words in text
    assert "does not fit" not in text
    assert titles(FITTING) == ["What fills it", "Peak by phase", "Safer, by estimate"]
    assert bars(FITTING) == [80.0, 50.0, 25.0, 12.5, 12.5]
    assert "phase device host load 5.00 GiB 1.00 GiB train 8.00 GiB -" in text
    assert text.count(FITTING.policy.describe()) == 1 + 4, "the first few alternatives are enough"
    assert "saves slower policy 1.00 GiB 0% nf4" in text
    assert "2.00 GiB 20% nf4" in text


@pytest.mark.parametrize(("seconds", "words"), [(0.01234, "0.0123 s"), (12.34, "12.3 s"), (1650.4, "1,650 s")])
def test_seconds_are_plain_numbers(seconds: float, words: str) -> None:
    predicted = dataclasses.replace(FITTING.predicted, step_seconds=seconds)
    assert speed_words(dataclasses.replace(FITTING, predicted=predicted)).startswith(f"{words} per step")


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    text = Parsed(REFUSED._repr_html_()).text
    for words in (
        "does not fit",
        "peak 8.00 GiB of 2.00 GiB, 400%",
        "None of 3 policies",
        "data.seq_len=512 1.00 GiB 99",
    ):
        assert words in text
    assert titles(REFUSED) == ["What fills it", "Peak by phase", "What would make it fit"]
    assert bars(REFUSED)[0] == 100.0
    assert "left:25.0%" in REFUSED._repr_html_(), "the budget is marked"


def test_every_form_says_so_where_the_host_binds() -> None:
    taken = dataclasses.replace(FITTING.predicted, host_peak_bytes=3 * GIB)
    bound = dataclasses.replace(FITTING, fits=False, predicted=taken, reason="The host binds.")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(bound))
    for text in (Parsed(bound._repr_html_()).text, Parsed(plan_page(bound)).text, console.export_text()):
        assert "; host: 3.00 GiB of 1.00 GiB" in text
        assert "The host binds." in text
    assert "10.00 GiB on rtx-3060-12gb with 1.00 GiB of the host" in Parsed(plan_page(bound)).text
    for free in (
        FITTING,
        dataclasses.replace(bound, budget={"device_bytes": 10 * GIB, "host_bytes": 0}),
        dataclasses.replace(bound, device={"name": "cpu", "kind": "cpu"}),
    ):
        assert not free.host_binds, "it is large enough, unknown, or the device itself"
        assert "host:" not in Parsed(free._repr_html_()).text


def test_a_verified_plan_shows_predicted_beside_measured() -> None:
    assert titles(VERIFIED) == [*titles(FITTING), "Verified"]
    text = Parsed(VERIFIED._repr_html_()).text
    assert "process peak 8.00 GiB 10.00 GiB -20.0%" in text
    assert "step seconds 0.5 0.4 +25.0%" in text


def test_nothing_from_outside_becomes_markup() -> None:
    plan = dataclasses.replace(
        REFUSED,
        model={**PLAN.model, "name": HOSTILE, "architecture": HOSTILE},
        device={"name": HOSTILE},
        reason=HOSTILE,
        phases={HOSTILE: {HOSTILE: 7}},
        changes=(Change(key=HOSTILE, value=HOSTILE, process_peak_bytes=1, tokens_per_second=1.0),),
    )
    page = Parsed(plan._repr_html_())
    assert {tag for tag, _ in page.tags} == {"div", "b", "span", "table", "tr", "td", "th"}
    assert {name for _, attributes in page.tags for name in attributes} == {"style"}
    assert page.text.count(HOSTILE) == 8


@pytest.mark.parametrize("plan", [FITTING, REFUSED, VERIFIED, PLAN], ids=["fits", "refused", "verified", "bare"])
def test_it_brings_its_own_styles_and_nothing_that_only_one_theme_can_show(plan: Plan) -> None:
    page = plan._repr_html_()
    assert not re.search(r"https?:|url\(|<style|<script|class=|background:(#fff|white|black)", page)
    for style in re.findall(r'style="(.*?)"', page):
        assert not re.search(r"(^|;)color:#", style) or "background:#" in style, "text has the colour of the page"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (900, True)])
def test_in_a_real_browser(width: int, dark: bool, tmp_path: Path) -> None:
    """In a notebook's column, with a notebook's styles for tables."""
    colours = "background:#111;color:#ddd" if dark else "background:#fff;color:#111"
    notebook = "table{table-layout:fixed;margin:auto}td,th{text-align:right;padding:.5em;white-space:normal}"
    look = """[...d.querySelectorAll('div[style*="height:100%"]')].map(b=>[b.getBoundingClientRect().width,
      b.parentElement.getBoundingClientRect().width,b.getBoundingClientRect().height])"""
    page = f"<!doctype html><style>body{{{colours}}}{notebook}</style>{VERIFIED._repr_html_()}"
    found = in_browser(page, width, look, tmp_path)
    assert found["scroll"] <= found["inner"] == width
    assert found["loaded"] == 0
    assert len(found["seen"]) == 5
    for share, (filled, whole, high) in zip(bars(VERIFIED), found["seen"], strict=True):
        assert filled == pytest.approx(whole * share / 100, abs=0.1)
        assert whole > 100
        assert high > 8
