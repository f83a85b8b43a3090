from __future__ import annotations

import pytest

from llava import UserError
from lmms_eval_msd.offline import main, read_rows, write_chartqa


def test_writes_what_the_task_reads(questions, tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.chdir(tmp_path)
    assert main(["--jsonl", str(questions), "--out", "."]) == 0
    assert "3 questions" in capsys.readouterr().out
    data = datasets.load_dataset("lmms-lab-encoder/ChartQA", cache_dir=str(tmp_path / "cache"))
    assert list(data) == ["test"]
    row = data["test"][1]
    assert (row["type"], row["question"], row["answer"]) == ("human_test", "How many shapes 1?", "1")
    assert row["image"].convert("RGB").size == (50, 34)


def test_limit(questions, tmp_path):
    assert write_chartqa(questions, tmp_path, limit=2)[1] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "q.jsonl:1"),
        ('{"id": 1}', "no .question"),
        ('{"images": ["no.png"], "question": "q", "answer": "a"}', "no.png"),
        ("\n", "no question with one picture"),
    ],
)
def test_bad_question_files(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        write_chartqa(tmp_path / "q.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_question_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(tmp_path / "none.jsonl"))
