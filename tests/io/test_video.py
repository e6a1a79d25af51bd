"""Written clips are read back with another reader than the one that wrote them, or pixel by
pixel.
"""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from salt_jax.io import video
from salt_jax.serve.recording import whole_fragments

COLOURS = np.array(
    [[230, 20, 20], [20, 200, 20], [40, 60, 240], [240, 220, 20], [250, 250, 250]], np.uint8
)


def stripes(frames: int, height: int, width: int) -> np.ndarray:
    """A bright column that moves to the right over a colour of its own."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    for i in range(frames):
        clip[i, :, :] = COLOURS[i % 4] // 4
        clip[i, :, i % width] = COLOURS[i % 4]
    return clip


def decode(path: Path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context.name, stream.codec_context.pix_fmt


def test_mp4_keeps_frames_colours_and_rate(tmp_path):
    clip = stripes(9, 12, 12)
    video.write_video(tmp_path / "made" / "clip.mp4", clip, scale=8)
    frames, rate, codec, pixels = decode(tmp_path / "made" / "clip.mp4")
    assert (rate, codec, pixels) == (16, "h264", "yuv420p")
    expected = np.kron(clip, np.ones((1, 8, 8, 1), np.uint8))
    assert frames.shape == expected.shape == (9, 96, 96, 3)
    assert np.abs(frames.astype(int) - expected).mean() < 4
    # the order is not by chance
    assert np.abs(frames.astype(int) - np.roll(expected, 1, axis=0)).mean() > 10


def test_no_colour_runs_into_another_pixel():
    """The chroma of each pixel of an enlarged picture is that of the pixel alone, to its edge."""
    clip = np.random.default_rng(1).integers(0, 256, (1, 6, 6, 3), np.uint8)
    whole, parts = planes(video.encode_mp4(clip, 16, 16)), np.zeros((3, 6, 6))
    for i, j in np.ndindex(6, 6):
        flat = np.broadcast_to(clip[:, i : i + 1, j : j + 1], (1, 6, 6, 3))
        parts[:, i, j] = [np.median(plane) for plane in planes(video.encode_mp4(flat, 16, 16))]
    for plane, wanted in zip(whole[1:], parts[1:], strict=True):
        assert np.abs(plane - wanted.repeat(8, 0).repeat(8, 1)).max() <= 2


def test_mp4_makes_odd_sizes_even(tmp_path):
    clip = stripes(3, 13, 11)
    video.write_video(tmp_path / "clip.mp4", clip, scale=3, fps=24)
    frames, rate, *_ = decode(tmp_path / "clip.mp4")
    assert frames.shape == (3, 40, 34, 3)
    assert rate == 24
    # the last row is repeated, not black
    assert np.abs(frames[:, 39].astype(int) - frames[:, 38]).mean() < 8


def planes(data: bytes) -> list[np.ndarray]:
    """Y, Cb, Cr of the first frame as stored, without any conversion."""
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        assert frame.format.name == "yuv420p"
        return [
            np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            for plane in frame.planes
        ]


@pytest.mark.parametrize(
    "colour", [(200, 40, 40), (40, 200, 40), (40, 40, 200), (255, 255, 255), (0, 0, 0)]
)
@pytest.mark.parametrize("height, width", [(64, 96), (33, 47), (720, 1280)])
def test_mp4_is_bt709_in_limited_range(colour, height, width):
    """ITU-R BT.709-6, 3.2 to 3.4, by hand."""
    clip = np.broadcast_to(np.array(colour, np.uint8), (2, height, width, 3))
    r, g, b = np.array(colour) / 255
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    wanted = [16 + 219 * y, 128 + 224 * (b - y) / 1.8556, 128 + 224 * (r - y) / 1.5748]
    for plane, value in zip(planes(video.encode_mp4(clip, 16, 1)), wanted, strict=True):
        assert np.abs(plane[: height // 2, : width // 2].astype(int) - value).max() <= 2


def boxes(data: bytes) -> list[bytes]:
    """Names of the boxes of an mp4 in order, ISO/IEC 14496-12, 4.2."""
    at, names = 0, []
    while at < len(data):
        names.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    return names


def test_mp4_says_its_colours_and_has_its_index_in_front(tmp_path):
    video.write_video(tmp_path / "a.mp4", stripes(9, 12, 12), scale=4)
    data = (tmp_path / "a.mp4").read_bytes()
    names = boxes(data)
    assert names.index(b"moov") < names.index(b"mdat")
    colr = data[data.index(b"colr") + 4 :]
    assert colr[:10] == b"nclx" + bytes([0, 1, 0, 1, 0, 1])  # primaries, transfer, matrix
    assert colr[10] >> 7 == 0  # limited range
    bare = tmp_path / "bare.h264"  # what the stream itself says, without the container
    with (
        av.open(str(tmp_path / "a.mp4")) as source,
        av.open(str(bare), "w", format="h264") as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(bare)) as container:
        frame = next(container.decode(video=0))
    assert (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range) == (
        1,
        1,
        1,
        1,
    )


def test_the_same_clip_is_the_same_bytes():
    """Of whole macroblocks. Of others x264 may choose otherwise (one file of 36 x 50 in a hundred,
    now and then one in four, PyAV 18.1), unless its assembler is off.
    """
    clip = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
    assert video.encode_mp4(clip, 16, 1) == video.encode_mp4(clip, 16, 1)


def test_gif_keeps_frames_and_time(tmp_path):
    clip = stripes(9, 12, 12)
    video.write_video(tmp_path / "clip.gif", clip, scale=2)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (9, (24, 24), 0)
        durations = []
        for i in range(9):
            image.seek(i)
            durations.append(image.info["duration"])
            shown = np.asarray(image.convert("RGB"))
            np.testing.assert_allclose(
                shown.astype(int), np.kron(clip[i], np.ones((2, 2, 1), np.uint8)), atol=6
            )
    assert set(durations) <= {60, 70}
    assert abs(sum(durations) - 9 / 16 * 1000) <= 5


def test_contact_sheet_has_clips_as_rows_and_time_from_left_to_right():
    clips = np.broadcast_to(COLOURS[:4].reshape(2, 2, 1, 1, 3), (2, 2, 6, 6, 3))
    page = np.asarray(video.contact_sheet(clips, ["first", "second"], scale=10)).astype(int)
    boxes = []
    for colour in COLOURS[:4]:
        rows, columns = np.nonzero(np.all(page == colour, axis=-1))
        assert len(rows) == 60 * 60
        boxes.append((rows.min(), rows.max(), columns.min(), columns.max()))
    (a, b, c, d) = boxes
    assert a[:2] == b[:2]
    assert c[:2] == d[:2]
    assert a[1] < c[0]
    assert a[3] < b[2]
    for above in (page[: a[0]], page[a[1] + 1 : c[0]]):
        assert above.min() < 60  # a label stands above each row


def test_long_labels_wrap_inside_the_page():
    clips = np.full((1, 9, 12, 12, 3), 255, np.uint8)
    short = np.asarray(video.contact_sheet(clips, ["word"], scale=4))
    long = np.asarray(video.contact_sheet(clips, ["word " * 60], scale=4))
    assert long.shape[1] == short.shape[1]
    assert long.shape[0] > short.shape[0] + 3 * 18
    assert long[:, -4:].min() == 255  # nothing runs over the edge


@pytest.mark.parametrize(
    "clip",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_refuses_what_is_not_a_clip(clip):
    for encode in (video.encode_mp4, video.encode_gif):
        with pytest.raises(ValueError, match=r"a clip is uint8 \[F, H, W, 3\]"):
            encode(clip, 16, 1)


def test_refuses_labels_that_do_not_match_and_scales_below_one():
    clips = np.zeros((2, 3, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="N labels"):
        video.contact_sheet(clips, ["only one"], scale=1)
    with pytest.raises(ValueError, match="scale=0"):
        video.encode_gif(clips[0], 16, 0)


def test_says_so_when_h264_is_missing(monkeypatch):
    monkeypatch.setattr(video, "H264_ENCODERS", ("no_such_encoder",))
    with pytest.raises(RuntimeError, match="no_such_encoder"):
        video.encode_mp4(stripes(2, 4, 4), 16, 1)


def test_visible_scale():
    assert [video.visible_scale(size, 144) for size in (12, 13, 144, 480)] == [12, 11, 1, 1]


def test_png_is_lossless():
    image = video.contact_sheet(np.zeros((1, 2, 4, 4, 3), np.uint8), ["a"], scale=2)
    with Image.open(io.BytesIO(video.encode_png(image))) as read:
        np.testing.assert_array_equal(np.asarray(read), np.asarray(image))


def test_a_growing_file_can_be_played_before_its_end(tmp_path):
    """What is complete of it, however it was cut off."""
    clip, file = frames_of_a_ramp(48), tmp_path / "growing.mp4"
    with video.written_mp4(file, 16, 16, growing=True) as write:
        for part in np.split(clip, 16):
            write(part)
        early = file.read_bytes()
    for data, least in ((early, 32), (early[:-7], 16), (file.read_bytes(), 48)):
        whole = whole_fragments(data)
        with av.open(io.BytesIO(whole)) as container:
            decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert least <= len(decoded) <= 48
        small = np.stack(decoded).reshape(-1, 12, 16, 12, 16, 3).mean((2, 4))
        assert np.abs(small - clip[: len(small)]).mean() < 2
    assert whole_fragments(b"") == whole_fragments(b"\0\0\0\x08mdat"[:6]) == b""


def frames_of_a_ramp(count):
    """uint8 [count, 12, 12, 3], each frame of one grey."""
    grey = np.linspace(20, 230, count).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (count, 12, 12, 3)).copy()
