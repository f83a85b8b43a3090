"""A pair of models in vLLM and in our own loop. No pytest in here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from repository import REPO
from safetensors.torch import load_file, save_file
from tiny_families import make_qwen3_vl
from tiny_llava import make_image
from tiny_stock import make_llava_next, make_qwen

from eagle import MSDModel, TreeConfig
from eagle.questions import Question
from eagle.serving.draft import export_draft

POCKET = REPO / "pocket"
CHAIN = TreeConfig(4, 1, 6)
"""A chain of five tokens: what vLLM drafts."""
TOKENS = 128
Run = Callable[..., dict[str, Any]]
HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}  # of 32: the smallest that vLLM has on a CPU
ROPE = {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 1e6}
MAKERS: dict[str, Callable[..., Path]] = {
    "llava_next": partial(make_llava_next, **HEAD),
    "qwen2_5_vl": partial(make_qwen, version="2.5", **HEAD, rope_parameters=ROPE),
    "qwen3_vl": partial(make_qwen3_vl, **HEAD, head_dim=32, rope_parameters={**ROPE, "mrope_interleaved": True}),
}
"""Tiny bases with random weights that vLLM runs."""


def calm(base: Path, scale: float = 0.5) -> None:
    """Smaller weights in the layers of the text model, so that an untrained draft can guess a token now and then; and
    the published names of CLIP's tensors, where transformers leaves a part out that vLLM wants."""
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        name = name.replace("vision_tower.embeddings", "vision_tower.vision_model.embeddings")
        name = re.sub(r"vision_tower\.(encoder|pre_layrnorm|post_layernorm)", r"vision_tower.vision_model.\1", name)
        in_text = "layers" in name and "vision" not in name and "visual" not in name and tensor.ndim == 2
        tensors[name] = scale * tensor if in_text else tensor
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def make_questions(folder: Path) -> list[Question]:
    """Three questions about one and two pictures, and one without, the third."""
    pictures = []
    for number, (width, height) in enumerate([(50, 34), (30, 90), (64, 64)]):
        path = folder / f"{number}.png"
        make_image(path, width, height, seed=number)
        pictures.append(path)
    return [
        Question("one", "And this?", (pictures[0],)),
        Question("two", "Which of these can you count?", (pictures[1], pictures[2])),
        Question("none", "Hello there"),
        Question("again", "What is in this picture?", (pictures[1],)),
    ]


def load_msd(base: Path, draft: Path) -> MSDModel:
    """The pair in float32, drafting a chain."""
    return MSDModel.from_pretrained(base, draft, tree=CHAIN, dtype=torch.float32, device_map="cpu")


@dataclass(frozen=True)
class Reference:
    """What our loop does: ids of the answers, chains drafted, and how often each position of them was accepted."""

    ids: list[list[int]]
    drafts: int
    accepted: list[int]


@dataclass(frozen=True)
class Pair:
    """A base and its draft: ``base`` and ``source`` as this project loads them, ``model`` and ``draft`` as vLLM does.
    ``msd`` is our model of them."""

    base: Path
    source: Path
    model: Path
    draft: Path
    msd: MSDModel

    def with_draft(self, source: Path, out: Path) -> Pair:
        """The same base with another draft, which is exported to ``out``."""
        draft = export_draft(source, out, self.base)
        return Pair(self.base, source, self.model, draft, load_msd(self.base, source))

    def request(self, question: Question) -> dict[str, Any]:
        """The question for vLLM, as ids: each picture has one token, from which vLLM makes all."""
        image = self.msd.target.config.image_token_id
        ids = question.inputs(self.msd.target)["input_ids"][0].tolist()
        kept = [each for number, each in enumerate(ids) if each != image or number == 0 or ids[number - 1] != image]
        return {"prompt_token_ids": kept, "images": [str(path.resolve()) for path in question.images]}

    def answers(self, questions: list[Question]) -> Reference:
        """Our greedy answers by the chain. They may be a cycle longer, because our loop drafts no further than the
        answer may go, and vLLM always drafts the whole chain."""
        room = CHAIN.depth + 2
        outputs = [
            self.msd.generate(**question.inputs(self.msd.target), max_new_tokens=TOKENS + room, temperature=0.0)
            for question in questions
        ]
        lengths = []
        for output in outputs:
            tokens = 1  # the first one comes with the prompt
            for length in output.stats.accept_lengths:
                if tokens < TOKENS:
                    lengths.append(length)
                tokens += length + 1
        accepted = [sum(length > place for length in lengths) for place in range(CHAIN.depth + 1)]
        return Reference([output.tokens[0][:TOKENS] for output in outputs], len(lengths), accepted)
