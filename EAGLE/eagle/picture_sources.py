"""What the training data is made of: each set's address, its place under the root, its size. No file is touched here.

All sizes are rounded and only for estimates; what a server says is what counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from llava.errors import UserError

HUB = "hf:"
"""Addresses that begin so name a data set repository of the Hugging Face hub."""


@dataclass(frozen=True)
class Source:
    """One thing to fetch.

    ``path``: where it lies under the root; ``address``: http(s), or `HUB` and a repository; ``size``: bytes to
    download.
    """

    name: str
    title: str
    path: str
    address: str
    size: int

    @property
    def group(self) -> str:
        """The first folder of ``path``: another word for the set, or for several together."""
        return PurePosixPath(self.path).parts[0]


@dataclass(frozen=True)
class AnnotationFile(Source):
    """Conversations; ``path`` is the file."""


@dataclass(frozen=True)
class PictureSet(Source):
    """A flat folder of pictures, ``pictures`` of them."""

    pictures: int


@dataclass(frozen=True)
class ArchiveSet(PictureSet):
    """Pictures in one zip archive; ``md5`` of the archive where it is known."""

    md5: str | None = None


@dataclass(frozen=True)
class CoverSet(PictureSet):
    """Pictures each at an address of its own; ``address`` is the list of them."""


SOURCES: tuple[Source, ...] = (
    AnnotationFile(
        name="sharegpt",
        title="ShareGPT conversations",
        path="annotations/ShareGPT_V3_unfiltered_cleaned_split.json",
        address=f"{HUB}anon8231489123/ShareGPT_Vicuna_unfiltered",
        size=673_000_000,
    ),
    AnnotationFile(
        name="llava",
        title="LLaVA-1.5 instruction mixture",
        path="annotations/llava_v1_5_mix665k.json",
        address=f"{HUB}liuhaotian/LLaVA-Instruct-150K",
        size=1_030_000_000,
    ),
    ArchiveSet(
        name="coco",
        title="COCO 2017, training pictures",
        path="coco/train2017",
        address="http://images.cocodataset.org/zips/train2017.zip",
        size=19_300_000_000,
        pictures=118_287,
        md5="cced6f7f71b7629ddf16f17bbcfab6b2",
    ),
    ArchiveSet(
        name="gqa",
        title="GQA",
        path="gqa/images",
        address="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        size=21_800_000_000,
        pictures=148_854,
    ),
    ArchiveSet(
        name="textvqa",
        title="TextVQA, training and validation pictures",
        path="textvqa/train_images",
        address="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        size=7_000_000_000,
        pictures=25_119,
    ),
    ArchiveSet(
        name="vg1",
        title="Visual Genome, part 1",
        path="vg/VG_100K",
        address="https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
        size=9_800_000_000,
        pictures=64_346,
    ),
    ArchiveSet(
        name="vg2",
        title="Visual Genome, part 2",
        path="vg/VG_100K_2",
        address="https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
        size=5_500_000_000,
        pictures=43_903,
    ),
    CoverSet(
        name="ocr_vqa",
        title="OCR-VQA book covers",
        path="ocr_vqa/images",
        address="https://drive.usercontent.google.com/download"
        "?id=1r0tyZUwGCc4wIG4RkiglCGNL_nFJjR6Q&export=download&confirm=t",
        size=9_000_000_000,
        pictures=207_572,
    ),
)


def choose(only: str | None = None, mirrors: Sequence[str] = ()) -> list[Source]:
    """The sets that ``--only`` names (names or groups, parted by commas; all by default), in the table's order.

    Args:
        mirrors: ``SET=URL`` each, another address for a set.

    Raises:
        UserError: a name is not known, or a mirror is no http(s) address.
    """
    addresses = _addresses(mirrors)
    wanted = None if only is None else [word.strip() for word in only.split(",") if word.strip()]
    known = {word for source in SOURCES for word in (source.name, source.group)}
    for word in wanted or []:
        _require(word, known, "--only")
    if wanted == []:
        raise UserError("no set named", "--only", f"known are {', '.join(sorted(known))}")
    chosen = [s for s in SOURCES if wanted is None or s.name in wanted or s.group in wanted]
    return [_mirrored(source, addresses) for source in chosen]


def _addresses(mirrors: Sequence[str]) -> dict[str, str]:
    addresses = {}
    for mirror in mirrors:
        name, mark, address = mirror.partition("=")
        if not mark or not address.startswith(("http://", "https://")):
            raise UserError("not a mirror", f"--mirror {mirror}", "give SET=URL with an http or https address")
        _require(name, {source.name for source in SOURCES}, "--mirror")
        addresses[name] = address
    return addresses


def _require(word: str, known: set[str], option: str) -> None:
    if word not in known:
        raise UserError(f"no set '{word}'", option, f"known are {', '.join(sorted(known))}")


def _mirrored(source: Source, addresses: Mapping[str, str]) -> Source:
    """A mirror may have packed the pictures anew, so the checksum of the first archive does not hold for it."""
    if source.name not in addresses:
        return source
    if isinstance(source, ArchiveSet):
        return replace(source, address=addresses[source.name], md5=None)
    return replace(source, address=addresses[source.name])
