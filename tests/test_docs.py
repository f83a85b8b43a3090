"""The pages of the documentation: their commands parse, their links lead somewhere, their snippets run."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import REPO, repository_files
from safetensors.torch import load_file, save_file

from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from llava.errors import UserError

PAGES = {path.relative_to(REPO).as_posix(): path for path in repository_files() if path.suffix == ".md"}
RUN = re.compile(r"(?:\S+=\S+ )*(?:\.venv/bin/)?(?:msd |python -m |deepspeed .*main_deepspeed\.py)(?=.*-)")
PROGRAMS = {"msd": "eagle.cli", "main_deepspeed.py": "eagle.train.main_deepspeed"}
DEVELOPMENT = ("pytest", "pip", "venv", "lmms_eval")  # run by tools of others


def commands(page: str) -> list[str]:
    """The page's commands with options: lines of its shell blocks, continued ones joined, and complete inline ones."""
    text = PAGES[page].read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r"\s#.*", "", line).strip() for line in re.split(r"\n|&&", blocks)]
    code = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines += [" ".join(each.split()) for each in code if "python -m" in each or "--base-model" in each]
    return [line for line in lines if RUN.match(line) and " --" in line and "…" not in line and "..." not in line]


class Parsed(BaseException):
    """Ends a command after it has parsed its arguments."""


def module_and_arguments(line: str) -> tuple[str, list[str]]:
    """The module that a command runs; a single capital letter stands for a number or a name."""
    words = shlex.split(re.sub(r"\b[A-Z]\b", "1", re.sub(r"[\[\]]", "", line)))
    while "=" in words[0]:
        words = words[1:]
    if words[0].endswith("python"):
        return words[2], words[3:]
    start = words.index("main_deepspeed.py") if words[0] == "deepspeed" else 0
    return PROGRAMS[words[start]], words[start + 1 :]


COMMANDS = sorted(
    {line for page in PAGES for line in commands(page) if module_and_arguments(line)[0] not in DEVELOPMENT}
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = module_and_arguments(line)
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (PAGES[page].parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE))
    defined = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= defined


def test_a_draft_with_other_names_is_renamed_as_docs_porting_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
    monkeypatch.chdir(tmp_path)
    save_draft(DraftModel(DraftConfig.from_dict(sizes)), "theirs")
    ours = load_draft("theirs").state_dict()
    tensors = load_file("theirs/model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, "theirs/model.safetensors")
    with pytest.raises(UserError, match=r"missing embed_tokens\.weight"):
        load_draft("theirs")
    Path("draft").mkdir()
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["docs/porting.md"].read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "porting.md", "exec"), {})
    shutil.copy("theirs/config.json", "draft/config.json")
    renamed = load_draft("draft").state_dict()
    assert set(renamed) == set(ours) and all(renamed[name].equal(tensor) for name, tensor in ours.items())
