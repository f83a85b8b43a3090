"""Rules of the house, read from the source: who imports whom, no magic numbers, one version."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from repository import REPO, repository_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = {"llava": "LLaVA", "eagle": "EAGLE", "lmms_eval_msd": "lmms-eval", "msd_vllm": "serving"}
MAY_NOT_IMPORT = {
    "llava": {"eagle", "lmms_eval_msd", "lmms_eval", "pocket", "deepspeed", "vllm", "msd_vllm"},
    "eagle": {"lmms_eval_msd", "lmms_eval", "pocket", "vllm", "msd_vllm"},
    "lmms_eval_msd": {"pocket", "vllm", "msd_vllm"},
    "msd_vllm": {"llava", "eagle", "lmms_eval_msd", "lmms_eval", "pocket", "transformers"},
}
LAYERS = (  # modules and folders of eagle, lowest first; the package itself re-exports names and belongs to none
    "cache kv_cache recurrent_state weight_layout attention conversations arguments extras locks provenance published",
    "report",
    "drafts",
    "families",
    "hidden_states",
    "decode",
    "ge_data",
    "questions",
    "train",
    "loading benchmark bench_report exactness publish serving",
    "doctor web",
    "commands",
    "cli",
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
PLACEHOLDERS = {-200, 575, 576, 151652, 151653, 151655, 151656}  # ids and counts of single checkpoints
ELSEWHERE = "|".join(["/" + "work/", "/" + "root/", "/" + "opt/", "/" + "home/[a-z]", "/" + "Users/[A-Za-z]"])
MACHINE_PATH = re.compile(rf"(?<![\w.~-])(?:{ELSEWHERE})")


def source_files(package: str) -> list[Path]:
    root = REPO / PACKAGES[package] / package
    return [p for p in repository_files() if p.suffix == ".py" and root in p.parents]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Top-level name and line of each absolute import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno


def imported_modules(tree: ast.Module, package: str) -> Iterator[tuple[str, int]]:
    """First name below ``package`` and line of each absolute import from it, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, below = name.partition(".")
            if root == package and below:
                yield below.split(".")[0], node.lineno


def integers(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Value and line of each whole-number literal, a minus sign included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            if isinstance(node.operand, ast.Constant) and type(node.operand.value) is int:
                yield -node.operand.value, node.lineno
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node.value, node.lineno


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(REPO).as_posix()}:{line}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = source_files(package)
    assert files, f"no source of {package}"
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in files
        for name, line in imported_names(parsed(path))
        if name in MAY_NOT_IMPORT[package]
    ]
    assert wrong == []


def module_name(path: Path, package: str) -> str:
    below = path.relative_to(REPO / PACKAGES[package]).with_suffix("")
    return ".".join(below.parts).removesuffix(".__init__")


def imported_files(path: Path, package: str, known: dict[str, Path]) -> Iterator[Path]:
    """The files of ``package`` that a file imports, also inside functions. Packages that only hand names on
    (``eagle/__init__.py``) are none: what they import has no way back."""
    own = module_name(path, package)
    parent = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = parent.split(".")[: len(parent.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] + [base]
        else:
            continue
        yield from (known[name] for name in names if name in known and known[name] != path)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    known = {module_name(path, package): path for path in source_files(package)}
    known.pop(package)
    graph = {path: set(imported_files(path, package, known)) for path in known.values()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(where(path, 1) for path in reversed(error.args[1])))


def test_imports_inside_eagle_run_down() -> None:
    wrong = []
    for path in source_files("eagle"):
        own = path.relative_to(REPO / "EAGLE" / "eagle").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in LAYER_OF, f"{own} has no layer: add it to LAYERS"
        for name, line in imported_modules(parsed(path), "eagle"):
            if name in LAYER_OF and LAYER_OF[name] > LAYER_OF[own]:
                wrong.append(f"{where(path, line)} imports {name}")
    assert wrong == []


def test_modules_inside_eagle_have_a_layer() -> None:
    """Names that `eagle` itself defines (MSDModel, ...) are imported by users, not by its modules."""
    unknown = [
        f"{where(path, line)} imports {name}"
        for path in source_files("eagle")
        for name, line in imported_modules(parsed(path), "eagle")
        if name not in LAYER_OF and name != "__version__"
    ]
    assert unknown == []


def test_placeholder_numbers_stay_in_one_reader() -> None:
    found = [
        (path, f"{where(path, line)} has {value}")
        for package in PACKAGES
        for path in source_files(package)
        for value, line in integers(parsed(path))
        if value in PLACEHOLDERS
    ]
    readers = {path for path, _ in found if path.is_relative_to(REPO / "LLaVA")}
    assert [text for path, text in found if path not in readers] == []
    assert len(readers) <= 1, [text for _, text in found]


def test_no_paths_of_a_machine() -> None:
    wrong = []
    for path in repository_files():
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{where(path, number)} {line.strip()[:100]}")
    assert wrong == []


def settings(folder: str) -> dict:
    return tomllib.loads((REPO / folder / "pyproject.toml").read_text(encoding="utf-8"))


def literal_version(package: str) -> str | None:
    """`__version__` of the package, which the build reads without importing it: it has to be a literal."""
    for node in parsed(REPO / PACKAGES[package] / package / "__init__.py").body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "__version__" for t in targets):
            return ast.literal_eval(node.value)
    return None


def test_versions_are_equal() -> None:
    release = settings(".")["tool"]["msd"]["version"]
    assert {package: literal_version(package) for package in PACKAGES} == dict.fromkeys(PACKAGES, release)
    major, minor = (int(part) for part in release.split(".")[:2])
    expected = f">={major}.{minor},<{major}.{minor + 1}"
    own = [
        requirement
        for folder in PACKAGES.values()
        for requirement in settings(folder)["project"]["dependencies"]
        if requirement.startswith("msd-")
    ]
    assert own and all(requirement.endswith(expected) for requirement in own), own


IMPORTED_AS = {
    "pillow": "PIL", "accelerate": None, "torchvision": None, "tensorboard": None, "vllm": None, "msd-vllm": None,
}  # fmt: skip
"""Names of distributions that differ from the module's; None where other libraries import them, or they are run."""


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_are_those_that_are_imported(package: str) -> None:
    project = settings(PACKAGES[package])["project"]
    extras = [
        each for name, group in project.get("optional-dependencies", {}).items() if name != "dev" for each in group
    ]
    names = {re.match(r"[\w-]+", each)[0] for each in [*project["dependencies"], *extras]}
    own = {"msd-llava": "llava", "msd-eagle": "eagle"}
    declared = {IMPORTED_AS.get(name, own.get(name, name.replace("-", "_"))) for name in names}
    imported = {name for path in source_files(package) for name, _ in imported_names(parsed(path))}
    assert declared - {None} - imported == set(), "declared, but nothing imports it"


def test_shared_ranges_are_equal() -> None:
    ranges: dict[str, set[str]] = {}
    for folder in PACKAGES.values():
        project = settings(folder)["project"]
        if project["dependencies"]:  # the plugin of vLLM goes where vLLM goes
            ranges.setdefault("python", set()).add(project["requires-python"])
        for requirement in project["dependencies"]:
            name, bounds = re.fullmatch(r"([\w.-]+?)([<>=!~].*)?", requirement).groups()
            ranges.setdefault(name, set()).add(bounds or "")
    assert {name: bounds for name, bounds in ranges.items() if len(bounds) > 1} == {}


def test_entry_points_exist() -> None:
    scripts = settings("EAGLE")["project"]["scripts"].values()
    plugins = settings("lmms-eval")["project"]["entry-points"]["lmms_eval.models"].values()
    vllm_plugins = settings("serving")["project"]["entry-points"]["vllm.general_plugins"].values()
    for target in [*scripts, *plugins, *vllm_plugins]:
        module, name = target.split(":")
        folder = REPO / PACKAGES[module.split(".")[0]] / Path(*module.split("."))
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        assert path.is_file(), f"{target}: no {path.relative_to(REPO)}"
        assert re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")), f"{target}: no {name}"


@pytest.mark.parametrize("folder", PACKAGES.values())
def test_each_package_has_its_own_licence_text(folder: str) -> None:
    """A copy: pip builds a package from its folder alone, where a link out of it would lead nowhere."""
    text = REPO / folder / "LICENSE"
    assert not text.is_symlink() and text.read_bytes() == (REPO / "LICENSE").read_bytes()
    assert settings(folder)["project"]["license-files"] == ["LICENSE"]


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_builds_without_the_repository(package: str, tmp_path: Path) -> None:
    source = REPO / PACKAGES[package]
    alone = tmp_path / "alone"
    left_out = shutil.ignore_patterns("*.egg-info", "build", "__pycache__", "tests")
    shutil.copytree(source, alone, ignore=left_out)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(alone)], check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    packed = {p.relative_to(tmp_path / "unpacked").as_posix() for p in (tmp_path / "unpacked").rglob("*")}
    texts = [text for text in (tmp_path / "unpacked").rglob("LICENSE") if text.parent.name == "licenses"]
    assert [text.read_bytes() for text in texts] == [(REPO / "LICENSE").read_bytes()]
    needed = {
        p.relative_to(source).as_posix()
        for p in repository_files()
        if source / package in p.parents
        and (p.suffix in {".py", ".json", ".yaml", ".html", ".css", ".js"} or p.name == "py.typed")
    }
    assert needed - packed == set()
    assert not any(name.startswith("tests/") for name in packed)
