"""The sets of the training data: address, place below the root, and size.

Sizes are rounded and serve only for estimates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llava.errors import UserError

HUB = "hf:"
"""Prefix of addresses that name a data set repository of the Hugging Face hub."""
WEB = ("http://", "https://")


@dataclass(frozen=True)
class Source:
    """A set to download.

    ``kind``: an annotation file, pictures in one zip archive, or covers that have an address each; ``path``: of the
    annotation file, or of the flat folder of pictures; ``address``: of the web, or `HUB` and a repository (for covers,
    of the list of their addresses); ``size``: bytes of the download; ``md5``: of the archive, if known.
    """

    name: str
    kind: Literal["annotations", "archive", "covers"]
    path: str
    address: str
    size: int
    pictures: int = 0
    md5: str | None = None

    @property
    def group(self) -> str:
        """The first folder of ``path``, which also names the set on the command line."""
        return self.path.split("/")[0]


SOURCES = (
    Source(
        "sharegpt", "annotations", "annotations/ShareGPT_V3_unfiltered_cleaned_split.json",
        f"{HUB}anon8231489123/ShareGPT_Vicuna_unfiltered", 673_000_000,
    ),
    Source(
        "llava", "annotations", "annotations/llava_v1_5_mix665k.json",
        f"{HUB}liuhaotian/LLaVA-Instruct-150K", 1_030_000_000,
    ),
    Source(
        "coco", "archive", "coco/train2017",
        "http://images.cocodataset.org/zips/train2017.zip", 19_300_000_000,
        pictures=118_287, md5="cced6f7f71b7629ddf16f17bbcfab6b2",
    ),
    Source(
        "gqa", "archive", "gqa/images",
        "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", 21_800_000_000, pictures=148_854,
    ),
    Source(
        "textvqa", "archive", "textvqa/train_images",
        "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", 7_000_000_000, pictures=25_119,
    ),
    Source(
        "vg1", "archive", "vg/VG_100K",
        "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip", 9_800_000_000, pictures=64_346,
    ),
    Source(
        "vg2", "archive", "vg/VG_100K_2",
        "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip", 5_500_000_000, pictures=43_903,
    ),
    Source(
        "ocr_vqa", "covers", "ocr_vqa/images",
        "https://drive.usercontent.google.com/download?id=1r0tyZUwGCc4wIG4RkiglCGNL_nFJjR6Q&export=download&confirm=t",
        9_000_000_000, pictures=207_572,
    ),
)  # fmt: skip
PICTURE_SETS = tuple(source for source in SOURCES if source.pictures)


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
        if not address.startswith(WEB):
            raise UserError("not a mirror", f"--mirror {mirror}", "give SET=URL with an http or https address")
        _check_known([name], names, "--mirror")
        addresses[name] = address
    wanted = known if only is None else {word.strip() for word in only.rstrip(", ").split(",")}
    _check_known(wanted, known, "--only")
    return [
        replace(source, address=addresses[source.name], md5=None) if source.name in addresses else source
        for source in SOURCES
        if wanted & {source.name, source.group}
    ]


def _check_known(words: Collection[str], known: Collection[str], option: str) -> None:
    for word in words:
        if word not in known:
            raise UserError(f"unknown set '{word}'", option, f"known are {', '.join(sorted(known))}")
