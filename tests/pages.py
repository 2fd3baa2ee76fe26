"""HTML in tests: parsed, and as a real browser lays it out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADLESS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000",
    "--enable-logging=stderr", "--v=0", "--allow-file-access-from-files", "--window-size=1400,4200",
)  # fmt: skip
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: `apt-get install chromium`")


class Parsed(HTMLParser):
    """Tags, attributes and text of a page; fails where tags are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, "never closed"

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def in_browser(page: str, width: int, look: str, folder: Path) -> dict[str, Any]:
    """What the page looks like in a window of `width` pixels; fails on any console message.

    Args:
        look: a JavaScript expression of what to see; `d` is the page's document.

    Returns:
        `seen` (the expression's value), `scroll` and `inner` (pixels across of page and window), `loaded` (requests).
    """
    assert CHROMIUM is not None
    (folder / "page.html").write_text(page, encoding="utf-8")
    probe = f"""<script>onload=()=>{{const f=document.getElementById('f'),d=f.contentDocument;
      document.title=JSON.stringify({{scroll:d.documentElement.scrollWidth,inner:f.clientWidth,
      loaded:f.contentWindow.performance.getEntriesByType('resource').length,seen:{look}}})}}</script>"""
    frame = f'<iframe id="f" src="page.html" style="border:0;width:{width}px;height:4000px"></iframe>'
    (folder / "probe.html").write_text(f"<!doctype html><body style='margin:0'>{frame}{probe}", encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *HEADLESS, f"--user-data-dir={folder / 'user'}", "--dump-dom", (folder / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[-2000:] + done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    found: dict[str, Any] = json.loads(title[1])
    return found
