"""The page of a plan: what it says, that it is safe and self-contained, and what a real browser makes of it."""

from __future__ import annotations

import dataclasses
import html
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import BREAKDOWN, Change, Plan, Sample
from lowmem_ft.report.plan_page import plan_page
from tests.pages import Parsed, in_browser, needs_browser
from tests.unit.core.test_plan import CANDIDATE, PLAN

GIB = 2**30


def realistic(**changes: Any) -> Plan:
    """An 8B model on a card of 12 GB."""
    sizes = [5.31, 0.08, 0.16, 0.16, 3.7, 0.44, 0.0, 0.8]
    blocks = range(32)
    rising = [Sample(int((5.7 + 0.1 * b) * GIB), "forward", b) for b in blocks]
    falling = [Sample(int((6.0 + 0.1 * b) * GIB), "backward", b) for b in reversed(blocks)]
    settings: dict[str, Any] = {
        "model": {**PLAN.model, "name": "m <8B> & co", "parameters": 8_030_000_000, "blocks": 32},
        "device": {"name": "rtx-3060-12gb", "kind": "cuda"},
        "budget": {"device_bytes": 11 * GIB, "host_bytes": 16 * GIB},
        "predicted": dataclasses.replace(PLAN.predicted, process_peak_bytes=int(10.65 * GIB), tokens_per_second=247.0),
        "breakdown": {name: int(size * GIB) for name, size in zip(BREAKDOWN, sizes, strict=True)},
        "phases": {
            "load": {"device_bytes": 6 * GIB, "host_bytes": GIB}, "train": {"device_bytes": int(10.65 * GIB)},
            "eval": {"device_bytes": 7 * GIB}, "save": {"device_bytes": 6 * GIB, "disk_bytes": GIB}, "merge": {},
        },
        "frontier": tuple(
            dataclasses.replace(CANDIDATE, process_peak_bytes=(8 + i) * GIB, tokens_per_second=240.0 + 3 * i)
            for i in range(20)
        ),
        "timeline": (*rising, Sample(int(9.8 * GIB), "loss", None), *falling, Sample(int(5.7 * GIB), "update", None)),
        "config": RunConfig.from_dict({"model": "org/m", "data": {"seq_len": 4096}}).model_dump(mode="json"),
    }  # fmt: skip
    return dataclasses.replace(PLAN, **{**settings, **changes})


def test_it_answers_and_explains() -> None:
    page = Parsed(plan_page(realistic(), dataset_tokens=50_000_000, price_per_hour=0.3))
    text = page.text
    for words in ("m <8B> & co", "fits", "11.00 GiB", "rtx-3060-12gb", "247 tokens per second", "56.23 hours", "16.87"):
        assert words in text
    charts = [attributes["id"] for tag, attributes in page.tags if tag == "svg"]
    assert charts == ["breakdown", "phases", "timeline", "frontier"]
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")


def test_nothing_is_loaded_from_anywhere_and_nothing_runs() -> None:
    page = plan_page(realistic())
    for _, attributes in Parsed(page).tags:
        assert not {"src", "href", "xlink:href", "onclick", "onload"} & set(attributes)
    assert not re.search(r"https?://|url\(|@import|<script", page)


def test_the_config_that_it_shows_is_one() -> None:
    shown = re.search(r"<pre>(.*?)</pre>", plan_page(realistic()), re.DOTALL)
    assert shown
    text, _, commands = shown[1].partition("\n\n")
    config = RunConfig.from_dict(yaml.safe_load(text))
    assert config.model == "org/m"
    assert config.data.seq_len == 4096
    assert config.budget.memory == 11 * GIB
    assert "lowmem-ft train run.yaml" in commands
    assert "data.seq_len=4096" in commands


def test_the_command_that_it_shows_is_read_as_the_config(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "model": str(tmp_path / "a model"), "train": {"grad_clip": None}, "budget": {"memory": 11 * GIB},
        "adapter": {"targets": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.q_proj": 4}},
    }  # fmt: skip
    config = RunConfig.from_dict(keys)
    shown = re.search(r"<pre>(.*?)</pre>", plan_page(realistic(config=config.model_dump(mode="json"))), re.DOTALL)
    assert shown
    _, _, model, _, page, *overrides = shlex.split(html.unescape(shown[1]).splitlines()[-1])
    assert page == "plan.html"
    assert RunConfig.from_dict({"model": model}, overrides) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fits": False, "changes": (Change(key="data.seq_len", value=512, process_peak_bytes=GIB,
                                            tokens_per_second=99.0),)}, ["does not fit", "data.seq_len=512", "99"]),
        ({"timeline": (), "frontier": (), "alternatives": ()}, ["No step was traced", "No other policy"]),
        ({"phases": {"load": {}, "train": {}}}, ["No phase was planned"]),
        ({"timeline": (Sample(1, "forward", 0),)}, ["Peak 1 B in forward, block 0"]),
        ({"budget": {"device_bytes": 2**50, "host_bytes": 1}}, ["1024.00 TiB"]),
    ],
    ids=["too small", "bare", "no phases", "one sample", "huge"],
)  # fmt: skip
def test_edges(changes: dict[str, Any], words: list[str]) -> None:
    text = Parsed(plan_page(realistic(**changes))).text
    for word in words:
        assert word in text


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_real_browser(width: int, tmp_path: Path) -> None:
    """No console message, no request, all charts have a size, and the page is as wide as the window."""
    look = """[...d.querySelectorAll('svg')].map(s=>[s.id,s.getBoundingClientRect().width,
      s.getBoundingClientRect().height,s.querySelectorAll('rect,circle,polygon').length])"""
    found = in_browser(plan_page(realistic(), dataset_tokens=10**9), width, look, tmp_path)
    assert found["scroll"] <= found["inner"] == width
    assert found["loaded"] == 0
    assert [name for name, *_ in found["seen"]] == ["breakdown", "phases", "timeline", "frontier"]
    for name, wide, high, marks in found["seen"]:
        assert wide > 0.7 * min(width, 700), name
        assert high > 20, name
        assert marks >= 4, name
