"""The model class on tiny checkpoints: prompts, answers, scores and statistics."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from lmms_eval.api.instance import Instance
from tiny_llava import make_image, make_llava_hf

from llava import UserError
from lmms_eval_msd import MODEL_CLASS, MODELS, report
from lmms_eval_msd.model import MSD
from lmms_eval_msd.prompts import pictures

IMAGES = [make_image(seed=number) for number in range(3)]
TREE = {"msd_depth": 2, "msd_top_k": 3, "msd_total_tokens": 8}


def request(context, images, number=0, settings=None, kind="generate_until", **metadata) -> Instance:
    metadata |= {"task": "tiny", "doc_id": number, "repeats": 1}
    second = {"max_new_tokens": 24, "until": ["\n\n"]} | (settings or {}) if kind == "generate_until" else settings
    return Instance(kind, (context, second, lambda doc: images, number, "tiny", "test"), 0, metadata)


def load(base, draft=None, **options) -> MSD:
    model = MSD(str(base), use_msd=draft is not None, msd_model_path=draft and str(draft), device="cpu", **options)
    model.task_dict = {"tiny": {"test": dict.fromkeys(range(10))}}
    return model


@pytest.fixture(scope="module")
def plain(base):
    return load(base)


@pytest.fixture(scope="module")
def fast(base, draft):
    return load(base, draft, **TREE)


@pytest.fixture
def requests():
    contexts = [("How many?", IMAGES[:1]), ("Which two?", IMAGES[:2]), ("No picture.", None)]
    return [request(context, images, number) for number, (context, images) in enumerate(contexts)]


def test_models_are_registered():
    from lmms_eval.models import get_model

    assert {get_model(name).__module__ for name in MODELS} == {MODEL_CLASS.rpartition(".")[0]}


def test_same_answers_with_and_without_draft(plain, fast, requests):
    answers = [[result.text for result in model.generate_until(requests)] for model in (plain, fast)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3
    assert plain.stats["tiny"].tau == 1.0
    assert fast.stats["tiny"].requests == 3
    assert fast.stats["tiny"].cycles < plain.stats["tiny"].cycles
    assert set(fast.stats["tiny"].accept_lengths) > {0}


def test_settings_of_the_task_count(plain):
    result = plain.generate_until([request("How many?", IMAGES[:1], settings={"max_new_tokens": 5, "until": []})])[0]
    assert result.token_counts.output_tokens == 5
    assert result.token_counts.input_tokens > 16
    stop = result.text[2:4]
    short = plain.generate_until([request("How many?", IMAGES[:1], settings={"max_new_tokens": 5, "until": stop})])[0]
    assert short.text == result.text[: result.text.index(stop)]
    assert short.token_counts.output_tokens <= 5
    sampled = {"temperature": 5.0, "do_sample": False, "max_new_tokens": 12}
    torch.manual_seed(0)
    texts = {plain.generate_until([request("How many?", IMAGES[:1], settings=sampled)])[0].text for _ in range(4)}
    assert len(texts) > 1


def test_padding_requests_are_not_counted(plain):
    before = plain.stats.get("tiny", report.Stats.empty()).requests
    assert len(plain.generate_until([request("How many?", IMAGES[:1], __padding_only__=True)])) == 1
    assert plain.stats.get("tiny", report.Stats.empty()).requests == before


@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompt_is_the_conversation(plain, count):
    from lmms_eval_msd.prompts import write_prompt

    prompt = write_prompt(plain.msd.target, "What?", count)
    marks = " ".join(["<image>"] * count) + "\n" if count else ""
    assert prompt.endswith(f"answers to the user's questions. USER: {marks}What? ASSISTANT:")
    assert write_prompt(plain.msd.target, "What?", count, system="Be brief.").startswith("Be brief. USER:")
    assert write_prompt(plain.msd.target, "A <image> B?", 1).endswith("USER: A <image> B? ASSISTANT:")


def test_prompts_and_answers_are_those_of_llava_hf(tmp_path, monkeypatch):
    """lmms-eval's own model on the same checkpoint and the same requests.

    Its processor cuts the middle out of a picture, which `image_aspect_ratio` asks for here; without it llava pads.
    """
    if find_spec("decord") is None:  # reads videos, which are not asked for here
        monkeypatch.setitem(sys.modules, "decord", SimpleNamespace(VideoReader=None, cpu=None))
    upstream_module = import_module("lmms_eval.models.simple.llava_hf")
    folder = make_llava_hf(tmp_path / "hf", config_changes={"image_aspect_ratio": "square"})
    processor = {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "default"}
    processor |= {"image_token": "<image>", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    upstream = upstream_module.LlavaHf(str(folder), device="cpu", device_map="cpu", dtype="float32")
    ours = load(folder)
    upstream.task_dict = ours.task_dict
    texts: list[str] = []
    apply = upstream.tokenizer.apply_chat_template
    upstream.tokenizer.apply_chat_template = lambda *a, **k: texts.append(apply(*a, **k)) or texts[-1]
    answers = []
    for number, images in enumerate((IMAGES[:1], IMAGES[1:])):
        ask = lambda images=images: [request("How many shapes?", images, settings={"until": []})]  # noqa: E731
        answers.append((upstream.generate_until(ask())[0], ours.generate_until(ask())[0].text))
        assert texts[number] == ours_prompt(ours, "How many shapes?", len(images))
    assert answers[0][0] == answers[0][1]  # with two pictures llava-hf's processor tokenises the space between them
    assert answers[0][0]


def ours_prompt(model, question, count):
    from lmms_eval_msd.prompts import write_prompt

    return write_prompt(model.msd.target, question, count)


def test_loglikelihood_is_that_of_the_base(fast):
    ask = request("How many?", IMAGES[:1], settings="three shapes", kind="loglikelihood")
    loss, greedy = fast.loglikelihood([ask])[0]
    target = fast.msd.target
    prompt = ours_prompt(fast, "How many?", 1)
    inputs = target.prepare(f"{prompt} three shapes", IMAGES[:1])
    start = target.prepare(prompt, IMAGES[:1])["input_ids"].shape[1]
    with torch.inference_mode():
        logits = target.model(**inputs).logits[0, start - 1 : -1]
    wanted = inputs["input_ids"][0, start:]
    torch.testing.assert_close(loss, float(torch.nn.functional.cross_entropy(logits, wanted)), atol=1e-4, rtol=1e-4)
    assert not greedy
    assert fast.loglikelihood([request("How?", None, settings=lambda doc: "a", kind="loglikelihood")])[0][0] > 0


def test_greedy_continuation_is_recognised(plain, monkeypatch):
    target = plain.msd.target
    prompt = ours_prompt(plain, "How many?", 1)
    start = target.prepare(prompt, IMAGES[:1])["input_ids"].shape[1]
    wanted = target.prepare(f"{prompt} three shapes", IMAGES[:1])["input_ids"][0, start:]
    sure = 50.0 * torch.nn.functional.one_hot(wanted, target.vocab_size)[None]
    monkeypatch.setattr(target, "head", lambda hidden: sure[:, : hidden.shape[1]])
    loss, greedy = plain.score("How many?", "three shapes", IMAGES[:1])
    assert greedy
    assert loss == pytest.approx(0.0, abs=1e-6)


def test_several_rounds_are_refused(plain):
    with pytest.raises(NotImplementedError, match="rounds"):
        plain.generate_until_multi_round([])
    with pytest.raises(UserError, match="apply_chat_template"):
        _ = plain.chat_template


def test_statistics_reach_the_results(base, draft, requests, tmp_path, capsys):
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    model = load(base, draft, **TREE)
    model.generate_until(requests)
    model.clean()
    model.clean()
    row = model.report["tasks"]["tiny"]
    assert row["answers"] == 3
    assert sum(row["histogram"].values()) == row["cycles"]
    assert row["tau"] == pytest.approx((row["tokens"] - 3) / row["cycles"])
    assert row["acceptance_by_position"] == sorted(row["acceptance_by_position"], reverse=True)
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_name_sanitized = "tiny"
    for name in ("a", "b"):  # the second run is none of ours
        tracker.save_results_aggregated(results={"results": {}}, samples={}, datetime_str=name)
    assert json.loads((tmp_path / "tiny" / "a_msd.json").read_text()) == json.loads(json.dumps(model.report))
    assert json.loads((tmp_path / "tiny" / "a_results.json").read_text())["msd"]["total"]["answers"] == 3
    assert not (tmp_path / "tiny" / "b_msd.json").exists()
    assert "MSD decoding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_msd": True}, "needs a draft"),
        ({"use_msd": "perhaps"}, "neither True nor False"),
        ({"pretrained": None}, "no base model"),
        ({"msd_dept": 3}, "did you mean 'msd_depth'"),
        ({"batch_size": "many"}, "batch_size"),
    ],
)
def test_bad_model_args(base, options, message):
    with pytest.raises(UserError, match=message):
        MSD(**{"pretrained": str(base), "device": "cpu", **options})


def test_family_of_the_future(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="mamba"):
        MSD(str(tmp_path), device="cpu")


def test_pictures(tmp_path):
    make_image(tmp_path / "a.png")
    assert pictures(None) == []
    assert len(pictures([IMAGES[:2], IMAGES[2], str(tmp_path / "a.png")])) == 4
    with pytest.raises(UserError, match="video"):
        pictures(["clip.mp4"])
    with pytest.raises(UserError, match="dict"):
        pictures([{"array": []}])
