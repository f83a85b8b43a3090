"""The suites: which sets they have, where each lies, at which commit, and how a row becomes a question.

Columns, numbers of rows and commits are those that public pages and programs name. docs/results.md says what could not
be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llava.errors import UserError

SUBSETS = {"test": 100, "testmini": 10}
"""Questions of each source."""
EXPLAIN = "\nExplain in detail what the picture shows and how you find the answer."
"""As the long tasks of the lmms-eval plugin ask, without the form of the answer."""
DESCRIBE = "Describe this image in detail."


@dataclass(frozen=True)
class HubSet:
    """A set of the hub with one picture a row.

    ``files``: pattern of the split's parquet files; ``rows``: as many as the split has; ``prompt``: the question of
    every row, for sets without questions; ``suffix``: after each question; ``pictures``: pattern of the files with the
    pictures (``id``, ``image``), for a set whose rows have only an ``imageId``; ``only``: a column and its value in the
    rows that are taken.
    """

    name: str
    repository: str
    revision: str
    files: str
    rows: int
    licence: str
    prompt: str | None = None
    suffix: str = ""
    pictures: str | None = None
    only: tuple[str, str] | None = None

    def text(self, row: Mapping[str, Any]) -> str:
        """The question of a row: with its hint before it and its choices after it, where it has them.

        Raises:
            UserError: the row has no question.
        """
        if self.prompt is not None:
            return self.prompt
        if not isinstance(row.get("question"), str):
            raise UserError(f"rows have {', '.join(sorted(row))}, not 'question'", self.repository, "another revision?")
        letters = ("choice_a", "choice_b", "choice_c", "choice_d")
        choices = row.get("choices") or [row[key] for key in letters if key in row]
        lines = [f"Context: {row['hint']}"] if row.get("hint") else []
        lines += [row["question"], *(f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(choices))]
        return "\n".join(lines) + self.suffix


@dataclass(frozen=True)
class Suite:
    """``sets``: of the hub. ``topics``: of MMSpec, which is one file of conversations in a repository of GitHub."""

    about: str
    sets: tuple[HubSet, ...] = ()
    topics: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.sets) or self.topics


MMSPEC = "killthefullmoon/MMSpec"
MMSPEC_REVISION = "290486861eabd746075ca776adb66175636c1fc0"
MMSPEC_FOLDER = "dataset/MMSpec"
MMSPEC_LICENCE = "not stated by the repository; each of the sets that it draws from has its own"


LITE, LITE_REVISION = "lmms-lab/LMMs-Eval-Lite", "07fc750730e654d2801cf1d76c2cde9dca5f9e5b"
CHARTQA = HubSet(
    "ChartQA", "lmms-lab/ChartQA", "9e63b7df1592a1c2158e735cc1725454aef0d6d9", "data/test-*.parquet", 2500,
    "not stated by the repository; GPL-3.0 in the authors' own",
)  # fmt: skip
GQA = HubSet(
    "GQA", "lmms-lab/GQA", "a6e72d6e1b912da88af8b2f9eba05d5ea8ec2dd8",
    "testdev_balanced_instructions/testdev-*.parquet", 12578, "MIT",
    pictures="testdev_balanced_images/testdev-*.parquet",
)  # fmt: skip
MME = HubSet(
    "MME", "lmms-lab/MME", "d6c9023f017b564f7b3ccccf5348166bce8fdbcd", "data/test-*.parquet", 2374,
    "not stated by the repository",
)  # fmt: skip
TEXTVQA = HubSet(
    "TextVQA", "lmms-lab/textvqa", "9c0699cd19768ac5ab97568f6b3cbac4c0062884", "data/validation-*.parquet", 5000,
    "not stated by the repository; CC BY 4.0 in facebook/textvqa",
)  # fmt: skip
VQAV2 = HubSet("VQAv2", LITE, LITE_REVISION, "vqav2_val/lite-*.parquet", 500, "CC BY 4.0 in lmms-lab/VQAv2")
SQA = HubSet(
    "SQA", "lmms-lab/ScienceQA", "df59f11e9fd34bc02e24b4d5314bb1c86dcd21c0", "ScienceQA-IMG/test-*.parquet", 2017,
    "not stated by the repository; CC BY-NC-SA 4.0 in derek-thomas/ScienceQA",
)  # fmt: skip
MM_VET = HubSet(
    "MM-Vet", "whyu/mm-vet", "8ce15108c0b55c67200eb96601ba2bb98183ff65", "data/test-*.parquet", 218, "CC BY-NC 4.0"
)
COCO = HubSet(
    "COCO Caps", LITE, LITE_REVISION, "coco2017_cap_val/lite-*.parquet", 500, "not stated by the repository", DESCRIBE
)
VIZWIZ = HubSet("VizWiz", LITE, LITE_REVISION, "vizwiz_vqa_val/lite-*.parquet", 500, "not stated by the repository")
SEED_BENCH = HubSet(
    "SEED-Bench", LITE, LITE_REVISION, "seedbench/lite-*.parquet", 500, "CC BY-NC 4.0 in AILab-CVC/SEED-Bench",
    only=("data_type", "image"),
)  # fmt: skip

SUITES = {
    "mmspec": Suite(
        "MMSpec (arXiv 2603.14989): six topics, one of them conversations",
        topics=(
            "general vqa", "text vqa", "image captioning", "chart understanding", "complex reasoning pro",
            "multi-turn conversation",
        ),
    ),
    "vispec": Suite(
        "the sets of ViSpec (arXiv 2509.15235)", (SQA, MM_VET, TEXTVQA, MME, COCO, VIZWIZ, GQA, SEED_BENCH)
    ),
    "seed": Suite(
        "the sets of the evaluation tasks of MSD (arXiv 2505.14260), with a request for long answers",
        tuple(
            replace(each, suffix=EXPLAIN) for each in (CHARTQA, TEXTVQA, VQAV2, MME, GQA)
        ),
    ),
}  # fmt: skip
