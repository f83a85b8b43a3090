"""Reading videos, for Qwen models: by `qwen_vl_utils` as in lmms-eval's own models, with our reader where it has none.

Its readers are torchcodec, decord and torchvision's; the first two are optional packages, and newer releases of
torchvision have no reader any more. lmms-eval brings PyAV along.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

OTHER_READERS = ("torchcodec", "decord")


def provide_reader() -> None:
    """Gives `qwen_vl_utils` our reader in place of torchvision's, if there is no other. Safe to call again."""
    from qwen_vl_utils import vision_process
    from torchvision import io

    if any(find_spec(name) for name in OTHER_READERS) or hasattr(io, "read_video"):
        return
    vision_process.VIDEO_READER_BACKENDS["torchvision"] = read_with_av


def read_with_av(element: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any], float]:
    """Reads the frames that ``element`` asks for, chosen as `qwen_vl_utils`' other readers choose them.

    Args:
        element: "video", the path, and what `qwen_vl_utils.vision_process.smart_nframes` reads.

    Returns:
        Frames [T, 3, h, w] uint8, what is known of the video, and the frames per second that were kept.
    """
    from qwen_vl_utils.vision_process import calculate_video_frame_range, smart_nframes

    path = str(element["video"]).removeprefix("file://")
    count, rate = measure(path)
    first, last, count = calculate_video_frame_range(dict(element), count, rate)
    wanted = smart_nframes(dict(element), total_frames=count, video_fps=rate)
    indices = torch.linspace(first, last, wanted).round().long().tolist()
    known = {"fps": rate, "frames_indices": indices, "total_num_frames": count, "video_backend": "pyav"}
    return frames_at(path, indices), known, wanted / count * rate


def measure(path: str) -> tuple[int, float]:
    """Number of frames and frames per second. Containers that do not say how many there are are decoded once."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        count = stream.frames or sum(1 for _ in container.decode(stream))
        rate = float(stream.average_rate or stream.guessed_rate or 1)
    return count, rate


def frames_at(path: str, indices: list[int]) -> Tensor:
    """Frames [T, 3, h, w] at ``indices``, which rise; the last one found stands in for those after
    the end."""
    import av

    wanted, found, number = set(indices), {}, -1
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted:
                found[number] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            if number == indices[-1]:
                break
    if not found:
        raise ValueError(f"has {number + 1} frames")
    last = found[max(found)]
    return torch.stack([found.get(index, last) for index in indices])


def thin_out(frames: Tensor, most: int) -> Tensor:
    """At most ``most`` frames of [T, 3, h, w], evenly spread, the first and the last among them."""
    kept = np.unique(np.linspace(0, len(frames) - 1, most, dtype=int))
    return frames[torch.from_numpy(kept)]
