"""Frames to an mp4 file, with the encoder that imageio-ffmpeg brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modip.files import write_atomically


def write(path: Path, frames: Sequence[NDArray[np.uint8]], fps: int) -> None:
    """Writes RGB frames (height, width, 3), all of one size, as H.264, whole or not at all.

    Odd heights and widths lose their last row or column (the encoding needs even ones).
    Raises UserError where the file cannot be written.
    """
    import imageio.v2 as imageio

    height, width = (size - size % 2 for size in frames[0].shape[:2])
    write_atomically(
        path,
        lambda temporary: imageio.mimwrite(
            temporary,
            [frame[:height, :width] for frame in frames],
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            macro_block_size=1,
            quality=7,
        ),
    )
