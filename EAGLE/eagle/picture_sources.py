"""The sets of the training data: address, folder below the root, and size.

Sizes are rounded and serve only for estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from llava.errors import UserError

HUB = "hf:"
"""Prefix of addresses that name a data set repository of the Hugging Face hub."""


@dataclass(frozen=True)
class Source:
    """A set to download. ``path``: below the root; ``address``: http(s), or `HUB` and a repository; ``size``: of the
    download, in bytes."""

    name: str
    path: str
    address: str
    size: int

    @property
    def group(self) -> str:
        """The first folder of ``path``, which also names the set on the command line."""
        return PurePosixPath(self.path).parts[0]


@dataclass(frozen=True)
class AnnotationFile(Source):
    """A file of conversations; ``path`` is the file."""


@dataclass(frozen=True)
class PictureSet(Source):
    """A flat folder of ``pictures`` pictures."""

    pictures: int


@dataclass(frozen=True)
class ArchiveSet(PictureSet):
    """Pictures in one zip archive. ``md5``: of the archive, if known."""

    md5: str | None = None


@dataclass(frozen=True)
class CoverSet(PictureSet):
    """Pictures that have an address each. ``address``: of the list of their addresses."""


SOURCES: tuple[Source, ...] = (
    AnnotationFile(
        name="sharegpt",
        path="annotations/ShareGPT_V3_unfiltered_cleaned_split.json",
        address=f"{HUB}anon8231489123/ShareGPT_Vicuna_unfiltered",
        size=673_000_000,
    ),
    AnnotationFile(
        name="llava",
        path="annotations/llava_v1_5_mix665k.json",
        address=f"{HUB}liuhaotian/LLaVA-Instruct-150K",
        size=1_030_000_000,
    ),
    ArchiveSet(
        name="coco",
        path="coco/train2017",
        address="http://images.cocodataset.org/zips/train2017.zip",
        size=19_300_000_000,
        pictures=118_287,
        md5="cced6f7f71b7629ddf16f17bbcfab6b2",
    ),
    ArchiveSet(
        name="gqa",
        path="gqa/images",
        address="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        size=21_800_000_000,
        pictures=148_854,
    ),
    ArchiveSet(
        name="textvqa",
        path="textvqa/train_images",
        address="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        size=7_000_000_000,
        pictures=25_119,
    ),
    ArchiveSet(
        name="vg1",
        path="vg/VG_100K",
        address="https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
        size=9_800_000_000,
        pictures=64_346,
    ),
    ArchiveSet(
        name="vg2",
        path="vg/VG_100K_2",
        address="https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
        size=5_500_000_000,
        pictures=43_903,
    ),
    CoverSet(
        name="ocr_vqa",
        path="ocr_vqa/images",
        address="https://drive.usercontent.google.com/download"
        "?id=1r0tyZUwGCc4wIG4RkiglCGNL_nFJjR6Q&export=download&confirm=t",
        size=9_000_000_000,
        pictures=207_572,
    ),
)


def choose(only: str | None = None, mirrors: Sequence[str] = ()) -> list[Source]:
    """The sets that ``--only`` names (names or groups, separated by commas; all by default), in the table's order.

    Args:
        mirrors: ``SET=URL``, another address for a set. The checksum of a mirrored archive is not checked.

    Raises:
        UserError: unknown name, or a mirror that is not an http(s) address.
    """
    names = {source.name for source in SOURCES}
    known = names | {source.group for source in SOURCES}
    addresses = {}
    for mirror in mirrors:
        name, _, address = mirror.partition("=")
        if not address.startswith(("http://", "https://")):
            raise UserError("not a mirror", f"--mirror {mirror}", "give SET=URL with an http or https address")
        _check_known(name, names, "--mirror")
        addresses[name] = address
    wanted = sorted(known) if only is None else [word.strip() for word in only.split(",") if word.strip()]
    for word in wanted or [""]:
        _check_known(word, known, "--only")
    chosen = []
    for source in SOURCES:
        if source.name in wanted or source.group in wanted:
            if source.name in addresses:
                source = replace(source, address=addresses[source.name])
                source = replace(source, md5=None) if isinstance(source, ArchiveSet) else source
            chosen.append(source)
    return chosen


def _check_known(word: str, known: set[str], option: str) -> None:
    if word not in known:
        raise UserError(f"unknown set '{word}'", option, f"known are {', '.join(sorted(known))}")
