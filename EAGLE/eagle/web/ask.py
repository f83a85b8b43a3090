"""What the page sends: one question, read strictly."""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from typing import Any

from PIL import Image
from pydantic import Field

from llava.errors import UserError
from llava.image import load_image
from llava.strict import read_strict, strict_dataclass

MAX_TEMPERATURE = 2.0


@strict_dataclass
class Ask:
    """One question of the page.

    ``question``: not empty. ``image``: a picture file as base64, or None. ``msd``: decode with the draft, or plainly.
    ``max_new_tokens``: length of the answer. ``temperature``: 0 is greedy.
    """

    question: str
    image: str | None = None
    msd: bool = True
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0, le=MAX_TEMPERATURE)

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise UserError("no question", fix="write one")

    @classmethod
    def from_dict(cls, given: Any, longest: int) -> Ask:
        """Reads the JSON object of a request.

        Args:
            given: the parsed request.
            longest: the most new tokens that this server allows.

        Raises:
            UserError: it is not an object, or has a missing, unknown or wrong value.
        """
        ask = read_strict(cls, given, "request")
        if "max_new_tokens" not in given:
            return replace(ask, max_new_tokens=min(ask.max_new_tokens, longest))
        if ask.max_new_tokens > longest:
            raise UserError(f"max_new_tokens={ask.max_new_tokens}", "request", f"give at most {longest}")
        return ask

    def picture(self) -> Image.Image | None:
        """The picture [h, w] RGB, or None.

        Raises:
            UserError: it is not base64, not a picture, or damaged.
        """
        if self.image is None:
            return None
        try:
            return load_image(base64.b64decode(self.image, validate=True))
        except binascii.Error:
            raise UserError("the picture of the request is not base64") from None
