"""Every model that transformers has: its answers are those of `generate`, or it is refused with one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llava import make_image, make_llava_hf
from tiny_text_models import llava_model, text_types, tiny_text_config
from transformers import LlamaConfig, LlavaForConditionalGeneration
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from eagle import MSDModel, TreeConfig
from eagle.decode.decoder import Decoder
from eagle.decode.drafter import Drafter
from eagle.decode.tree import Candidates
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import family_of, load_target
from eagle.families.layers import FULL_ONLY, WITH_WINDOWS, attention_layers
from eagle.families.llava.target import LlavaTarget
from llava.errors import UserError

KNOWN = sorted({*FULL_ONLY, *WITH_WINDOWS} & {*text_types()})
OTHERS = sorted({*text_types()} - {*KNOWN})
LENGTH = 12
RIGHT = 3
"""Right tokens in each drafted tree; each has a wrong sibling."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LlavaTarget:
    target = load_target(make_llava_hf(tmp_path_factory.mktemp("llava")), dtype=torch.float32)
    assert isinstance(target, LlavaTarget)
    return target


@pytest.fixture
def answers(base: LlavaTarget, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """A list for the answers of the sequences of a batch, from which trees are drafted."""
    known: list[list[int]] = []
    init, draft = Decoder.__init__, Decoder.draft

    def numbered(decoder: Decoder, *arguments: Any) -> None:
        init(decoder, *arguments)
        for number, sequence in enumerate(decoder.sequences):
            sequence.number = number  # type: ignore[attr-defined]

    def with_sequences(decoder: Decoder) -> Any:
        decoder.drafter.sequences = decoder.active  # type: ignore[union-attr]
        return draft(decoder)

    def expand(drafter: Any, tree: TreeConfig, should_deepen: Any = None) -> Candidates:
        rows = []
        for sequence in drafter.sequences:
            done = len(sequence.tokens)
            right = (known[sequence.number][done : done + RIGHT] + [0] * RIGHT)[:RIGHT]
            rows.append([each for token in right for each in ((token + 1) % base.vocab_size, token)])
        tokens = torch.tensor(rows)
        parents = torch.tensor([max(2 * (node // 2) - 1, -1) for node in range(2 * RIGHT)])
        return Candidates(tokens, -torch.arange(1.0, 2 * RIGHT + 1).expand_as(tokens), parents.expand_as(tokens))

    monkeypatch.setattr(Decoder, "__init__", numbered)
    monkeypatch.setattr(Decoder, "draft", with_sequences)
    monkeypatch.setattr(Drafter, "expand", expand)
    yield known


def check(model: LlavaForConditionalGeneration, base: LlavaTarget, answers: list[list[int]]) -> None:
    """Answers with a tree equal `generate`: before and past the window, with a picture, and in a batch."""
    target = LlavaTarget(model, base.processor)
    table = model.get_input_embeddings().weight
    config = {"hidden_size": table.shape[1], "intermediate_size": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-6}
    draft = DraftModel(DraftConfig.from_dict({"model_type": "llava", "vocab_size": table.shape[0], **config}))
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(table)
    msd = MSDModel(target, draft, TreeConfig(RIGHT, 2, 2 * RIGHT))
    prompts = [("Hi", []), ("Which of these can you count? " * 2, []), ("And?", [make_image(width=50, height=34)])]
    texts = [target.chat_prompt(question, len(pictures)) for question, pictures in prompts]
    expected, accepted = [], 0
    for text, (_, pictures) in zip(texts, prompts, strict=True):
        inputs = target.prepare(text, pictures)
        output = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        expected.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        answers[:] = expected[-1:]
        found = msd.generate(**inputs, max_new_tokens=LENGTH, temperature=0.0)
        assert found.tokens == expected[-1:]
        accepted += sum(found.stats.accept_lengths)
    assert accepted > LENGTH
    parts = MSDModel(target, draft, TreeConfig(RIGHT, 2, 2 * RIGHT), tree_attention="two-part")
    inputs = target.prepare(texts[-1], prompts[-1][1])
    answers[:] = expected[-1:]
    assert parts.generate(**inputs, max_new_tokens=LENGTH, temperature=0.0).tokens == expected[-1:]
    answers[:] = expected
    batch = target.prepare(texts, [picture for _, pictures in prompts for picture in pictures])
    assert msd.generate(**batch, max_new_tokens=LENGTH, temperature=0.0).tokens == expected


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
def test_models_of_pictures_and_text(kind: str, tmp_path: Path) -> None:
    """A config.json of each names a family, or is refused with a line that names those which are supported."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    try:
        family = family_of(tmp_path)
    except UserError as error:
        assert f"'{kind}' is not supported" in str(error) and "\n" not in str(error)
        with pytest.raises(UserError, match="is not supported"):
            load_target(tmp_path)
    else:
        assert kind in family.model_types


@pytest.mark.slow
@pytest.mark.parametrize("kind", KNOWN)
def test_a_known_language_model_is_exact(kind: str, base: LlavaTarget, answers: list[list[int]]) -> None:
    text = tiny_text_config(kind, base.vocab_size)
    assert (attention_layers(text).window is not None) == (kind in WITH_WINDOWS)
    check(llava_model(text, base), base, answers)


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
    check(llava_model(text, base), base, answers)
