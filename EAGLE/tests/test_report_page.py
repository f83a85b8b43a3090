"""The pages of `msd bench` and `msd report` in a real browser: nothing is loaded, nothing scrolls sideways, both modes
of colour. ``MSD_SCREENSHOTS=FOLDER`` keeps pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser as chromium
import pytest

from eagle.published import published_rows
from eagle.report import bench, compare
from eagle.report.runs import Run, bench_row

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.installed() is None, reason="no Chromium with chromedriver on this machine"),
]
SIZES = {"desktop": (1280, False), "phone": (390, True)}


def report() -> dict[str, Any]:
    """A report of `msd bench` of 30 questions of two sources, some slower than plain decoding."""
    answers = []
    for number in range(30):
        text = [["A long answer ", 0], ["that was drafted", 1], [" in part", 2], [" by <the> draft" * (number % 4), 3]]
        answers.append({
            "id": f"q{number}", "source": f"a source with a long name {number % 2}", "images": [], "accepted": [3],
            "question": "What is this? " * (1 + number % 9), "cycles": [[1], [2, 3, 4, 5][: 2 + number % 3]],
            "pieces": text, "seconds": {"msd": 1.0 + number % 3, "baseline": 2.0}, "baseline_tokens": 4,
            "first_token_seconds": {"msd": 0.1, "baseline": 0.1}, "plain_text": "".join(piece for piece, _ in text),
            "difference": {"place": 3, "steps": 1.0, "near_tie": True} if number == 4 else None,
        })  # fmt: skip
    figures = {
        "questions": 30, "new_tokens": 99, "cycles": 30, "tau": 3.0, "accepted_per_cycle": 2.0, "speedup": 1.2,
        "tokens_per_second": {"msd": 123.4, "baseline": 100.0}, "first_token_ms": {"MSD": 50.0, "plain float32": 49.0},
        "paired_speedup": {"mean": 1.25, "low": 1.0, "high": 1.5}, "acceptance_by_position": [0.9, 0.5, 0.25],
        "histogram": {"0": 3, "1": 12, "2": 8, "3": 7}, "identical": {"answers": 29, "of": 30, "near_ties": 1},
    }  # fmt: skip
    setting = {"card": "cpu", "dtype": "bfloat16", "attention": "sdpa", "compiled": False, "batch": 1, "temperature": 0}
    return {
        **figures, "answers": answers, "baseline_name": "plain float32", "setting": setting, "date": "2026-01-01",
        "sources": {f"a source with a long name {number}": figures for number in range(2)}, "commit": "c" * 40,
        "settings": {
            "base_model": "owner/a-base-model-of-a-long-name", "msd_model": "owner/its-draft", "data": "q.jsonl",
            "tree": {"depth": 6, "top_k": 3, "total_tokens": 12, "adaptive": False}, "max_new_tokens": 128,
        },
        "hardware": {"cpu": "a processor", "threads": 2}, "versions": {"torch": "2"}, "command": ["msd", "bench"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium.window(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("pages"), report()
    bench.write_html(made, folder / "bench.html")
    runs = [
        Run(Path("a/long/name/of/a/folder") / f"{name}.json", "bench", {"dtype": name, "tree": "x" * 90},
            [bench_row("total", made, made["answers"][: 20 + n])])
        for n, name in enumerate(("float32", "bfloat16"))
    ]  # fmt: skip
    compare.write_html(runs, folder / "report.html", published_rows())
    return {name: folder / f"{name}.html" for name in ("bench", "report")}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["bench", "report"])
def test_a_page_is_readable(window: Any, pages: dict[str, Path], name: str, size: str, dark: bool) -> None:
    width, mobile = SIZES[size]
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    window.get(pages[name].as_uri())
    run = window.execute_script
    assert run("return document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    loaded = run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [each for each in loaded if not each.startswith("data:")] == []
    colours = [run(f"return getComputedStyle(document.documentElement).{key}") for key in ("backgroundColor", "color")]
    ground, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (ground < text) == dark and abs(ground - text) > 3 * 128
    outside = run(
        "return [...document.querySelectorAll('svg')].flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {"
        "  const [a, b] = [svg.getBoundingClientRect(), text.getBoundingClientRect()];"
        "  return b.left < a.left - 1 || b.right > a.right + 1 || b.bottom > a.bottom + 1 || b.top < a.top - 1;"
        "}).map(text => text.textContent))"
    )
    assert outside == [], "texts of a chart are inside it"
    if name == "bench":
        assert len(run("return [...document.querySelectorAll('.text .d3')]")) > 10
        assert "<the>" in run("return document.body.textContent"), "texts are escaped"
        assert run("return document.querySelectorAll('circle.loss').length") > 0, "where speculation loses"
    if folder := os.environ.get("MSD_SCREENSHOTS"):
        height = min(3000, run("return document.documentElement.scrollHeight"))
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**screen, "height": height})
        Path(folder).mkdir(parents=True, exist_ok=True)
        assert window.save_screenshot(str(Path(folder) / f"{name}-{size}-{scheme['value']}.png"))
