"""CONTRIBUTING.md: its example of a model family works, its commands and links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image
from tiny_stock import TEXT
from tiny_tokenizer import tokenizer_size, write_tokenizer_model
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from eagle import MSDModel, TreeConfig
from eagle.conversations import read_conversation
from eagle.drafts.checkpoint import load_draft
from eagle.families import Family, load_target, registry, template_of
from llava.errors import UserError
from llava.hub import Source
from llava.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")


def make_vipllava(folder: Path) -> Path:
    """A tiny ViP-LLaVA with random weights; special tokens are never produced."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    write_tokenizer_model(folder)
    tokenizer = load_tokenizer(Source(str(folder)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    tower = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    layers = "vision_feature_layer" if hasattr(VipLlavaConfig(), "vision_feature_layer") else "vision_feature_layers"
    config = VipLlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**TEXT, vocab_size=tokenizer_size() + 2, eos_token_id=2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
        **{layers: [-1, -2, 1]},
    )  # fmt: skip
    model = VipLlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight[[0, 1, 2, tokenizer_size(), tokenizer_size() + 1]] = 0
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The page's family, made from the page's text and registered as the page says."""
    target, template, row = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for name, code in (("target", target), ("template", template)):
        module = ModuleType(f"eagle.families.vipllava.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    family = eval(row, {"Family": Family})
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, family))
    return family


def test_the_example_of_a_family_decodes_like_transformers(example: Family, tmp_path: Path) -> None:
    target = load_target(make_vipllava(tmp_path / "base"), dtype="float32")
    assert type(target) is example.target_class()
    draft = load_draft(make_draft(tmp_path / "draft", target), dtype=torch.float32)
    msd = MSDModel(target, draft, TreeConfig(2, 40, 120))  # a wide tree: a random draft is rarely right
    accepted: list[int] = []
    for sizes in ([], [(50, 34)], [(30, 60), (64, 64)]):
        pictures = [make_image(width=w, height=h, seed=w) for w, h in sizes]
        inputs = target.prepare(target.chat_prompt("What colours?", num_images=len(sizes)), pictures)
        assert (inputs["input_ids"] == target.config.image_token_id).sum() == 4 * len(sizes)
        expected = target.model.generate(**inputs, max_new_tokens=24, do_sample=False)
        output = msd.generate(**inputs, max_new_tokens=24, temperature=0.0)
        assert torch.equal(output.sequences, expected)
        accepted += output.stats.accept_lengths
    assert max(accepted) > 0


def test_the_example_of_a_family_writes_training_conversations(example: Family, tmp_path: Path) -> None:
    target = load_target(make_vipllava(tmp_path / "base"), dtype="float32")
    make_image(tmp_path / "a.png", width=60, height=30)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A river."}]
    conversation = read_conversation({"image": "a.png", "conversations": turns}, 0)
    prepared = template_of(target).prepare(conversation, tmp_path, 200)
    assert (prepared.input_ids == target.config.image_token_id).sum() == 4
    assert target.tokenizer.decode(prepared.input_ids[prepared.loss_mask]).strip() == "A river.</s>"


def test_without_registration_the_family_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_type 'vipllava' is not supported"):
        load_target(make_vipllava(tmp_path / "base"))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", ".github/ISSUE_TEMPLATE/bug.md"])
def test_paths_lead_somewhere(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:EAGLE|LLaVA|lmms-eval|tests|docs|pocket|scripts)/[\w./-]+)`", text)
    assert all((REPO / path).exists() for path in paths), paths


def test_changelog_names_the_release() -> None:
    release = re.search(r'^version = "([^"]+)"', (REPO / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert release and f"\n## {release[1]}" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
