from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from eval_support import make_video

from lmms_eval_msd.video import frames_at, measure, read_with_av, thin_out


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "clip.mp4", frames=12)


def test_frames_are_those_of_the_file(clip):
    with av.open(str(clip)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert measure(str(clip)) == (12, 5.0)
    found = frames_at(str(clip), [0, 5, 11])
    assert found.shape == (3, 3, 56, 56)
    for got, index in zip(found, (0, 5, 11), strict=True):
        assert np.array_equal(got.permute(1, 2, 0).numpy(), frames[index])


def test_end_that_is_not_there(clip):
    """Containers may promise more frames than they have."""
    found = frames_at(str(clip), [11, 40])
    assert torch.equal(found[0], found[1])
    with pytest.raises(ValueError, match="12 frames"):
        frames_at(str(clip), [40])


def test_as_qwen_vl_utils_asks(clip):
    frames, known, rate = read_with_av({"video": f"file://{clip}", "nframes": 4})
    assert known["frames_indices"] == [0, 4, 7, 11]
    assert frames.shape[0] == 4
    assert rate == pytest.approx(4 / 12 * 5)


def test_thin_out():
    frames = torch.arange(10).view(10, 1, 1, 1)
    assert thin_out(frames, 4).flatten().tolist() == [0, 3, 6, 9]
    assert torch.equal(thin_out(frames, 32), frames)
