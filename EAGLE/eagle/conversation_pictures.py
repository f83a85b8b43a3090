"""A row's picture on the disk: read, missing, broken, or out of reach."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from PIL import Image

from eagle.conversations import Unusable
from llava.errors import UserError
from llava.image import PictureUnreachable, load_image

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
"""What a name gives that no file has, or can have; any other error is the file system's."""
MEND = "mend the disk, the share or the rights and start again; what is finished is kept"


def picture_is_there(path: Path) -> bool:
    """Whether a picture's file is there.

    Raises:
        UserError: the file system cannot tell.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except ValueError:  # a name that no file can have
        return False
    except OSError as error:
        if error.errno in MISSING:
            return False
        raise UserError(f"picture cannot be read ({error.strerror})", path, MEND) from None


def open_picture(path: Path) -> Image.Image:
    """A row's picture as RGB.

    Raises:
        Unusable: it is missing or broken.
        UserError: the file system does not let it be read: that is no fault of the row, and no reason to skip it.
    """
    if not picture_is_there(path):
        raise Unusable("missing_picture")
    try:
        return load_image(path)
    except PictureUnreachable as error:
        raise UserError(error.what, error.where, MEND) from None
    except UserError:
        raise Unusable("broken_picture") from None
