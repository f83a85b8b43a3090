"""A checkpoint's own generation config: stop strings are served, other settings served or named and left out."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_llava_hf
from tiny_stock import make_qwen
from transformers import GenerationConfig

from eagle import MSDModel, TreeConfig
from eagle.benchmark import with_transformers
from eagle.cli import main
from eagle.decode.generate_settings import NO_EFFECT, REFUSED, SERVED
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.questions import Question
from llava.errors import UserError


@pytest.fixture(params=["llava", "qwen2_vl"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    base = (make_llava_hf if request.param == "llava" else make_qwen)(tmp_path / "base")
    return base, make_draft(tmp_path / "draft", load_target(base, dtype=torch.float32), agree=1.0)


def configure(base: Path, **values: Any) -> None:
    path = base / "generation_config.json"
    own = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**own, **values}))


def command(name: str, pair: tuple[Path, Path], *more: str) -> list[str]:
    return [name, "--base-model", str(pair[0]), "--msd-model", str(pair[1]), "--max-new-tokens", "12", *more]


def test_stop_strings_of_the_checkpoint_end_answers(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    msd = MSDModel.from_pretrained(*pair, dtype="float32")
    inputs = msd.target.prepare(msd.target.chat_prompt("Name two rivers."))
    whole = msd.generate(**inputs, max_new_tokens=12, temperature=0.0).tokens[0]
    texts = (msd.tokenizer.decode([token]).strip() for token in whole[2:])
    stop = next(text for text in texts if text.isascii() and text.isprintable() and text)
    configure(pair[0], stop_strings=[stop])
    msd = MSDModel.from_pretrained(*pair, dtype="float32")
    generate = msd.target.model.generate
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    wanted = generate(**inputs, **settings, stop_strings=[stop], tokenizer=msd.tokenizer)
    assert wanted.shape[1] < inputs["input_ids"].shape[1] + len(whole)
    assert torch.equal(generate(**inputs, **settings, custom_generate=msd), wanted)
    for use_msd in (True, False):
        output = msd.generate(**inputs, max_new_tokens=12, temperature=0.0, use_msd=use_msd)
        assert torch.equal(output.sequences, wanted)
    with_config = GenerationConfig(stop_strings=stop, max_new_tokens=12, do_sample=False)
    assert torch.equal(msd.generate(**inputs, generation_config=with_config).sequences, wanted)
    assert with_config.stop_strings == stop
    other = msd.generate(**inputs, max_new_tokens=12, temperature=0.0, stop_strings="no such text")
    assert other.tokens[0] == whole
    answer = with_transformers(msd, {"max_new_tokens": 12})(Question("q", "Name two rivers."))
    assert answer.tokens[0] == wanted[0, inputs["input_ids"].shape[1] :].tolist()
    assert main(command("generate", pair, "--dtype", "float32", "--prompt", "Name two rivers.", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == answer.tokens[0]
    (tmp_path / "q.jsonl").write_text('{"question": "Name two rivers."}\n')
    assert main(command("verify", pair, "--data", str(tmp_path / "q.jsonl"))) == 0


def test_what_the_engine_does_not_serve_is_named_and_left_out(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(pair[0], num_beams=4, chat_format="chatml", output_scores=True)
    with caplog.at_level(logging.WARNING, "eagle"):
        assert main(command("generate", pair, "--prompt", "Hi", "--json")) == 0
    lines = [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()]
    assert any("num_beams=4" in line and "one continuation" in line for line in lines)
    assert any("output_scores=True" in line for line in lines)
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) > 0
    msd = MSDModel.from_pretrained(*pair, dtype="float32")
    with pytest.raises(UserError, match="num_beams=2"):  # asked for by the caller
        msd.generate(**msd.target.prepare("Hi"), num_beams=2, max_new_tokens=2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": "x"}, "temperature"), ({"temperature": -1}, "temperature"), ({"top_k": 0.5}, "top_k"),
        ({"top_p": 3}, "top_p"), ({"do_sample": "yes"}, "do_sample"), ({"stop_strings": [""]}, "stop_strings"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"eos_token_id": []}, "eos_token_id"),
        ({"pad_token_id": "<pad>"}, "pad_token_id"), ({"min_new_tokens": "x"}, "min_new_tokens='x'"),
        ({"bad_words_ids": [3]}, "bad_words_ids.0=3"), ({"bad_words_ids": [[10**6]]}, "1000000 is not an id"),
        ({"suppress_tokens": 5}, "suppress_tokens=5"), ({"begin_suppress_tokens": "x"}, "begin_suppress_tokens='x'"),
        ({"exponential_decay_length_penalty": 1.5}, "exponential_decay_length_penalty=1.5"),
        ({"sequence_bias": {"1": 2.0}}, "sequence_bias"), ({"forced_eos_token_id": 10**6}, "1000000 is not an id"),
        ({"encoder_repetition_penalty": -1}, "encoder_repetition_penalty=-1"), ({"max_time": "x"}, "max_time='x'"),
        ({"eos_token_id": 10**30}, "eos_token_id="), ({"early_stopping": []}, "early_stopping="),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_named_when_the_model_is_loaded(
    pair: tuple[Path, Path], values: dict[str, Any], said: str
) -> None:
    configure(pair[0], **values)
    with pytest.raises(UserError, match=said) as raised:
        load_target(pair[0], dtype="float32")
    assert "generation_config.json" in str(raised.value) and "\n" not in str(raised.value)


def test_values_that_may_be_null_or_whole(pair: tuple[Path, Path]) -> None:
    configure(pair[0], temperature=1, top_p=None, top_k=50, do_sample=False, stop_strings=None, repetition_penalty=2)
    msd = MSDModel.from_pretrained(*pair, dtype="float32")
    inputs = msd.target.prepare("Hi")
    wanted = msd.target.model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(msd.generate(**inputs, max_new_tokens=8).sequences, wanted)


ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**6, 10**10, 10**30, 10**400, -0.5, 0.0, 0.5, 1.0, 2.0, 1e300, "x", "", [], [1],
    [-1], [10**6], [10**30], ["x"], [None], [0.5], [[1]], [[1, 2], [3]], [[-1]], [[10**6]], [[]], [3, 1.5], [3, "x"],
    [3, 1e300], [[[5], 2.0]], [[[5, 6], -3]], [[[10**6], 2.0]], [[5], 2.0], {}, {"a": 1}, {"1": 2.0}, {"bias": 1},
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*SERVED, *NO_EFFECT, *REFUSED}))
def test_any_value_at_any_key(tmp_path: Path, name: str) -> None:
    """One line when the model is loaded, or answers as transformers' with that file."""
    base = make_llava_hf(tmp_path / "base")
    target = load_target(base, dtype="float32")
    draft = load_draft(make_draft(tmp_path / "draft", target, agree=1.0), dtype=torch.float32)
    whole = (base / "generation_config.json").read_text()
    own = json.loads(whole)
    inputs = target.prepare("USER: Name two rivers. ASSISTANT:")
    length = {} if name == "max_new_tokens" else {"max_new_tokens": 4}
    ran = 0
    for value in ODD:
        (base / "generation_config.json").write_text(json.dumps({**own, name: value}))
        try:
            msd = MSDModel(load_target(base, dtype="float32"), draft, TreeConfig(3, 3, 9))
        except UserError as error:
            assert "\n" not in str(error) and "generation_config.json" in str(error), value
            assert name in str(error), value
            continue
        if name == "max_new_tokens" and value is not None and value > 100:
            continue
        ran += 1
        for settings in ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "seed": 1}):
            try:
                output = msd.generate(**inputs, **length, **settings)
            except UserError as error:
                assert name in str(error), value
                continue
            if not settings["temperature"]:
                try:
                    wanted = msd.target.model.generate(**inputs, **length, do_sample=False)
                except Exception:  # transformers cannot use what has no effect here
                    assert name in NO_EFFECT
                    continue
                assert torch.equal(output.sequences, getattr(wanted, "sequences", wanted)), value
    assert ran


def test_criteria_get_what_they_get_from_transformers(pair: tuple[Path, Path]) -> None:
    """No scores, unless they were asked for; and these are refused."""
    msd = MSDModel.from_pretrained(*pair, dtype="float32")
    inputs = msd.target.prepare("Hi")
    seen: list[Any] = []

    def criterion(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        seen.append(scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "stopping_criteria": [criterion]}
    msd.generate(**inputs, **settings)
    msd.target.model.generate(**inputs, **settings)
    assert len(seen) >= 4 and set(map(type, seen)) == {type(None)}
    with pytest.raises(UserError, match="does not return scores"):
        msd.generate(**inputs, **settings, output_scores=True, return_dict_in_generate=True)


def test_inputs_and_outputs_can_be_pickled(pair: tuple[Path, Path]) -> None:
    msd = MSDModel.from_pretrained(*pair, dtype="float32")
    prompt = msd.target.chat_prompt("What?", num_images=1)
    processor = pickle.loads(pickle.dumps(msd.processor))
    inputs = pickle.loads(pickle.dumps(processor(images=make_image(), text=prompt, return_tensors="pt")))
    output = msd.generate(**inputs, max_new_tokens=6, temperature=0.0)
    again = pickle.loads(pickle.dumps(output))
    assert torch.equal(again.sequences, output.sequences) and again.stats == output.stats
    error = pickle.loads(pickle.dumps(UserError("what", "where", "fix")))
    assert str(error) == "what: where (fix)"


def test_an_answer_that_spells_a_mark_does_not_break_the_chat(pair: tuple[Path, Path]) -> None:
    target = load_target(pair[0], dtype="float32")
    answer = "A tag <image>, <|image_pad|> or <|video_pad|>."
    history = [("What?", answer), ("And?", answer)]
    inputs = target.prepare(target.chat_prompt("Why?", 1, history, system=answer), [make_image()])
    alone = target.prepare(target.chat_prompt("Why?", 1), [make_image()])
    image = target.config.image_token_id
    assert int((inputs["input_ids"] == image).sum()) == int((alone["input_ids"] == image).sum()) > 0
