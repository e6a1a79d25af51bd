"""Real files are written with PyAV; what must come out is known from how they were made."""

import importlib.util
import json
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from salt_jax.data.video_folder import find_videos, fit_picture, read_clip, read_prompts, resample
from salt_jax.errors import UserError

MS = Fraction(1, 1000)


def write(path, frames, rate=16, codec="libx264", pts=None, rotation=0, aspect=None):
    """A video of uint8 [T, H, W, 3]; `pts` in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "1"} if codec == "libx264" else {})
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


def greys(count, height=32, width=48):
    """Frame i is grey of level 10 + 5 i: which frame a decoded one is can be read off it."""
    levels = (10 + 5 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(clip):
    """The numbers of the frames of a video of `greys`."""
    return np.round((clip.mean((1, 2, 3)) - 10) / 5).astype(int).tolist()


def quadrants(height, width):
    """Red, green above blue, white: what is where after turning and cutting can be read off the corners."""
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


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.MOV", "libx264"), ("a.gif", "gif")]
)
def test_frames_at_the_wanted_rate_are_taken_as_they_are(tmp_path, name, codec):
    clip = read_clip(write(tmp_path / name, greys(14), 16 if codec != "gif" else 20, codec), 81, 32, 48, 20)
    wanted = [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 10, 11, 12, 13] if codec != "gif" else list(range(13))
    assert clip.shape[1:] == (32, 48, 3) and clip.dtype == np.uint8
    assert numbers(clip) == wanted


@pytest.mark.parametrize("name, codec", [("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")])
def test_other_containers_are_read(tmp_path, name, codec):
    assert numbers(read_clip(write(tmp_path / name, greys(9), 16, codec), 81, 32, 48, 16)) == list(range(9))


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


@pytest.mark.parametrize("frames, wanted", [(17, 17), (18, 17), (20, 17), (21, 21), (30, 21), (3, 1)])
def test_clips_have_4k_plus_1_frames(tmp_path, frames, wanted):
    assert len(read_clip(write(tmp_path / "a.mp4", greys(frames)), 21, 32, 48, 16)) == wanted


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
    nearest = [min(range(len(times)), key=lambda j: (abs(int(times[j]) * MS - t), j)) for t in instants]
    assert list(resample(frames, fps)) == nearest


def test_resampling_of_little_or_disordered_input():
    assert list(resample([], 16)) == []
    assert list(resample([(Fraction(3), Fraction(0), "a")], 16)) == ["a"]
    times = [0, 1, 1, 0, 2, 3]  # sixteenths; the second 1 and 0 again do not grow
    frames = [(Fraction(t, 16), Fraction(1, 16), i) for i, t in enumerate(times)]
    assert list(resample(frames, 16)) == [0, 1, 4, 5]


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
    """The display matrix written by hand: (x, y) of the file is seen at (h - y, x), a quarter turn clockwise."""
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
    """32 x 32 pixels, each twice as wide as high, are a picture of 2 : 1: a square middle cuts the sides off."""
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    frames[:, :, 8:24] = 255
    clip = read_clip(write(tmp_path / "a.mp4", frames, aspect=Fraction(2)), 5, 32, 32, 16)
    assert clip[:, :, 1:-1].min() > 240  # the kernel sees a little of what was cut off


@pytest.mark.parametrize("h, w", [(61, 97), (97, 61), (33, 33), (480, 270)])
@pytest.mark.parametrize("height, width", [(32, 48), (48, 32), (40, 40)])
def test_fitting_keeps_the_aspect_and_the_middle(h, w, height, width):
    """A picture whose value is linear in x (red) and y (green): at every pixel it says where it was taken from."""
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
    (tmp_path / "holes.mp4").write_bytes(data[:200] + bytes(len(data) // 2) + data[200 + len(data) // 2 :])
    with wave.open(str(tmp_path / "sound.avi"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000), sound.writeframes(bytes(8000))
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
    """These have no index at the end, so half a file still opens; noise, so its bytes are spread evenly."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 96, 3), np.uint8)
    file = write(tmp_path / name, noise, codec=codec)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    if codec == "libx264":  # cut between two frames as far as the decoder can tell
        assert len(read_clip(file, 17, 64, 96, 16)) in (5, 9)
    else:
        with pytest.raises(ValueError, match=r"damaged after \d frames"):
            read_clip(file, 17, 64, 96, 16)


def folder(tmp_path, **captions):
    """Empty files that look like videos, each with its caption beside it."""
    for name, caption in captions.items():
        (tmp_path / f"{name}.mp4").touch()
        if caption is not None:
            (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    return tmp_path


def told(videos):
    return [(v.name, v.caption, v.problem) for v in videos]


def test_captions_beside_videos(tmp_path):
    folder(tmp_path, b=" Ein Kätzchen.\n", a="A cat.", bare=None, blank=" \n")
    (tmp_path / "more").mkdir()
    folder(tmp_path / "more", c="More.")
    for hidden in (".hidden.mp4", "._a.mp4", "picture.png"):
        (tmp_path / hidden).touch()
    (tmp_path / "latin.webm").touch()
    (tmp_path / "latin.txt").write_bytes("Kätzchen".encode("latin-1"))
    found = find_videos(tmp_path, None)
    assert told(found)[:4] == [
        ("a.mp4", "A cat.", ""),
        ("b.mp4", "Ein Kätzchen.", ""),
        ("bare.mp4", "", "no caption: there is no bare.txt beside it"),
        ("blank.mp4", "", "no caption: blank.txt is empty"),
    ]
    assert found[4].name == "latin.webm" and "cannot be read as UTF-8" in found[4].problem
    assert told(found)[5:] == [("more/c.mp4", "More.", "")] and found[5].file.is_file()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("file_column, caption_column", [("file", "caption"), ("path", "text")])
def test_captions_in_a_table(tmp_path, kind, file_column, caption_column):
    folder(tmp_path, a=None, b=None, c=None)
    rows = [
        ("b.mp4", 'A "dog", running'),
        ("a.mp4", "Zwei\nZeilen ä"),
        ("b.mp4", "again"),
        ("x.mp4", "gone"),
        ("c.mp4", ""),
    ]
    table = tmp_path / f"captions.{kind}"
    if kind == "csv":
        quoted = ['"' + caption.replace('"', '""') + '"' for _, caption in rows]
        lines = [f"{name},7,{caption}" for (name, _), caption in zip(rows, quoted, strict=True)]
        table.write_text("\n".join([f"{file_column},seconds,{caption_column}", *lines]), encoding="utf-8-sig")
    else:
        lines = [json.dumps({file_column: name, caption_column: caption}) for name, caption in rows]
        table.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "late.mkv").touch()
    assert told(find_videos(tmp_path, table)) == [
        ("b.mp4", 'A "dog", running', ""),
        ("a.mp4", "Zwei\nZeilen ä", ""),
        ("b.mp4", "again", ""),
        ("x.mp4", "gone", f"{tmp_path / 'x.mp4'} does not exist"),
        ("c.mp4", "", f"no caption: its '{caption_column}' in captions.{kind} is empty"),
        ("late.mkv", "", f"no caption: not in captions.{kind}"),
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "name,words\na.mp4,hello", r"columns \['name', 'words'\]; one must be called file or path"),
        ("t.csv", "file,words\na.mp4,hello", "one must be called caption or text"),
        ("t.jsonl", '{"file": "a.mp4", "text": "x"}\n{"file"', "line 2 of .*t.jsonl is not JSON"),
        ("t.jsonl", '["a.mp4"]', "line 1 of .*t.jsonl is no JSON object"),
        ("t.json", "[]", "must end in .csv or .jsonl"),
        ("t.csv", b"file,text\na.mp4,\xff", "t.csv is not UTF-8"),
        ("t.csv", None, "cannot read .*t.csv"),
        ("t.csv", "file,text\nx.mp4,hello", r"no video with a caption \(x.mp4: .* does not exist\)"),
    ],
)
def test_unusable_tables_are_named(tmp_path, name, content, message):
    folder(tmp_path, a=None)
    table = tmp_path / name
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        find_videos(tmp_path, table)


def test_folders_without_videos_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no video with a caption; it needs files ending in .mp4"):
        find_videos(tmp_path, None)
    with pytest.raises(UserError, match="there is no folder"):
        find_videos(tmp_path / "nowhere", None)


def test_prompts_of_every_kind(tmp_path):
    wanted = ["A cat, asleep.", "Ein Kätzchen"]
    (tmp_path / "p.txt").write_text("A cat, asleep.\r\n\n  Ein Kätzchen \n", encoding="utf-8")
    (tmp_path / "p.csv").write_text('uuid,prompt\n1,"A cat, asleep."\n2,\n3,Ein Kätzchen\n', encoding="utf-8")
    rows = [{"caption": wanted[0]}, {"other": 1}, {"caption": wanted[1]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("p.txt", "p.csv", "p.jsonl"):
        assert read_prompts(tmp_path / name) == wanted
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(UserError, match="has no prompt"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "absent.txt")


def test_a_real_video():
    """Live action of 1280 x 720 at 20 frames a second: frame i of the clip is what was seen at i / 16 s."""
    (package,) = importlib.util.find_spec("imageio").submodule_search_locations
    file = Path(package) / "resources" / "images" / "cockatoo.mp4"
    clip = read_clip(file, 37, 96, 160, 16)
    assert clip.shape == (37, 96, 160, 3) and clip.dtype == np.uint8
    with av.open(str(file)) as container:
        seen = {
            i: f.to_ndarray(format="rgb24")
            for i, f in zip(range(46), container.decode(video=0), strict=False)
        }
    for i in (0, 4, 36):  # at multiples of 1/4 s both have a frame
        middle = Image.fromarray(seen[i * 20 // 16]).crop((40, 0, 1240, 720))
        wanted = np.asarray(middle.resize((160, 96), Image.Resampling.BICUBIC))
        assert np.abs(clip[i].astype(int) - wanted).mean() < 0.05  # the frame beside is off by 4 at least
    assert np.abs(clip[36].astype(int) - clip[0]).mean() > 5  # it moves
