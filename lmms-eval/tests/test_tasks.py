"""The `*_msd` tasks load, differ from upstream's only where they should, and score the answer at the end."""

from __future__ import annotations

import datasets
import pytest
from eval_support import IMAGES
from lmms_eval.utils import load_yaml_config

from lmms_eval_msd import answers
from lmms_eval_msd.hook import TASKS

UPSTREAM = {"chartqa": "chartqa", "textvqa": "textvqa_val", "gqa": "gqa", "vqav2": "vqav2_val", "mme": "mme"}


def people(*said):
    """What VQAv2 has of people's answers."""
    return [{"answer": answer, "answer_id": number} for number, answer in enumerate(said)]


DOCS = {  # one of each data set: the columns that the task reads
    "chartqa": {"question": "How many?", "answer": "3", "type": "human_test"},
    "textvqa": {"question": "what is written?", "answers": ["stop"] * 10, "question_id": 1},
    "gqa": {"question": "On which side?", "answer": "left", "imageId": "n1"},
    "vqav2": {"question": "Which animal?", "answer": "cat", "answers": people(*["cat"] * 10), "question_id": 1},
    "mme": {"question": "Red? Please answer yes or no.", "answer": "Yes", "category": "count", "question_id": "1"},
}
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


@pytest.fixture
def task_dict(monkeypatch):
    """All tasks of ours, made by lmms-eval's own manager on data sets of one question."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    def load_dataset(path, name=None, split=None, **_):
        if name == "testdev_balanced_images":  # GQA keeps its pictures elsewhere
            return datasets.Dataset.from_list([{"id": "n1", "image": IMAGES[0]}])
        (key,) = [key for key in DOCS if key == path.rpartition("/")[2].lower()]
        row = DOCS[key] if key == "gqa" else DOCS[key] | {"image": IMAGES[0]}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([row]) for split in ("test", "validation", "testdev")}
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("lmms_eval.tasks.gqa.utils.load_dataset", load_dataset)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, model_name="llava_msd")
    return get_task_dict([f"{name}_msd" for name in UPSTREAM], manager)


def test_lmms_eval_makes_requests_of_every_task_and_scores_them(task_dict):
    assert task_dict.keys() == {f"{name}_msd" for name in UPSTREAM}
    for name, task in task_dict.items():
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=1)
        (request,) = task.instances
        context, settings, doc_to_visual = request.args[:3]
        doc = DOCS[name.removesuffix("_msd")]
        question = doc["question"].removesuffix(" Please answer yes or no.")
        assert context.lower().startswith(f"{question}\nExplain in detail".lower()), name
        assert (settings["max_new_tokens"], settings["until"]) == (512, []), name
        (document,) = task.test_docs() if task.has_test_docs() else task.validation_docs()
        (picture,) = doc_to_visual(document)
        assert picture.size == IMAGES[0].size
        answer = doc.get("answer", "stop")
        right, wrong = (task.process_results(document, [f"It is so.\nAnswer: {text}."]) for text in (answer, "none"))
        assert right.keys() <= {metric["metric"] for metric in task.config.metric_list}, name
        for metric, value in right.items():
            score = task.aggregation()[metric]
            assert score([value] * 2) > score([wrong[metric]] * 2) == 0, (name, metric)  # MME's questions are in pairs


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
    doc = {"answers": people(*["two cats"] * 3, *["a cat"] * 7), "question_id": 1}
    assert answers.vqav2(doc, ["I see them.\nAnswer: Two cats."])["exact_match"] == pytest.approx(0.9)
    assert answers.vqav2(doc, ["I see two cats, and no answer."])["exact_match"] == 0.0
