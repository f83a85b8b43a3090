"""What the page sends: a question, its picture and settings."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from PIL import Image
from pydantic import Field

from llava.errors import UserError
from llava.image import load_image
from llava.strict import read_strict, strict_dataclass


@strict_dataclass
class AnswerRequest:
    """One question of the page.

    ``image``: a picture file in base64, or None. ``msd``: decode with the draft, or plainly. ``max_new_tokens``: length
    of the answer. ``temperature``: as in `eagle.decode.sampling.SamplingSettings`.
    """

    question: str
    image: str | None = None
    msd: bool = True
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)

    @classmethod
    def from_json(cls, given: Any, longest: int) -> AnswerRequest:
        """Reads the JSON value of a request; ``longest`` is the maximal ``max_new_tokens``.

        Raises:
            UserError: it is not such an object, or has no question.
        """
        if isinstance(given, dict):
            given = {"max_new_tokens": min(cls.max_new_tokens, longest), **given}
        request = read_strict(cls, given, "request")
        if not request.question.strip():
            raise UserError("no question", fix="write one")
        if request.max_new_tokens > longest:
            raise UserError(f"max_new_tokens={request.max_new_tokens}", fix=f"give 1 to {longest}")
        return request

    def picture(self) -> Image.Image | None:
        """The picture [h, w] RGB, if there is one.

        Raises:
            UserError: it cannot be read as a picture.
        """
        if self.image is None:
            return None
        try:
            return load_image(base64.b64decode(self.image, validate=True))
        except binascii.Error:
            raise UserError("the picture of the request is not base64") from None
