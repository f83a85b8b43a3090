"""Configuration of the draft head.

A draft's ``config.json`` is the published one: the base model's text configuration with one layer, plus keys of the
base that a draft does not need. So unknown keys are normal there, unless they look like a known one (`check_keys`).
Options of this package are in the section ``"msd"``, and rotary positions in ``"rope_scaling"`` or
``"rope_parameters"``. In these an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from typing_extensions import Self

from llava.errors import UserError
from llava.files import read_object
from llava.strict import read_strict, reject_similar, reject_unknown, strict_dataclass

if TYPE_CHECKING:
    from eagle.drafts.compression import Compression

DRAFT_VOCAB_FILE = "head_tokens.safetensors"
"""The file beside a draft with its trimmed vocabulary."""
BLOCK = "block"
"""The section of ``config.json`` that only block heads have."""
VISPEC = "vispec"
"""The section of ``config.json`` of ViSpec heads that were trained here."""
COMPRESSOR_BIAS = "imadpt.k_proj.bias"
Size = Annotated[int, Field(ge=1)]
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""Keys that every draft's config has."""
KNOWN_KEYS = (
    *SIZES, "model_type", "num_key_value_heads", "head_dim", "num_hidden_layers", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "hidden_act", "hidden_activation", "bias",
    "text_config", "msd", BLOCK, VISPEC, "qkv_bias",
)  # fmt: skip
ROPE_KEYS = ("type", "rope_type", "rope_theta", "mrope_section", "mrope_interleaved", "partial_rotary_factor")
UNUSED_ROPE_KEYS = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
"""Keys of other types of rotary positions, which transformers ignores where a type that does not read them is named."""


@strict_dataclass
class DraftOptions:
    """The ``"msd"`` section of a draft's ``config.json``. Published drafts do not have it; these defaults are theirs.

    Attributes:
        positions: position ids of the draft's inputs: ``plain`` 0, 1, 2, ... (all published drafts) or ``mrope``, the
            target's three rows.
        head_tokens: file beside the config with the ids [K] of a trimmed draft vocabulary (`eagle.ge_data.vocabulary`).
            None drafts from the whole vocabulary.
        decoupled: False feeds image positions through ``fc([image feature ; hidden state])`` as text positions are.
            That is EAGLE's way, and MSD's ablation.
        image_tokens: rows that the draft keeps of a picture (`eagle.drafts.compression`). None keeps all.
        image_merge: how these rows are merged. Only "pool" exists.
        layer_size: hidden size of the decoder layer. None is the base's; with another the draft has two more linear
            layers, ``image_fc`` before the layer and ``out_fc`` after it.
    """

    positions: Literal["plain", "mrope"] = "plain"
    head_tokens: Literal["head_tokens.safetensors"] | None = None
    decoupled: bool = True
    image_tokens: int | None = Field(None, ge=0)
    image_merge: Literal["pool"] = "pool"
    layer_size: Size | None = None

    @property
    def compression(self) -> Compression:
        from eagle.drafts.compression import Compression  # imports torch

        return Compression(self.image_tokens)


@strict_dataclass
class DraftConfig:
    """Shape of a draft head. Sizes are counts of elements; ``rope_theta`` is the rotary base.

    ``input_layernorm``, ``attention_bias`` and ``fc_bias`` say which tensors the layer has. They follow the
    checkpoint's tensors when one is loaded, and the family's published layout otherwise.
    """

    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    vocab_size: Size
    head_dim: Size
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    hidden_act: str = "silu"
    input_layernorm: bool = False
    attention_bias: bool = False
    fc_bias: bool = True
    options: DraftOptions = field(default_factory=DraftOptions)
    published: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def layer_size(self) -> int:
        """Hidden size of the decoder layer."""
        return self.options.layer_size or self.hidden_size

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], where: str | Path = "draft config", tensors: Iterable[str] | None = None
    ) -> Self:
        """Reads a published ``config.json``.

        Args:
            config: the parsed file. Text settings may sit at the top level or in ``text_config``.
            where: named in errors.
            tensors: names of the checkpoint's tensors, which decide the optional parts of the layer.

        Raises:
            UserError: a size is missing or wrong, or section "msd" has an unknown key or a wrong value.
        """
        check_objects(config, ("text_config",), where)
        text = {**config, **(config.get("text_config") or {})}
        check_keys(text, KNOWN_KEYS, where, DraftOptions)
        missing = [key for key in SIZES if key not in text]
        if missing:
            raise UserError(f"lacks {', '.join(missing)}", where=where, fix="is this the config.json of a draft?")
        for key in SIZES:
            if type(text[key]) is not int or text[key] < 1:
                raise UserError(f"{key}={text[key]!r}", where=where, fix="give a whole number of at least 1")
        rope = rope_settings(text, where)
        section = rope.get("mrope_section")
        family = str(config.get("model_type", "llava"))
        like_qwen = "qwen" in family
        names = None if tensors is None else set(tensors)

        def present(name: str, default: bool) -> bool:
            return default if names is None else name in names

        options = read_strict(DraftOptions, config.get("msd", {}), f"{where}, section 'msd'")
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        if options.positions == "mrope":
            check_sections(section, head_dim, where)
        try:
            return cls(
                model_type=family,
                hidden_size=text["hidden_size"],
                intermediate_size=text["intermediate_size"],
                num_attention_heads=text["num_attention_heads"],
                num_key_value_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
                vocab_size=text["vocab_size"],
                head_dim=head_dim,
                rms_norm_eps=text.get("rms_norm_eps", 1e-6),
                rope_theta=text.get("rope_theta") or rope.get("rope_theta") or 10000.0,
                mrope_section=tuple(section) if section else None,
                mrope_interleaved=bool(rope.get("mrope_interleaved", False)),
                hidden_act=activation(text, where),
                input_layernorm=present("layers.0.input_layernorm.weight", like_qwen),
                attention_bias=present("layers.0.self_attn.q_proj.bias", like_qwen),
                fc_bias=present("fc.bias", bool(config.get("bias", True))),
                options=options,
                published=dict(config),
            )
        except UserError as error:
            raise UserError(error.what, where=where, fix=error.fix) from None

    def for_vocabulary(self, size: int) -> Self:
        """The same draft for a vocabulary of ``size`` tokens."""
        return replace(self, vocab_size=size)

    def training_choices(self) -> dict[str, Any]:
        """What a resumed training must share."""
        return asdict(self.options)

    def layers_of(self, count: int) -> tuple[int, ...]:
        """The target's layers whose inputs the draft reads: none."""
        return ()

    @classmethod
    def from_json(cls, path: str | Path, tensors: Iterable[str] | None = None) -> DraftConfig:
        """Reads ``config.json`` (a file, or the folder that holds it)."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_object(path, "draft config"), where=path, tensors=tensors)

    def to_dict(self) -> dict[str, Any]:
        """The published form: what was read, with section "msd" only if it differs from the defaults."""
        out = {
            **self.published,
            "model_type": self.model_type,
            "num_hidden_layers": 1,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": self.hidden_act,
        }
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            out["head_dim"] = self.head_dim
        if not self.fc_bias:
            out["bias"] = False
        out.pop("msd", None)
        if self.options != DraftOptions():
            out["msd"] = asdict(self.options)
        return out


@strict_dataclass
class BlockOptions:
    """The ``"block"`` section of a block head's ``config.json`` (`eagle.drafts.block`).

    Attributes:
        size: tokens that one forward drafts.
        layers: decoder layers.
    """

    size: int = Field(8, ge=2, le=16)
    layers: int = Field(1, ge=1, le=8)


@strict_dataclass
class BlockConfig(DraftConfig):
    """Shape of a block head: that of an MSD draft, and section ``"block"``."""

    block: BlockOptions = field(default_factory=BlockOptions)

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], where: str | Path = "draft config", tensors: Iterable[str] | None = None
    ) -> Self:
        own = super().from_dict(config, where, tensors)
        return replace(own, block=read_strict(BlockOptions, config.get(BLOCK, {}), f"{where}, section '{BLOCK}'"))

    def training_choices(self) -> dict[str, Any]:
        return {**super().training_choices(), BLOCK: asdict(self.block)}

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "num_hidden_layers": self.block.layers, BLOCK: asdict(self.block)}


@strict_dataclass
class ViSpecOptions:
    """The ``"msd"`` section of a ViSpec head's ``config.json`` (`eagle.drafts.vispec`).

    Attributes:
        image_rows: ``compressed`` as described there; ``token`` reads the embeddings of the image ids as text, and no
            global vector, as the published code does for LLaVA-1.5 alone.
    """

    image_rows: Literal["compressed", "token"] = "compressed"


@strict_dataclass
class CompressorOptions:
    """The ``"vispec"`` section of a ViSpec head's ``config.json``. Published heads do not have it: the shape of a
    tensor says the same.

    Attributes:
        queries: learnt ones; all of the results but one are rows of a picture.
    """

    queries: int = Field(2, ge=1, le=64)


@strict_dataclass
class ViSpecConfig(DraftConfig):
    """Shape of a ViSpec head. ``compressor_bias``: whether keys and values of the compressor have one. As in the
    published code, ``qkv_bias`` of the config is for the compressor and the layer, which has no input norm."""

    image_rows: Literal["compressed", "token"] = "compressed"
    queries: Size = 2
    compressor_bias: bool = False

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], where: str | Path = "draft config", tensors: Iterable[str] | None = None
    ) -> Self:
        layer = {key: value for key, value in config.items() if key not in ("msd", VISPEC)}
        if tensors is None:
            biases = ("layers.0.self_attn.q_proj.bias", COMPRESSOR_BIAS) if config.get("qkv_bias") else ()
            tensors = (*biases, "fc.bias") if config.get("bias", True) else biases
        names = set(tensors)
        own = super().from_dict(layer, where, names)
        if own.hidden_size % own.num_attention_heads:
            fix = "give a number of heads that divides the hidden size"
            raise UserError(f"{own.num_attention_heads} heads for a hidden size of {own.hidden_size}", where, fix)
        return replace(
            own,
            image_rows=read_strict(ViSpecOptions, config.get("msd", {}), f"{where}, section 'msd'").image_rows,
            queries=read_strict(CompressorOptions, config.get(VISPEC, {}), f"{where}, section '{VISPEC}'").queries,
            compressor_bias=COMPRESSOR_BIAS in names,
        )

    def training_choices(self) -> dict[str, Any]:
        return {"image_rows": self.image_rows, "queries": self.queries}

    def to_dict(self) -> dict[str, Any]:
        out = {**super().to_dict(), "qkv_bias": self.attention_bias, VISPEC: {"queries": self.queries}}
        if self.image_rows != ViSpecOptions().image_rows:
            out["msd"] = {"image_rows": self.image_rows}
        return out


def check_objects(config: Mapping[str, Any], keys: Iterable[str], where: str | Path) -> None:
    """Raises `UserError` if one of ``keys`` of a parsed config is not an object. It may be missing."""
    for key in keys:
        if not isinstance(config.get(key) or {}, Mapping):
            raise UserError(f"{key}={config[key]!r}", where=where, fix="give an object")


def check_keys(config: Mapping[str, Any], known: Iterable[str], where: str | Path, options: Any) -> None:
    """Raises `UserError` for a key that is another spelling of a known one (`llava.strict`), and for an option of
    section ``"msd"`` outside of it. Other keys of the base model are accepted.

    Args:
        known: keys that are read.
        options: the dataclass of the section.
    """
    known = list(known)
    for key in {each.name for each in fields(options)} - set(known):
        if key in config:
            raise UserError(f"'{key}' is outside of section 'msd'", where=where, fix="move it into the section")
    reject_similar(config, known, where)


def rope_settings(text: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The rotary settings of a head, which have several places.

    Raises:
        UserError: a key is unknown or a value wrong, or the positions are of a type that heads do not have.
    """
    places = ("rope_scaling", "rope_parameters")
    check_objects(text, places, where)
    rope: dict[str, Any] = {}
    for place in places:
        given = {key: value for key, value in (text.get(place) or {}).items() if value is not None}
        typed = "type" in given or "rope_type" in given
        reject_unknown(given, (*ROPE_KEYS, *UNUSED_ROPE_KEYS) if typed else ROPE_KEYS, f"{where}, section '{place}'")
        rope |= given
    for kind in (rope.get("type", "default"), rope.get("rope_type", "default")):
        if kind not in ("default", "mrope"):
            fix = "only default and M-RoPE are supported"
            raise UserError(f"rotary positions of type {kind!r} in the head", where=where, fix=fix)
    if rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1)) not in (1, None):
        raise UserError("partial rotary positions in the head", where=where, fix="only full ones are supported")
    section = rope.get("mrope_section")
    if section is not None and not (isinstance(section, list) and all(type(part) is int for part in section)):
        raise UserError(f"mrope_section={section!r}", where=where, fix="give a list of whole numbers")
    return rope


def check_sections(sections: Sequence[int] | None, head_dim: Any, where: str | Path) -> None:
    """Raises `UserError` for sections that do not share out the frequencies of a head, for positions ``mrope``."""
    given = list(sections or ())
    if 2 * sum(given) != head_dim or min(given) < 0:
        fix = "give rope_scaling an mrope_section that adds up to half a head, as the base model's"
        raise UserError(f"positions 'mrope' with mrope_section {given} for heads of {head_dim}", where=where, fix=fix)


def activation(text: Mapping[str, Any], where: str | Path) -> Any:
    """The activation of the feed-forward, which Gemma's configs call ``hidden_activation``.

    Raises:
        UserError: it has two names with different values.
    """
    other = text.get("hidden_activation")
    act = text.get("hidden_act", "silu" if other is None else other)
    if other not in (None, act):
        fix = "give the one that the draft was trained with"
        raise UserError(f"hidden_act={act!r} and hidden_activation={other!r}", where=where, fix=fix)
    return act
