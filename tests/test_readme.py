"""README's commands are commands: `msd` lines parse, scripts and files that it names exist."""

import re
import shlex
from pathlib import Path

import pytest

from eagle.cli import parser

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")


def shell_lines() -> list[str]:
    """Lines of README's shell blocks, continued ones joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("msd ")])
def test_msd_command_parses(line):
    parser().parse_args(shlex.split(line)[1:])


def test_scripts_exist():
    named = {Path(word) for line in shell_lines() for word in line.split() if word.startswith("scripts/")}
    assert {path.name[0] for path in named} == set("12345")
    assert all((REPO / path).is_file() for path in named)


def test_make_targets_exist():
    targets = set(re.findall(r"^make (\w+)", "\n".join(shell_lines()), re.MULTILINE))
    defined = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert targets and targets <= defined


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((REPO / link.split("#")[0]).exists() for link in links)


def test_the_file_tree_names_real_files():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    folder = REPO
    for line in tree.splitlines():
        words = line.split()
        if line.startswith(" "):
            assert all((folder / word).exists() for word in words if re.fullmatch(r"[\w/]+\.py|\w+/", word)), line
        else:
            folder = REPO / words[0]
            assert folder.is_dir(), line
