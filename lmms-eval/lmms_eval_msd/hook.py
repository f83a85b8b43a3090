"""Adds our flags and tasks to lmms-eval, which has no extension point for them.

`python -m lmms_eval_msd` calls `extend` on lmms-eval's command line before it runs. The commands `lmms-eval` and
`python -m lmms_eval` know nothing of this package until they load their plugins, half-way through their own imports;
there `install` waits for lmms-eval's argument parser, which is recognised by its options.

`--model_args use_msd=True,msd_model_path=DRAFT` needs nothing of this. Evaluations of other models run as before. A
failure in here is one warning, and lmms-eval stays as it is.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from loguru import logger

from eagle.families import FAMILIES
from llava.arguments import reject_unknown_flags
from llava.errors import UserError, cli_errors

MODELS = {
    family.eval_model: f"lmms_eval_msd.model.{family.target.rpartition(':')[2].removesuffix('Target')}MSD"
    for family in FAMILIES
}
"""``--model`` -> class, which has the name of the family's target: `LlavaMSD` for `LlavaTarget`."""
TASKS = Path(__file__).parent / "tasks"
EVAL_OPTIONS = {"--model", "--model_args", "--tasks", "--gen_kwargs", "--include_path"}
FLAGS = ("use_msd", "msd_model_path", "msd_baseline")
WRAPPED = "_msd_wrapped"


def extend(evaluation: ModuleType) -> None:
    """Adds flags and tasks to lmms-eval's command line.

    Args:
        evaluation: the module `lmms_eval.__main__`, which parses the arguments and runs the evaluations.
    """
    add_tasks()
    wrap(evaluation, "parse_eval_args", _parse_eval_args)
    wrap(evaluation, "cli_evaluate_single", _evaluate)


def install() -> None:
    """Waits for lmms-eval's argument parser, for commands other than our own. Can be called repeatedly."""
    if getattr(sys.modules["__main__"], "__package__", None) != __package__:  # `python -m lmms_eval_msd` calls `extend`
        with_warning(wrap, argparse.ArgumentParser, "parse_known_args", _parse_known_args)
    if "lmms_eval.evaluator" in sys.modules:  # is being imported, and needs the tasks next
        with_warning(add_tasks)


def with_warning(change: Callable[..., Any], *args: Any) -> None:
    """Makes one of our changes to lmms-eval. If it fails, there is one warning and lmms-eval continues without it."""
    try:
        change(*args)
    except Exception as error:
        logger.warning(
            f"lmms_eval_msd could not extend lmms-eval ({type(error).__name__}: {error}); "
            "give --model_args use_msd=True,msd_model_path=DRAFT instead of the flags"
        )


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces `owner.name` by a function that calls `wrapper` with the original first, unless that is done already."""
    original = getattr(owner, name)
    if getattr(original, WRAPPED, False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, WRAPPED, True)
    setattr(owner, name, wrapped)


def _parse_eval_args(original: Callable[[], Any]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """lmms-eval's parser with our flags, and what it parses; lmms-eval's own function builds the parser and uses it."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        parser, _ = original()
    finally:
        sys.argv = argv
    add_flags(parser)
    args, rest = parser.parse_known_args()
    _check_parsed(parser, args, rest)
    return parser, parser.parse_args()


def _parse_known_args(original: Callable[..., Any], parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
    if not parser._option_string_actions.keys() >= EVAL_OPTIONS:
        return original(parser, *args, **kwargs)
    with_warning(add_tasks)
    with_warning(_extend_parser, parser)
    namespace, rest = original(parser, *args, **kwargs)
    _check_parsed(parser, namespace, rest)
    return namespace, rest


def _extend_parser(parser: argparse.ArgumentParser) -> None:
    wrap(sys.modules["lmms_eval.__main__"], "cli_evaluate_single", _evaluate)
    add_flags(parser)  # last: flags that nothing reads would be worse than none


def _check_parsed(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Checks the flags of an evaluation with our models. ``rest``: words that the parser does not know."""
    ours = not MODELS.keys().isdisjoint(models_to_evaluate(parser, args))
    with cli_errors():
        if ours:
            reject_unknown_flags(rest, parser._option_string_actions)
        check_flags(args)
    if ours:
        with_warning(join_processes)


def models_to_evaluate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> set[str]:
    """`--model` if it is given, which lmms-eval prefers, else the models of a `--config` file.

    A file that cannot be read names none; lmms-eval reads it next and reports the error.
    """
    if not getattr(args, "config", None) or args.model != parser.get_default("model"):
        return {args.model}
    try:
        content = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return set()
    runs = content if isinstance(content, list) else [content]
    return {str(run.get("model", args.model)) for run in runs if isinstance(run, dict)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to lmms-eval's parser, once."""
    if "--use_msd" in parser._option_string_actions:
        return
    group = parser.add_argument_group(f"multimodal speculative decoding ({', '.join(MODELS)})")
    group.add_argument(
        *_spellings("--use_msd"),
        action="store_true",
        default=False,
        help="Decode with the draft; without it the base model decodes alone.",
    )
    group.add_argument(
        *_spellings("--msd_model_path"), type=str, default=None, metavar="DRAFT", help="Draft: folder or hub name."
    )
    group.add_argument(
        *_spellings("--msd_baseline"),
        type=str,
        default=None,
        metavar="measure|RESULTS",
        help="For the speed-up: 'measure' decodes by the strongest plain way too, in turn with MSD (without "
        "--use_msd: by that way alone). Or results of such a plain run (file or folder).",
    )


def _spellings(flag: str) -> tuple[str, str]:
    """A flag as lmms-eval writes its own, and with dashes."""
    return flag, flag.replace("_", "-")


def join_processes() -> None:
    """Without an accelerator, `accelerate` joins several processes only if an environment variable says so."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def add_tasks() -> None:
    """Makes lmms-eval find the tasks of this package without `--include_path`."""
    from lmms_eval.tasks import TaskManager

    wrap(TaskManager, "initialize_tasks", _initialize_tasks)


def _initialize_tasks(original: Callable[..., dict], manager: Any, *args: Any, **kwargs: Any) -> dict:
    index = original(manager, *args, **kwargs)
    if not kwargs.get("include_defaults", True):
        return index
    return {**manager._get_task_and_group(str(TASKS)), **index}


def check_flags(args: argparse.Namespace) -> None:
    """Checks that the flags fit together. A `--config` file may still bring what is missing.

    Raises:
        UserError: --use_msd without a draft, or a flag with a model that is not ours.
    """
    if getattr(args, "config", None):
        return
    given = [flag for flag in FLAGS if getattr(args, flag, None)]
    if args.model not in MODELS:
        if given:
            raise UserError(
                f"--{given[0]} does not work with --model {args.model}", fix=f"use one of {', '.join(MODELS)}"
            )
        return
    if "use_msd" in given and "msd_model_path" not in given and "msd_model_path=" not in (args.model_args or ""):
        raise UserError("--use_msd needs a draft", fix="add --msd_model_path DRAFT, a folder or a hub name")


def flags_to_model_args(args: argparse.Namespace) -> str:
    """`--model_args` with the flags in it.

    Raises:
        UserError: a path has a comma, which separates arguments.
    """
    parts = [args.model_args] if args.model_args else []
    if getattr(args, "use_msd", False):
        parts.append("use_msd=True")
    for flag in FLAGS[1:]:
        if value := getattr(args, flag, None):
            if "," in str(value):
                raise UserError(f"--{flag} has a comma", where=value, fix="rename the folder")
            parts.append(f"{flag}={value}")
    return ",".join(parts)


def _evaluate(original: Callable[..., Any], args: argparse.Namespace) -> Any:
    """One evaluation. For our models the flags become `model_args`, bad input ends with status 2 and any other failure
    with status 1."""
    args.config, config = None, args.config  # what the file says is in ``args`` by now
    with cli_errors():
        check_flags(args)
    args.config = config
    if args.model not in MODELS:
        return original(args)
    with cli_errors():
        args.model_args = flags_to_model_args(args)
        try:
            return original(args)
        except UserError:
            raise
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
