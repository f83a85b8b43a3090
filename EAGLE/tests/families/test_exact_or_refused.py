"""Every model that transformers has: its answers are those of `generate`, or it is refused with one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from scripted_drafts import draft_by
from tiny_families import ALL_MAKERS
from tiny_llava import make_image, make_liuhaotian, make_llava_hf
from tiny_text_models import llava_model, text_types, tiny_text_config
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from eagle import MSDModel, TreeConfig
from eagle.conversations import MARK, Conversation
from eagle.decode.sequence import Sequence
from eagle.decode.tree import Candidates
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import FAMILIES, Target, load_target, template_of
from eagle.families.layers import ALL_ALIKE, FULL_ONLY, WITH_WINDOWS, attention_layers
from eagle.families.llava.target import LlavaTarget
from llava.errors import UserError

KNOWN = sorted({*FULL_ONLY, *WITH_WINDOWS} & {*text_types()})
OTHERS = sorted({*text_types()} - {*KNOWN})
LENGTH = 12
RIGHT = 3
"""Right tokens in each drafted tree; each has a wrong sibling. The last token of a chain is wrong."""
QUESTIONS = [
    ("Hi",),
    ("Which of these can you count? " * 2,),
    ("Name two.", "<image>\nAnd?", "Hm.", "<image> <image>?"),
]
SIZES = [(50, 34), (112, 30), (64, 100)]
FAMILY_OF = {kind: family for family in FAMILIES for kind in family.model_types}
MAKERS = {**ALL_MAKERS, "llava_llama": make_liuhaotian}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LlavaTarget:
    target = load_target(make_llava_hf(tmp_path_factory.mktemp("llava")), dtype=torch.float32)
    assert isinstance(target, LlavaTarget)
    return target


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """A list for the answers of the sequences of a batch, from which trees are drafted."""
    known: list[list[int]] = []

    def expand(sequences: list[tuple[int, Sequence]], tree: TreeConfig) -> Candidates:
        rows = []
        for number, sequence in sequences:
            done = len(sequence.tokens)
            right = (known[number][done : done + RIGHT] + [0] * RIGHT)[:RIGHT]
            if tree.top_k == 1:
                rows.append([*right[:-1], wrong(right[-1])])
            else:
                rows.append([each for token in right for each in (wrong(token), token)])
        tokens = torch.tensor(rows)
        nodes = tokens.shape[1]
        parents = torch.tensor([node - 1 if tree.top_k == 1 else max(2 * (node // 2) - 1, -1) for node in range(nodes)])
        return Candidates(tokens, -torch.arange(1.0, nodes + 1).expand_as(tokens), parents.expand_as(tokens))

    draft_by(monkeypatch, expand)
    yield known


def wrong(token: int) -> int:
    return token - 1 if token else 1


def asked(target: Target, *questions: str) -> str:
    """A conversation up to the answer to its last question. ``<image>`` in a question stands for a picture."""
    count = sum(question.count(MARK) for question in questions)
    turns = tuple((question, "Red.") for question in questions)
    segments = template_of(target).segments(Conversation("r", turns, ("a.png",) * count))
    return "".join(segment.text for segment in segments[:-1])


def check(target: Target, answers: list[list[int]]) -> None:
    """Answers with a tree, or a chain, equal `generate`: before and past the window, with pictures of several sizes in
    later turns, and in a batch. Sampled ones equal plain decoding with the same seed."""
    model = target.model
    model.generation_config.eos_token_id = None
    table = model.get_input_embeddings().weight
    config = {"hidden_size": table.shape[1], "intermediate_size": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-6}
    draft = DraftModel(DraftConfig.from_dict({"model_type": target.family, "vocab_size": table.shape[0], **config}))
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(table)
    msd = MSDModel(target, draft, TreeConfig(RIGHT, 2 if target.verifies_trees else 1, 2 * RIGHT))
    texts = [asked(target, *questions) for questions in QUESTIONS]
    images = [make_image(width=width, height=height, seed=width) for width, height in SIZES]
    expected, accepted = [], 0
    for text, pictures in zip(texts, ([], [], images), strict=True):
        inputs = target.prepare(text, pictures)
        output = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        expected.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        answers[:] = expected[-1:]
        found = msd.generate(**inputs, max_new_tokens=LENGTH, temperature=0.0)
        assert found.tokens == expected[-1:]
        accepted += sum(found.stats.accept_lengths)
    assert accepted > LENGTH
    parts = MSDModel(target, draft, msd.tree, tree_attention="two-part")
    inputs = target.prepare(texts[-1], images)
    answers[:] = expected[-1:]
    assert parts.generate(**inputs, max_new_tokens=LENGTH, temperature=0.0).tokens == expected[-1:]
    answers[:] = expected
    batch = target.prepare(texts, images)
    assert msd.generate(**batch, max_new_tokens=LENGTH, temperature=0.0).tokens == expected
    settings = {"max_new_tokens": LENGTH, "temperature": 1.0, "seed": 3}
    sampled = MSDModel(target, None).generate(**batch, **settings).tokens
    answers[:] = sampled
    assert msd.generate(**batch, **settings).tokens == sampled


@pytest.mark.parametrize("kind", sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *FAMILY_OF}))
def test_models_of_pictures_and_text(kind: str, tmp_path: Path, answers: list[list[int]]) -> None:
    """A tiny model of each family of the registry is exact, and any other model is refused with one line."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    if kind not in FAMILY_OF:
        with pytest.raises(UserError, match=f"'{kind}' is not supported") as raised:
            load_target(tmp_path)
        assert "\n" not in str(raised.value)
        return
    try:
        FAMILY_OF[kind].target_class()
    except ImportError:
        with pytest.raises(UserError, match=f"does not have the model '{FAMILY_OF[kind].name}'"):
            load_target(tmp_path)
        return
    if kind == "paddleocr_vl" and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("its config class refuses its own tie_word_embeddings")
    target = load_target(MAKERS[kind](tmp_path / "base"), dtype=torch.float32)
    assert target.family == FAMILY_OF[kind].name and target.config.model_type in FAMILY_OF[kind].model_types
    check(target, answers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KNOWN)
def test_a_known_language_model_is_exact(kind: str, base: LlavaTarget, answers: list[list[int]]) -> None:
    try:
        text = tiny_text_config(kind, base.vocab_size)
    except StrictDataclassError as error:  # an old transformers with a new huggingface_hub
        pytest.skip(f"its config class refuses its own defaults: {error}")
    layers = attention_layers(text)
    assert (layers.window is not None) == (kind in WITH_WINDOWS)
    assert layers.by_type == (kind in WITH_WINDOWS and kind not in ALL_ALIKE)
    check(LlavaTarget(llava_model(text, base), base.processor), answers)


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_language_model_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not known to verify"):
        attention_layers(SimpleNamespace(model_type=kind))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"model_type": kind}}))
    with pytest.raises(UserError, match="is not known to verify"):
        load_target(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({"default", *ROPE_INIT_FUNCTIONS}))
def test_rotary_kinds(kind: str, base: LlavaTarget, answers: list[list[int]]) -> None:
    """Prompts are longer than the length that the positions were made for."""
    rope: dict[str, Any] = {
        "rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    text = tiny_text_config("llama", base.vocab_size)
    assert isinstance(text, LlamaConfig)
    text.rope_parameters, text.max_position_embeddings = rope, 16 if kind == "dynamic" else 64
    try:
        attention_layers(text)
    except UserError as error:
        assert kind in ("dynamic", "longrope") and "depend on the length" in str(error)
        return
    check(LlavaTarget(llava_model(text, base), base.processor), answers)
