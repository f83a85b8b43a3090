"""What the page sends: one question, read strictly."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from llava.errors import UserError
from llava.image import load_image
from llava.strict import reject_unknown

MAX_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Ask:
    """One question of the page.

    ``question``: not empty. ``image``: a picture file as base64, or None. ``msd``: decode with the draft, or plainly.
    ``max_new_tokens``: length of the answer. ``temperature``: 0 is greedy.
    """

    question: str
    image: str | None = None
    msd: bool = True
    max_new_tokens: int = 256
    temperature: float = 0.0

    @classmethod
    def from_dict(cls, given: Any, longest: int) -> Ask:
        """Reads the object of a request; ``longest`` is the most tokens that this server gives.

        Raises:
            UserError: it is no such object.
        """
        if not isinstance(given, Mapping):
            raise UserError("the request is no JSON object")
        reject_unknown(given, [field.name for field in fields(cls)], "request")
        ask = cls(**{"question": "", "max_new_tokens": min(cls.max_new_tokens, longest), **given})
        if not isinstance(ask.question, str) or not ask.question.strip():
            raise UserError("no question", fix="write one")
        if not isinstance(ask.msd, bool) or not isinstance(ask.image, str | None):
            raise UserError(
                "the request has a value of a wrong kind", "msd, image", "msd is true or false, image base64"
            )
        if type(ask.max_new_tokens) is not int or not 1 <= ask.max_new_tokens <= longest:
            raise UserError(f"max_new_tokens {ask.max_new_tokens!r}", fix=f"give 1 to {longest}")
        if type(ask.temperature) not in (int, float) or not 0 <= ask.temperature <= MAX_TEMPERATURE:
            raise UserError(f"temperature {ask.temperature!r}", fix=f"give 0 to {MAX_TEMPERATURE:.0f}")
        return ask

    def picture(self) -> Image.Image | None:
        """The picture [h, w] RGB; None where there is none.

        Raises:
            UserError: it is broken, or no picture.
        """
        if self.image is None:
            return None
        try:
            return load_image(base64.b64decode(self.image, validate=True))
        except binascii.Error:
            raise UserError("the picture of the request is not base64") from None
