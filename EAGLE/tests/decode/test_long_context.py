"""Long prompts: same answers, exact lengths, and memory that follows the request."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import TinySizes, make_image, make_liuhaotian
from tiny_stock import make_qwen
from transformers import MaxLengthCriteria, StoppingCriteria, TextIteratorStreamer

from eagle import MSDModel, TreeConfig
from eagle.decode.decoder import Decoder
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target

TREE = TreeConfig(3, 4, 16)


def pair(folder: Path, base: Path, **changes: object) -> MSDModel:
    target = load_target(base, dtype="float32")
    return MSDModel(target, load_draft(make_draft(folder / "draft", target, **changes), dtype=torch.float32), TREE)


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("long")
    return pair(folder, (make_liuhaotian if request.param == "llava" else make_qwen)(folder / "base"))


@pytest.mark.parametrize("length", [4000, pytest.param(16_000, marks=pytest.mark.slow)])
def test_long_prompts_equal_transformers(model: MSDModel, length: int) -> None:
    ids = torch.randint(5, 200, (1, length), generator=torch.Generator().manual_seed(length))
    expected = model.target.model.generate(input_ids=ids, do_sample=False, max_new_tokens=9)
    output = model.generate(input_ids=ids, temperature=0, max_new_tokens=9)
    assert torch.equal(output.sequences, expected)
    assert output.stats.new_tokens == 9


def test_many_pictures_make_a_long_prompt(tmp_path: Path) -> None:
    model = pair(tmp_path, make_liuhaotian(tmp_path / "base", sizes=TinySizes(image_size=112)))
    pictures = [make_image(seed=seed) for seed in range(40)]
    inputs = model.target.prepare("USER: " + "<image>\n" * 40 + "Which? ASSISTANT:", pictures)
    assert inputs["input_ids"].shape[1] > 40 * 64
    expected = model.target.model.generate(**inputs, do_sample=False, max_new_tokens=9)
    assert torch.equal(model.generate(**inputs, temperature=0, max_new_tokens=9).sequences, expected)


@pytest.mark.parametrize("positions", [512, 131_072])
def test_caches_follow_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """Not the longest prompt that the model could take."""
    model = pair(tmp_path, make_liuhaotian(tmp_path / "base", sizes=TinySizes(max_positions=positions)))
    seen: list[Decoder] = []
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self: (seen.append(self), run(self))[1])
    model.generate(input_ids=torch.randint(5, 200, (1, 30)), temperature=0, max_new_tokens=20)
    (decoder,) = seen
    assert decoder.cache.capacity == 30 + 20 + TREE.total_tokens
    assert decoder.drafter is not None
    assert decoder.drafter.cache.capacity < 30 + 20 + 40


def test_iterator_streamer_and_custom_criteria(model: MSDModel) -> None:
    """What serving code uses: an answer read from another thread, and a stop of the caller's own."""

    class AfterTwelve(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 42)

    ids = torch.randint(5, 200, (1, 30), generator=torch.Generator().manual_seed(1))
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60)
    criteria = [AfterTwelve(), MaxLengthCriteria(60)]
    settings = {"input_ids": ids, "stopping_criteria": criteria, "max_new_tokens": 40}
    plain = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60)
    expected = model.target.model.generate(**settings, do_sample=False, streamer=plain)
    assert expected.shape[1] == 42
    results = []
    thread = Thread(target=lambda: results.append(model.generate(**settings, temperature=0, streamer=streamer)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert torch.equal(results[0].sequences, expected)
    assert text and text == "".join(plain)
