"""What the page sends: a question, its picture and settings."""

from __future__ import annotations

import base64
from typing import Any

from PIL import Image
from pydantic import Field

from eagle.decode.sampling import SamplingSettings
from llava.errors import UserError
from llava.image import load_image
from llava.inputs import check_text
from llava.strict import read_strict, strict_dataclass

MAX_QUESTION = 500_000
"""Characters of a question."""
MAX_PICTURE = 22 * 2**20
"""Bytes of a picture file."""
MAX_SIDE = 8192
"""Longest side of a picture in pixels; a square of it has 0.2 GB of RGB."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
"""Formats of pictures. Not those for which Pillow starts other programs, such as EPS."""


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
            UserError: it is not such an object, has no question, or is too long.
        """
        if isinstance(given, dict):
            given = {"max_new_tokens": min(cls.max_new_tokens, longest), **given}
            check_text(str(given.get("question")), "the question")
        request = read_strict(cls, given, None)
        if not request.question.strip():
            raise UserError("no question", fix="write one")
        if len(request.question) > MAX_QUESTION:
            raise UserError(f"question of {len(request.question)} characters", fix=f"give at most {MAX_QUESTION}")
        if request.max_new_tokens > longest:
            raise UserError(f"max_new_tokens={request.max_new_tokens}", fix=f"give 1 to {longest}")
        SamplingSettings(request.temperature)  # refuses one that is too close to 0
        return request

    def picture(self) -> Image.Image | None:
        """The picture [h, w] RGB, if there is one.

        Raises:
            UserError: it cannot be read as a picture, or has too many pixels.
        """
        if self.image is None:
            return None
        try:
            content = base64.b64decode(self.image, validate=True)
        except ValueError:  # also for characters outside ASCII
            raise UserError("the picture of the request is not base64") from None
        return load_image(content, formats=FORMATS, max_side=MAX_SIDE)
