"""Videos to read, made with PyAV."""

from fractions import Fraction

import av
import numpy as np

MS = Fraction(1, 1000)


def write(
    path,
    frames,
    rate=16,
    codec="libx264",
    pts=None,
    rotation=0,
    aspect=None,
    options=None,
    form=None,
):
    """A video of uint8 [T, H, W, 3]; `pts` in milliseconds; `form` the container's, if not the
    name's.
    """
    options = options or ({"crf": "1"} if codec == "libx264" else {})
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"gif": "rgb8", "libx264": "yuv444p"}.get(codec, "yuv420p")
        if codec not in ("gif", "libx264"):
            stream.bit_rate = 2_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if pts:
            stream.codec_context.time_base = MS
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if pts:
                picture.pts, picture.time_base = pts[i], MS
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def quadrants(height, width):
    """Red, green above blue, white: what is where after turning and cutting can be read off the
    corners.
    """
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2, 0] = 255
    picture[: height // 2, width // 2 :, 1] = 255
    picture[height // 2 :, : width // 2, 2] = 255
    picture[height // 2 :, width // 2 :] = 255
    return picture


def corners(clip):
    names = {(True, False, False): "R", (False, True, False): "G", (False, False, True): "B"}
    picture = clip[0] > 128
    at = lambda y, x: names.get(tuple(picture[y, x].tolist()), "W")
    return at(2, 2) + at(2, -3) + at(-3, 2) + at(-3, -3)
