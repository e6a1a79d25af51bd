"""Real files are written with PyAV; what must come out is known from how they were made."""

import importlib.util
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from salt_jax.data import clips
from salt_jax.data.clips import (
    Disorder,
    Shown,
    by_decoding,
    by_display,
    fit_picture,
    read_clip,
    resample,
)
from tests.data.videos import MS, corners, quadrants, write

B_FRAMES = {"crf": "1", "x264-params": "bframes=2:b-adapt=0"}


def greys(count, height=32, width=48):
    """Frame i is grey of level 10 + 5 i: which frame a decoded one is can be read off it."""
    levels = (10 + 5 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(clip):
    """The numbers of the frames of a video of `greys`."""
    return np.round((clip.mean((1, 2, 3)) - 10) / 5).astype(int).tolist()


@pytest.mark.parametrize(
    "name, codec",
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.MOV", "libx264"), ("a.gif", "gif")],
)
def test_frames_at_the_wanted_rate_are_taken_as_they_are(tmp_path, name, codec):
    clip = read_clip(
        write(tmp_path / name, greys(14), 16 if codec != "gif" else 20, codec), 81, 32, 48, 20
    )
    wanted = (
        [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 10, 11, 12, 13]
        if codec != "gif"
        else list(range(13))
    )
    assert clip.shape[1:] == (32, 48, 3) and clip.dtype == np.uint8
    assert numbers(clip) == wanted


@pytest.mark.parametrize("name, codec", [("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")])
def test_other_containers_are_read(tmp_path, name, codec):
    assert numbers(read_clip(write(tmp_path / name, greys(9), 16, codec), 81, 32, 48, 16)) == list(
        range(9)
    )


@pytest.mark.parametrize(
    "rate, wanted",
    [
        (8, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]),  # between two, the earlier
        (
            25,
            [0, 2, 3, 5, 6, 8, 9, 11, 12],
        ),  # i 25/16 to the nearest: 1.56, 3.125, 4.69, 6.25, 7.8, 9.4, 10.9, 12.5
        (32, [0, 2, 4, 6, 8]),
    ],
)
def test_rate_is_converted_by_nearest_frame(tmp_path, rate, wanted):
    clip = read_clip(write(tmp_path / "a.mp4", greys(13), rate), len(wanted), 32, 48, 16)
    assert numbers(clip) == wanted


def test_variable_frame_rate_goes_by_timestamps(tmp_path):
    file = write(tmp_path / "a.mkv", greys(6), pts=[500, 510, 750, 760, 1000, 1010])
    # times after the first: 0, .01, .25, .26, .5, .51 s; wanted: 0, .0625, .125 ...
    assert numbers(read_clip(file, 9, 32, 48, 16)) == [0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    "frames, wanted", [(17, 17), (18, 17), (20, 17), (21, 21), (30, 21), (3, 1)]
)
def test_clips_have_4k_plus_1_frames(tmp_path, frames, wanted):
    assert len(read_clip(write(tmp_path / "a.mp4", greys(frames)), 21, 32, 48, 16)) == wanted


@pytest.mark.parametrize(
    "name, form",
    [("a.avi", "avi"), ("a.wmv", "asf"), ("a.h264", "h264"), ("a.mpg", "mpeg"), ("a.ts", "mpegts"),
     ("a.flv", "flv"), ("a.m4v", "mp4"), ("a.m2ts", "mpegts"), ("a.3gp", "3gp"),
     ("a.mkv", "matroska")]
)  # fmt: skip
@pytest.mark.parametrize("rate", [16, 25])
def test_frames_that_are_stored_out_of_order_come_in_order(tmp_path, name, form, rate):
    """AVI and ASF have times of decoding alone, bare streams none, program streams one for several
    frames.
    """
    file = write(tmp_path / name, greys(14), rate, options=B_FRAMES, form=form)
    # of i / 16 s, the earlier of two
    nearest = [int(np.ceil(i * rate / 16 - 0.5)) for i in range(14)]
    assert numbers(read_clip(file, 9, 32, 48, 16)) == nearest[:9]
    assert numbers(read_clip(file, 5, 32, 48, 16)) == nearest[:5]


@pytest.mark.parametrize(
    "name, codec", [("a.avi", "mpeg4"), ("a.wmv", "wmv2"), ("a.mpg", "mpeg2video")]
)
def test_older_codecs_come_in_order(tmp_path, name, codec):
    file = write(tmp_path / name, greys(14), 25, codec)
    assert numbers(read_clip(file, 13, 32, 48, 25)) == list(range(13))


def test_frames_that_an_avi_leaves_out_are_shown_as_long_as_they_are(tmp_path):
    """Between frames 3 and 4 its clock has empty chunks."""
    pts = [0, 1000, 2000, 3000, 5000, 6000, 7000, 8000, 9000, 9500]
    file = write(tmp_path / "a.avi", greys(10), codec="mpeg4", pts=pts)
    assert numbers(read_clip(file, 9, 32, 48, 1)) == [0, 1, 2, 3, 3, 4, 5, 6, 7]


def test_recordings_joined_end_to_end_are_rejected_where_time_runs_back(tmp_path):
    file = write(tmp_path / "a.ts", greys(9), 16, options=B_FRAMES, form="mpegts")
    file.write_bytes(file.read_bytes() * 2)
    assert numbers(read_clip(file, 5, 32, 48, 16)) == list(range(5))
    with pytest.raises(ValueError, match=r"its times do not grow: .* at frame 9; write it anew"):
        read_clip(file, 17, 32, 48, 16)


def test_a_jump_in_time_is_rejected(tmp_path):
    file = write(tmp_path / "a.mkv", greys(6), pts=[0, 60, 120, 3600_000, 3600_060, 3600_120])
    with pytest.raises(ValueError, match=r"frame 2 is shown for 3599.88 s: its times jump"):
        read_clip(file, 17, 32, 48, 16)


def shown(times, durations, decoded=None):
    decoded = decoded or [None] * len(times)
    fraction = lambda t: None if t is None else Fraction(t)
    return [
        Shown(fraction(t), fraction(d), Fraction(length), i, None)
        for i, (t, d, length) in enumerate(zip(times, decoded, durations, strict=True))
    ]


@pytest.mark.parametrize(
    "times, durations, wanted",
    [
        ([None, None, None], [2, 3, 1], [0, 2, 5]),
        ([7, None, None, 10], [1, 1, 1, 1], [7, 8, 9, 10]),
        ([7, 9, None, 13], [0, 0, 0, 0], [7, 9, 11, 13]),
        ([-3, -2, None], [1, 1, 1], [-3, -2, -1]),
    ],
)
def test_a_frame_without_a_time_follows_the_one_before(times, durations, wanted):
    assert [time for time, *_ in by_display(shown(times, durations))] == wanted


def test_without_times_and_durations_nothing_is_made_up():
    with pytest.raises(Disorder, match="frame 1 has no time"):
        list(by_display(shown([0, None], [0, 0])))
    with pytest.raises(Disorder, match="frame 1 has no time"):
        list(by_decoding(shown([0, 1], [1, 1], [0, None])))


def test_equal_times_are_replaced_by_those_of_decoding(tmp_path, monkeypatch):
    file = write(tmp_path / "a.mp4", greys(9))
    decode = clips._decode
    for repeated in ({3: 2}, {0: 1}, {2: 1, 6: 5}):

        def spoiled(file, repeated=repeated):
            items = list(decode(file))
            return iter(
                [
                    item._replace(shown=items[repeated.get(i, i)].shown)
                    for i, item in enumerate(items)
                ]
            )

        monkeypatch.setattr(clips, "_decode", spoiled)
        assert numbers(read_clip(file, 9, 32, 48, 16)) == list(range(9))


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.flv"])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_muxer_that_took_one_time_for_the_other_does_no_harm(tmp_path, name, frames):
    """Times of decoding as those of display, at 8 frames a second: short clips end before a time
    runs back.
    """
    write(tmp_path / "a.mp4", greys(13), 8, options=B_FRAMES)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / name), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.pts = stream, packet.dts
                target.mux(packet)
    assert numbers(read_clip(tmp_path / name, frames, 32, 48, 16)) == [
        i // 2 for i in range(frames)
    ]


def test_a_bare_stream_without_a_rate_is_rejected(tmp_path):
    """FFmpeg would take it for 25 frames a second."""
    file = tmp_path / "a.hevc"
    quiet = {"x265-params": "vui-timing-info=0:log-level=none:pools=1"}
    write(file, greys(5, 64, 96), codec="libx265", options=quiet, form="hevc")
    with pytest.raises(ValueError, match="does not tell its frame rate"):
        read_clip(file, 5, 64, 96, 16)


def test_a_cover_picture_is_no_video(tmp_path):
    """The streams of an mp4 in this order: its cover, its video."""
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w") as container:
        cover = container.add_stream("png", rate=16)
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        cover.height, cover.width, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = Disposition.attached_pic
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        container.mux(
            cover.encode(
                av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            )
        )
        for frame in greys(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert numbers(read_clip(file, 9, 32, 48, 16)) == list(range(9))


def test_animations_are_read_or_named(tmp_path):
    """FFmpeg reads moving WebP from version 9 on, which PyAV 19 brings."""
    pictures = [Image.fromarray(picture) for picture in greys(5)]
    webp, avif = tmp_path / "a.webp", tmp_path / "a.avif"
    for file in (webp, avif):
        pictures[0].save(
            file, save_all=True, append_images=pictures[1:], duration=62, lossless=True
        )
    if av.__version__.startswith("18."):
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_clip(webp, 5, 32, 48, 16)
    else:
        assert numbers(read_clip(webp, 5, 32, 48, 16)) == list(range(5))
    with pytest.raises(ValueError, match="a picture or an animation in AVIF"):
        read_clip(avif, 5, 32, 48, 16)


def test_names_are_no_addresses(tmp_path, monkeypatch):
    """A name that FFmpeg would take for a protocol, and one that it would take for a pattern."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "a.mp4", greys(5))
    for name in ("concat:a.mp4|a.mp4", "http:b.mp4", "50%d.mp4", "-i.mp4"):
        Path(name).write_bytes(file.read_bytes())
        assert numbers(read_clip(name, 5, 32, 48, 16)) == list(range(5))


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.integers(0, 100),
    st.sampled_from([8, 16, 24]),
    st.booleans(),
)
def test_resampling_is_the_nearest_frame_of_every_instant(gaps, start, fps, known):
    times = start + np.cumsum([0, *gaps])
    shown = 40 if known else 0
    frames = [(int(t) * MS, shown * MS, i) for i, t in enumerate(times)]
    end = int(times[-1]) + (shown or gaps[-1])
    instants, i = [], 0
    while start * MS + Fraction(i, fps) < end * MS:
        instants.append(start * MS + Fraction(i, fps))
        i += 1
    nearest = [
        min(range(len(times)), key=lambda j: (abs(int(times[j]) * MS - t), j)) for t in instants
    ]
    assert list(resample(frames, fps)) == nearest


def test_resampling_of_little_or_disordered_input():
    assert list(resample([], 16)) == []
    assert list(resample([(Fraction(3), Fraction(0), "a")], 16)) == ["a"]
    for times in ([0, 1, 1, 2], [0, 2, 1, 3]):  # one that repeats or runs back is never left out
        frames = [(Fraction(t, 16), Fraction(1, 16), i) for i, t in enumerate(times)]
        with pytest.raises(Disorder, match="do not grow"):
            list(resample(frames, 16))


@pytest.mark.parametrize(
    "rotation, wanted", [(0, "RGBW"), (90, "GWRB"), (-90, "BRWG"), (180, "WBGR")], ids=str
)
def test_rotation_in_the_file_is_obeyed(tmp_path, rotation, wanted):
    """Counter-clockwise: at 90 degrees the right column becomes the top row."""
    frames = np.broadcast_to(quadrants(32, 64), (5, 32, 64, 3))
    height, width = (64, 32) if rotation % 180 else (32, 64)
    clip = read_clip(write(tmp_path / "a.mp4", frames, rotation=rotation), 5, height, width, 16)
    assert corners(clip) == wanted


def test_a_phone_held_upright_is_seen_upright(tmp_path):
    """The display matrix written by hand: (x, y) of the file is seen at (h - y, x), a quarter turn
    clockwise.
    """
    file = write(tmp_path / "a.mp4", np.broadcast_to(quadrants(32, 64), (5, 32, 64, 3)))
    data = bytearray(file.read_bytes())
    at = (
        data.index(b"tkhd") + 4 + 40
    )  # version and flags, times, id, duration, layer and volume before the matrix
    matrix = np.array([0, 1, 0, -1, 0, 0, 32, 0, 1], np.int64) * ([1 << 16, 1 << 16, 1 << 30] * 3)
    identity = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1], np.int64) * ([1 << 16, 1 << 16, 1 << 30] * 3)
    assert data[at : at + 36] == identity.astype(">i4").tobytes()
    data[at : at + 36] = matrix.astype(">i4").tobytes()
    file.write_bytes(data)
    assert corners(read_clip(file, 5, 64, 32, 16)) == "BRWG"


def test_odd_turns_are_named(tmp_path):
    file = write(tmp_path / "a.mp4", greys(5), rotation=40)
    with pytest.raises(ValueError, match=r"turned by (39|40) degrees"):
        read_clip(file, 5, 32, 48, 16)


def test_stretched_pixels_are_seen_as_wide_as_they_are(tmp_path):
    """32 x 32 pixels, each twice as wide as high, are a picture of 2 : 1: a square middle cuts the
    sides off.
    """
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    frames[:, :, 8:24] = 255
    clip = read_clip(write(tmp_path / "a.mp4", frames, aspect=Fraction(2)), 5, 32, 32, 16)
    assert clip[:, :, 1:-1].min() > 240  # the kernel sees a little of what was cut off


@pytest.mark.parametrize("h, w", [(61, 97), (97, 61), (33, 33), (480, 270)])
@pytest.mark.parametrize("height, width", [(32, 48), (48, 32), (40, 40)])
def test_fitting_keeps_the_aspect_and_the_middle(h, w, height, width):
    """A picture whose value is linear in x (red) and y (green): at every pixel it says where it was
    taken from.
    """
    y, x = np.mgrid[:h, :w] + 0.5  # centres
    picture = np.stack([255 * x / w, 255 * y / h, 0 * x], -1).round().astype(np.uint8)
    fitted = fit_picture(picture, height, width, Fraction(1)).astype(float)
    scale = min(w / width, h / height)
    wanted_x = (w / 2 + (np.arange(width) + 0.5 - width / 2) * scale) / w * 255
    wanted_y = (h / 2 + (np.arange(height) + 0.5 - height / 2) * scale) / h * 255
    inner = slice(3, -3)  # at the edges of the picture the kernel sees less than its support
    np.testing.assert_allclose(
        fitted[inner, inner, 0], np.tile(wanted_x, (height, 1))[inner, inner], atol=1.1
    )
    np.testing.assert_allclose(
        fitted[inner, inner, 1], np.tile(wanted_y[:, None], (1, width))[inner, inner], atol=1.1
    )


def test_shrinking_is_antialiased():
    """Stripes finer than a pixel become grey instead of a moire."""
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (64, 64, 3))
    fitted = fit_picture(stripes, 16, 32, Fraction(1))[:, 2:-2]
    assert abs(fitted.astype(int) - 127).max() < 12


def damage(tmp_path):
    """Files that are no use, by name, with the reason that must be given."""
    whole = write(
        tmp_path / "whole.mp4", np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), np.uint8)
    )
    data = whole.read_bytes()
    whole.unlink()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mkv").write_text("no video")
    (tmp_path / "holes.mp4").write_bytes(
        data[:200] + bytes(len(data) // 2) + data[200 + len(data) // 2 :]
    )
    with wave.open(str(tmp_path / "sound.avi"), "wb") as sound:
        (
            sound.setnchannels(1),
            sound.setsampwidth(2),
            sound.setframerate(8000),
            sound.writeframes(bytes(8000)),
        )
    return {
        "cut.mp4": "cannot be decoded",
        "empty.mp4": "cannot be decoded",
        "text.mkv": "cannot be decoded",
        "holes.mp4": "cannot be decoded|no frame|damaged",
        "sound.avi": "no video stream",
        "absent.mp4": "cannot be decoded after 0 frames .No such file",
    }


def test_bad_files_have_a_reason(tmp_path):
    for name, reason in damage(tmp_path).items():
        with pytest.raises(ValueError, match=reason):
            read_clip(tmp_path / name, 17, 32, 48, 16)


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.avi", "mpeg4")])
def test_half_a_file_is_at_most_half_a_clip(tmp_path, name, codec):
    """These have no index at the end, so half a file still opens; noise, so its bytes are spread
    evenly.
    """
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 96, 3), np.uint8)
    file = write(tmp_path / name, noise, codec=codec)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    if codec == "libx264":  # cut between two frames as far as the decoder can tell
        assert len(read_clip(file, 17, 64, 96, 16)) in (5, 9)
    else:
        with pytest.raises(ValueError, match=r"damaged after \d frames"):
            read_clip(file, 17, 64, 96, 16)


def test_a_real_video():
    """Live action of 1280 x 720 at 20 frames a second: frame i of the clip is what was seen at
    i / 16 s.
    """
    (package,) = importlib.util.find_spec("imageio").submodule_search_locations
    file = Path(package) / "resources" / "images" / "cockatoo.mp4"
    clip = read_clip(file, 37, 96, 160, 16)
    assert clip.shape == (37, 96, 160, 3) and clip.dtype == np.uint8
    with av.open(str(file)) as container:
        seen = {
            i: f.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()  # untagged, and HD
            for i, f in zip(range(46), container.decode(video=0), strict=False)
        }
    for i in (0, 4, 36):  # at multiples of 1/4 s both have a frame
        middle = Image.fromarray(seen[i * 20 // 16]).crop((40, 0, 1240, 720))
        wanted = np.asarray(middle.resize((160, 96), Image.Resampling.BICUBIC))
        # the frame beside is off by 4 at least
        assert np.abs(clip[i].astype(int) - wanted).mean() < 0.05
    assert np.abs(clip[36].astype(int) - clip[0]).mean() > 5  # it moves
