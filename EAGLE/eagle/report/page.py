"""Pages of HTML in one file: no scripts, no links, readable on a desktop and on a phone, light and dark."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from llava.files import write_text

STYLE = Path(__file__).with_name("page.css")
DEEPEST = 10
"""Colours of the style; deeper tokens share the last one."""
SHOWN = 100
"""Answers on a page at most; the JSON file has all."""
THUMBNAIL = 240  # pixels
LONG = 40
"""Texts of a table with more characters are wrapped."""
NUMBER = re.compile(r"[-+]?\d")


def write_page(path: Path, title: str, *sections: str) -> None:
    """Writes a page, atomically."""
    style = STYLE.read_text(encoding="utf-8")
    head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    head += f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n"
    write_text(path, head + "\n".join(filter(None, sections)) + "\n</html>\n")


def section(title: str, *parts: str) -> str:
    """A heading and what is below it; nothing if there is nothing."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) if any(parts) else ""


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def header(title: str, *lines: str) -> str:
    return f"<header><h1>{escape(title)}</h1>{''.join(paragraph(line) for line in lines)}</header>"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """(figure, what it is) each."""
    return '<div class="tiles">' + "".join(
        f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in figures
    ) + "</div>"  # fmt: skip


def charts(*parts: str) -> str:
    return f'<div class="charts">{"".join(parts)}</div>' if any(parts) else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways on its own where it is too wide. Columns of texts are on the left."""
    texts = [any(row[place] and not NUMBER.match(row[place]) for row in rows) for place in range(len(header))]

    def cell(tag: str, place: int, text: str) -> str:
        kinds = [kind for kind, true in (("left", texts[place]), ("long", len(text) > LONG)) if true]
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    def line(tag: str, row: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, place, text) for place, text in enumerate(row))}</tr>"

    lines = [line("th", header), *(line("td", row) for row in rows)]
    return f'<div class="scroll"><table>{chr(10).join(lines)}</table></div>'


def coloured(pieces: Sequence[Sequence[Any]]) -> str:
    """The text of (piece, depth) pairs; accepted drafted tokens have the colour of their depth in the tree."""
    return "".join(
        f'<b class="d{min(depth, DEEPEST)}">{escape(piece)}</b>' if depth else escape(piece)
        for piece, depth in pieces if piece
    )  # fmt: skip


LEGEND = '<p class="legend muted">Drafted tokens, by depth in the tree: ' + "".join(
    f'<b class="d{depth}">{depth}{"+" if depth == DEEPEST else ""}</b>' for depth in range(1, DEEPEST + 1)
) + " Without colour: tokens of the target itself.</p>"  # fmt: skip


def thumbnail(path: str | Path) -> str:
    """A small copy of a picture inside the page; nothing if the file is not there any more."""
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def answers(logged: Sequence[Mapping[str, Any]], lines: Sequence[str], opened: int = 3) -> str:
    """Answers with their accepted tokens coloured, each beside the plain one if there is one.

    Args:
        logged: entries of a report's ``answers``.
        lines: the summary line of each.
        opened: how many are unfolded.
    """
    parts = [LEGEND]
    for number, (answer, line) in enumerate(zip(logged[:SHOWN], lines, strict=False)):
        pair = f'<div><h3>speculative</h3><p class="text">{coloured(answer["pieces"])}</p></div>'
        if (difference := answer.get("difference")) is not None:
            near = " (near tie)" if difference["near_tie"] else ""
            title = f"plain, differs from token {difference['place']} on{near}"
            pair += f'<div><h3 class="bad">{title}</h3><p class="text">{escape(answer["plain_text"])}</p></div>'
        elif answer.get("plain_text") is not None:
            pair += f'<div><h3>plain: the same</h3><p class="text">{escape(answer["plain_text"])}</p></div>'
        pictures = "".join(thumbnail(path) for path in answer.get("images", ()))
        parts.append(
            f"<details{' open' if number < opened else ''}><summary>{escape(line)}</summary>"
            f'{paragraph(answer["question"], "muted text")}{pictures}<div class="pair">{pair}</div></details>'
        )
    if len(logged) > SHOWN:
        parts.append(paragraph(f"{len(logged) - SHOWN} more answers are in the JSON file.", "muted"))
    return "\n".join(parts)
