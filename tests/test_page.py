"""The page in a real browser: what a reader sees, clicks and types."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunesearch.report import compare
from prunesearch.report.page import render_page
from prunesearch.study.candidate import Candidate
from tests.browser import Browser, find_chromium
from tests.report_records import FOUND, LAYERS, add, add_study

TOP2 = Candidate((4, 5))
PANEL = "[...document.querySelectorAll('#pins tr')].map(r => [...r.cells].map(c => c.textContent))"
RINGS = "[...document.querySelectorAll('#front .tracepinned .point')].filter(p => getComputedStyle(p).opacity > 0).length"
LABELS = "[...document.querySelectorAll('#front .tracepinned text')].map(t => t.textContent.trim()).filter(Boolean).sort()"
PRESSED = "[...document.querySelectorAll('button[aria-pressed=true]')].map(b => b.getAttribute('aria-label'))"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    add_study(folder / "records")
    (folder / "report.html").write_text(render_page(compare(folder / "records", "speech_params", "s")), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if (program := find_chromium()) is None:
        pytest.skip("no Chromium here (apt-get install chromium): the page is not tried out in a browser")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Iterator[Browser]:
    """At the page, wide; whatever a test does there must be free of errors and of the network."""
    chromium.resize(1280)
    chromium.open(page)
    chromium.until("document.querySelectorAll('#front .point').length > 0")
    yield chromium
    assert chromium.reported("Runtime.exceptionThrown") == []
    assert [c for c in chromium.reported("Runtime.consoleAPICalled") if c["type"] == "error"] == []
    assert [e for e in chromium.reported("Log.entryAdded") if e["entry"]["level"] == "error"] == []
    requests = [r["request"]["url"] for r in chromium.reported("Network.requestWillBeSent")]
    assert requests == [page.as_uri()]


def click_point(browser: Browser, candidate: Candidate) -> None:
    """On the middle of the candidate's mark, once the plot shows what lies there: a click is on what was last pointed at.
    Two clicks within 0.3 s would be a double click, which resets the axes."""
    time.sleep(0.35)
    x, y = browser.evaluate(
        f"""(() => {{
          const plot = document.getElementById("front");
          plot.scrollIntoView();
          const trace = plot.data.findIndex(t => t.uid !== "pinned" && t.customdata.includes("{candidate.key}"));
          const point = plot.data[trace].customdata.indexOf("{candidate.key}");
          const mark = plot.querySelectorAll(".scatterlayer > .trace")[trace].querySelectorAll(".point")[point];
          const box = mark.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
    )
    browser.move(1, 1)
    browser.move(x, y)
    browser.until(f"document.querySelector('#front .hoverlayer').textContent.includes('{strip(candidate)}')")
    browser.click(x, y)


def strip(candidate: Candidate) -> str:
    return "".join("□" if i in candidate.removed_layers else "■" for i in range(LAYERS))


def panel(browser: Browser, candidates: int) -> dict[str, list[str]]:
    """The panel's rows by their first cell, once it shows so many candidates."""
    columns = candidates + (candidates == 2)
    browser.until(f"document.querySelector('#pins thead tr')?.cells.length === {1 + columns}")
    rows: list[list[str]] = browser.evaluate(PANEL)
    return {first: rest for first, *rest in rows}


def test_a_clicked_point_is_pinned_and_a_second_one_compared(browser: Browser) -> None:
    assert browser.evaluate("document.querySelector('#pins table').checkVisibility()") is False
    click_point(browser, FOUND)
    one = panel(browser, 1)
    assert one[""] == ["1: minus-1-2+lora4"]
    assert one["layers"] == ["■□□■■■"]
    assert (one["layers removed"], one["LoRA rank"]) == (["2"], ["4"])
    assert (one["dev WER, %"], one["test WER, %"], one["test S/D/I"]) == (["23.33"], ["13.33"], ["13.3/0.0/0.0"])
    assert browser.evaluate(RINGS) == 1
    assert browser.evaluate(PRESSED) == ["pin minus-1-2+lora4"]

    click_point(browser, TOP2)
    two = panel(browser, 2)
    assert two[""] == ["1: minus-1-2+lora4", "2: top2", "2 minus 1"]
    assert two["layers"] == ["■□□■■■", "■■■■□□", ""]
    assert two["layers removed"] == ["2", "2", "0"]
    assert two["LoRA rank"] == ["4", "0", "−4"]
    assert two["dev WER, %"] == ["23.33", "53.33", "+30.00"]
    assert two["test S/D/I"] == ["13.3/0.0/0.0", "53.3/0.0/0.0", "+40.0/0.0/0.0"]
    assert two["speech, M"] == ["11.040", "11.000", "−0.040"]
    assert two["total, M"] == ["61.040", "61.000", "−0.040"]
    assert browser.evaluate(RINGS) == 2
    assert browser.evaluate(LABELS) == ["1", "2"]

    click_point(browser, FOUND)
    assert panel(browser, 1)[""] == ["1: top2"]
    assert browser.evaluate(RINGS) == 1
    click_point(browser, TOP2)
    browser.until("!document.querySelector('#pins table').checkVisibility()")
    assert browser.evaluate(RINGS) == 0
    assert browser.evaluate(PRESSED) == []


def test_a_third_pin_replaces_the_older_one_and_the_axes_stay(browser: Browser) -> None:
    axes = "JSON.stringify([front.layout.xaxis.range, front.layout.yaxis.range])"
    before = browser.evaluate(axes)
    for candidate in (FOUND, TOP2, Candidate((0,), 4)):
        click_point(browser, candidate)
    browser.until("document.querySelector('#pins thead').textContent.includes('minus-0+lora4')")
    assert panel(browser, 2)[""] == ["1: top2", "2: minus-0+lora4", "2 minus 1"]
    assert panel(browser, 2)["test WER, %"] == ["53.33", "–", "–"]
    assert browser.evaluate(RINGS) == 2
    assert browser.evaluate(LABELS) == ["1", "2"]
    assert browser.evaluate(axes) == before


def test_candidates_can_be_pinned_by_keyboard(browser: Browser) -> None:
    def focused() -> Any:
        return browser.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent")

    labels = browser.evaluate("[...document.querySelectorAll('button[data-pin]')].map(b => b.getAttribute('aria-label'))")
    assert labels == [f"pin {name}" for name in ("top2", "minus-1-2+lora4", "top2+lora", "unpruned", "unpruned+lora")]
    for _ in range(20):
        if focused() == "pin top2":
            break
        browser.press("Tab")
    assert focused() == "pin top2"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.evaluate(outline) == "solid"
    browser.press("Enter")
    assert panel(browser, 1)[""] == ["1: top2"]
    for _ in range(2):
        browser.press("Tab")
    browser.press(" ")
    assert panel(browser, 2)[""] == ["1: top2", "2: top2+lora", "2 minus 1"]
    assert browser.evaluate(PRESSED) == ["pin top2", "pin top2+lora"]
    browser.press(" ")
    assert panel(browser, 1)[""] == ["1: top2"]

    browser.evaluate("document.querySelector('#pins button').focus()")
    browser.press("Enter")
    browser.until("!document.querySelector('#pins table').checkVisibility()")
    assert browser.evaluate(PRESSED) == []
    assert focused() == "Pinned candidates"


def test_nothing_is_wider_than_a_phone(browser: Browser) -> None:
    browser.resize(390)
    for name in ("top2", "minus-1-2+lora4"):
        browser.evaluate(f"document.querySelector('[aria-label=\"pin {name}\"]').click()")
    panel(browser, 2)
    browser.until("document.querySelector('#front .main-svg').getBoundingClientRect().width <= 390")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    legend, plot = (f"document.querySelector('#front .{name}').getBoundingClientRect()" for name in ("legend", "nsewdrag"))
    assert browser.evaluate(f"{legend}.bottom <= {plot}.top + 1")
    assert browser.evaluate(f"{plot}.height") > 200


def test_tables_and_headings_are_accessible(page: Path) -> None:
    html = re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert '<html lang="en">' in html
    assert html.count("<h1") == 1
    assert html.count("<table") == html.count("<caption>") > 2
    assert all('scope="' in tag for tag in re.findall(r"<th\b[^>]*>", html))
    boxes = re.findall(r'<div class="scroll"[^>]*>', html)
    assert len(boxes) == html.count("<table")
    labels = [match[1] for box in boxes if (match := re.search(r' tabindex="0" role="region" aria-label="([^"]+)"', box))]
    assert len(set(labels)) == len(boxes)
    assert 'aria-live="polite"' in html


def test_names_are_escaped_on_the_page(tmp_path: Path) -> None:
    add(tmp_path, Candidate((1,)), 2, name='</script><script>alert("x")</script><!--<script>')
    html = render_page(compare(tmp_path, "speech_params", "s"))
    assert "<script>alert" not in html
    assert "<!--<script>" not in html
    (embedded,) = re.findall(r'<script type="application/json" id="candidates">(.*?)</script>', html, re.DOTALL)
    assert json.loads(embedded)["candidates"]["minus-1"]["title"].startswith("</script>")
