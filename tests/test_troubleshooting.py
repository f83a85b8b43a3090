"""docs/troubleshooting.md has a line for every `UserError` message in the code, and none that no code raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "troubleshooting.md"
SOURCES = ("LLaVA/llava", "EAGLE/eagle", "lmms-eval/lmms_eval_msd", "benchmarks")
GAP = "…"
PASSED_ON = {"message", "failure.message", "error.what"}  # a message that was made elsewhere: argparse's, a worker's
KINDS = ("UserError", "OutOfMemory", "Refused")
ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)


def template(node: ast.expr) -> str | None:
    """The text of a message with a gap for each inserted value; None for a message that is only passed on."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp):
        return f"{template(node.left) or GAP}{template(node.right) or GAP}"
    return None


def messages() -> Iterator[tuple[str | None, str, str]]:
    """(template, source text, place) of each UserError that is made."""
    for path in sorted(path for folder in SOURCES for path in (REPO / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS):
                continue
            what = node.args[0] if node.args else next(word.value for word in node.keywords if word.arg == "what")
            yield template(what), ast.unparse(what), f"{path.relative_to(REPO).as_posix()}:{node.lineno}"


def explained() -> dict[str, str]:
    return dict(ROW.findall(PAGE.read_text(encoding="utf-8")))


def test_every_message_is_explained() -> None:
    known = explained()
    missing = [f"{place}: | `{text}` |" for text, _, place in messages() if text is not None and text not in known]
    assert missing == [], "add a row to docs/troubleshooting.md"


def test_every_explained_message_exists() -> None:
    raised = {text for text, _, _ in messages()}
    assert [text for text in explained() if text not in raised] == []


def test_other_messages_are_passed_on() -> None:
    """What is no literal cannot be looked up, so only messages of others may be handed on."""
    assert {source: place for text, source, place in messages() if text is None and source not in PASSED_ON} == {}


def test_rows_say_something_and_are_sorted_into_sections() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = ROW.findall(text)
    assert len(rows) == len(explained()) > 100, "a message is explained twice"
    assert [message for message, meaning in rows if len(meaning) < 20] == []
    assert all(ROW.search(section) for section in text.split("\n## ")[1:])
