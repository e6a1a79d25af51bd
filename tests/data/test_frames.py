"""Colours, transparency and orientation: files are written from the formulas of BT.601, 709 and
2020, and read.
"""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from salt_jax.data.clips import read_clip
from salt_jax.data.frames import over_background, to_srgb
from tests.data.videos import corners, quadrants, write

RED = (200, 40, 40)
HD, SD, WIDE = (0.2126, 0.0722), (0.299, 0.114), (0.2627, 0.0593)  # weights of red and blue
MATRIX = {HD: 1, SD: 6, WIDE: 9}


def to_yuv(rgb, weights, full, bits):
    """Of ITU-R BT.601, 709 and 2020, by hand."""
    (r, g, b), (kr, kb) = (np.array(rgb) / 255), weights
    y = kr * r + (1 - kr - kb) * g + kb * b
    chroma = np.array([(b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))])
    if full:
        return np.rint([y * (2**bits - 1), *(chroma * (2**bits - 1) + 2 ** (bits - 1))]).astype(int)
    return np.rint(np.array([16 + 219 * y, *(128 + 224 * chroma)]) * 2 ** (bits - 8)).astype(int)


def flat(pix_fmt, values, height=32, width=48):
    """A frame of one colour, plane by plane."""
    frame = av.VideoFrame(width, height, pix_fmt)
    for plane, value in zip(frame.planes, values, strict=True):
        dtype = np.uint8 if "10" not in pix_fmt and "16" not in pix_fmt else np.uint16
        row = plane.line_size // dtype().itemsize
        plane.update(np.full((plane.height, row), value, dtype).tobytes())
    return frame


def store(path, frame, codec="ffv1", options=None, **tags):
    """Five times the same frame, tagged in stream and frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, frame.format.name
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        for i in range(5):
            frame.pts, frame.time_base = i, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seen(path, height=32, width=48):
    clip = read_clip(path, 5, height, width, 16).astype(int)
    assert clip.shape == (5, height, width, 3)
    return clip[0]


@pytest.mark.parametrize("pix_fmt, bits", [("yuv420p", 8), ("yuv444p", 8), ("yuv420p10le", 10)])
@pytest.mark.parametrize("weights", [HD, SD, WIDE])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_matrix_and_range_are_those_of_the_tags(tmp_path, name, pix_fmt, bits, weights, full):
    frame = flat(pix_fmt, to_yuv(RED, weights, full, bits))
    codec, options = ("libx264", {"crf": "1"}) if name == "a.mp4" else ("ffv1", {})
    tags = {"colorspace": MATRIX[weights], "color_range": 2 if full else 1}
    picture = seen(store(tmp_path / name, frame, codec, options, **tags))
    assert np.abs(picture - RED).max() <= 3


@pytest.mark.parametrize(
    "height, width, weights",
    [(32, 48, SD), (576, 720, SD), (720, 1280, HD), (544, 1280, HD), (720, 960, HD)],
)
def test_without_tags_hd_is_bt709_and_anything_smaller_bt601(tmp_path, height, width, weights):
    frame = flat("yuv420p", to_yuv(RED, weights, False, 8), height, width)
    assert np.abs(seen(store(tmp_path / "a.mkv", frame)) - RED).max() <= 2


def test_motion_jpeg_is_bt601_in_full_range(tmp_path):
    frame = flat("yuvj420p", to_yuv(RED, SD, True, 8))
    assert np.abs(seen(store(tmp_path / "a.avi", frame, "mjpeg", {"q": "1"})) - RED).max() <= 3


@pytest.mark.parametrize(
    "tags, reason",
    [
        (
            {"color_trc": 16, "color_primaries": 9, "colorspace": 9},
            "it is HDR .PQ.; convert it to SDR in BT.709",
        ),
        ({"color_trc": 18, "color_primaries": 9, "colorspace": 9}, "it is HDR .HLG."),
        ({"color_trc": 16}, "it is HDR .PQ."),
        ({"color_trc": 14, "color_primaries": 9, "colorspace": 9}, "its primaries are BT.2020"),
        ({"color_primaries": 12, "colorspace": 1}, "its primaries are Display P3"),
        ({"color_primaries": 11}, "its primaries are DCI-P3"),
        ({"color_primaries": 8}, "its primaries are number 8 of ITU-T H.273"),
        ({"color_trc": 8}, "its transfer function is number 8"),
        ({"color_trc": 9}, "its transfer function is number 9"),
        ({"colorspace": 8}, "its colour matrix is number 8"),
        ({"colorspace": 10}, "its colour matrix is number 10"),
    ],
)
@pytest.mark.parametrize("name, codec", [("a.mkv", "ffv1"), ("a.mp4", "libx264")])
def test_hdr_and_wide_gamut_are_rejected_with_their_name(tmp_path, name, codec, tags, reason):
    """In the container alone (ffv1), and in the stream as well (H.264)."""
    frame = flat("yuv420p10le", to_yuv(RED, WIDE, False, 10))
    with pytest.raises(ValueError, match=reason):
        read_clip(store(tmp_path / name, frame, codec, **tags), 5, 32, 48, 16)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_hdr_that_the_container_alone_tells_is_rejected(tmp_path, name):
    """FFmpeg's decoder of HEVC forgets what the container said where the stream says nothing."""
    quiet = {"x265-params": "log-level=none:pools=1"}
    write(
        tmp_path / f"plain.{name}",
        np.full((5, 64, 96, 3), RED, np.uint8),
        codec="libx265",
        options=quiet,
    )
    with (
        av.open(str(tmp_path / f"plain.{name}")) as source,
        av.open(str(tmp_path / name), "w") as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for tag, value in {
            "color_trc": 16,
            "color_primaries": 9,
            "colorspace": 9,
            "color_range": 1,
        }.items():
            setattr(stream.codec_context, tag, value)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with pytest.raises(ValueError, match=r"it is HDR .PQ."):
        read_clip(tmp_path / name, 5, 64, 96, 16)


def test_ten_bits_of_sdr_are_read(tmp_path):
    frame = flat("yuv420p10le", to_yuv(RED, WIDE, False, 10))
    path = store(tmp_path / "a.mkv", frame, color_trc=14, color_primaries=1, colorspace=9)
    assert np.abs(seen(path) - RED).max() <= 2


@pytest.mark.parametrize(
    "pix_fmt, value, color_range, wanted",
    [
        ("gray", 128, 2, 128),
        ("gray", 126, 1, 128),  # 16 + 219 x 128 / 255
        ("gray10le", 512, 2, 128),
        ("gray16le", 128 * 257, 2, 128),
        ("gray", 235, 1, 255),
        ("gray", 10, 1, 0),
    ],
)
def test_greys_of_every_depth_and_range(tmp_path, pix_fmt, value, color_range, wanted):
    path = store(tmp_path / "a.mkv", flat(pix_fmt, [value]), color_range=color_range)
    assert np.abs(seen(path) - wanted).max() <= 1


@pytest.mark.parametrize(
    "name, codec, options, pix_fmt",
    [
        ("a.mkv", "ffv1", {}, "bgr0"),
        ("a.mp4", "libx264rgb", {"crf": "1"}, "bgr24"),
        ("a.mov", "png", {}, "rgb48be"),
        ("a.mov", "qtrle", {}, "rgb24"),
    ],
)
def test_rgb_needs_no_matrix(tmp_path, name, codec, options, pix_fmt):
    frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), RED, np.uint8), format="rgb24")
    assert (
        np.abs(
            seen(store(tmp_path / name, frame.reformat(format=pix_fmt), codec, options)) - RED
        ).max()
        <= 1
    )


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.mp4", "libx264", {"x264-params": "interlaced=1"}),
        ("a.ts", "mpeg2video", {"flags": "+ildct+ilme"}),
    ],
)
def test_interlaced_videos_are_rejected(tmp_path, name, codec, options):
    frame = flat("yuv420p", to_yuv(RED, SD, False, 8), 64, 96)
    with pytest.raises(ValueError, match="it is interlaced; deinterlace it first"):
        read_clip(store(tmp_path / name, frame, codec, options), 5, 64, 96, 16)


def half_clear():
    """Green noise that is not to be seen, at the left; a half transparent column; red."""
    picture = np.zeros((32, 48, 4), np.uint8)
    picture[:, :16] = (0, 255, 0, 0)
    picture[:, 16:32] = (*RED, 128)
    picture[:, 32:] = (*RED, 255)
    return picture


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mkv", "ffv1", "yuva420p"),
    ],
)
def test_transparent_parts_are_white(tmp_path, name, codec, pix_fmt):
    frame = av.VideoFrame.from_ndarray(half_clear(), format="rgba").reformat(format=pix_fmt)
    picture = seen(store(tmp_path / name, frame, codec))
    half = 255 + (np.array(RED) - 255) * 128 / 255
    for columns, wanted in (
        (slice(2, 14), (255,) * 3),
        (slice(18, 30), half),
        (slice(34, 46), RED),
    ):
        assert np.abs(picture[:, columns] - wanted).max() <= 4


def test_transparent_parts_of_a_gif_are_white(tmp_path):
    pictures = [Image.new("RGBA", (48, 32), (0, 255, 0, 0)) for _ in range(5)]
    for picture in pictures:
        picture.paste((*RED, 255), (16, 0, 48, 32))
    pictures[0].save(
        tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=60, disposal=2
    )
    picture = seen(tmp_path / "a.gif")
    assert (picture[:, 2:14] == 255).all() and np.abs(picture[:, 18:46] - RED).max() <= 1


def test_transparency_that_is_not_decoded_is_a_reason(tmp_path):
    frame = av.VideoFrame.from_ndarray(half_clear(), format="rgba").reformat(format="yuva420p")
    with pytest.raises(ValueError, match="its transparency cannot be read"):
        read_clip(store(tmp_path / "a.webm", frame, "libvpx-vp9"), 5, 32, 48, 16)


def test_composing_is_exact():
    rgba = np.random.default_rng(0).integers(0, 256, (1000, 4), np.uint8)
    colour, alpha = rgba[:, :3].astype(float), rgba[:, 3:] / 255
    assert np.abs(over_background(rgba) - (colour * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9


def test_a_profile_that_is_none_is_a_reason():
    with pytest.raises(ValueError, match="its colour profile does not fit it"):
        to_srgb(Image.new("RGB", (2, 2)), b"no profile")
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (
        np.abs(np.asarray(to_srgb(Image.new("RGB", (2, 2), RED), same)).astype(int) - RED).max()
        <= 1
    )


def shown_at(picture, matrix):
    """By the definition in ISO/IEC 14496-12, 6.2.2: (x, y) is seen at (a x + c y, b x + d y), moved
    into view.
    """
    a, b, c, d = matrix
    h, w = picture.shape[:2]
    points = {(a * x + c * y, b * x + d * y): picture[y, x] for y in range(h) for x in range(w)}
    left, top = min(x for x, _ in points), min(y for _, y in points)
    out = np.zeros(
        (max(y for _, y in points) - top + 1, max(x for x, _ in points) - left + 1, 3), np.uint8
    )
    for (x, y), value in points.items():
        out[y - top, x - left] = value
    return out


EIGHT = [(a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)]
EIGHT += [(0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2)]


@pytest.mark.parametrize("matrix", EIGHT, ids=str)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_every_turn_and_mirror_of_the_display_matrix(tmp_path, name, matrix):
    path = turned(tmp_path / name, matrix, quadrants(32, 64))
    wanted = shown_at(quadrants(32, 64), matrix)
    assert corners(read_clip(path, 5, *wanted.shape[:2], 16)) == corners(wanted[None])


def turned(path, matrix, picture, aspect=None):
    """A file whose display matrix is overwritten, in the 16.16 and 2.30 fixed point of its track
    header.
    """
    data = bytearray(
        write(path, np.broadcast_to(picture, (5, *picture.shape)), aspect=aspect).read_bytes()
    )
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    rows = np.array([a, b, 0, c, d, 0, 0, 0, 1]) * ([1 << 16, 1 << 16, 1 << 30] * 3)
    data[at : at + 36] = rows.astype(">i4").tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("matrix", EIGHT, ids=str)
def test_turns_with_stretched_pixels(tmp_path, matrix):
    """Pixels twice as wide as high: 32 x 32 of them are seen as 2 : 1, or as 1 : 2 when lying on
    the side.
    """
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16, 0] = 255
    seen_as = shown_at(picture, matrix)
    height, width = (32, 64) if matrix[0] else (64, 32)
    clip = read_clip(turned(tmp_path / "a.mp4", matrix, picture, Fraction(2)), 5, height, width, 16)
    assert corners(clip) == corners(
        np.kron(seen_as, np.ones((height // 32, width // 32, 1), np.uint8))[None]
    )


@pytest.mark.parametrize("matrix", [(2, 0, 0, 2), (-0.5, 0, 0, 0.5), (0, 3, -1, 0)], ids=str)
def test_a_matrix_may_scale(tmp_path, matrix):
    signs = tuple(int(np.sign(value)) for value in matrix)
    wanted = shown_at(quadrants(32, 64), signs)
    path = turned(tmp_path / "a.mp4", matrix, quadrants(32, 64))
    assert corners(read_clip(path, 5, *wanted.shape[:2], 16)) == corners(wanted[None])


@pytest.mark.parametrize(
    "matrix", [(1, 0.5, 0, 1), (1, 0, 1, 0), (0.8, 0.6, -0.6, 0.8), (0, 0, 0, 0)], ids=str
)
def test_shears_and_other_angles_are_named(tmp_path, matrix):
    with pytest.raises(ValueError, match=r"is to be turned by .* no multiple of 90, or sheared"):
        read_clip(turned(tmp_path / "a.mp4", matrix, quadrants(32, 64)), 5, 32, 64, 16)
