"""Python and the packages, against the ranges that our own packages declare. Imports none of them."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from eagle.doctor.check import Check, State

ENGINE = "msd-eagle"
OWN = {ENGINE: State.PROBLEM, "msd-llava": State.PROBLEM, "msd-lmms-eval": State.WARNING}  # where one is not installed
INSTALL = {ENGINE: "./EAGLE", "msd-llava": "./LLaVA", "msd-lmms-eval": "./lmms-eval"}
SHOWN = ("torch", "transformers", "huggingface-hub", "deepspeed")


def check_python() -> Check:
    """This Python's version against ``requires-python``."""
    version = platform.python_version()
    try:
        wanted = metadata.metadata(ENGINE)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        return Check("Python", State.WARNING, f"{version}; {ENGINE} is not installed, so its range is not known")
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("Python", State.OK, version)
    return Check("Python", State.PROBLEM, f"{version}, wanted {wanted}", "make an environment with another Python")


def check_packages() -> list[Check]:
    """One row for each package that is missing or out of range, and one for all others."""
    ranges = _ranges()
    wrong = [*_missing_own(), *_out_of_range(ranges)]
    if any(check.state is State.PROBLEM for check in wrong):
        return wrong
    versions = ", ".join(f"{name} {version}" for name in SHOWN if (version := _version(name)))
    return [Check("packages", State.OK, f"{len(ranges)} in range; {versions}"), *wrong]


def _missing_own() -> Iterator[Check]:
    for name, state in OWN.items():
        if _version(name) is None:
            yield Check(f"package {name}", state, "not installed", f"pip install -e {INSTALL[name]}")


def _out_of_range(ranges: Mapping[str, SpecifierSet]) -> Iterator[Check]:
    for name, wanted in ranges.items():
        version = _version(name)
        if version is None and name in OWN:
            continue  # said already
        if version is None or not wanted.contains(version, prereleases=True):
            found = f"{version or 'not installed'}, wanted {wanted or 'any version'}"
            yield Check(f"package {name}", State.PROBLEM, found, f"pip install '{name}{wanted}'")


def _ranges() -> dict[str, SpecifierSet]:
    """What our installed packages need on this machine, without extras; ranges of all of them joined."""
    found: dict[str, SpecifierSet] = {}
    for owner in OWN:
        for line in [] if _version(owner) is None else metadata.requires(owner) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                name = canonicalize_name(requirement.name)
                found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
