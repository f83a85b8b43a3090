"""The models on tiny checkpoints: answers, settings, scores, statistics and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from eval_support import IMAGES, SOME_SLOW, TREE, class_of, load, request
from tiny_draft import make_draft
from tiny_llava import make_image

from eagle.families import FAMILIES, family_named, load_target
from llava import UserError
from lmms_eval_msd import MODELS, report
from lmms_eval_msd import model as models
from lmms_eval_msd.model import LlavaMSD, score
from lmms_eval_msd.prompts import visuals_of


@pytest.fixture(scope="module")
def plain(base):
    return load(LlavaMSD, base)


@pytest.fixture(scope="module")
def fast(base, draft):
    return load(LlavaMSD, base, draft, **TREE)


@pytest.fixture
def requests():
    contexts = [("How many?", IMAGES[:1]), ("Which two?", IMAGES[:2]), ("No picture.", None)]
    return [request(context, images, number) for number, (context, images) in enumerate(contexts)]


def test_models_are_registered():
    from lmms_eval.models import get_model

    assert MODELS.keys() == {family.eval_model for family in FAMILIES}
    assert all(family_named(get_model(name).family).eval_model == name for name in MODELS)


def test_same_answers_with_and_without_draft(plain, fast, requests):
    answers = [[result.text for result in model.generate_until(requests)] for model in (plain, fast)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3
    assert plain.stats["tiny"].tau == 1.0
    assert fast.stats["tiny"].requests == 3
    assert fast.stats["tiny"].cycles < plain.stats["tiny"].cycles
    assert set(fast.stats["tiny"].accept_lengths) > {0}


def test_models_warm_up_before_they_answer(fast, requests, monkeypatch):
    calls, generate = [], fast.msd.generate
    monkeypatch.setattr(fast.msd, "warm_up", lambda progress, batch_sizes: calls.append((progress, batch_sizes)))
    monkeypatch.setattr(fast.msd, "generate", lambda **given: calls.append("answer") or generate(**given))
    fast.generate_until(requests[2:])
    assert calls == [(True, [1]), "answer"]
    for size, sizes in ((4, [1, 4]), (17, [1])):  # larger batches are not compiled
        monkeypatch.setattr(fast, "batch_size_per_gpu", size)
        fast.generate_until(requests[2:])
        assert calls[-2:] == [(True, sizes), "answer"]


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


def test_loglikelihood_is_that_of_the_base(fast):
    ask = request("How many?", IMAGES[:1], settings="three shapes", kind="loglikelihood")
    loss, greedy = fast.loglikelihood([ask])[0]
    target = fast.msd.target
    prompt = fast.prompts.write("How many?", IMAGES[:1]).text
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
    prompt = plain.prompts.write("How many?", IMAGES[:1])
    start = target.prepare(prompt.text, IMAGES[:1])["input_ids"].shape[1]
    wanted = target.prepare(f"{prompt.text} three shapes", IMAGES[:1])["input_ids"][0, start:]
    sure = 50.0 * torch.nn.functional.one_hot(wanted, target.vocab_size)[None]
    monkeypatch.setattr(target, "head", lambda hidden: sure[:, : hidden.shape[1]])
    loss, greedy = score(target, plain.prompts, prompt, "three shapes")
    assert greedy
    assert loss == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", SOME_SLOW[1:])
def test_loglikelihood_of_each_family(name, family_bases):
    model = load(class_of(name), family_bases[name])
    ask = request("How many?", IMAGES[:1], settings="three shapes", kind="loglikelihood")
    loss, _ = model.loglikelihood([ask])[0]
    prompt = model.prompts.write("How many?", IMAGES[:1])
    space = "" if prompt.text[-1:].isspace() else " "
    inputs = model.prompts.inputs([type(prompt)(f"{prompt.text}{space}three shapes", prompt.visuals)])
    start = model.prompts.inputs([prompt])["input_ids"].shape[1]
    with torch.inference_mode():
        logits = model.msd.target.model(**inputs).logits[0, start - 1 : -1]
    wanted = inputs["input_ids"][0, start:]
    torch.testing.assert_close(loss, float(torch.nn.functional.cross_entropy(logits, wanted)), atol=1e-4, rtol=1e-4)


def test_chat_template_flag_is_refused(plain):
    with pytest.raises(UserError, match="apply_chat_template"):
        _ = plain.chat_template


def test_statistics_reach_the_results(base, draft, requests, tmp_path, capsys):
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    model = load(LlavaMSD, base, draft, **TREE)
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
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "9" * 5000}, "batch_size"),
        ({"batch_size": "\u00b2"}, "batch_size"),
        ({"max_pixels": 3}, "unknown key 'max_pixels': --model_args of llava_msd"),
        ({"image_aspect": "wide"}, "image_aspect is none of pad, crop"),
        ({"msd_baseline": "x"}, "results as msd_baseline without use_msd"),
        ({"msd_baseline": "measure", "msd_baseline_requests": 0}, "msd_baseline_requests: 0 is not at least 1"),
        (
            {"msd_baseline_requests": 4},
            r"msd_baseline_requests without a measured baseline: 4 \(add --msd_baseline measure",
        ),
    ],
)
def test_bad_model_args(base, options, message):
    with pytest.raises(UserError, match=message):
        LlavaMSD(**{"pretrained": str(base), "device": "cpu", **options})


def test_family_of_the_future(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="mamba"):
        LlavaMSD(str(tmp_path), device="cpu")


@pytest.mark.parametrize(("fixture", "right"), [("base", "llava_msd"), ("qwen2", "qwen2_vl_msd")])
def test_family_of_another_name(fixture, right, base, qwen2, tmp_path):
    """Found in config.json alone, before the weights are read."""
    source = base if fixture == "base" else qwen2
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    for name in MODELS.keys() - {right}:
        model_class = class_of(name)
        with pytest.raises(UserError, match=rf"--model {name} evaluates .*use --model {right}") as error:
            model_class(str(tmp_path), device="cpu")
        assert "\n" not in str(error.value)


def test_processes_that_do_not_know_of_each_other(base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, accelerate sees 1"):
        LlavaMSD(str(base), device="cpu")


def test_defaults_are_those_of_the_family(base, qwen2, qwen2_5):
    pairs = [(LlavaMSD, base, 1024), (models.Qwen2VLMSD, qwen2, 128), (models.Qwen2_5VLMSD, qwen2_5, 32768)]
    for model_class, folder, most in pairs:
        model = load(model_class, folder)
        assert model.settings(None).engine["max_new_tokens"] == most
        stops = () if model_class is models.Qwen2_5VLMSD else ("\n\n",)
        assert model.settings({"until": ["\n\n"]}).until == stops


@pytest.mark.parametrize("name", SOME_SLOW[1:])
def test_draft_of_each_family(name, family_bases, tmp_path):
    folder, model_class = family_bases[name], class_of(name)
    draft = make_draft(tmp_path / "draft", load_target(folder), agree=1.0)
    requests = [request("How many?", IMAGES[:1]), request("Which two?", IMAGES[:2]), request("No picture.", None)]
    plain, fast = load(model_class, folder), load(model_class, folder, draft, **TREE)
    answers = [[each.text for each in model.generate_until(requests)] for model in (plain, fast)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3
    assert fast.stats["tiny"].cycles < plain.stats["tiny"].cycles


def test_visuals(tmp_path):
    make_image(tmp_path / "a.png")
    assert visuals_of(None) == []
    assert len(visuals_of([IMAGES[:2], IMAGES[2], str(tmp_path / "a.png")])) == 4
    assert visuals_of(["clip.MP4"]) == ["clip.MP4"]
    with pytest.raises(UserError, match="neither picture nor video"):
        visuals_of(["sound.wav"])
    with pytest.raises(UserError, match="dict"):
        visuals_of([{"array": []}])
