"""Prints the page ``docs/families.md``, from the registry: ``python -m eagle.families > docs/families.md``."""

from __future__ import annotations

from eagle.families.base import MASKED_ATTENTION, Target
from eagle.families.layers import FULL_ONLY, STATIC_ROPE, WITH_WINDOWS
from eagle.families.registry import FAMILIES, Family

HEAD = """# Families of base models

Written by `python -m eagle.families > docs/families.md` from `eagle.families.registry`. `FAMILY` and `MODEL` are
settings of `scripts/3_allocate.sh` and `scripts/5_evaluate.sh`: the conversation template and lmms-eval's model.

| models | checkpoints | `model_type` | `FAMILY`, `MODEL` | media | drafts | compiled |
|---|---|---|---|---|---|---|
"""
TAIL = """
**Language model.** LLaVA, InternVL, LLaVA-OneVision and Mistral 3 may be built around any of {known} language models
of transformers, {windows} of them with sliding windows (`eagle.families.layers`). The other families have their own.

**Refused in one line when the model is loaded**: another `model_type` or language model; layers that are not full,
sliding or (Qwen3.5) linear attention; sliding windows, or `layer_types`, that the language model in transformers does
not read; attention to later tokens; attention kernels other than {attention}; models that the installed
transformers does not have; rotary positions other than {rope}.
**Refused in one line with the prompt**: audio (Gemma 4), videos where the table has pictures only, and a video beside
a picture (GLM, as in transformers). InternVL's processor gives videos as pictures.

**Checked** with tiny random models of each family in float32 on a CPU: greedy answers equal transformers' `generate`,
and sampled ones plain decoding with the same seed, with pictures of several sizes, several pictures, none, videos,
batches, trees of several shapes, before and past windows; what is learnt in training; hidden states of padded prompts
(`test_current_families.py`, `test_families.py` and `test_recurrent.py` in `EAGLE/tests/families/`). Language models and
what is refused: `test_exact_or_refused.py`, which goes through every model of the installed transformers. 300 random
prompts of each, 155 with pictures, five trees (chains for Qwen3.5), alone and in ragged batches of three: no answer
differed (`pytest -m by_hand -k three_hundred EAGLE/tests/families/test_current_families.py`, 2026-11-28, transformers
5.24, AMD EPYC, one thread). **Not checked**: any published checkpoint.
"""


def row(family: Family) -> str:
    """The family's line."""
    target = family.target_class()
    media = " and ".join(f"{media.name}s" for media in target.media).replace("images", "pictures")
    has_states = target.new_states is not Target.new_states
    checkpoints = ", ".join(f"`{name}`" for name in family.published)
    types = ", ".join(f"`{name}`" for name in family.model_types)
    drafts, compiled = ("chains", "no") if has_states else ("trees", "yes")
    names = f"`{family.training_name}`, `{family.eval_model}`"
    return f"| {family.title} | {checkpoints} | {types} | {names} | {media} | {drafts} | {compiled} |"


def page() -> str:
    """The page as Markdown."""
    tail = TAIL.format(
        known=len(FULL_ONLY) + len(WITH_WINDOWS),
        windows=len(WITH_WINDOWS),
        rope=", ".join(STATIC_ROPE),
        attention=" and ".join(MASKED_ATTENTION),
    )
    return HEAD + "\n".join(row(family) for family in FAMILIES) + "\n" + tail


if __name__ == "__main__":
    print(page(), end="")
