"""Whether vLLM runs an EAGLE-3 head as it was trained.

vLLM reads the head's ``config.json`` without our section ``"msd"``, and where implementations differ it has one
behaviour. Each finding compares that with the head's own conventions (`eagle.drafts.eagle3_config`). A difference
raises no error when the head is served: few drafted tokens are accepted. The rules are those of vLLM 0.32, read in its
source: ``llama_eagle3.py``, ``configs/speculators/algos.py``, and both model runners, V1 and V2, where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from eagle.doctor import Check, State, problems
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import FEATURES, IDS, OWN_ROPE_BASE, default_layers
from eagle.families import Target

RUNNERS = ("V1", "V2")
TARGETS = ("llava", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "gemma4", "mistral3")
"""Families whose class in vLLM supports EAGLE-3 (``SupportsEagle3``)."""
NAME_BASE = "name the base model with --base-model"


@dataclass(frozen=True)
class Served:
    """What vLLM's loader sees of a head's ``config.json``.

    ``top``: the whole file; ``layer``: the keys of the Llama config, the same in the flat layout; ``speculators``: the
    layout.
    """

    top: Mapping[str, Any]
    layer: Mapping[str, Any]
    speculators: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Served:
        speculators = "speculators_model_type" in config
        return cls(config, config["transformer_layer_config"] if speculators else config, speculators)

    @property
    def eagle_config(self) -> Mapping[str, Any]:
        return self.layer.get("eagle_config") or {}

    @property
    def rope(self) -> dict[str, Any]:
        return {**(self.layer.get("rope_scaling") or {}), **(self.layer.get("rope_parameters") or {})}

    def layers(self, runner: str, count: int | None) -> tuple[int, ...] | None:
        """The layers whose inputs it reads; None for the default ones of a base of unknown size."""
        inner = self.eagle_config.get(IDS if runner == "V1" else "layer_ids")
        if ids := self.top.get(IDS) or inner:
            return tuple(sorted(set(ids)))
        return None if count is None else default_layers(count)

    @property
    def features(self) -> int:
        """Streams that its ``fc`` reads."""
        return self.layer.get("num_aux_hidden_states") or len(self.eagle_config.get(IDS) or range(FEATURES))

    def positions(self, runner: str, mrope_base: bool) -> str:
        if runner == "V2" or not mrope_base:
            return "plain"
        if not self.rope.get("mrope_section"):
            return "temporal"
        return "mrope interleaved" if self.rope.get("mrope_interleaved") else "mrope sectioned"


def check_served_eagle3(draft: Eagle3Draft, target: Target | None, runner: str | None) -> list[Check]:
    """Compares a head with what vLLM makes of its files.

    Args:
        target: the base model, on the meta device; None if it is not known.
        runner: "V1" or "V2"; None checks both.
    """
    served = Served.of(draft.config.published)
    return [
        _target(target),
        *_by_runner(lambda each: _layers(draft, target, served, each), runner),
        *_by_runner(lambda each: _positions(draft, target, served, each), runner),
        *_by_runner(lambda each: _cache(draft, target, each), runner),
        _rope(draft, served),
        _norms(draft, served),
        _image_rows(draft),
        _vocabulary(draft, target),
        _tensors(draft, served),
        Check("vLLM: drafting", State.OK, "chains only", "trees and adaptive depth are of this package's own decoding"),
    ]


def _by_runner(check: Callable[[str], Check], runner: str | None) -> list[Check]:
    """The finding for a model runner, or for both where they differ."""
    found = {each: check(each) for each in (RUNNERS if runner is None else (runner,))}
    if len(set(found.values())) == 1:
        return list(found.values())[:1]
    return [replace(each, topic=f"{each.topic}, model runner {name}") for name, each in found.items()]


def _compared(topic: str, own: str, served: str, fix: str) -> Check:
    if own == served:
        return Check(topic, State.OK, f"{own}, in training and in vLLM")
    return Check(topic, State.PROBLEM, f"trained with {own}, vLLM has {served}", fix)


def _target(target: Target | None) -> Check:
    topic = "vLLM: base model"
    if target is None:
        return Check(topic, State.WARNING, "not named, so not all could be compared", NAME_BASE)
    if target.family in TARGETS:
        return Check(topic, State.OK, f"EAGLE-3 heads of {target.family} are served")
    found = f"vLLM does not run EAGLE-3 heads of {target.family}"
    return Check(topic, State.PROBLEM, found, f"it does of {', '.join(TARGETS)}")


def _layers(draft: Eagle3Draft, target: Target | None, served: Served, runner: str) -> Check:
    topic, config = "vLLM: layers", draft.config
    count = None if target is None else len(target.text_model.layers)
    found: list[Check] = []
    with problems(found, topic):
        own = config.target_layers if count is None else config.layers_of(count)
        theirs = served.layers(runner, count)
        if own is None and theirs is None:
            return Check(topic, State.OK, "the default layers, in training and in vLLM")
        if own is None or theirs is None:
            return Check(topic, State.WARNING, "default layers on one side, ids on the other", NAME_BASE)
        if config.features != served.features:
            place = '"transformer_layer_config" of ' if served.speculators else ""
            fix = f'write "num_aux_hidden_states": {config.features} into {place}config.json'
            return _compared(topic, f"{config.features} streams", f"{served.features}", fix)
        trained, read = (f"the inputs of layers {', '.join(map(str, sorted(each)))}" for each in (own, theirs))
        fix = f'write "{IDS}": {sorted(own)} at the top of config.json'
        return _compared(topic, trained, read, fix)
    return found[0]


def _positions(draft: Eagle3Draft, target: Target | None, served: Served, runner: str) -> Check:
    topic, config = "vLLM: positions", draft.config
    mrope_base = _mrope_base(draft, target)
    theirs = served.positions(runner, mrope_base)
    own: str = config.positions
    if own == "mrope":
        own += " interleaved" if config.mrope_interleaved else " sectioned"
    if not mrope_base:
        if target is None:
            found = "plain; a base with M-RoPE would be served with others by model runner V1"
            return Check(topic, State.WARNING, found, NAME_BASE)
        own = "plain"  # all kinds are the same
    fix = 'set "mrope_section" and "mrope_interleaved" of its rope settings as in training'
    if runner == "V2" and own != "plain":
        fix = "train with --draft-positions plain; prompts without pictures are equal"
    elif own in ("plain", "temporal") and served.rope.get("mrope_section"):
        fix = 'leave "mrope_section" out of its rope settings'
    elif own == "plain":
        fix = "serve with VLLM_USE_V2_MODEL_RUNNER=1, or train with --draft-positions temporal or mrope"
    return _compared(topic, own, theirs, fix)


def _cache(draft: Eagle3Draft, target: Target | None, runner: str) -> Check:
    """Where the rows of drafted tokens are kept. V1 takes the first row of their M-RoPE positions for their places,
    which is smaller than these behind a picture."""
    topic = "vLLM: cached rows"
    if runner == "V2" or not _mrope_base(draft, target):
        return Check(topic, State.OK, "those of drafted tokens stand behind the prompt's")
    found = "behind a picture, drafted tokens after the first overwrite rows of the prompt (vLLM issue 54498)"
    fix = "train with --draft-positions plain and serve with VLLM_USE_V2_MODEL_RUNNER=1; text alone is not affected"
    return Check(topic, State.PROBLEM, found, fix)


def _mrope_base(draft: Eagle3Draft, target: Target | None) -> bool:
    """Whether the base has M-RoPE positions; what the head's config says if the base is not known."""
    if target is not None:
        return has_mrope(target)
    return draft.config.mrope_section is not None or draft.config.positions != "plain"


def has_mrope(target: Target) -> bool:
    """Whether the base has M-RoPE positions."""
    text = target.config.get_text_config()
    rope = {**(getattr(text, "rope_scaling", None) or {}), **(getattr(text, "rope_parameters", None) or {})}
    return "mrope_section" in rope


def _rope(draft: Eagle3Draft, served: Served) -> Check:
    theirs = served.layer.get("rope_theta") or served.rope.get("rope_theta") or OWN_ROPE_BASE
    own = draft.config.rope_theta
    fix = f'set "rope_theta" of config.json to {own:g}'
    return _compared("vLLM: rotary base", f"{own:g}", f"{theirs:g}", fix)


def _norms(draft: Eagle3Draft, served: Served) -> Check:
    config = draft.config
    residual = bool(served.top.get("norm_before_residual", served.speculators))
    output = bool(served.top.get("norm_output"))
    fc_norm = bool(served.top.get("fc_norm"))
    before_fc = served.top.get("norm_before_fc", False)
    before_fc = bool(before_fc if served.speculators else served.eagle_config.get("norm_before_fc", before_fc))
    wanted = {
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.feedback == "after",
        "fc_norm": config.fc_norm,
        "norm_before_fc": config.norm_before_fc,
    }
    theirs = dict(zip(wanted, (residual, output, fc_norm, before_fc), strict=True))
    fix = f"write these of training at the top of config.json: {_flags(wanted)}"
    if not config.head_norm:
        return _compared("vLLM: norms", "no norm before lm_head", "one", "train with it: vLLM always has it")
    return _compared("vLLM: norms", _flags(wanted), _flags(theirs), fix)


def _flags(values: Mapping[str, bool]) -> str:
    return ", ".join(f"{name} {str(value).lower()}" for name, value in values.items())


def _image_rows(draft: Eagle3Draft) -> Check:
    rows = {"token": "the placeholder's embedding", "feature": "projected image features"}
    config, fix = draft.config, 'train with "image_rows": "token", the default'
    own = rows[config.image_rows]
    if config.image_tokens is not None:
        own += f", merged to at most {config.image_tokens} rows of a picture"
        fix += ', and without "image_tokens"'
    return _compared("vLLM: image rows", own, rows["token"], fix)


def _vocabulary(draft: Eagle3Draft, target: Target | None) -> Check:
    topic, config = "vLLM: vocabulary", draft.config
    if target is not None and config.vocab_size != target.vocab_size:
        found = f"the head's vocab_size is {config.vocab_size}, the base's {target.vocab_size}"
        return Check(topic, State.PROBLEM, found, "use a head whose vocab_size is the base's")
    if draft.draft_vocab is not None and config.draft_vocab_size == config.vocab_size:
        return Check(topic, State.PROBLEM, "vLLM refuses d2t for a whole vocabulary", "leave d2t and t2d out")
    return Check(topic, State.OK, f"{config.draft_vocab_size} of {config.vocab_size}, in training and in vLLM")


def _tensors(draft: Eagle3Draft, served: Served) -> Check:
    """Biases, norms of queries and keys, and the window, which vLLM takes from the config and not from the tensors."""
    topic, config, layer = "vLLM: layer", draft.config, served.layer
    kinds = (layer.get("layer_types") or [])[: config.num_hidden_layers]
    window = layer.get("sliding_window") if "sliding_attention" in kinds else None
    qwen = layer.get("model_type") == "qwen3" if served.speculators else _names_qwen3(served.top)
    wanted = {
        "biases of fc": (config.fc_bias, False, "vLLM has none"),
        "attention biases": (config.attention_bias, bool(layer.get("attention_bias")), 'set "attention_bias"'),
        "norms of queries and keys": (config.query_norm, qwen, "vLLM has them for heads of Qwen3's kind only"),
        "window": (config.window, window, 'set "layer_types" and "sliding_window"'),
    }
    for name, (own, theirs, fix) in wanted.items():
        if own != theirs:
            return _compared(topic, f"{name}: {own}", f"{theirs}", fix)
    return Check(topic, State.OK, "the same tensors and window, in training and in vLLM")


def _names_qwen3(config: Mapping[str, Any]) -> bool:
    return any("Eagle3Qwen3ForCausalLM" in str(name) for name in config.get("architectures") or ())
