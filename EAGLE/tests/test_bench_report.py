"""The report of `msd bench`: its counters against an independent count of the log, near ties, and its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from eagle import bench_report
from eagle.arguments import POCKET
from eagle.bench_report import Bench
from eagle.benchmark import Contestant
from eagle.cli import main
from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.exactness import Gap
from eagle.questions import Question, read_questions

PAIR = ["--base-model", str(POCKET / "llava"), "--msd-model", str(POCKET / "llava-msd"), "--dtype", "float32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run on four held-out questions of two sources, with all files. The first one is cut at the length limit."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [json.loads(line) for line in (POCKET / "data" / "heldout.jsonl").read_text().splitlines()[:40:10]]
    for number, row in enumerate(rows):
        row["images"] = [str(POCKET / "data" / name) for name in row["images"]]
        row["source"] = ("charts", "scenes")[number % 2]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {name: folder / f"report.{name}" for name in ("json", "html", "csv", "md")}
    flags = ["--out", str(made["json"]), "--html", str(made["html"]), "--csv", str(made["csv"])]
    flags += ["--markdown", str(made["md"]), "--max-new-tokens", "24", "--warm-up", "0", "--tree", "fixed"]
    assert main(["bench", *PAIR, "--data", str(folder / "q.jsonl"), *flags]) == 0
    return made


@pytest.fixture(scope="module")
def report(files: dict[str, Path]) -> dict[str, Any]:
    return json.loads(files["json"].read_text())


def count(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything from the logged tokens alone. A whole cycle ends with the target's own token; the last one may be cut
    at the end of the answer, so the log says how many of its tokens were accepted."""
    logs = [list(zip(each["cycles"][1:], each["accepted"], strict=True)) for each in answers]
    cycles = [pair for log in logs for pair in log]
    assert all(len(cycle) == n + 1 for log in logs for cycle, n in log[:-1]) and all(len(c) <= n + 1 for c, n in cycles)
    texts = [[token for cycle in each["cycles"] for token in cycle] for each in answers]
    return {
        "cycles": len(cycles),
        "tau": sum(len(cycle) for cycle, _ in cycles) / len(cycles),
        "accepted": sum(number for _, number in cycles) / len(cycles),
        "positions": [sum(n >= p for _, n in cycles) / len(cycles) for p in range(1, max(n for _, n in cycles) + 1)],
        "identical": sum(text == each["plain"] for text, each in zip(texts, answers, strict=True)),
        "tokens": sum(map(len, texts)),
    }


def test_counters_agree_with_an_independent_count_of_the_log(report: dict[str, Any]) -> None:
    parts = {"total": (report, report["answers"])} | {
        name: (figures, [each for each in report["answers"] if each["source"] == name])
        for name, figures in report["sources"].items()
    }
    assert set(parts) == {"total", "charts", "scenes"}
    for figures, answers in parts.values():
        counted = count(answers)
        assert counted["accepted"] > 1, "the draft is good enough for the count to mean something"
        assert (figures["cycles"], figures["new_tokens"]) == (counted["cycles"], counted["tokens"])
        assert figures["tau"] == pytest.approx(counted["tau"])
        assert figures["accepted_per_cycle"] == pytest.approx(counted["accepted"])
        assert figures["acceptance_by_position"] == pytest.approx(counted["positions"])
        assert figures["identical"]["answers"] == counted["identical"] == figures["identical"]["of"] == len(answers)


def test_a_source_has_the_figures_of_its_own_questions(report: dict[str, Any]) -> None:
    assert sum(figures["questions"] for figures in report["sources"].values()) == report["questions"] == 4
    own = [each for each in report["answers"] if each["source"] == "charts"]
    seconds, plain = (sum(each["seconds"][name] for each in own) for name in ("msd", "baseline"))
    tokens = sum(sum(map(len, each["cycles"])) for each in own)
    assert report["sources"]["charts"]["speedup"] == pytest.approx(plain / seconds)
    assert report["sources"]["charts"]["tokens_per_second"]["msd"] == pytest.approx(tokens / seconds)


def test_the_setting_is_recorded(report: dict[str, Any]) -> None:
    assert report["setting"] == {
        "card": "cpu", "dtype": "float32", "attention": "sdpa", "compiled": False, "batch": 1, "temperature": 0.0,
    }  # fmt: skip


def test_pieces_are_the_text_with_depths(report: dict[str, Any]) -> None:
    for each in report["answers"]:
        assert "".join(text for text, _ in each["pieces"]).strip() == each["plain_text"].strip()
        depths = [depth for _, depth in each["pieces"][:-1]]
        wanted = [depth for cycle, n in zip(each["cycles"], [0, *each["accepted"]], strict=True)
                  for depth in [*range(1, n + 1), 0][: len(cycle)]]  # fmt: skip
        assert depths == wanted


def test_csv_and_markdown_have_the_same_figures(files: dict[str, Path], report: dict[str, Any]) -> None:
    with files["csv"].open(newline="") as file:
        rows = {row["source"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"charts", "scenes", "total"}
    assert float(rows["total"]["tau"]) == report["tau"] and rows["total"]["identical"] == "4"
    assert float(rows["total"]["paired_low"]) == report["paired_speedup"]["low"]
    header, rule, row = files["md"].read_text().splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["τ"] == f"{report['tau']:.2f}" and cells["attention"] == "sdpa"
    assert cells["identical answers"] == "4 of 4"
    assert (cells["tree"], cells["max_new_tokens"], cells["data"]) == ("6/3/12", "24", "q.jsonl")


def test_the_page_needs_nothing_from_elsewhere(files: dict[str, Path], report: dict[str, Any]) -> None:
    page = files["html"].read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<details") == 4 and page.count("<svg") == 4 and page.count("data:image/jpeg;base64,") == 4
    assert 'class="d2"' in page and report["answers"][0]["question"].split("'")[0] in page


def test_each_report_needs_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--out", str(tmp_path / "a"), "--csv", str(tmp_path / "b" / ".." / "a")]
    (tmp_path / "b").mkdir()
    assert main(["bench", *PAIR, "--data", "q.jsonl", *files]) == 2
    assert "the same file for two of --out, --html" in capsys.readouterr().err


def bench_of(own: list[list[int]], plain: list[list[int]], model: MSDModel, **settings: bool) -> Bench:
    """Contestants that have answered so."""
    questions = [Question(str(number), "Name a river.") for number in range(len(own))]
    rounds = [Stats(len(tokens), seconds=1.0) for tokens in own]
    made = [
        Contestant(name, lambda work: None, rounds=rounds, answers=answers, cycles=[[tokens] for tokens in answers])  # type: ignore[arg-type,return-value]
        for name, answers in (("MSD", own), ("autoregressive", plain), ("transformers generate", plain))
    ]
    return Bench(model, made[0], made[1:], questions, **settings)


def test_a_difference_is_a_near_tie_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MSDModel.from_pretrained(POCKET / "llava", POCKET / "llava-msd", dtype="float32")
    (question,) = read_questions(POCKET / "data" / "heldout.jsonl", 1)
    plain = model.generate(**question.inputs(model.target), use_msd=False, max_new_tokens=4, temperature=0.0).tokens[0]
    other = [*plain[:2], plain[2] + 1, *plain[3:]]
    bench = bench_of([other, plain], [plain, plain], model)
    bench.questions = [question, question]
    (difference,) = bench.differences.values()
    assert difference["place"] == 2 and difference["steps"] > 1000 and not difference["near_tie"]
    assert bench.figures([0, 1])["identical"] == {
        "answers": 1, "of": 2, "near_ties": 0, "to": "transformers generate",
    }  # fmt: skip
    monkeypatch.setattr(bench_report, "logit_gap", lambda *_: Gap(1, 2, (0.0, 0.0), 1.0))
    close = bench_of([[1, 9], [1]], [[1, 2], [1, 2]], model)
    assert close.figures([0, 1])["identical"]["near_ties"] == 1, "an answer that ends earlier is not a near tie"
    assert close.figures([1])["identical"]["near_ties"] == 0


def test_a_turn_after_a_difference_is_as_near_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first turn differs at a near tie, so both were asked the second one after other answers. The third is the
    first turn of another conversation, and differs clearly."""
    model = MSDModel.from_pretrained(POCKET / "llava", dtype="float32")
    seen: list[int] = []

    def gap(target: Any, inputs: dict[str, Any], *_: Any) -> Gap:
        seen.append(inputs["input_ids"].shape[1])
        return Gap(1, 2, (0.0, 0.0), 1.0 if len(seen) == 1 else 99.0)

    monkeypatch.setattr(bench_report, "logit_gap", gap)
    bench = bench_of([[5, 9], [7], [5, 9], [8]], [[5, 8], [8], [5, 8], [8]], model)
    asked = {"a": ("One?", "Two?"), "b": ("One?", "Two?")}
    bench.questions = [
        Question(f"{name}/{n}", text, conversation=name, earlier=turns[:n])
        for name, turns in asked.items() for n, text in enumerate(turns)
    ]  # fmt: skip
    assert [(n, each["near_tie"]) for n, each in bench.differences.items()] == [(0, True), (1, True), (2, False)]
    assert len(seen) == 2, "only first differences of a conversation are looked at"


def test_sampled_answers_are_compared_only_with_a_seed() -> None:
    assert bench_of([[1]], [[1]], None, sampled=True).figures([0])["identical"] is None  # type: ignore[arg-type]
    seeded = bench_of([[1]], [[1]], None, sampled=True, seeded=True)  # type: ignore[arg-type]
    assert seeded.figures([0])["identical"]["to"] == "autoregressive"
