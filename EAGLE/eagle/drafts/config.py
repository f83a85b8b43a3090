"""Configuration of the draft head.

A draft's ``config.json`` is the published one: the base model's text configuration with one layer, plus keys of the
base that a draft does not need. So unknown keys are normal there. What is ours sits in its own section ``"msd"`` and
is strict: an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eagle.drafts.compression import Compression
from llava.errors import UserError
from llava.files import read_json

POSITION_KINDS = ("plain", "mrope")


HEAD_TOKENS = "head_tokens.safetensors"
"""The file beside a draft with its trimmed vocabulary."""


def reject_unknown(given: Iterable[str], known: Iterable[str], where: str | Path) -> None:
    """Raises `UserError` for the first key of ``given`` that is not in ``known``, and names the nearest known key."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
            raise UserError(f"unknown key '{key}'", where=where, fix=hint)


@dataclass(frozen=True)
class DraftOptions:
    """The ``"msd"`` section of a draft's ``config.json``; absent in published drafts, which have these defaults.

    ``positions``: how the draft numbers its inputs: ``plain`` 0, 1, 2, ... (all published drafts) or ``mrope``, the
    target's three rows. ``head_tokens``: file beside it with the ids [K] that are drafted from, the most frequent of
    the vocabulary (`eagle.ge_data.vocabulary`); without it all are. ``decoupled``: false feeds image positions through
    ``fc([image feature ; hidden state])`` as text positions are, which is EAGLE's way and MSD's ablation.
    ``image_tokens``, ``image_merge``: rows that it keeps of a picture, and how they are merged
    (`eagle.drafts.compression`); without them all.
    """

    positions: str = "plain"
    head_tokens: str | None = None
    decoupled: bool = True
    image_tokens: int | None = None
    image_merge: str = "pool"

    @property
    def compression(self) -> Compression:
        return Compression(self.image_tokens, self.image_merge)

    @classmethod
    def from_dict(cls, section: Mapping[str, Any], where: str | Path) -> DraftOptions:
        reject_unknown(section, [f.name for f in fields(cls)], f"{where}, section 'msd'")
        options = cls(**section)
        if options.positions not in POSITION_KINDS:
            raise UserError(
                f"positions is '{options.positions}'", where=where, fix=f"use one of {', '.join(POSITION_KINDS)}"
            )
        if not isinstance(options.decoupled, bool):
            raise UserError(f"decoupled is {options.decoupled!r}", where=where, fix="use true or false")
        if options.head_tokens not in (None, HEAD_TOKENS):
            raise UserError(
                f"head_tokens is {options.head_tokens!r}",
                where=where,
                fix=f"the file beside the draft is {HEAD_TOKENS}",
            )
        try:
            _ = options.compression
        except UserError as error:
            raise UserError(error.what, where=where, fix=error.fix) from None
        return options


@dataclass(frozen=True)
class DraftConfig:
    """Shape of a draft head. Sizes are counts of elements; ``rope_theta`` is the rotary base.

    ``input_layernorm``, ``attention_bias`` and ``fc_bias`` say which tensors the layer has. They follow the
    checkpoint's tensors when one is loaded, and the family's published layout otherwise.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mrope_section: tuple[int, ...] | None = None
    hidden_act: str = "silu"
    input_layernorm: bool = False
    attention_bias: bool = False
    fc_bias: bool = True
    options: DraftOptions = DraftOptions()
    published: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], where: str | Path = "draft config", tensors: Iterable[str] | None = None
    ) -> DraftConfig:
        """Reads a published ``config.json``.

        Args:
            config: the parsed file. Text settings may sit at the top level or in ``text_config``.
            where: named in errors.
            tensors: names of the checkpoint's tensors, which decide the optional parts of the layer.
        """
        text = {**config, **config.get("text_config", {})}
        required = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        missing = [key for key in required if key not in text]
        if missing:
            raise UserError(f"lacks {', '.join(missing)}", where=where, fix="is this the config.json of a draft?")
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        section = rope.get("mrope_section")
        family = str(config.get("model_type", "llava"))
        like_qwen = "qwen" in family
        names = None if tensors is None else set(tensors)

        def present(name: str, default: bool) -> bool:
            return default if names is None else name in names

        return cls(
            model_type=family,
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=text.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            mrope_section=tuple(section) if section else None,
            hidden_act=text.get("hidden_act", "silu"),
            input_layernorm=present("layers.0.input_layernorm.weight", like_qwen),
            attention_bias=present("layers.0.self_attn.q_proj.bias", like_qwen),
            fc_bias=present("fc.bias", bool(config.get("bias", True))),
            options=DraftOptions.from_dict(config.get("msd", {}), where),
            published=dict(config),
        )

    @classmethod
    def from_json(cls, path: str | Path, tensors: Iterable[str] | None = None) -> DraftConfig:
        """Reads ``config.json`` (a file, or the folder that holds it)."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json(path, "draft config"), where=path, tensors=tensors)

    def to_dict(self) -> dict[str, Any]:
        """The published form: what was read, with our own section only where it differs from the defaults."""
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
