"""Configuration of EAGLE-3 heads, in the two layouts in which they are published.

``flat`` (SafeAILab, SpecForge, AngelSlim, ModelOpt): the keys of a Llama config, with those of the head beside them.
``speculators``: the layer's keys in ``transformer_layer_config``, those of the head at the top.

Implementations differ in what a config means. `Eagle3Options`, the section ``"msd"`` of the config, names each choice.
Without it a choice is the publisher's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from eagle.drafts.config import KNOWN_KEYS, activation, check_keys, check_objects, check_sections, rope_settings
from llava.errors import UserError
from llava.strict import read_strict, strict_dataclass

Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Shapes = Mapping[str, tuple[int, ...]]
FEATURES = 3
"""Streams that a head reads if neither its tensors nor its config say."""
IDS, OTHER_IDS = "eagle_aux_hidden_state_layer_ids", "aux_hidden_states_layer_ids"
EAGLE3_KEYS = (
    IDS, OTHER_IDS, "eagle_config", "num_aux_hidden_states", "draft_vocab_size", "target_hidden_size",
    "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "layer_types", "sliding_window",
    "use_sliding_window", "transformer_layer_config", "speculators_model_type", "architectures",
)  # fmt: skip
"""Keys that are read beside those of every draft."""
OWN_ROPE_BASE = 10000.0
"""Of AngelSlim's rotary positions without M-RoPE, whatever the config says."""


@strict_dataclass
class Eagle3Options:
    """The ``"msd"`` section of an EAGLE-3 head's ``config.json``. None takes the publisher's own choice.

    Attributes:
        positions: ``plain`` 0, 1, 2, ...; ``temporal`` the first row of the target's M-RoPE positions; ``mrope`` all
            three. Own: ``mrope`` if the config has M-RoPE sections (in the speculators layout only if it says
            ``mrope_interleaved``, since speculators trains with plain positions), else ``plain``.
        mrope: how the three rows share the frequencies, as in Qwen3-VL or in Qwen2-VL. Own: what ``mrope_interleaved``
            says, and always ``interleaved`` for AngelSlim's class.
        rope_theta: base of the rotary positions. Own: the config's, and 10000 for AngelSlim's class without M-RoPE.
        image_rows: what stands for the next token where it is an image token: the embedding of its id, ``token``, or
            the projected image ``feature``. Own: ``token``.
        image_tokens: rows that the head keeps of a picture (`eagle.drafts.compression`). Own: all.
        layer_ids: whether id i of the config is the ``input`` or the ``output`` of layer i. Own: ``input`` in the
            speculators layout and for a list at the top of a flat config, ``output`` in its ``eagle_config``.
        target_layers: the layers whose inputs are the features, in place of the config's ids.
        norm_before_residual: whether the residual starts after the norm of the features. Own: what the config says,
            else false.
        feedback: whether the head's next row gets its output before or after the final norm. Own: ``after`` if a
            config of the speculators layout says ``norm_output``, else ``before``.
        head_norm: whether the final norm stands before the ``lm_head``. Own: true, unless a flat config says
            ``"norm_output": false``.
    """

    positions: Literal["plain", "temporal", "mrope"] | None = None
    mrope: Literal["interleaved", "sectioned"] | None = None
    rope_theta: float | None = Field(None, gt=0)
    image_rows: Literal["token", "feature"] | None = None
    image_tokens: int | None = Field(None, ge=0)
    layer_ids: Literal["input", "output"] | None = None
    target_layers: tuple[int, ...] | None = None
    norm_before_residual: bool | None = None
    feedback: Literal["before", "after"] | None = None
    head_norm: bool | None = None


@strict_dataclass
class Eagle3Config:
    """Shape and conventions of an EAGLE-3 head. The names are those of `Eagle3Options` and of the published configs.

    ``target_layers``: the layers whose inputs are the features, None for the default ones of the target;
    ``features``: their number; ``window``: rows that a row sees, None for all. ``*_bias``, ``query_norm``,
    ``own_embedding`` and ``own_head`` say which tensors there are.
    """

    layout: Literal["flat", "speculators"]
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    num_hidden_layers: Size
    vocab_size: Size
    draft_vocab_size: Size
    target_hidden_size: Size
    features: Size
    target_layers: tuple[int, ...] | None
    positions: Literal["plain", "temporal", "mrope"]
    mrope_section: tuple[int, ...] | None
    mrope_interleaved: bool
    rope_theta: Positive
    image_rows: Literal["token", "feature"]
    image_tokens: int | None
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    feedback: Literal["before", "after"]
    head_norm: bool
    window: int | None
    rms_norm_eps: Positive
    hidden_act: str
    attention_bias: bool
    output_bias: bool
    fc_bias: bool
    query_norm: bool
    own_embedding: bool
    own_head: bool
    published: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str | Path, shapes: Shapes | None = None) -> Eagle3Config:
        """Reads a published ``config.json``.

        Args:
            where: named in errors.
            shapes: of the checkpoint's tensors, under their canonical names. They decide the optional parts.

        Raises:
            UserError: a value is missing, wrong, or not supported.
        """
        try:
            return _read(config, str(where), shapes)
        except UserError as error:
            raise UserError(error.what, where=error.where or where, fix=error.fix) from None

    def to_dict(self) -> dict[str, Any]:
        """The published form: what was read, with all choices of image rows and positions by name."""
        chosen: dict[str, Any] = {"image_rows": self.image_rows, "positions": self.positions}
        if self.image_tokens is not None:
            chosen["image_tokens"] = self.image_tokens
        return {**self.published, "msd": {**self.published.get("msd", {}), **chosen}}

    def for_vocabulary(self, size: int) -> Eagle3Config:
        """The same head for a vocabulary of ``size`` tokens; a trimmed one keeps its own size."""
        own = size if self.draft_vocab_size == self.vocab_size else self.draft_vocab_size
        published = {**self.published, "vocab_size": size, "draft_vocab_size": own}
        return replace(self, vocab_size=size, draft_vocab_size=own, published=published)

    def training_choices(self) -> dict[str, Any]:
        """What a resumed training must share."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.compare}

    def layers_of(self, count: int) -> tuple[int, ...]:
        """The target's layers whose inputs are the features. ``count``: layers of the target.

        Raises:
            UserError: the target has no such layers.
        """
        chosen = self.target_layers
        if chosen is None and self.features != FEATURES:
            raise UserError(f"config.json does not name the {self.features} layers of the target", fix=_NAME_THEM)
        if chosen is None:
            chosen = default_layers(count)
        if len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) > count:
            fix = "use the head that was trained for this base model" if self.target_layers else _NAME_THEM
            raise UserError(f"layers {', '.join(map(str, chosen))} of a target of {count} layers", fix=fix)
        return tuple(sorted(chosen))


def default_layers(count: int) -> tuple[int, ...]:
    """The layers whose inputs all publishers take if nothing else is said, of so many."""
    return 2, count // 2, count - 3


_NAME_THEM = 'give their inputs as "target_layers" in section "msd" of its config.json'


def is_eagle3_config(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` alone shows that it is of an EAGLE-3 head."""
    classes = config.get("architectures")
    by_name = isinstance(classes, list) and any("Eagle3" in str(each) for each in classes)
    by_key = any(key in config for key in ("eagle_config", "draft_vocab_size"))
    return by_name or by_key or config.get("speculators_model_type") == "eagle3"


def _read(config: Mapping[str, Any], where: str, shapes: Shapes | None) -> Eagle3Config:
    speculators = "speculators_model_type" in config
    layer = config.get("transformer_layer_config") if speculators else config
    if not isinstance(layer, Mapping):
        raise UserError("lacks 'transformer_layer_config'", fix="is this the config.json of a draft head?")
    check_objects(config, ("eagle_config",), where)
    check_keys({**config, **layer}, (*KNOWN_KEYS, *EAGLE3_KEYS), where, Eagle3Options)
    options = read_strict(Eagle3Options, config.get("msd", {}), f"{where}, section 'msd'")
    hidden, vocabulary = _size(layer, "hidden_size"), _size(layer, "vocab_size")
    heads = _size(layer, "num_attention_heads")
    target_hidden = _size(config, "target_hidden_size", hidden)
    ids, named_ids = _layer_ids(config, speculators)
    layers = _target_layers(ids, named_ids, options)
    features = _features(shapes, target_hidden, len(layers) if layers else config.get("num_aux_hidden_states"))
    if layers is not None and len(layers) != features:
        raise UserError(f"{len(layers)} layers of the target, but fc reads {features}", fix=_NAME_THEM)
    rope = rope_settings(layer, where)
    angelslim = "Eagle3LlamaForCausalLM" in (config.get("architectures") or ()) and not speculators
    section = rope.get("mrope_section")
    interleaved = bool(rope.get("mrope_interleaved")) or angelslim
    positions = options.positions
    if positions is None:
        positions = "mrope" if section and (interleaved or not speculators) else "plain"
    head_dim = _size(layer, "head_dim", hidden // heads)
    if positions == "mrope":
        check_sections(section, head_dim, where)
    theta = options.rope_theta or layer.get("rope_theta") or rope.get("rope_theta") or OWN_ROPE_BASE
    if angelslim and not section and options.rope_theta is None:
        theta = OWN_ROPE_BASE
    says_output = _flag(config, "norm_output")
    own_feedback: Literal["before", "after"] = "after" if speculators and says_output else "before"
    feedback = options.feedback or own_feedback
    head_norm = _chosen(options.head_norm, speculators or says_output is not False)
    if feedback == "after" and not head_norm:
        raise UserError('"feedback": "after" with "head_norm": false', fix="the lm_head would read normed states")
    has = _presence(shapes)
    return Eagle3Config(
        layout="speculators" if speculators else "flat",
        hidden_size=hidden,
        intermediate_size=_size(layer, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=_size(layer, "num_key_value_heads", heads),
        head_dim=head_dim,
        num_hidden_layers=_size(layer, "num_hidden_layers", 1),
        vocab_size=vocabulary,
        draft_vocab_size=_size(config, "draft_vocab_size", vocabulary),
        target_hidden_size=target_hidden,
        features=features,
        target_layers=layers,
        positions=positions,
        mrope_section=tuple(section) if section else None,
        mrope_interleaved=interleaved if options.mrope is None else options.mrope == "interleaved",
        rope_theta=theta,
        image_rows=options.image_rows or "token",
        image_tokens=options.image_tokens,
        norm_before_residual=_chosen(options.norm_before_residual, bool(_flag(config, "norm_before_residual"))),
        norm_before_fc=bool(_flag(config, "norm_before_fc")),
        fc_norm=bool(_flag(config, "fc_norm")),
        feedback=feedback,
        head_norm=head_norm,
        window=_window(layer),
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        hidden_act=activation(layer, where),
        attention_bias=has("layers.0.self_attn.q_proj.bias"),
        output_bias=has("layers.0.self_attn.o_proj.bias"),
        fc_bias=has("fc.bias"),
        query_norm=has("layers.0.self_attn.q_norm.weight") or layer.get("model_type") == "qwen3",
        own_embedding=has("embed_tokens.weight", speculators),
        own_head=has("lm_head.weight", True),
        published=dict(config),
    )


def _chosen(option: bool | None, own: bool) -> bool:
    return own if option is None else option


def _presence(shapes: Shapes | None) -> Any:
    names: Collection[str] | None = None if shapes is None else set(shapes)
    return lambda name, default=False: default if names is None else name in names


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is None:
        raise UserError(f"lacks {key}", fix="is this the config.json of a draft head?")
    if value is None:
        assert default is not None
        return default
    if type(value) is not int or value < 1:
        raise UserError(f"{key}={value!r}", fix="give a whole number of at least 1")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool | None:
    """A setting that may be in ``eagle_config`` too, which comes first."""
    value = (config.get("eagle_config") or {}).get(key, config.get(key))
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{key}={value!r}", fix="give true or false")
    return value


def _layer_ids(config: Mapping[str, Any], speculators: bool) -> tuple[Any, Literal["input", "output"]]:
    """The ids of the target's layers, as written, and what they mean to the publisher."""
    names, inner = (IDS, OTHER_IDS), config.get("eagle_config") or {}
    if not speculators:
        for ids in (inner.get(names[0]), inner.get(names[1]), config.get(names[1])):
            if ids is not None:
                return ids, "output"
    return config.get(names[0]), "input"


def _target_layers(ids: Any, own: Literal["input", "output"], options: Eagle3Options) -> tuple[int, ...] | None:
    """The layers whose inputs are the features."""
    if options.target_layers is not None:
        return options.target_layers
    if ids is None:
        return None
    if not isinstance(ids, list) or not ids or any(type(number) is not int for number in ids):
        raise UserError(f"layers of the target {ids!r}", fix="give a list of whole numbers")
    return tuple(sorted(number + ((options.layer_ids or own) == "output") for number in ids))


def _features(shapes: Shapes | None, target_hidden: int, named: Any) -> int:
    """Streams that ``fc`` reads."""
    width = (shapes or {}).get("fc.weight")
    if width is None or len(width) != 2:
        return named if isinstance(named, int) else FEATURES
    if width[1] % target_hidden:
        raise UserError(
            f"fc reads {width[1]} values, not a multiple of the target's hidden size {target_hidden}",
            fix="is target_hidden_size right?",
        )
    return width[1] // target_hidden


def _window(layer: Mapping[str, Any]) -> int | None:
    """Rows that a row sees. Without layer types nothing slides."""
    if not isinstance(layer.get("layer_types") or [], list):
        raise UserError(f"layer_types={layer['layer_types']!r}", fix="give a list of texts")
    kinds = set((layer.get("layer_types") or [])[: layer.get("num_hidden_layers") or 1])
    if "sliding_attention" not in kinds or layer.get("use_sliding_window") is False:
        return None
    if len(kinds) > 1:
        raise UserError("layers with and without a sliding window in one head", fix="only one kind is supported")
    return _size(layer, "sliding_window")
