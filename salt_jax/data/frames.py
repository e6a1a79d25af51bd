"""A decoded frame becomes a picture: its colours, its transparency and its orientation as the
file's tags say.

What a tag asks for and is not done here is a reason to reject the file: never are colours taken for
others.
"""

import io
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from av import VideoFrame
from av.sidedata.sidedata import Type
from PIL import Image, ImageCms

BACKGROUND = 255  # white, under whatever is transparent, as browsers and printers have it

# Numbers of ITU-T H.273, tables 2 to 4, which are FFmpeg's. 2 is "unspecified" in all three.
UNKNOWN = 2
HD, SD = 1, 5  # BT.709 and BT.601
MATRICES = {1: 1, 4: 4, 5: SD, 6: SD, 7: 7, 9: 9}  # -> swscale's
SDR_CURVES = {
    1,
    2,
    4,
    5,
    6,
    7,
    11,
    13,
    14,
    15,
}  # BT.709, BT.601, gamma, sRGB, BT.2020: players show them alike
HDR_CURVES = {16: "PQ", 18: "HLG"}
# Primaries that players take for BT.709's: BT.601 in both its variants is a few levels off at most.
SDR_PRIMARIES = {1, 2, 5, 6, 7, 22}
WIDE_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
HDR_SIDE_DATA = {
    Type.DOVI_RPU_BUFFER,
    Type.DOVI_METADATA,
    Type.DYNAMIC_HDR_PLUS,
    Type.DYNAMIC_HDR_VIVID,
}
MASTERED = {Type.MASTERING_DISPLAY_METADATA, Type.CONTENT_LIGHT_LEVEL}
LIMITED, FULL = 1, 2
TO_SDR = "convert it to SDR in BT.709 first, for instance with ffmpeg's zscale and tonemap"


class Tags(NamedTuple):
    """What a stream says of all its frames; a frame's own word goes first."""

    pixel_aspect: Fraction  # width of a pixel over its height
    primaries: int
    curve: int
    matrix: int
    range: int


def picture(frame: VideoFrame, tags: Tags) -> tuple[np.ndarray, Fraction]:
    """uint8 sRGB [h, w, 3] as it is meant to be seen, and the aspect of its pixels.

    Without tags HD is BT.709 and anything smaller BT.601, as players have it. What is transparent
    is composed over white.

    Raises:
      ValueError: the reason why this frame cannot be shown rightly.
    """
    if frame.interlaced_frame:
        raise ValueError("it is interlaced; deinterlace it first, for instance with ffmpeg's bwdif")
    _refuse_colours(frame, tags)
    return _upright(frame, _rgb(frame, tags), tags.pixel_aspect)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image whose numbers mean what an ICC profile says, in sRGB.

    Raises ValueError where the profile is no use.
    """
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return (
            ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
            or image
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ValueError(f"its colour profile does not fit it ({error})") from error


def over_background(rgba: np.ndarray) -> np.ndarray:
    """uint8 [..., 4] with straight alpha -> [..., 3] over white."""
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8)


def _side_data(frame: VideoFrame, kind: Type) -> bytes | None:
    try:  # the stub of PyAV 18 knows one kind of side data alone
        return bytes(frame.side_data[kind])  # pyright: ignore[reportGeneralTypeIssues]
    except KeyError:
        return None


def _first(frame_says: int, stream_says: int) -> int:
    return stream_says if frame_says == UNKNOWN else frame_says


def _refuse_colours(frame: VideoFrame, tags: Tags) -> None:
    curve, primaries = (
        _first(frame.color_trc, tags.curve),
        _first(frame.color_primaries, tags.primaries),
    )
    beside = {kind for kind in HDR_SIDE_DATA | MASTERED if kind in frame.side_data}
    hdr = HDR_CURVES.get(curve, "Dolby Vision or HDR10+" if beside & HDR_SIDE_DATA else "")
    if not hdr and curve == UNKNOWN and beside & MASTERED:
        hdr = "mastered for an HDR display"
    if hdr:
        raise ValueError(f"it is HDR ({hdr}); {TO_SDR}")
    if curve not in SDR_CURVES:
        raise ValueError(
            f"its transfer function is number {curve} of ITU-T H.273, which is not read; {TO_SDR}"
        )
    if primaries not in SDR_PRIMARIES:
        name = WIDE_PRIMARIES.get(primaries, f"number {primaries} of ITU-T H.273")
        raise ValueError(f"its primaries are {name}, not BT.709; {TO_SDR}")
    if any(kind in frame.format.name for kind in ("xyz", "f16", "f32")):
        raise ValueError(f"its pixels are {frame.format.name}, which are not read; {TO_SDR}")


def _rgb(frame: VideoFrame, tags: Tags) -> np.ndarray:
    """uint8 [h, w, 3] as stored, over white where it is transparent."""
    form = frame.format
    matrix = _first(frame.colorspace, tags.matrix)
    if form.is_rgb or form.has_palette or len(form.components) < 3:  # grey, with or without alpha
        matrix = UNKNOWN
    elif matrix not in MATRICES and matrix != UNKNOWN:
        raise ValueError(
            f"its colour matrix is number {matrix} of ITU-T H.273, which is not read; {TO_SDR}"
        )
    if matrix == UNKNOWN:
        matrix = HD if frame.height >= 720 or frame.width >= 1280 else SD
    limits = frame.color_range or tags.range
    clear = form.has_palette or any(part.is_alpha for part in form.components)
    pixels = frame.reformat(
        format="rgba" if clear else "rgb24",
        src_colorspace=MATRICES[matrix],
        src_color_range=limits if limits and not form.is_rgb else None,
        dst_color_range=FULL,
    ).to_ndarray()
    if len(form.components) < 3 and limits == LIMITED and not form.has_palette:
        pixels[..., :3] = _stretched(pixels[..., :3])
    pixels = over_background(pixels) if clear else pixels
    profile = _side_data(frame, Type.ICC_PROFILE)
    return np.asarray(to_srgb(Image.fromarray(pixels), profile)) if profile else pixels


def _stretched(grey: np.ndarray) -> np.ndarray:
    """Limited range to full: swscale takes every grey format for full range, whatever its tag."""
    return ((grey.astype(np.float32) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)


def _upright(
    frame: VideoFrame, pixels: np.ndarray, aspect: Fraction
) -> tuple[np.ndarray, Fraction]:
    """Turned and mirrored by the display matrix: (x, y) is seen at (a x + c y, b x + d y)."""
    data = _side_data(frame, Type.DISPLAYMATRIX)
    if data is None:
        return pixels, aspect
    rows = np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2].astype(float)
    # it may scale; the size is chosen by others
    unit = rows / np.maximum(np.hypot(*rows.T)[:, None], 1)
    turn = unit.round().astype(int)
    # a degree: matrices are rounded
    if np.abs(unit - turn).max() > 0.02 or (np.abs(turn).sum(0) != 1).any():
        degrees = -np.degrees(np.arctan2(rows[0, 1], rows[0, 0]))  # counter-clockwise
        raise ValueError(
            f"it is to be turned by {degrees:.0f} degrees, which is no multiple of 90, or sheared"
        )
    (a, b), (c, d) = turn.tolist()
    if not a:
        pixels, aspect = pixels.transpose(1, 0, 2), 1 / aspect
    return np.ascontiguousarray(pixels[:: b + d, :: a + c]), aspect
