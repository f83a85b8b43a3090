"""Every base family on tiny random models: MSD's greedy output is that of transformers `generate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from tiny_stock import make_llava_next, make_qwen
from transformers import PreTrainedModel

from eagle import MSDModel, TreeConfig
from eagle.decode.drafter import Drafter
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from llava.errors import UserError

FAMILIES = {
    "qwen2_vl": make_qwen,
    "qwen2_vl tied": lambda folder: make_qwen(folder, tied=True),
    "qwen2_5_vl": lambda folder: make_qwen(folder, version="2.5"),
    "llava_next": make_llava_next,
    "llava": make_liuhaotian,
}
POSITIONS = ("plain", "mrope")
TREES = [TreeConfig(5, 10, 60), TreeConfig(3, 2, 6)]
SIZES = [(50, 34), (112, 30), (64, 100)]


@pytest.fixture(scope="module", params=[(f, p) for f in FAMILIES for p in POSITIONS if p == "plain" or "qwen" in f])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    name, positions = request.param
    folder = tmp_path_factory.mktemp("family")
    base = FAMILIES[name](folder / "base")
    target = load_target(base, dtype="float32")
    changes = {"msd": {"positions": "mrope"}, "rope_scaling": {"mrope_section": [1, 1, 2]}}
    draft = make_draft(folder / "draft", target, **(changes if positions == "mrope" else {}))
    return MSDModel(target, load_draft(draft, dtype=torch.float32))


def mark(model: MSDModel) -> str:
    """A picture's place in a written prompt."""
    if "qwen" in model.target.family:
        return "<|vision_start|><|image_pad|><|vision_end|>"
    return "<image>\n"


def inputs_of(model: MSDModel, text: str, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    pictures = [make_image(width=w, height=h, seed=i) for i, (w, h) in enumerate(sizes)]
    return model.target.prepare(text.replace("[]", mark(model)), pictures)


def check(model: MSDModel, inputs: dict[str, torch.Tensor], tree: TreeConfig) -> list[int]:
    """MSD's answer is that of transformers; returns the accepted lengths."""
    settings = {"max_new_tokens": 30, "do_sample": False}
    expected = model.target.model.generate(**inputs, **settings)
    output = model.generate(**inputs, **settings, tree=tree)
    assert torch.equal(output.sequences, expected)
    return output.stats.accept_lengths


@pytest.mark.parametrize("tree", [TREES[0], pytest.param(TREES[1], marks=pytest.mark.slow)], ids=str)
def test_any_number_of_pictures_of_any_size(model: MSDModel, tree: TreeConfig) -> None:
    accepted = []
    for sizes in ([], SIZES[:1], SIZES[1:2], SIZES):
        text = "USER: Here " + "[] and " * len(sizes) + "what colours? ASSISTANT:"
        accepted += check(model, inputs_of(model, text, sizes), tree)
    if tree.total_tokens == 60:  # a random draft is rarely right within a small tree
        assert max(accepted) > 0


def test_a_picture_in_a_later_turn(model: MSDModel) -> None:
    text = "USER: Name two rivers. ASSISTANT: The Nile. USER: And []? ASSISTANT: Red. USER: [] Which? ASSISTANT:"
    check(model, inputs_of(model, text, SIZES[:2]), TREES[0])


def test_text_after_a_picture_is_not_moved(model: MSDModel) -> None:
    """Qwen2-VL remembers the offset of the last prompt's positions."""
    check(model, inputs_of(model, "USER: [] Which? ASSISTANT:", SIZES[:1]), TREES[0])
    check(model, inputs_of(model, "USER: Name two rivers. ASSISTANT:", []), TREES[0])


def test_rows_of_a_batch_are_as_if_alone(model: MSDModel) -> None:
    texts = [
        "USER: [] Which of these shapes can you count? ASSISTANT:",
        "USER: Hi ASSISTANT:",
        "USER: [] [] ASSISTANT:",
    ]
    texts = [text.replace("[]", mark(model)) for text in texts]
    pictures = [make_image(width=w, height=h, seed=i) for i, (w, h) in enumerate(SIZES)]
    batch = model.target.prepare(texts, pictures)
    settings = {"max_new_tokens": 20, "do_sample": False, "tree": TREES[1]}
    together = model.generate(**batch, **settings).sequences[:, batch["input_ids"].shape[1] :]
    for row, (text, own) in enumerate(zip(texts, (pictures[:1], [], pictures[1:]), strict=True)):
        alone = model.target.prepare(text, own)
        expected = model.generate(**alone, **settings).sequences[0, alone["input_ids"].shape[1] :]
        assert together[row].tolist() == expected.tolist()


def drafted_rows(model: MSDModel, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list:
    """What the draft's layer reads of each prompt, [1, P, H] each."""
    assert model.draft is not None
    original, rows = model.draft.fuse, []

    def fuse(*arguments: torch.Tensor) -> torch.Tensor:
        rows.append(original(*arguments))
        return rows[-1]

    monkeypatch.setattr(model.draft, "fuse", fuse)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    monkeypatch.setattr(model.draft, "fuse", original)
    return rows[: len(inputs["input_ids"])]


def embeddings(model: MSDModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[1, P, H] what the target's language model reads, the projected pictures in their places."""
    seen = []
    hook = model.target.model.model.language_model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    with torch.inference_mode():
        model.target.model(**{**inputs, **model.target.complete_inputs(inputs["input_ids"], inputs)})
    hook.remove()
    return seen[0]


def is_picture(model: MSDModel, ids: torch.Tensor) -> torch.Tensor:
    config = model.target.config
    return (ids == config.image_token_id) | (ids == getattr(config, "video_token_id", -1))


@pytest.mark.parametrize(
    "text",
    [
        "USER: [] [] [] Which? ASSISTANT:",
        "USER: Hi. ASSISTANT: Yes. USER: [] or []? ASSISTANT: Red. USER: []",
    ],
)
def test_the_draft_reads_each_picture_position_itself(
    model: MSDModel, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Decoupled: where the next token is a picture's, the layer's input is that position's projected feature."""
    inputs = inputs_of(model, text, SIZES)
    ids = inputs["input_ids"][0]
    places = is_picture(model, ids).nonzero().flatten()
    (rows,) = drafted_rows(model, inputs, monkeypatch)
    wanted = embeddings(model, inputs)
    assert len(places) > 12
    torch.testing.assert_close(rows[0, places - 1], wanted[0, places], atol=1e-5, rtol=1e-5)
    others = (~is_picture(model, ids)).nonzero().flatten()[1:]
    assert not torch.isclose(rows[0, others - 1], wanted[0, others], atol=1e-3).all(dim=-1).any()


def test_the_draft_reads_the_pictures_of_each_row_of_a_batch(
    model: MSDModel, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    texts = ["USER: [] Which? ASSISTANT:", "USER: Hi ASSISTANT:", "USER: [] and []. ASSISTANT:"]
    texts = [text.replace("[]", mark(model)) for text in texts]
    pictures = [make_image(width=w, height=h, seed=i) for i, (w, h) in enumerate(SIZES)]
    together = drafted_rows(model, model.target.prepare(texts, pictures), monkeypatch)
    for rows, text, own in zip(together, texts, (pictures[:1], [], pictures[1:]), strict=True):
        alone = model.target.prepare(text, own)
        places = is_picture(model, alone["input_ids"][0]).nonzero().flatten()
        torch.testing.assert_close(rows[0, places - 1], embeddings(model, alone)[0, places], atol=1e-5, rtol=1e-5)
        assert bool(len(places)) == bool(own)


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_of_loading_reach_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A quantised target is transformers' own affair."""

    class Seen(BaseException):
        pass

    def see(cls: type, *_: object, **settings: object) -> None:
        raise Seen(settings)

    FAMILIES[name](tmp_path / "base")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(see))
    asked = {"quantization_config": {"load_in_4bit": True}, "device_map": {"": "cpu"}}
    with pytest.raises(Seen) as seen:
        MSDModel.from_pretrained(tmp_path / "base", **asked)
    assert asked.items() <= seen.value.args[0].items()


@pytest.mark.parametrize("away", ["lm_head", "model.language_model.layers.1"])
def test_a_base_that_is_offloaded_is_refused(tmp_path: Path, away: str) -> None:
    """As `device_map="auto"` does on a GPU with too little room."""
    base = make_qwen(tmp_path / "base")
    places = {
        "model.visual": "cpu", "model.language_model.embed_tokens": "cpu", "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "cpu", "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    assert not load_target(base, dtype="float32", device_map=places).offloaded
    with pytest.raises(UserError, match=r"was offloaded.*16 bit"):
        load_target(base, dtype="float32", device_map=places | {away: "disk"}, offload_folder=tmp_path / "away")


def test_video(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    if "qwen" not in model.target.family:
        pytest.skip("the family has no video")
    frames = [Image.fromarray(np.full((56, 84, 3), 40 * i, np.uint8)) for i in range(6)]
    text = "USER: <|vision_start|><|video_pad|><|vision_end|> What happens? ASSISTANT:"
    metadata = {"total_num_frames": 6, "fps": 2.0, "frames_indices": list(range(6))}
    inputs = model.processor(
        text=[text], videos=[[np.asarray(f) for f in frames]], video_metadata=[metadata], do_sample_frames=False,
        return_tensors="pt",
    )  # fmt: skip
    assert (inputs["input_ids"] == model.target.config.video_token_id).sum() > 4
    check(model, dict(inputs), TREES[0])
    (rows,) = drafted_rows(model, dict(inputs), monkeypatch)
    places = is_picture(model, inputs["input_ids"][0]).nonzero().flatten()
    wanted = embeddings(model, dict(inputs))[0, places]
    torch.testing.assert_close(rows[0, places - 1], wanted, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def first_guess(model: MSDModel, sizes: list[tuple[int, int]], gap: int) -> torch.Tensor:
    """The draft's log-probabilities after the prompt and ``gap`` more rows of true states."""
    inputs = inputs_of(model, "USER: " + "[]" * len(sizes) + " Which colours? ASSISTANT:", sizes)
    target, draft = model.target, model.draft
    cache = target.new_cache(1, inputs["input_ids"].shape[1] + 8)
    (prefill,) = target.prefill_each(inputs, cache)
    drafter = Drafter(draft, target.head, inputs["input_ids"].shape[1] + 8, TREES[1])
    drafter.start(0, prefill, inputs["input_ids"], torch.tensor([7]))
    if gap:
        drafter.extend([prefill.hidden[0, :gap]], [torch.arange(gap) + 5])
    return drafter.expand(TREES[1]).scores


def test_mrope_draft_reads_the_targets_positions(tmp_path: Path) -> None:
    """The same weights with both kinds of positions: they agree on text, where the positions are the same numbers, and
    differ after a picture, in the prompt and beyond it."""
    target = load_target(make_qwen(tmp_path / "base"), dtype="float32")
    sections = {"rope_scaling": {"mrope_section": [1, 1, 2]}}
    make_draft(tmp_path / "plain", target, **sections)
    make_draft(tmp_path / "mrope", target, **sections, msd={"positions": "mrope"})
    plain, mrope = (MSDModel(target, load_draft(tmp_path / kind, dtype=torch.float32)) for kind in POSITIONS)
    for gap in (0, 3):
        assert torch.equal(first_guess(plain, [], gap), first_guess(mrope, [], gap))
        assert not torch.allclose(first_guess(plain, SIZES[:1], gap), first_guess(mrope, SIZES[:1], gap), atol=1e-5)
