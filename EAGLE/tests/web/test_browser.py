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
    programs = chromium.installed()
    assert programs is not None
    opened = chromium.open_browser(programs, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.quit()


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


def test_a_file_that_is_no_picture_is_told(page: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    by(page, "#file")[0].send_keys(str(tmp_path / "text.png"))
    wait(page, lambda: by(page, "#clear")[0].is_displayed())
    ask(page, "What is this?", 8)
    wait(page, lambda: "not a picture" in texts(page, ".state.error")[0] if by(page, ".state.error") else False)
    by(page, "#clear")[0].click()
    ask(page, "What is this?", 8)
    finish(page)
