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
    """Files are named from the folder of the line that has none before it, or beside the line's first file."""
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    folder, seen = REPO, 0
    for line in tree.splitlines():
        first, *rest = line.split()
        if not line.startswith(" "):
            folder = REPO / first
            assert folder.is_dir(), line
        elif (folder / first).exists():
            rest.append(first)
        beside = (folder / first).parent if first.endswith(".py") else folder / first
        for name in (word.strip(",:;()") for word in rest):
            if re.fullmatch(r"[\w/]+\.(py|sh)", name):
                seen += 1
                assert any((place / name).is_file() for place in (folder, beside)), f"{name}: {line}"
    assert seen > 15


def test_the_file_tree_names_every_folder_of_code():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    named = set(tree.replace("\n", " ").split())
    packages = {f"{path.name}/" for path in (REPO / "EAGLE" / "eagle").iterdir() if (path / "__init__.py").is_file()}
    assert packages - named - {"model/"} == set() and any(word.startswith("model/") for word in named)
