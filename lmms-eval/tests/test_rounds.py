"""Tasks of several rounds, as lmms-eval's Qwen model answers them."""

from __future__ import annotations

import pytest
from eval_support import IMAGES, load, request, upstream
from lmms_eval.api.instance import unwrap_generation_output

from lmms_eval_msd import model as models

SETTINGS = {"max_new_tokens": 8, "until": ["e"]}  # lmms-eval's own models ignore `until` in several rounds


def asking(rounds, log=None):
    """A task that asks ``rounds`` times, shows another picture each time and quotes the last answer."""

    def ask(doc, previous_output=None, round_idx=None, previous_round_info=None):
        if log is not None:
            log.append((round_idx, tuple(previous_output), previous_round_info))
        if round_idx == rounds:
            return None, None, True, previous_output, None
        return [IMAGES[round_idx]], f"You said {previous_output[-1]}. And now?", False, previous_output, round_idx

    return ask


def ask_both(rounds, log=None):
    kind = "generate_until_multi_round"
    return request("How many?", IMAGES[:1], settings=dict(SETTINGS), kind=kind, ask=asking(rounds, log))


def test_as_upstream(qwen2, monkeypatch):
    limits = {"min_pixels": 56 * 56, "max_pixels": 84 * 84}
    theirs, texts = upstream("qwen2_vl", "Qwen2_VL", qwen2, monkeypatch, **limits)
    ours = load(models.Qwen2VLMSD, qwen2, **limits)
    written = []
    write = ours.prompts.write
    monkeypatch.setattr(ours.prompts, "write", lambda *a: written.append(write(*a)) or written[-1])
    one = theirs.generate_until_multi_round([ask_both(3)])[0]
    other = ours.generate_until_multi_round([ask_both(3)])[0]
    assert other == list(one)
    assert len(other) == 3
    assert [prompt.text for prompt in written] == texts


@pytest.mark.parametrize("size", [1, 3])
def test_each_request_has_its_own_rounds(base, size):
    log = []
    model = load(models.LlavaMSD, base, batch_size=size)
    requests = [ask_both(1), ask_both(3, log), ask_both(2)]
    answers = model.generate_until_multi_round(requests)
    assert [len(each) for each in answers] == [1, 3, 2]
    assert [entry[0] for entry in log] == [1, 2, 3]
    assert [entry[1] for entry in log] == [tuple(answers[1][:count]) for count in (1, 2, 3)]
    assert [entry[2] for entry in log] == [None, 1, 2]
    assert model.stats["tiny"].requests == 6
    assert answers[0][0] == answers[1][0]
    assert len(set(answers[1])) == 3
    for each in answers:  # lmms-eval keeps them as lists
        assert unwrap_generation_output(each) == (each, None)
