"""The `*_msd` tasks load, differ from upstream's only where they should, and score the answer at the end."""

from __future__ import annotations

import pytest
from lmms_eval.utils import load_yaml_config

from lmms_eval_msd import answers
from lmms_eval_msd.hook import TASKS

UPSTREAM = {"chartqa": "chartqa", "textvqa": "textvqa_val", "gqa": "gqa", "vqav2": "vqav2_val", "mme": "mme"}
CHANGED = {"task", "process_results", "generation_kwargs", "lmms_eval_specific_kwargs", "metric_list", "metadata"}


@pytest.mark.parametrize("name", sorted(UPSTREAM))
def test_task_is_upstreams_with_long_answers(name):
    import lmms_eval.tasks

    ours = load_yaml_config(str(TASKS / f"{name}_msd.yaml"))
    folder = lmms_eval.tasks.__path__[0]
    upstream = load_yaml_config(f"{folder}/{name}/{UPSTREAM[name]}.yaml")
    for key in set(upstream) - CHANGED:
        same = getattr(ours[key], "__name__", ours[key]), getattr(upstream[key], "__name__", upstream[key])
        assert same[0] == same[1], key
    assert ours["task"] == f"{name}_msd"
    assert ours["generation_kwargs"]["max_new_tokens"] == 512
    assert ours["generation_kwargs"]["until"] == []
    assert "Explain in detail" in ours["lmms_eval_specific_kwargs"]["default"]["post_prompt"]
    wanted = {metric["metric"] for metric in upstream["metric_list"]} - {"submission"}
    assert {metric["metric"] for metric in ours["metric_list"]} == wanted


def test_index_has_them_without_include_path(monkeypatch):
    from lmms_eval.tasks import TaskManager

    from lmms_eval_msd import hook

    monkeypatch.setattr(TaskManager, "initialize_tasks", lambda *a, **k: {"chartqa": {"type": "task"}})
    hook.add_tasks()
    assert {f"{name}_msd" for name in UPSTREAM} | {"chartqa"} == set(TaskManager().task_index)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The bar is 3.\nAnswer: 3.", "3"),
        ("Answer: 2\nNo, the answer is: 42%", "42%"),
        (" 7. ", "7"),
    ],
)
def test_final_answer(text, answer):
    assert answers.final_answer(text) == answer


def test_scores():
    doc = {"answer": "10", "type": "human_test"}
    assert answers.chartqa(doc, ["It shows ten.\nAnswer: 10.2"])["relaxed_overall"] == 1.0
    assert answers.gqa({"answer": "left"}, ["...\nAnswer: Left."]) == {"exact_match": 1.0}
    doc = {"answer": "Yes", "category": "count", "question_id": "1"}
    assert answers.mme(doc, ["There are two dogs. Answer: yes"])["mme_perception_score"]["score"] == 1.0
    doc = {"answers": ["cat"] * 10, "question_id": 1}
    assert answers.textvqa(doc, ["Answer: cat"]) == {"exact_match": 1.0}
