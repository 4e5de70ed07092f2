"""Frames to mp4 and back."""

from __future__ import annotations

from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from modip import video
from modip.errors import UserError


def test_a_video_holds_its_frames(tmp_path: Path) -> None:
    path = tmp_path / "new" / "clip.mp4"
    frames = [np.full((33, 50, 3), 20 * i, np.uint8) for i in range(12)]  # an odd height
    video.write(path, frames, fps=10)
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]
    with imageio.get_reader(path, format="FFMPEG") as reader:
        back = [np.asarray(frame) for frame in reader]
        assert reader.get_meta_data()["fps"] == 10
    assert len(back) == 12
    assert back[0].shape == (32, 50, 3)
    for frame, original in zip(back, frames, strict=True):
        assert abs(float(frame.mean()) - float(original.mean())) < 6


def test_a_video_that_cannot_be_written_names_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"clip\.mp4"):
        video.write(tmp_path / "file" / "clip.mp4", [np.zeros((16, 16, 3), np.uint8)], fps=10)
