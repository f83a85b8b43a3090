"""The flags, on a parser with lmms-eval's options; the real one is in test_end_to_end."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from types import SimpleNamespace

import pytest

from llava import UserError
from lmms_eval_msd import hook


@pytest.fixture(autouse=True)
def own_parser(monkeypatch):
    """A parser without the hook, which other tests of this process may have installed."""
    plain = inspect.unwrap(argparse.ArgumentParser.parse_known_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", plain)


def parse(*argv: str) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def make_parser(flags: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="")
    for option in sorted(hook.EVAL_OPTIONS):
        parser.add_argument(option, type=str, default="")
    if flags:
        hook.add_flags(parser)
        hook.add_flags(parser)
    return parser


def test_flags_become_model_args():
    args = parse("--model", "llava_msd", "--model_args", "pretrained=b", "--use_msd", "--msd_model_path", "d")
    hook.check_flags(args)
    assert hook.flags_to_model_args(args) == "pretrained=b,use_msd=True,msd_model_path=d"
    assert hook.flags_to_model_args(parse("--model_args", "pretrained=b")) == "pretrained=b"
    args = parse("--use-msd", "--msd-model-path", "d", "--msd-baseline", "runs")
    assert hook.flags_to_model_args(args) == "use_msd=True,msd_model_path=d,msd_baseline=runs"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "llava_msd", "--use_msd"], "needs a draft"),
        (["--model", "llava_hf", "--use_msd"], "--use_msd does not work with --model llava_hf"),
        (["--model", "llava_hf", "--msd_model_path", "d"], "--msd_model_path does not work"),
        (["--model", "dummy", "--msd_baseline", "d"], "--msd_baseline does not work"),
    ],
)
def test_flags_that_cannot_work(argv, message):
    with pytest.raises(UserError, match=message):
        hook.check_flags(parse(*argv))


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "llava_hf"],
        ["--model", "llava_msd"],
        ["--model", "llava_msd", "--msd_model_path", "d"],
        ["--model", "llava_msd", "--use_msd", "--model_args", "msd_model_path=d"],
        ["--use_msd", "--config", "run.yaml"],
    ],
)
def test_flags_that_can_work(argv):
    hook.check_flags(parse(*argv))


@pytest.mark.parametrize(
    ("content", "argv", "models"),
    [
        ("{model: llava_msd}", [], {"llava_msd"}),
        ("[{model: dummy}, {model: qwen2_vl_msd}, {tasks: mme}]", [], {"dummy", "qwen2_vl_msd", ""}),
        ("{model: llava_msd}", ["--model", "dummy"], {"dummy"}),  # lmms-eval lets the command line win
        ("{model: [", [], set()),
        ("text", [], set()),
    ],
)
def test_models_of_a_config_file(content, argv, models, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    parser = make_parser()
    assert hook.models_to_evaluate(parser, parser.parse_args(["--config", str(tmp_path / "run.yaml"), *argv])) == models
    assert hook.models_to_evaluate(parser, parser.parse_args(["--config", str(tmp_path / "none.yaml")])) == set()
    assert hook.models_to_evaluate(parser, parser.parse_args(["--model", "llava_hf"])) == {"llava_hf"}


@pytest.mark.parametrize(("model", "told"), [("llava_msd", "true"), ("llava_hf", None)])
def test_config_file_joins_processes(model, told, tmp_path, monkeypatch):
    """The parser that lmms-eval parses with knows nothing of the file's model."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(hook, "add_tasks", lambda: None)
    monkeypatch.setattr(hook, "_extend_parser", lambda parser: None)
    (tmp_path / "run.yaml").write_text(f"{{model: {model}, tasks: chartqa}}")
    hook.install()
    make_parser().parse_args(["--config", str(tmp_path / "run.yaml")])
    assert os.environ.get("ACCELERATE_USE_CPU") == told


def test_comma_in_path():
    with pytest.raises(UserError, match="comma"):
        hook.flags_to_model_args(parse("--msd_model_path", "a,b"))


def evaluation(parser: argparse.ArgumentParser) -> SimpleNamespace:
    """lmms-eval's command line: it makes its parser and parses with it in one function."""
    return SimpleNamespace(
        parse_eval_args=lambda: (parser, parser.parse_args()), cli_evaluate_single=lambda args: args.model_args
    )


def test_own_command_line_needs_no_patched_parser(monkeypatch):
    monkeypatch.setattr(hook, "add_tasks", lambda: None)
    plain = argparse.ArgumentParser.parse_known_args
    module = evaluation(make_parser(flags=False))
    hook.extend(module)
    argv = ["--model", "llava_msd", "--model_args", "pretrained=b", "--use_msd", "--msd_model_path", "d"]
    monkeypatch.setattr("sys.argv", ["lmms_eval_msd", *argv])
    parser, args = module.parse_eval_args()
    assert "--use_msd" in parser.format_help()
    assert module.cli_evaluate_single(args) == "pretrained=b,use_msd=True,msd_model_path=d"
    assert argparse.ArgumentParser.parse_known_args is plain


def test_own_command_line_checks_the_flags(monkeypatch, capsys):
    monkeypatch.setattr(hook, "add_tasks", lambda: None)
    module = evaluation(make_parser(flags=False))
    hook.extend(module)
    monkeypatch.setattr("sys.argv", ["lmms_eval_msd", "--model", "llava_msd", "--use_msd"])
    with pytest.raises(SystemExit) as stop:
        module.parse_eval_args()
    assert stop.value.code == 2
    assert "error: --use_msd needs a draft" in capsys.readouterr().err


@pytest.mark.parametrize("own", [True, False], ids=["python -m lmms_eval_msd", "lmms-eval"])
def test_unknown_flag_names_the_nearest(own, monkeypatch, capsys):
    monkeypatch.setattr(hook, "add_tasks", lambda: None)
    monkeypatch.setattr("sys.modules", {**sys.modules, "lmms_eval.__main__": SimpleNamespace(cli_evaluate_single=None)})
    module = evaluation(make_parser(flags=False))
    hook.extend(module) if own else hook.install()
    monkeypatch.setattr("sys.argv", ["lmms-eval", "--model", "llava_msd", "--msd_modl_path", "d"])
    with pytest.raises(SystemExit) as stop:
        module.parse_eval_args()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unknown flag --msd_modl_path (did you mean --msd_model_path?)\n"


def test_other_parsers_are_left_alone():
    hook.install()
    hook.install()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    assert parser.parse_args(["--model", "llava_msd"]).model == "llava_msd"
    assert "--use_msd" not in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--use_msd"])


def test_failure_in_the_hook_is_a_warning(monkeypatch, capsys):
    from loguru import logger

    seen: list[str] = []
    sink = logger.add(seen.append, level="WARNING", format="{message}")

    def broken(*_):
        raise AttributeError("lmms-eval changed")

    try:
        hook.with_warning(broken)
    finally:
        logger.remove(sink)
    assert len(seen) == 1
    assert "lmms-eval changed" in seen[0]
    assert "model_args use_msd=True" in seen[0]


@pytest.mark.parametrize(("error", "status"), [(UserError("x"), 2), (RuntimeError("x"), 1)])
def test_failed_evaluation_has_a_status(error, status, capsys):
    def evaluate(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        hook._evaluate(evaluate, parse("--model", "llava_msd"))
    assert stop.value.code == status
    with pytest.raises(type(error)):  # other models keep lmms-eval's own behaviour
        hook._evaluate(evaluate, parse("--model", "llava_hf"))


def test_settings_of_a_config_file_reach_the_model():
    args = parse("--model", "llava_msd", "--config", "run.yaml")
    args.use_msd, args.msd_model_path = True, "d"  # as cli_evaluate sets what the file says
    seen = hook._evaluate(lambda given: (given.model_args, given.config), args)
    assert seen == ("use_msd=True,msd_model_path=d", "run.yaml")


def test_config_file_without_draft(capsys):
    args = parse("--model", "llava_msd", "--config", "run.yaml")
    args.use_msd = True
    with pytest.raises(SystemExit) as stop:
        hook._evaluate(lambda given: None, args)
    assert stop.value.code == 2
    assert "error: --use_msd needs a draft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("world", "accelerator", "told"), [("2", False, "true"), ("2", True, None), ("1", False, None)]
)
def test_processes_without_an_accelerator(world, accelerator, told, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerator)
    hook.join_processes()
    assert os.environ.get("ACCELERATE_USE_CPU") == told
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
