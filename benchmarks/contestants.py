"""The contestants of a suite file: names and the ways of decoding that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.assistant import assistant_for
from benchmarks.spec import Cell, Suite
from eagle.arguments import tree_limits
from eagle.benchmark import Answer, Contestant, Work, with_engine, with_prompt_lookup, with_transformers
from eagle.decode.compiled.engine import LARGEST_BATCH, obstacle
from eagle.decode.msd import MSDModel
from eagle.decode.sampling import SamplingSettings
from eagle.decode.tree_config import TreeConfig
from llava.errors import UserError

Way = Callable[[Work], Answer]
Builder = Callable[[MSDModel, dict[str, Any], Suite], Way]


def autoregressive(model: MSDModel, settings: dict[str, Any], suite: Suite) -> Way:
    """Our loop without a draft."""
    return with_engine(model, False, settings)


def dynamic(model: MSDModel, settings: dict[str, Any], suite: Suite) -> Way:
    """transformers' `generate` as it is."""
    return with_transformers(model, settings)


def static(model: MSDModel, settings: dict[str, Any], suite: Suite) -> Way:
    """With its preallocated cache; transformers compiles the model for it where it can."""
    return with_transformers(model, settings, cache_implementation="static")


def lookup(model: MSDModel, settings: dict[str, Any], suite: Suite) -> Way:
    """Drafts from the text so far."""
    return with_prompt_lookup(model, settings, suite.lookup)


def assisted(model: MSDModel, settings: dict[str, Any], suite: Suite) -> Way:
    """A small model drafts a chain."""
    return with_transformers(model, settings, assistant_model=assistant_for(model, suite.assistant))


PLAIN: dict[str, Builder] = {
    "autoregressive": autoregressive,
    "transformers dynamic": dynamic,
    "transformers static": static,
}
SINGLE: dict[str, Builder] = {"prompt lookup": lookup, "assistant": assisted}
"""What transformers supports for one sequence only."""
COMPILED, BACKEND = " compiled", "inductor"


def build(
    cell: Cell, suite: Suite, model: MSDModel, others: Sequence[MSDModel] = ()
) -> tuple[list[Contestant], dict[str, str]]:
    """The cell's contestants, and why one of them is left out.

    Args:
        model: the pair, in the suite's dtype.
        others: the base model in the further dtypes that the plain baselines run in.

    Raises:
        UserError: a contestant is unknown.
    """
    sampling = SamplingSettings(cell.temperature, seed=suite.seed).for_engine()
    settings: dict[str, Any] = {"max_new_tokens": cell.new_tokens, **sampling}
    runners, left_out = [], {}
    for name in cell.contestants:
        if name.endswith(COMPILED):
            large = f"batches of more than {LARGEST_BATCH} are not compiled" if cell.batch > LARGEST_BATCH else None
            if reason := large or obstacle(model.target):
                left_out[name] = reason
                continue
            way = name.removesuffix(COMPILED)
            use_msd = way != "autoregressive"
            compiled = compiled_copy(model, way, cell.batch)
            runners.append(Contestant(name, with_engine(compiled, use_msd, settings), plain=not use_msd))
            for other in () if use_msd else others:
                compiled = compiled_copy(other, way, cell.batch)
                runners.append(
                    Contestant(f"{name} {dtype_of(other)}", with_engine(compiled, False, settings), plain=True)
                )
        elif name in PLAIN:
            runners.append(Contestant(name, PLAIN[name](model, settings, suite), plain=True))
            for other in others:
                runners.append(Contestant(f"{name} {dtype_of(other)}", PLAIN[name](other, settings, suite), plain=True))
        elif name in SINGLE and cell.batch > 1:
            left_out[name] = "transformers supports it for one sequence only"
        elif name in SINGLE:
            runners.append(Contestant(name, SINGLE[name](model, settings, suite)))
        elif name == "msd fixed" and cell.batch > 1:
            left_out[name] = "a batch uses this tree anyway"
        else:
            runners.append(Contestant(name, with_engine(model, True, settings, tree_of(name, model, cell.batch))))
    if not any(runner.plain for runner in runners):
        raise UserError(f"cell '{cell.name}' has no plain baseline", suite.where, f"add one of {', '.join(PLAIN)}")
    through = [runner.name for runner in runners if model.backend is not None or runner.name.endswith(COMPILED)]
    if any(each.startswith("msd") for each in through) and not any(each.startswith("auto") for each in through):
        what = f"cell '{cell.name}' has compiled MSD and no compiled plain decoding"
        raise UserError(what, suite.where, f"add 'autoregressive{COMPILED}'")
    return runners, left_out


def dtype_of(model: MSDModel) -> str:
    """The name of its dtype, without "torch."."""
    return str(model.dtype).removeprefix("torch.")


def compiled_copy(model: MSDModel, way: str, batch: int) -> MSDModel:
    """The same pair, sharing its weights, compiled for "autoregressive" or the tree of a name as in `tree_of`, and
    warmed up for such a batch. "msd" is the default of compiled decoding, which pauses where drafting loses."""
    plain = way == "autoregressive"
    made = MSDModel(model.target, None if plain else model.draft, compile=BACKEND)
    if way not in ("autoregressive", "msd"):
        made.tree = tree_of(way, made, 1)
    made.warm_up(batch_sizes=[batch])
    return made


def tree_of(name: str, model: MSDModel, batch: int) -> TreeConfig:
    """The tree of ``msd`` (the default one), ``msd fixed`` or ``msd D/K/N``; a large batch has smaller ones."""
    kind, _, bounds = name.partition(" ")
    if kind != "msd" or (bounds not in ("", "fixed") and bounds.count("/") != 2):
        known = [*PLAIN, *SINGLE, "msd", "msd fixed", "msd D/K/N", "autoregressive compiled", "msd [...] compiled"]
        raise UserError(f"no contestant '{name}'", fix=f"there are {', '.join(known)}")
    if not bounds:
        return model.tree_for(batch)
    tree = TreeConfig.named("fixed", model.device) if bounds == "fixed" else TreeConfig(*tree_limits(bounds))
    return tree.for_batch(batch, model.device)
