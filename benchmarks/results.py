"""The tables of docs/results.md: the pocket pairs, reports of other pairs and machines, and published figures.

    python -m benchmarks.results add report.json    # a report of `msd bench --out`: checked, then a row of the page
    python -m benchmarks.results                    # writes the page again
    python -m benchmarks.results --check            # exit status 1 if the page has other rows

Rows of reports are kept in benchmarks/results.json. Adding a report again changes nothing.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasPath, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from eagle.published import published_rows
from eagle.report import markdown_table
from eagle.report.bench import identical_text, lacks_compiled_baseline, questions_of, tree_text
from eagle.report.runs import kind_of
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli
from llava.files import read_json, read_object, write_json, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE, ROWS, POCKET = "docs/results.md", "benchmarks/results.json", "benchmarks/pocket.json"
BLOCK = re.compile(r"(<!-- (pocket|sent|published) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


def at(*path: str) -> Any:
    """Where in a report a field is."""
    return Field(validation_alias=AliasPath(*path))


class Part(BaseModel):
    """Of a report. Types are strict; keys that a row does not need are not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Interval(Part):
    mean: Positive
    low: Positive
    high: Positive


class Identical(Part):
    answers: Annotated[int, Field(ge=0)]
    of: Count
    near_ties: Annotated[int, Field(ge=0)]


class Logged(Part):
    """An answer: its new tokens by cycle, the drafted tokens that each cycle accepted, the plain answer, the times."""

    cycles: Annotated[list[list[int]], Field(min_length=1)]
    accepted: list[Annotated[int, Field(ge=0)]]
    plain: list[int] | None = None
    baseline_tokens: Count
    seconds: Annotated[Positive, at("seconds", "msd")]
    plain_seconds: Annotated[Positive, at("seconds", "baseline")]

    @property
    def tokens(self) -> list[int]:
        return [token for cycle in self.cycles for token in cycle]


class Tree(Part):
    depth: int
    top_k: int
    total_tokens: int
    adaptive: bool


class Report(Part):
    """What a row needs of a report of `msd bench`."""

    speedup: Positive
    paired_speedup: Interval
    tau: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    accepted_per_cycle: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    identical: Identical | None
    own_speed: Annotated[Positive, at("tokens_per_second", "msd")]
    plain_speed: Annotated[Positive, at("tokens_per_second", "baseline")]
    baseline_name: str
    first_token_ms: dict[str, Positive]
    new_tokens: Count
    cycles: Count
    questions: Count
    histogram: dict[str, Annotated[int, Field(ge=0)]]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT")]
    commit: str | None
    torch: Annotated[str, at("versions", "torch")]
    transformers: Annotated[str, at("versions", "transformers")]
    cpu: Annotated[str, at("hardware", "cpu")]
    gpu: Annotated[str | None, at("hardware", "gpu")] = None
    compiled: Annotated[bool, at("setting", "compiled")]
    base: Annotated[str, at("settings", "base_model")]
    draft: Annotated[str, at("settings", "msd_model")]
    data: Annotated[str, at("settings", "data")]
    suite: Annotated[str | None, at("settings", "suite")] = None
    subset: Annotated[str | None, at("settings", "subset")] = None
    limit: Annotated[int | None, at("settings", "limit")] = None
    attention: Annotated[str, at("settings", "attn_implementation")]
    tree: Annotated[Tree, at("settings", "tree")]
    max_new_tokens: Annotated[Count, at("settings", "max_new_tokens")]
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), at("settings", "temperature")]
    answers: Annotated[list[Logged], Field(min_length=1)]


@dataclass(frozen=True)
class Row:
    """A line of the page, as numbers and texts."""

    pair: str
    questions: str
    temperature: float
    machine: str
    decoding: str
    tokens_per_second: float
    plain: str
    speedup: float
    paired: tuple[float, float, float]
    tau: float
    accepted: float
    identical: str
    made: str


def faults_of(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with a report, one line each; none if it can be a row."""
    if (kind := kind_of(given)) != "bench":
        return [f"not a report of msd bench --out{f', but of {kind}' if kind else ''}: a row comes only from one"]
    try:
        report = Report.model_validate_json(json.dumps(given))
    except ValidationError as error:
        return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
    same, paired = report.identical, report.paired_speedup
    checks = {
        "MSD was compiled and no plain baseline was: measure it again": not lacks_compiled_baseline(given),
        "speedup is not the ratio of tokens_per_second": math.isclose(
            report.speedup, report.own_speed / report.plain_speed, rel_tol=1e-6
        ),
        "paired_speedup: the mean is outside its interval": paired.low <= paired.mean <= paired.high,
        "tau is not (new_tokens - questions) / cycles": math.isclose(
            report.tau, (report.new_tokens - report.questions) / report.cycles, rel_tol=1e-6
        ),
        "tau is larger than accepted_per_cycle and a bonus token": report.tau <= report.accepted_per_cycle + 1 + 1e-9,
        "identical: more answers than there are": same is None or same.answers <= same.of,
        "identical.of is not the number of questions": same is None or same.of == report.questions,
        "first_token_ms has no MSD": any(name.startswith("MSD ") for name in report.first_token_ms),
        "commit: the source had changes, or is not from a clone": re.fullmatch("[0-9a-f]{40}", report.commit or "")
        is not None,
    }
    return [what for what, holds in checks.items() if not holds] + faults_of_log(report)


def faults_of_log(report: Report) -> list[str]:
    """The figures of a report that its logged answers do not give, counted again from them alone."""
    answers = report.answers
    if any(len(each.accepted) != len(each.cycles) - 1 for each in answers):
        return ["answers: not one number of accepted tokens for each cycle"]
    pairs = [pair for each in answers for pair in zip(each.cycles[1:], each.accepted, strict=True)]
    ratios = [len(each.tokens) / each.seconds / (each.baseline_tokens / each.plain_seconds) for each in answers]
    counted = {
        "questions": (report.questions, len(answers)),
        "new_tokens": (report.new_tokens, sum(len(each.tokens) for each in answers)),
        "cycles": (report.cycles, len(pairs)),
        "accepted_per_cycle": (report.accepted_per_cycle, sum(number for _, number in pairs) / max(len(pairs), 1)),
        "tokens_per_second.msd": (
            report.own_speed, sum(len(each.tokens) for each in answers) / sum(each.seconds for each in answers)
        ),
        "tokens_per_second.baseline": (
            report.plain_speed,
            sum(each.baseline_tokens for each in answers) / sum(each.plain_seconds for each in answers),
        ),
        "paired_speedup.mean": (report.paired_speedup.mean, sum(ratios) / len(ratios)),
    }  # fmt: skip
    if report.identical is not None:
        counted["identical.answers"] = report.identical.answers, sum(each.tokens == each.plain for each in answers)
    faults = [
        f"{name} is {said:.6g}, but the logged answers give {found:.6g}"
        for name, (said, found) in counted.items() if not math.isclose(said, found, rel_tol=1e-6)
    ]  # fmt: skip
    if {str(accepted): count for accepted, count in Counter(number for _, number in pairs).items()} != report.histogram:
        faults.append("histogram does not count the accepted tokens of the logged cycles")
    if any(len(cycle) > number + 1 for cycle, number in pairs):
        faults.append("answers: a cycle with more tokens than were accepted, and a bonus token")
    return faults


def row_of(given: Mapping[str, Any]) -> Row:
    """The row of a report without faults."""
    report = Report.model_validate_json(json.dumps(given))
    paired, same = report.paired_speedup, report.identical
    dtype = next(name for name in report.first_token_ms if name.startswith("MSD ")).removeprefix("MSD ")
    compiled = ", compiled" if report.compiled else ""
    asked = {"suite": report.suite, "subset": report.subset, "data": report.data, "limit": report.limit}
    versions = f"torch {report.torch}, transformers {report.transformers}"
    return Row(
        pair=f"{short(report.base)} + {short(report.draft)}",
        questions=f"{questions_of(asked)}: {report.questions}",
        temperature=report.temperature,
        machine=report.gpu or report.cpu,
        decoding=f"{dtype}, {report.attention}{compiled}, tree {tree_text(vars(report.tree))}, "
        f"up to {report.max_new_tokens} tokens",
        tokens_per_second=report.own_speed,
        plain=f"{report.plain_speed:.1f} ({report.baseline_name})",
        speedup=report.speedup,
        paired=(paired.mean, paired.low, paired.high),
        tau=report.tau,
        accepted=report.accepted_per_cycle,
        identical="" if same is None else identical_text(same.model_dump()),
        made=f"{report.date[:10]}, {str(report.commit)[:12]}, {versions}",
    )


def short(model: str) -> str:
    """A hub name as it is, of a path its last folder."""
    return Path(model).name if model.startswith(("/", ".", "~")) or model.count("/") != 1 else model


def add(path: Path, root: Path) -> str:
    """Adds a report to the rows and writes the page; returns a line for the user.

    Raises:
        UserError: the report has faults; a line about each was printed.
    """
    given = read_object(path, "report")
    if faults := faults_of(given):
        for fault in faults:
            print(f"error: {path}: {' '.join(fault.split())}", file=sys.stderr)
        raise UserError(f"{len(faults)} fault{'s' * (len(faults) > 1)}, nothing was added", path)
    rows, row = read_rows(root), row_of(given)
    if row in rows:
        return f"already there: {row.pair}, {row.questions}"
    rows = sorted([*rows, row], key=lambda each: (each.pair, each.questions, each.temperature, each.machine, each.made))
    write_json(root / ROWS, [asdict(each) for each in rows], indent=1)
    write_page(root)
    return f"added: {row.pair}, {row.questions}"


def read_rows(root: Path) -> list[Row]:
    return TypeAdapter(list[Row]).validate_json(json.dumps(read_json(root / ROWS, "rows")))


def pocket_table(root: Path) -> str:
    from benchmarks.readme import chosen, how, name_of
    from benchmarks.report import NOISY, days, made_by

    report = read_object(root / POCKET, "report")
    rows, shown = [], chosen(report)
    for temperature, cells in shown.items():
        for cell in cells:
            own, plain = cell["results"]["msd"], cell["results"][cell["baseline_name"]]
            mark, differ = NOISY if cell["doubtful"] else "", own["answers_that_differ"]
            same = "" if differ is None else f"{cell['questions'] - differ} of {cell['questions']}"
            rows.append([
                name_of(cell), how(temperature), f"{mark}{own['tokens_per_second']:.0f}",
                f"{mark}{plain['tokens_per_second']:.0f} ({cell['baseline_name']})", f"{mark}{own['speedup']:.2f}x",
                f"{own['tau']:.2f}", same,
            ])  # fmt: skip
    head = ("pair", "", "tokens/s", "strongest plain", "speed-up of medians", "τ with bonus", "identical")
    every = [cell for cells in shown.values() for cell in cells]
    made = f"{days(report, every)}, {report['hardware']['cpu']}, {report['hardware']['cores']} cores, float32, "
    made += f"{made_by(report, every)}. {NOISY}: noisy rounds.\n"
    return f"{markdown_table(head, rows)}\n\n{made}"


def sent_table(root: Path) -> str:
    rows = read_rows(root)
    if not rows:
        return "No report was sent yet.\n"
    head = ("pair", "questions", "T", "machine", "decoding", "tokens/s", "strongest plain", "speed-up of totals",
            "paired [95 %]", "τ with bonus", "without", "identical", "made")  # fmt: skip
    cells = (
        [
            each.pair, each.questions, f"{each.temperature:g}", each.machine, each.decoding,
            f"{each.tokens_per_second:.1f}", each.plain, f"{each.speedup:.2f}x",
            "{:.2f}x [{:.2f}, {:.2f}]".format(*each.paired), f"{each.tau:.2f}", f"{each.accepted:.2f}",
            each.identical, each.made,
        ]
        for each in rows
    )  # fmt: skip
    return markdown_table(head, cells) + "\n"


def published_table(root: Path) -> str:
    head = ("method", "base", "questions", "T", "setting", "τ", "speed-up", "identical", "source, and how it was read")
    cells = (
        [
            each.method, each.base, each.set, "" if each.temperature is None else f"{each.temperature:g}", each.setting,
            each.counted, each.faster, "" if each.identical is None else f"{each.identical:.0%}",
            f"{each.source}; {each.checked}",
        ]
        for each in published_rows(root / "benchmarks" / "published.json")
    )  # fmt: skip
    return markdown_table(head, cells) + "\n"


def page_of(root: Path, text: str) -> str:
    """The page with its tables written again."""
    tables = {"pocket": pocket_table, "sent": sent_table, "published": published_table}
    if sorted(match[2] for match in BLOCK.finditer(text)) != sorted(tables):
        raise UserError(f"the page does not have the marks of {', '.join(tables)} once each", root / PAGE)
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match[2]](root)}{match[4]}", text)


def write_page(root: Path) -> None:
    text = page_of(root, (root / PAGE).read_text(encoding="utf-8"))
    write_text(root / PAGE, text)


def run(argv: Sequence[str], root: Path = REPOSITORY) -> int:
    """Returns the exit status."""
    parser = OneLineParser(prog="python -m benchmarks.results", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page has other rows")
    actions = parser.add_subparsers(dest="action", metavar="add")
    adding = actions.add_parser("add", help="check a report and add its row")
    adding.add_argument("report", type=Path, metavar="FILE.json", help="written by msd bench --out")
    options = parser.parse_args(argv)
    if options.action == "add":
        print(add(options.report, root))
        return 0
    before = (root / PAGE).read_text(encoding="utf-8")
    if options.check:
        return int(page_of(root, before) != before)
    write_page(root)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda: run(sys.argv[1:])))
