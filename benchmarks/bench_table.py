"""README's table from a report of `msd bench`, which has one pair and one temperature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODELS = {"llava": "LLaVA", "qwen2vl": "Qwen2-VL"}
NAMES = {"autoregressive": "our autoregressive loop", "transformers generate": "transformers `generate`"}


def table_of(report: Mapping[str, Any]) -> str:
    """Baselines from slow to fast, then MSD. The strongest baseline is 1."""
    best = report["tokens_per_second"]["baseline"]
    folder, sampling = Path(report["settings"]["base_model"]).name, report["settings"]["temperature"]
    place = report["hardware"].get("gpu") or f"{report['hardware']['cores']} CPU cores"
    how = "greedy" if sampling == 0 else f"T = {sampling:g}"
    lines = [
        f"| pocket {MODELS.get(folder, folder)}, {place}, {how} | tokens/s | τ | speed-up |",
        "|---|---:|---:|---:|",
    ]
    for name, speed in sorted(report["baselines"].items(), key=lambda item: item[1]):
        kind, _, dtype = name.rpartition(" ")
        note = " (the strongest baseline)" if name == report["baseline_name"] else ""
        lines.append(f"| {NAMES.get(kind, kind)}, {dtype}{note} | {speed:.0f} | | {speed / best:.2f}x |")
    own = report["tokens_per_second"]["msd"]
    dtype = next(iter(report["baselines"])).rpartition(" ")[2]  # the first is in MSD's own
    lines.append(f"| MSD, {dtype} | {own:.0f} | {report['tau']:.2f} | **{report['speedup']:.2f}x** |")
    return "\n".join(lines) + "\n"
