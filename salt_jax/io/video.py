"""Clips become files: MP4, GIF and contact sheets.

A clip is uint8 RGB [F, H, W, 3]. `encode_*` returns the bytes of a file. `scale` enlarges every
pixel to scale x scale, so that clips of 12 x 12 pixels can be seen; `visible_scale` proposes one.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from salt_jax.io.files import as_path, write_whole

H264_ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox")  # the first one present is used


def visible_scale(size: int, wanted: int) -> int:
    """The largest whole factor that keeps `size` pixels within `wanted`; 1 when they are more
    already.
    """
    return max(1, wanted // size)


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Nearest neighbour, [..., H, W, 3] -> [..., scale H, scale W, 3].

    Raises ValueError for scale < 1.
    """
    if scale < 1:
        raise ValueError(f"scale={scale} must be 1 or more")
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def looks(pixels: np.ndarray) -> dict[str, float]:
    """Saturation, contrast and brightness of uint8 pixels [..., H, W, 3], each in [0, 1].

    What drifts first when a student collapses: mean spread of a pixel's channels, standard
    deviation of luminance over a picture, mean luminance (ITU-R BT.601 weights).
    """
    rgb = np.asarray(pixels, np.float64) / 255
    luminance = rgb @ np.array([0.299, 0.587, 0.114])
    return {
        "saturation": float((rgb.max(-1) - rgb.min(-1)).mean()),
        "contrast": float(luminance.std((-2, -1)).mean()),
        "brightness": float(luminance.mean()),
    }


def encode_mp4(frames: np.ndarray, fps: int, scale: int) -> bytes:
    """H.264 in MP4, yuv420p, which every browser plays. Odd sizes repeat the last row or column.

    Colours are BT.709's in limited range and say so, in the stream and in the container; the index
    stands in front.

    Raises RuntimeError when PyAV was built without an H.264 encoder.
    """
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # to move the index to the front FFmpeg opens the file again
        file = Path(folder) / "clip.mp4"
        with written_mp4(file, fps, scale) as write:
            write(_clip(frames))
        return file.read_bytes()


@contextmanager
def written_mp4(
    file: Path, fps: int, scale: int, growing: bool = False
) -> Iterator[Callable[[np.ndarray], None]]:
    """What takes the frames of a video, uint8 [F, H, W, 3], part by part, and writes them as
    `encode_mp4` does.

    `growing`: in fragments of a second each, so that what is there can be played while the video
    goes on, and also where it is never finished; no index stands in front.
    """
    options = {"movflags": "+faststart"}
    if growing:
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
    with av.open(str(file), "w", format="mp4", options=options) as container:
        # CRF 12: a picture of a few flat shapes shows every artefact, and costs few bytes all the
        # same.
        options = {"crf": "12"} | (
            {"g": str(fps), "tune": "zerolatency", "preset": "ultrafast"} if growing else {}
        )
        stream = container.add_stream(_h264_encoder(), rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        _tag_bt709(stream.codec_context)
        convert = VideoReformatter().reformat  # one for all: a frame's own one begins anew

        def write(frames: np.ndarray) -> None:
            frames = enlarge(_clip(frames), scale)
            odd = [size % 2 for size in frames.shape[1:3]]
            frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                picture = convert(
                    av.VideoFrame.from_ndarray(frame, format="rgb24"),
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range="MPEG",
                    interpolation=Interpolation.AREA,  # no colour runs into another pixel
                )
                _tag_bt709(picture)
                container.mux(stream.encode(picture))

        yield write
        container.mux(stream.encode())


def encode_gif(frames: np.ndarray, fps: int, scale: int) -> bytes:
    """A GIF that loops.

    Its clock ticks in 1/100 s: durations alternate so that the whole clip keeps time.
    """
    images = [Image.fromarray(frame) for frame in enlarge(_clip(frames), scale)]
    ticks = np.round(np.arange(len(images) + 1) * 100 / fps).astype(int)
    file = io.BytesIO()
    images[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=(10 * np.diff(ticks)).tolist(),
        loop=0,
    )
    return file.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """A still picture, e.g. a contact sheet."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def contact_sheet(videos: np.ndarray, labels: Sequence[str], scale: int) -> Image.Image:
    """All clips on one page: each a row of its frames, first to last, under its label.

    `videos` is uint8 [N, F, H, W, 3]. Long clips make wide pages: pass every n-th frame. Labels
    wrap.
    """
    if videos.ndim != 5 or len(videos) != len(labels) or not len(videos):
        raise ValueError(
            f"expected [N, F, H, W, 3] and N labels, got {list(videos.shape)} and {len(labels)}"
        )
    gap, font = 4, ImageFont.load_default(size=14)
    clips = [enlarge(_clip(video), scale) for video in videos]
    _, columns, height, width, _ = videos.shape
    page_width = max(columns * (scale * width + gap) + gap, 240)
    captions = [_wrap(label, font, page_width - 2 * gap) for label in labels]
    line = 18
    page_height = sum(line * len(lines) + 2 * gap + scale * height for lines in captions) + 2 * gap
    page = Image.new("RGB", (page_width, page_height), "white")
    draw, y = ImageDraw.Draw(page), gap
    for clip, lines in zip(clips, captions, strict=True):
        for text in lines:
            draw.text((gap, y), text, fill="black", font=font)
            y += line
        for column, frame in enumerate(clip):
            page.paste(Image.fromarray(frame), (gap + column * (scale * width + gap), y))
        y += scale * height + 2 * gap
    return page


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: int = 16, scale: int = 1) -> None:
    """Writes a clip, uint8 [F, H, W, 3], as MP4, or as GIF where the name says so."""
    gif = as_path(path).suffix.lower() == ".gif"
    write_whole(as_path(path), (encode_gif if gif else encode_mp4)(frames, fps, scale))


def _clip(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"a clip is uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    return frames


def _tag_bt709(tags: av.VideoFrame | av.VideoCodecContext) -> None:
    """Says of a frame or a codec that it is BT.709 in limited range; 1 is both in ITU-T H.273 and
    FFmpeg.
    """
    tags.color_primaries = tags.color_trc = tags.colorspace = tags.color_range = 1


def _h264_encoder() -> str:
    for name in H264_ENCODERS:
        try:
            return av.Codec(name, "w").name
        except av.codec.codec.UnknownCodecError:  # pyright: ignore[reportAttributeAccessIssue]
            continue
    raise RuntimeError(
        f"PyAV has none of the H.264 encoders {H264_ENCODERS}: install its ready-made wheel (pip "
        "install av)"
    )


def _wrap(text: str, font, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
