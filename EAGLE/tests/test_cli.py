"""The command `msd` on tiny real models: what it prints, what it writes, how it fails."""

import json
import os
import re
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from transformers import LlamaModel

from eagle import exactness
from eagle.cli import main, parser
from eagle.decode.msd import MSDModel
from eagle.decode.sampling import Sampler
from eagle.families import load_target
from eagle.loading import load_model

REPORT_KEYS = {"speedup", "tau", "tokens_per_second", "baseline_name", "phases_ms", "histogram", "versions", "hardware",
               "settings"}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a base model, its draft, and a question file with pictures."""
    folder = tmp_path_factory.mktemp("cli")
    base = make_liuhaotian(folder / "base")
    make_draft(folder / "draft", load_target(base, dtype=torch.float32))
    make_image(folder / "one.png")
    make_image(folder / "two.png", seed=1)
    rows = [
        {"id": "a", "images": ["one.png"], "question": "How many shapes?", "answer": "three"},
        {"id": "b", "images": ["two.png"], "question": "Which colour?", "answer": "red and green"},
        {"id": "c", "images": [], "question": "Name a river.", "answer": "Rhine"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def models(pair):
    return ["--base-model", str(pair / "base"), "--msd-model", str(pair / "draft"), "--dtype", "float32"]


def generate(pair, capsys, *options):
    status = main(["generate", *models(pair), "--json", "--max-new-tokens", "12", *options])
    return status, json.loads(capsys.readouterr().out)


def test_generate_prints_one_json_object(pair, capsys):
    status, report = generate(pair, capsys, "--image", str(pair / "one.png"), "--prompt", "How many shapes?")
    assert status == 0
    assert set(report) == {"text", "token_ids", "new_tokens", "tau", "cycles", "seconds", "accept_lengths"}
    assert report["new_tokens"] == len(report["token_ids"]) == 12
    assert len(report["accept_lengths"]) == report["cycles"]


def test_generate_equals_plain_decoding_and_the_template_written_out(pair, capsys):
    image = ["--image", str(pair / "one.png")]
    _, msd = generate(pair, capsys, *image, "--prompt", "How many?")
    _, plain = generate(pair, capsys, *image, "--prompt", "How many?", "--no-msd")
    template = load_target(pair / "base").chat_prompt("How many?", num_images=1)
    _, raw = generate(pair, capsys, *image, "--raw-prompt", "--prompt", template)
    assert msd["token_ids"] == plain["token_ids"] == raw["token_ids"]
    assert plain["tau"] == 1.0


def test_generate_streams_text(pair, capsys):
    assert main(["generate", *models(pair), "--prompt", "Name a river.", "--max-new-tokens", "5"]) == 0
    said = capsys.readouterr()
    assert "[5 tokens," in said.out and "no --image" in said.err
    picture = ["--image", str(pair / "one.png")]
    assert main(["generate", *models(pair), *picture, "--prompt", "How many?", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("usage: msd") and "exactness" in said.out and said.err == ""


def test_sampling_follows_the_seed(pair, capsys):
    options = ["--prompt", "Name a river.", "--temperature", "1", "--top-p", "0.9", "--seed"]
    first, again, other = (generate(pair, capsys, *options, seed)[1]["token_ids"] for seed in "112")
    assert first == again != other


def test_verify_counts_mismatches(pair, capsys):
    assert main(["verify", *models(pair), "--data", str(pair / "questions.jsonl"), "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("0/3 mismatches")


def test_verify_in_float32_needs_whole_products(pair, capsys, monkeypatch):
    """With TF32, differences would say nothing."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert main(["verify", *models(pair), "--data", str(pair / "questions.jsonl"), "--max-new-tokens", "2"]) == 2
    assert "float32_matmul_precision is high" in capsys.readouterr().err


def test_verify_compares_sampled_answers(pair, capsys):
    check = ["verify", *models(pair), "--data", str(pair / "questions.jsonl"), "--max-new-tokens", "20"]
    assert main([*check, "--temperature", "0.8", "--seed", "3"]) == 0
    assert "0/3 mismatches (torch.float32, temperature 0.8, seed 3, 20 new tokens)" in capsys.readouterr().out
    assert main([*check, "--temperature", "-1"]) == 2
    assert "temperature -1.0" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--reference", "padded"], ["--one-row-ties"]], ids=" ".join)
def test_verify_with_forwards_of_other_sizes(pair, capsys, options):
    check = ["verify", *models(pair), "--data", str(pair / "questions.jsonl"), "--max-new-tokens", "9", *options]
    assert main(check) == 0
    assert capsys.readouterr().out.startswith("0/3 mismatches")


def test_verify_fails_when_answers_differ(pair, capsys, monkeypatch):
    """A decoder that drops the last token must be caught."""
    from eagle.decode.decoder import Decoder

    monkeypatch.setattr(Decoder, "run", lambda self, honest=Decoder.run: [row[:-1] for row in honest(self)])
    assert main(["verify", *models(pair), "--data", str(pair / "questions.jsonl"), "--max-new-tokens", "9"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("3/3 mismatches")
    assert "a: differs at new token 8" in captured.err


def test_bench_writes_its_report(pair, capsys, tmp_path):
    out = tmp_path / "report.json"
    options = ["--max-new-tokens", "8", "--warm-up", "1", "--baseline-dtype", "bfloat16", "--out", str(out)]
    assert main(["bench", *models(pair), "--data", str(pair / "questions.jsonl"), *options]) == 0
    report = json.loads(out.read_text())
    assert set(report) >= REPORT_KEYS
    assert set(report["phases_ms"]) == {"prefill", "draft", "tree", "verify", "accept", "commit"}
    phases = {"draft", "tree", "verify", "accept", "commit", "outside"}
    assert set(report["phases_share"]["cycle"]) == phases
    assert set(report["phases_share"]["request"]) == phases | {"prefill"}
    assert all(sum(shares.values()) == pytest.approx(1.0) for shares in report["phases_share"].values())
    assert set(report["first_token_ms"]) == {"MSD float32", *report["baselines"]}
    assert all(ms > 0 for ms in report["first_token_ms"].values())
    assert set(report["baselines"]) == {
        f"{name} {dtype}" for name in ("autoregressive", "transformers generate") for dtype in ("float32", "bfloat16")
    }
    assert report["tokens_per_second"]["baseline"] == max(report["baselines"].values())
    assert report["new_tokens"] == 24
    out = capsys.readouterr().out
    assert "speed-up" in out and "first token" in out and "share of a cycle: draft" in out


@pytest.mark.parametrize(
    ("options", "guarded"),
    [
        ([], True),
        (["--tree", "auto", "--tree-depth", "2"], True),
        (["--tree", "fixed"], False),
        (["--tree-tokens", "8"], False),
    ],
    ids=str,
)
def test_only_an_automatic_tree_may_stop_drafting(pair, options, guarded):
    arguments = parser(["verify"]).parse_args(["verify", *models(pair), "--data", "x", *options])
    assert load_model(arguments).guarded is guarded


def test_exactness_prints_its_table(pair, capsys, tmp_path):
    out = tmp_path / "fits.json"
    options = ["--data", str(pair / "questions.jsonl"), "--limit", "1", "--draws", "1500", "--out", str(out)]
    assert main(["exactness", *models(pair), *options]) == 0
    fits = json.loads(out.read_text())
    assert {fit["setting"] for fit in fits} == set(exactness.SETTINGS)
    assert {"first token", "second token"} <= {fit["where"] for fit in fits}
    assert f"0/{len(fits)} comparisons fail" in capsys.readouterr().out


def test_exactness_fails_where_a_setting_is_ignored(pair, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "scores", lambda self, logits, prefix: logits.float())
    options = ["--data", str(pair / "questions.jsonl"), "--limit", "1", "--draws", "1500"]
    assert main(["exactness", *models(pair), *options]) == 1


def test_throughput_of_each_batch_size(pair, capsys, tmp_path):
    out = tmp_path / "report.json"
    options = ["--batch-sizes", "1", "2", "--max-new-tokens", "6", "--out", str(out)]
    assert main(["throughput", *models(pair), "--data", str(pair / "questions.jsonl"), *options]) == 0
    report = json.loads(out.read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    assert [row["tree"]["total_tokens"] for row in report["rows"]] == [32, 12]
    assert all(row["speedup"] == pytest.approx(row["msd"] / row["plain"]) for row in report["rows"])
    assert "speed-up" in capsys.readouterr().out
    assert main(["throughput", *models(pair), "--data", str(pair / "questions.jsonl"), "--batch-sizes", "0"]) == 2
    assert "--batch-sizes: 0 is not at least 1" in capsys.readouterr().err


def test_throughput_of_batches_that_are_not_compiled(pair, tmp_path):
    """They are measured, but no warm-up knows them."""
    row, out = json.loads((pair / "questions.jsonl").read_text().splitlines()[-1]), tmp_path / "report.json"
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({**row, "id": str(number)}) for number in range(17)))
    options = ["--max-new-tokens", "2", "--out", str(out), "--batch-sizes"]
    for sizes in (["1", "17"], ["17"]):
        assert main(["throughput", *models(pair), "--data", str(tmp_path / "q.jsonl"), *options, *sizes]) == 0
        assert [str(row["batch"]) for row in json.loads(out.read_text())["rows"]] == sizes


def test_bench_takes_more_contestants(pair, capsys, tmp_path):
    out = tmp_path / "report.json"
    more = ["--also-tree", "2/2/6", "--also-tree", "1/1/2", "--prompt-lookup", "3", "--out", str(out)]
    questions = ["--data", str(pair / "questions.jsonl"), "--max-new-tokens", "8", "--warm-up", "0"]
    assert main(["bench", *models(pair), *questions, *more]) == 0
    others = json.loads(out.read_text())["others"]
    assert set(others) == {"MSD float32, tree 2/2/6", "MSD float32, tree 1/1/2", "prompt lookup float32"}
    assert all(other["tokens_per_second"] > 0 for other in others.values())
    assert "prompt lookup float32" in capsys.readouterr().out


def test_bench_compiles_before_it_measures(pair, capsys, tmp_path, monkeypatch):
    """Both what is measured and the baseline; plain decoding without compiling stays a baseline."""
    warm, generate, out = [], MSDModel.generate, tmp_path / "report.json"

    def checked(self, *given, **named):
        assert self.backend is None or self in warm
        return generate(self, *given, **named)

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(MSDModel, "warm_up", lambda self, **_: warm.append(self))
    monkeypatch.setattr(MSDModel, "generate", checked)
    options = ["--max-new-tokens", "4", "--warm-up", "0", "--limit", "1", "--compile", "eager", "--out", str(out)]
    assert main(["bench", *models(pair), "--data", str(pair / "questions.jsonl"), *options]) == 0
    assert len({id(model) for model in warm}) == 2
    assert {"autoregressive float32", "autoregressive float32, compiled"} < set(
        json.loads(out.read_text())["baselines"]
    )


def test_compiled_msd_has_a_compiled_baseline(pair, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    options = ["--data", str(pair / "questions.jsonl"), "--compile", "eager", "--no-compiled-baselines"]
    assert main(["bench", *models(pair), *options]) == 2
    assert "MSD is compiled, and its baselines would not be" in capsys.readouterr().err


def test_demo_ends_with_a_table(pair, capsys):
    data = ["--data", str(pair / "questions.jsonl"), "--pictures", "2", "--max-new-tokens", "6"]
    assert main(["demo", *models(pair), *data]) == 0
    out = capsys.readouterr().out
    assert "one.png" in out and "two.png" in out
    assert "speed-up" in out and "all" in out


def bad_inputs(pair):
    broken = pair / "broken.png"
    broken.write_bytes(b"not a picture")
    (pair / "empty.jsonl").write_text("")
    (pair / "bad.jsonl").write_text('{"question": "x"}\n{"question": 3}\n')
    (pair / "lost.jsonl").write_text('{"question": "x", "images": ["lost.png"]}\n')
    (pair / "latin.jsonl").write_bytes('{"question": "café"}\n'.encode("latin-1"))
    ask = ["generate", *models(pair), "--prompt", "x"]
    check = ["verify", *models(pair)]
    return {
        "missing picture": ([*ask, "--image", "nowhere.png"], "nowhere.png"),
        "broken picture": ([*ask, "--image", str(broken)], "broken.png"),
        "picture not mentioned": ([*ask, "--raw-prompt", "--image", str(pair / "one.png")], "1 picture"),
        "mentioned, not given": (["generate", *models(pair), "--raw-prompt", "--prompt", "<image> x"], "0 picture"),
        "no draft": (["generate", *models(pair)[:2], "--prompt", "x"], "--no-msd"),
        "absent base": (["generate", "--base-model", "./nowhere", "--prompt", "x", "--no-msd"], "./nowhere"),
        "base as draft": (["generate", *models(pair)[:2], "--msd-model", str(pair / "base"), "--prompt", "x"], "draft"),
        "empty data": ([*check, "--data", str(pair / "empty.jsonl")], "empty"),
        "bad row": ([*check, "--data", str(pair / "bad.jsonl")], "bad.jsonl:2"),
        "lost picture": ([*check, "--data", str(pair / "lost.jsonl")], "lost.png"),
        "negative temperature": ([*ask, "--temperature", "-1"], "temperature -1.0"),
        "negative top-k": ([*ask, "--top-k", "-1"], "top_k -1"),
        "Latin-1 prompt": ([*ask[:-1], "caf\udce9"], "half of a character"),
        "surrogate system": ([*ask, "--system", "\ud83d"], "half of a character"),
        "surrogate stop": ([*ask, "--stop", "\ud83d"], "half of a character"),
        "Latin-1 picture": ([*ask, "--image", "caf\udce9.png"], "picture not found"),
        "Latin-1 base": (["generate", "--base-model", "caf\udce9", "--prompt", "x", "--no-msd"], "not found"),
        "revision of a folder": ([*ask, "--revision", "v9"], "of revision 'v9', but this is a folder"),
        "Latin-1 file": ([*check, "--data", str(pair / "latin.jsonl")], "latin.jsonl:1:18"),
    }


@pytest.mark.parametrize("command", ["generate", "verify", "bench"])
def test_a_prompt_longer_than_the_model_is_refused_before_any_forward(pair, capsys, command):
    """The tiny base has 512 positions."""
    long = "word " * 2000
    (pair / "long.jsonl").write_text(json.dumps({"id": "long", "question": long}) + "\n")
    options = ["--prompt", long] if command == "generate" else ["--data", str(pair / "long.jsonl")]
    with patch.object(LlamaModel, "forward", side_effect=AssertionError):
        assert main([command, *models(pair), "--tree", "fixed", *options]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(r"prompt of \d{4,} positions for a model of 512", error)
    assert command == "generate" or "question long" in error


@pytest.mark.slow
def test_an_answer_that_may_be_too_long_is_warned_of_once(pair, capsys, caplog):
    options = ["--data", str(pair / "questions.jsonl"), "--max-new-tokens", "475", "--limit", "2"]
    assert main(["verify", *models(pair), *options]) == 0
    (line,) = [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]
    assert re.match(r"prompt of \d+ positions and 475 new tokens for a model of 512 positions \(ask for at most", line)


@pytest.mark.parametrize("name", [
    "missing picture", "broken picture", "picture not mentioned", "mentioned, not given", "no draft", "absent base",
    "base as draft", "empty data", "bad row", "lost picture", "negative temperature", "negative top-k",
    "Latin-1 prompt", "surrogate system", "surrogate stop", "Latin-1 picture", "Latin-1 base", "Latin-1 file",
    "revision of a folder",
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(pair, capsys, name):
    arguments, named = bad_inputs(pair)[name]
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert named in errors[0]


@pytest.mark.parametrize("seed", ["1.5", "True", str(2**64), "9" * 20, "-1"])
def test_a_seed_that_is_not_one(pair, capsys, seed):
    for command in (["generate", "--prompt", "x"], ["verify", "--data", "x"], ["exactness", "--data", "x"]):
        assert main([*command, *models(pair), "--seed", seed]) == 2
        assert f"argument --seed: {seed} is not a whole number from 0" in capsys.readouterr().err


def test_a_draft_of_another_size_is_refused(pair, capsys, tmp_path):
    draft = make_draft(tmp_path / "draft", load_target(pair / "base"), hidden_size=64)
    assert main(["generate", *models(pair)[:2], "--msd-model", str(draft), "--prompt", "x"]) == 2
    assert "hidden size 64 in the draft, 32 in the base" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["main(['--help'])", "run_cli(lambda: console().print('x'))"])
def test_a_reader_that_has_left(what):
    """As in `msd --help | true`, and while a table is printed."""
    code = (
        f"import sys; from eagle.cli import main, run_cli; from eagle.commands.output import console; sys.exit({what})"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert done.returncode in (141, 0) and done.stderr == b""  # argparse leaves out what it cannot write


@pytest.mark.parametrize("name", ["x" * 300, "owner/" + "x" * 300, "a/b\nc", "a/b--c", "\x1b[31mred"])
def test_names_that_no_model_can_have(pair, capsys, name):
    draft = ["--msd-model", str(pair / "draft")]
    assert main(["generate", "--base-model", name, *draft, "--prompt", "Hi"]) == 2
    assert main(["generate", "--base-model", str(pair / "base"), "--msd-model", name, "--prompt", "Hi"]) == 2
    assert main(["doctor", "--base-model", name]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("not found" in line for line in lines), lines


@pytest.mark.parametrize("device", ["meta", "disk", "nowhere", "", "cuda:99", "-1", '{"": "cpu"}'])
def test_odd_devices(pair, capsys, device):
    assert main(["generate", *models(pair), "--prompt", "Hi", "--max-new-tokens", "2", "--device-map", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
