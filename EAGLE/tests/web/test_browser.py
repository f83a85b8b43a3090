"""`msd web` in a real browser, with the pocket pair: upload, ask, stream, switch, stop.

Debian and Ubuntu: ``apt-get install chromium chromium-driver``. ``MSD_SCREENSHOTS=FOLDER`` keeps two pictures of the
page (docs/web-*.png are made so).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser as chromium
import pytest
from fault_support import hear_ctrl_c
from PIL import Image

from eagle.arguments import POCKET

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.installed() is None, reason="no Chromium with chromedriver on this machine"),
]
PATIENCE = 600  # seconds until a page that does not move is given up
PICTURE = POCKET / "data" / "images" / "heldout" / "h0000.png"
# Counts the pieces of an answer each time some are added.
WATCH = """
window.sizes = [];
new MutationObserver(() => window.sizes.push(document.querySelectorAll('.text span').length))
    .observe(document.getElementById('answers'), {childList: true, subtree: true});
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The command itself, on a free port, ended by Ctrl-C."""
    models = ["--base-model", str(POCKET / "llava"), "--msd-model", str(POCKET / "llava-msd"), "--dtype", "float32"]
    command = [sys.executable, "-m", "eagle.cli", "web", *models, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, preexec_fn=hear_ctrl_c, **pipes) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
            assert found, "the command prints its address"
            yield found.group()
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=PATIENCE) == 130


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium.window(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(window: Any, address: str) -> Any:
    window.get(address)
    wait(window, lambda: window.execute_script("return document.body.dataset.ready") == "yes")
    return window


def wait(window: Any, true: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(window, PATIENCE, poll_frequency=0.05).until(lambda _: true())


def by(window: Any, selector: str) -> list[Any]:
    return window.find_elements("css selector", selector)


def texts(window: Any, selector: str) -> list[str]:
    return [element.text for element in by(window, selector)]


def ask(window: Any, question: str, length: int, mode: str = "msd") -> None:
    """Fills the form in and sends it."""
    for selector, value in (("#question", question), ("#length", str(length))):
        (field,) = by(window, selector)
        field.clear()
        field.send_keys(value)
    by(window, f"#mode-{mode}")[0].click()
    by(window, "#ask")[0].click()


def finish(window: Any, answers: int = 1) -> None:
    wait(window, lambda: sum(line.startswith("done") for line in texts(window, ".state")) == answers)


def keep(window: Any, name: str) -> None:
    """Keeps a picture of the page where the environment asks for it."""
    if folder := os.environ.get("MSD_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        window.execute_script("window.scrollTo(0, 0)")
        assert window.save_screenshot(str(Path(folder) / name))


def upload(window: Any, path: Path) -> None:
    by(window, "#file")[0].send_keys(str(path))
    wait(window, lambda: by(window, "#picture")[0].is_displayed())


def test_upload_ask_and_watch_it_stream(page: Any, address: str) -> None:
    upload(page, PICTURE)
    page.execute_script(WATCH)
    ask(page, "Please describe the picture.", 60)
    finish(page)
    sizes = [size for size in page.execute_script("return window.sizes") if size]
    assert len(set(sizes)) > 2 and sizes == sorted(sizes), "the answer grows piece by piece"
    depths = page.execute_script("return [...document.querySelectorAll('.text span')].map(s => s.dataset.depth || 0)")
    assert {int(depth) for depth in depths} >= {0, 1, 2}
    (drafted, *_), (own, *_) = by(page, ".text .d1"), by(page, ".text span:not([class])")
    colours = [element.value_of_css_property("background-color") for element in (drafted, own)]
    assert colours[0] != colours[1] == "rgba(0, 0, 0, 0)", "an own token of the target has no colour"
    assert float(texts(page, ".tau")[0]) > 1.5 and float(texts(page, ".speed")[0]) > 0
    assert texts(page, ".count") == ["60"]
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(name.startswith((address, "data:", "blob:")) for name in loaded), "nothing from elsewhere"
    keep(page, "web-msd.png")


def test_switch_to_plain_and_side_by_side(page: Any) -> None:
    samples = by(page, "#samples button")
    assert len(samples) == 12
    before = by(page, "#question")[0].get_property("value")
    samples[0].click()
    wait(page, lambda: by(page, "#picture")[0].is_displayed())
    assert by(page, "#question")[0].get_property("value") != before, "a sample brings its question"
    ask(page, "Please describe the picture.", 60, mode="plain")
    finish(page)
    assert texts(page, "article h2") == ["plain decoding"] and texts(page, ".tau") == ["1.00"]
    assert by(page, ".text [data-depth]") == []
    alone = texts(page, ".text")[0]
    ask(page, "Please describe the picture.", 60, mode="both")
    finish(page, answers=2)
    assert texts(page, "article h2") == ["MSD", "plain decoding"]
    assert texts(page, ".text") == [alone, alone] and alone
    assert by(page, "article:first-child [data-depth]") and not by(page, "article:last-child [data-depth]")
    assert "the same answer" in texts(page, "#verdict")[0]
    keep(page, "web-side-by-side.png")


def test_stop_and_ask_again(page: Any) -> None:
    upload(page, PICTURE)
    ask(page, "Please describe the picture.", 512, mode="plain")
    wait(page, lambda: by(page, ".text span"))
    by(page, "#stop")[0].click()
    wait(page, lambda: texts(page, ".state") == ["stopped"])
    ask(page, "Please describe the picture.", 8)
    finish(page)
    assert texts(page, ".count") == ["8"]


@pytest.fixture
def phone(page: Any) -> Iterator[Any]:
    """The page on a phone in a dark room."""
    screen = {"width": 390, "height": 667, "deviceScaleFactor": 1, "mobile": True}
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    yield page
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_shows_the_answer_and_the_dark_colours(phone: Any) -> None:
    upload(phone, PICTURE)
    ask(phone, "Please describe the picture.", 20)
    finish(phone)
    assert phone.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    box = "const box = document.querySelector('.text').getBoundingClientRect();"
    assert phone.execute_script(box + "return box.top >= 0 && box.top + 60 <= innerHeight"), "the answer is in view"
    names = ("html", "form", ".d1", "i.d10")
    grounds = [by(phone, name)[0].value_of_css_property("background-color") for name in names]
    assert all(sum(map(int, re.findall(r"\d+", ground)[:3])) < 3 * 128 for ground in grounds), grounds


def test_control_enter_sends(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    for key in (Keys.CONTROL, Keys.META):
        page.refresh()
        wait(page, lambda: page.execute_script("return document.body.dataset.ready") == "yes")
        (question,) = by(page, "#question")
        page.execute_script("document.getElementById('length').value = 3")
        question.send_keys(Keys.ENTER, "And?")
        assert by(page, "article") == [], "Enter alone is a new line"
        question.send_keys(key, Keys.ENTER)
        finish(page)


@pytest.mark.slow
def test_the_extremes_of_the_controls(page: Any) -> None:
    for selector in ("#temperature", "#length"):
        (field,) = by(page, selector)
        for bound in ("min", "max"):
            page.execute_script("arguments[0].value = arguments[0][arguments[1]]", field, bound)
            page.execute_script("if (arguments[0].id === 'temperature') $('length').value = 4", field)
            by(page, "#ask")[0].click()
            finish(page)
    (field,) = by(page, "#temperature")
    page.execute_script("arguments[0].value = 2.1", field)
    by(page, "#ask")[0].click()
    assert page.execute_script("return !arguments[0].checkValidity() && !running", field), "the browser refuses it"


def test_the_place_in_the_queue_is_shown_and_a_waiting_request_can_be_stopped(page: Any, address: str) -> None:
    long = {"question": "Please describe the picture.", "msd": False, "max_new_tokens": 512, "temperature": 2}
    page.execute_script(
        "window.other = new AbortController();"
        "const asked = (body, signal) => fetch('answer', {method: 'POST', signal, body: JSON.stringify(body),"
        "    headers: {'Content-Type': 'application/json'}});"
        "for (let n = 0; n < 2; n += 1) asked(arguments[0], window.other.signal).catch(() => {});",
        long,
    )
    page.execute_script(WATCH.replace("sizes", "states").replace(
        "document.querySelectorAll('.text span').length", "document.querySelector('.state')?.textContent"
    ))  # fmt: skip
    ask(page, "What is this?", 4)
    wait(page, lambda: any("ahead of you" in (state or "") for state in page.execute_script("return window.states")))
    by(page, "#stop")[0].click()
    wait(page, lambda: texts(page, ".state") == ["stopped"])
    page.execute_script("window.other.abort()")
    ask(page, "What is this?", 4)
    finish(page)


def test_screen_readers_hear_starts_and_ends_but_not_each_token(page: Any) -> None:
    page.execute_script(
        "window.heard = []; new MutationObserver(() => window.heard.push($('announcement').textContent))"
        "    .observe($('announcement'), {childList: true});"
    )
    ask(page, "Please describe the picture.", 30)
    finish(page)
    assert by(page, "#answers [aria-live], #answers[aria-live], #answers [role=status]") == []
    heard = page.execute_script("return window.heard")
    assert len(heard) == 2 and heard[0] == "MSD: waiting" and heard[1].startswith("MSD: done, ")


def test_a_picture_that_is_too_large_is_told_before_it_is_sent(page: Any, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(22 * 2**20 + 1))
    Image.new("1", (8193, 2)).save(tmp_path / "wide.png")
    for name, said in (("large.png", "takes at most 22.0 MB"), ("wide.png", "has 8193 x 2 pixels")):
        by(page, "#file")[0].send_keys(str(tmp_path / name))
        wait(page, lambda said=said: said in texts(page, "#problem")[0])
        assert page.execute_script("return picture") is None
    upload(page, PICTURE)
    assert texts(page, "#problem") == [""]


def test_a_question_that_is_too_long_is_told(page: Any) -> None:
    page.execute_script("$('question').value = 'word '.repeat(50000)")
    by(page, "#ask")[0].click()
    wait(page, lambda: "for a model of 4096" in texts(page, ".state.error")[0] if by(page, ".state.error") else False)
    assert "for a model of 4096" in page.execute_script("return $('announcement').textContent")


def test_a_file_that_is_no_picture_is_told(page: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    by(page, "#file")[0].send_keys(str(tmp_path / "text.png"))
    wait(page, lambda: by(page, "#clear")[0].is_displayed())
    ask(page, "What is this?", 8)
    wait(page, lambda: "not a picture" in texts(page, ".state.error")[0] if by(page, ".state.error") else False)
    by(page, "#clear")[0].click()
    ask(page, "What is this?", 8)
    finish(page)
