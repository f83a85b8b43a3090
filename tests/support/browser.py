"""A headless Chromium for tests; None where the machine has none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVERS = ("chromedriver", "chromium.chromedriver")


def installed() -> tuple[str, str] | None:
    """Paths of browser and driver, if both are there."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS)]
    return (found[0], found[1]) if found[0] and found[1] else None


@contextmanager
def window(profile: Path) -> Iterator[Any]:
    """A selenium driver with an empty profile and a window of 1280 x 900 pixels. Nothing is downloaded for it."""
    from selenium import webdriver

    programs = installed()
    assert programs is not None

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    switches = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900",
                "disable-background-networking", f"user-data-dir={profile}")  # fmt: skip
    for switch in switches:
        options.add_argument(f"--{switch}")
    service = webdriver.ChromeService(executable_path=programs[1])
    opened = webdriver.Chrome(options=options, service=service)
    try:
        yield opened
    finally:
        opened.quit()
