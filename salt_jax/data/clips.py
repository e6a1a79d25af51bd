"""A video file becomes a clip: decoded, resampled in time, brought to one size.

An unusable file gets a reason.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.format import Flags
from av.stream import Disposition
from PIL import Image

from salt_jax.data.frames import Tags, picture
from salt_jax.io.files import AnyPath, as_path, on_disk

# Raised whenever the same file may give other pixels than before.
READER = 2
LONGEST_STILL = 10  # seconds: a longer gap is taken for a break in the times, as ffmpeg does
# These store when a frame is decoded, not when it is shown; what FFmpeg gives as the latter is
# wrong with B-frames. So do files of any kind in which the two never differ: then they tell nothing
# of frames that are stored out of order.
DECODE_TIMES = {"avi", "asf"}

T = TypeVar("T")


class Disorder(ValueError):
    """Frame times that are missing or out of order, and where."""


class Shown(NamedTuple):
    """A frame in order of display. Times are seconds, None where the file does not tell."""

    shown: Fraction | None
    decoded: Fraction | None
    duration: Fraction  # 0 if it is not known
    frame: av.VideoFrame
    tags: Tags


Timed = Iterable[tuple[Fraction, Fraction, Shown]]
"""Frames with time and duration, in seconds."""


def read_clip(
    file: str | AnyPath, max_frames: int, height: int, width: int, fps: int
) -> np.ndarray:
    """The beginning of a video: its longest 4k + 1 frames up to `max_frames`,
    uint8 [T, height, width, 3].

    Frames are those nearest in time to 0, 1/fps, 2/fps, ... after the first one. Where the times at
    which frames are to be shown do not grow, the n-th frame is shown at the n-th time of decoding.
    Pictures are turned and mirrored as the file says, and `fit_picture` sees to the size.

    Raises:
      ValueError: the reason why this file cannot be used.
    """

    def beginning(timed: Timed) -> list[np.ndarray]:
        return list(islice(_fitted(timed, height, width, fps), max_frames))

    frames = _in_order(file, beginning)
    return np.stack(frames[: (len(frames) - 1) // 4 * 4 + 1])


def read_ending(
    file: str | AnyPath, max_frames: int, height: int, width: int, fps: int
) -> np.ndarray:
    """The last frames of a video, at most so many, uint8 [T, height, width, 3]; else as
    `read_clip`.
    """

    def ending(timed: Timed) -> list[np.ndarray]:
        return list(deque(_fitted(timed, height, width, fps), max_frames))

    return np.stack(_in_order(file, ending))


def _in_order(file: str | AnyPath, take: Callable[[Timed], list[np.ndarray]]) -> list[np.ndarray]:
    """What `take` makes of the frames with their times.

    Raises ValueError: they have none, or there is no frame.
    """
    try:
        frames = take(by_display(_decode(file)))
    except Disorder as error:
        try:
            frames = take(by_decoding(_decode(file)))
        except Disorder:
            raise ValueError(f"{error}; write it anew, for instance with ffmpeg -i") from error
    if not frames:
        raise ValueError("it has no frame")
    return frames


def resample(frames: Iterable[tuple[Fraction, Fraction, T]], fps: int) -> Iterator[T]:
    """From (time, duration, frame) in order of time, the frame nearest to each of start + i/fps,
    the earlier of two.

    The last one is shown for its duration, or, where that is not known (0), for as long as the one
    before.

    Raises:
      Disorder: a time is not later than the one before.
      ValueError: a frame is shown for longer than LONGEST_STILL seconds.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        return
    (start, duration, held), gap, count = first, Fraction(1, fps), 0
    before = start
    for number, (time, shown, frame) in enumerate(frames, 1):
        if time <= before:
            raise Disorder(
                f"its times do not grow: {float(before):g} s, then {float(time):g} s at frame "
                f"{number}"
            )
        _refuse_still(time - before, number - 1)
        while 2 * (start + Fraction(count, fps)) <= before + time:
            yield held
            count += 1
        before, gap, duration, held = time, time - before, shown, frame
    _refuse_still(duration or gap, None)
    while start + Fraction(count, fps) < before + (duration or gap):
        yield held
        count += 1


def fit_picture(picture: np.ndarray, height: int, width: int, pixel_aspect: Fraction) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3]: scaled with its aspect kept until it covers, the
    middle cut out.

    One antialiased bicubic resize (PIL) of the middle, so no row is lost to rounding.
    `pixel_aspect` is the width of a stored pixel over its height.
    """
    h, w = picture.shape[:2]
    # of the wanted pixels, in stored rows
    scale = min(w * pixel_aspect / width, Fraction(h, height))
    cut_w, cut_h = float(width * scale / pixel_aspect), float(height * scale)
    left, top = (w - cut_w) / 2, (h - cut_h) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + cut_w, w), min(top + cut_h, h))
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)


def by_display(frames: Iterable[Shown]) -> Iterator[tuple[Fraction, Fraction, Shown]]:
    """With the times at which they are to be shown; one that has none follows the frame before, as
    in ffmpeg.

    Raises:
      Disorder: nothing says when a frame is shown.
    """
    before: Shown | None = None
    time, gap = Fraction(0), Fraction(0)
    for number, item in enumerate(frames):
        if item.shown is None and before is not None and not (before.duration or gap):
            raise Disorder(f"frame {number} has no time")
        last = time
        if item.shown is not None:
            time = item.shown
        elif before is not None:
            time += before.duration or gap
        gap, before = (time - last if before is not None else gap), item
        yield time, item.duration, item


def by_decoding(frames: Iterable[Shown]) -> Iterator[tuple[Fraction, Fraction, Shown]]:
    """With the times of decoding, in their order. Raises Disorder where one is missing."""
    for number, item in enumerate(frames):
        if item.decoded is None:
            raise Disorder(f"frame {number} has no time")
        yield item.decoded, item.duration, item


def _fitted(timed: Timed, height: int, width: int, fps: int) -> Iterator[np.ndarray]:
    """Frames at a steady rate in one size; one that is shown twice is looked at once."""
    before, fitted = None, np.zeros(0)
    for item in resample(timed, fps):
        if item is not before:
            seen, aspect = picture(item.frame, item.tags)
            fitted, before = fit_picture(seen, height, width, aspect), item
        yield fitted


def _decode(file: str | AnyPath) -> Iterator[Shown]:
    """The frames of the first video stream that is no cover picture.

    Raises ValueError where it cannot go on.
    """
    count = 0
    try:
        with on_disk(as_path(file)) as here, _open(here) as container:
            streams = [
                s for s in container.streams.video if not s.disposition & Disposition.attached_pic
            ]
            if not streams:
                raise ValueError("it has no video stream")
            if "mif1" in container.metadata.get(
                "compatible_brands", ""
            ):  # its pictures are streams of their own
                raise ValueError("it is a picture or an animation in AVIF or HEIF; write it as mp4")
            stream = streams[0]
            codec = stream.codec_context
            if container.format.flags & Flags.no_timestamps.value and not codec.framerate:
                raise ValueError(
                    "it is a bare stream that does not tell its frame rate; put it into an mp4"
                )
            if stream.metadata.get("alpha_mode") == "1":
                raise ValueError(
                    "its transparency cannot be read; compose it over a background first"
                )
            stream.thread_type = "AUTO"
            unit, tags = stream.time_base or Fraction(1), _tags(stream)
            decoded: list[int | None] = []  # times of decoding of the packets so far
            alike = True
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    decoded.append(packet.dts)
                    alike = alike and packet.pts == packet.dts
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise ValueError(f"it is damaged after {count} frames")
                    dts = decoded[count] if count < len(decoded) else None
                    pts = dts if alike or container.format.name in DECODE_TIMES else frame.pts
                    shown, decoding = (
                        None if ticks is None else ticks * unit for ticks in (pts, dts)
                    )
                    yield Shown(shown, decoding, frame.duration * unit, frame, tags)
                    count += 1
    except (FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"it cannot be decoded after {count} frames ({reason})") from error


def _open(file: Path) -> InputContainer:
    # With the protocol named, no file's name is taken for the address of something else.
    name = f"file:{file}"
    if av.__version__.startswith("18."):  # later ones replace what is no UTF-8 by themselves
        return av.open(name, metadata_errors="replace")  # pyright: ignore[reportCallIssue]
    return av.open(name)


def _tags(stream: av.VideoStream) -> Tags:
    """What the container says, before a decoder has overwritten it."""
    codec = stream.codec_context
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return Tags(aspect, codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range)


def _refuse_still(seconds: Fraction, number: int | None) -> None:
    if seconds > LONGEST_STILL:
        which = "its last frame" if number is None else f"frame {number}"
        raise ValueError(
            f"{which} is shown for {float(seconds):g} s: its times jump, or it is a still; cut it "
            "before that"
        )
