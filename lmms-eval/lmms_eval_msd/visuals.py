"""What a task shows to the model: pictures, and paths of videos."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PIL import Image

from llava.errors import UserError
from llava.image import load_image

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
Visual = Image.Image | str
"""A picture, or the path of a video."""


def visuals_of(given: Any) -> list[Visual]:
    """The pictures and videos that a task's `doc_to_visual` gave: none, one, a list, or a list of lists.

    Raises:
        UserError: it gave something else, such as sound, or a picture cannot be read.
    """
    if given is None:
        return []
    if isinstance(given, Image.Image):
        return [given]
    if isinstance(given, str):
        return [given if is_video(given) else load_image(_picture_path(given))]
    if isinstance(given, Iterable) and not isinstance(given, dict | bytes):
        return [visual for part in given for visual in visuals_of(part)]
    raise UserError(f"the task gives a {type(given).__name__}", fix="MSD evaluates tasks of pictures, videos and text")


def is_video(path: str) -> bool:
    """Whether a path is a video's, by its ending."""
    return path.lower().endswith(VIDEO_ENDINGS)


def pictures_only(visuals: Iterable[Visual], family: str) -> list[Image.Image]:
    """``visuals`` of a family that knows pictures alone.

    Raises:
        UserError: there is a video among them.
    """
    pictures = []
    for visual in visuals:
        if isinstance(visual, str):
            raise UserError(f"the task gives a video, and {family} models see pictures alone", visual)
        pictures.append(visual)
    return pictures


def _picture_path(path: str) -> str:
    if not path.lower().endswith(tuple(Image.registered_extensions())):
        raise UserError("the task gives a file that is neither picture nor video", path)
    return path
