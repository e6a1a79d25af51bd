"""Pictures as phones, cameras, scanners and programs write them; expected is what they were made
from.
"""

import io
import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from salt_jax.data.pictures import read_picture
from salt_jax.errors import UserError

RED = (200, 40, 40)


def quarter(height=16, width=32):
    """Red, green above blue, white."""
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[: height // 2, : width // 2] = (255, 0, 0)
    picture[: height // 2, width // 2 :] = (0, 255, 0)
    picture[height // 2 :, : width // 2] = (0, 0, 255)
    return picture


# Exif 2.32, tag 274: where row 0 and column 0 of what is stored are seen.
TURNED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_turns_and_mirrors(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(
        form, {}
    )
    Image.fromarray(quarter()).save(tmp_path / "a", form, exif=exif, **lossless)
    picture = read_picture(tmp_path / "a")
    wanted = TURNED[orientation](quarter())
    assert picture.shape == wanted.shape and np.abs(picture.astype(int) - wanted).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_greys_are_divided_by_257(tmp_path, form):
    values = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    Image.fromarray(values).save(tmp_path / "a", form)
    picture = read_picture(tmp_path / "a")
    assert (picture == picture[..., :1]).all()
    np.testing.assert_array_equal(picture[..., 0], np.rint(values / 257))


@pytest.mark.parametrize("name, form", [("a.png", "rgb48be"), ("a.tiff", "rgb48le")])
def test_16_bit_colours(tmp_path, name, form):
    """Written by FFmpeg."""
    values = np.random.default_rng(0).integers(0, 65536, (8, 12, 3), np.uint16)
    frame = av.VideoFrame.from_ndarray(values, format="rgb48le").reformat(format=form)
    with av.open(str(tmp_path / name), "w", format="image2") as container:
        stream = container.add_stream(name[2:], rate=1)
        stream.height, stream.width, stream.pix_fmt = 8, 12, form
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.abs(read_picture(tmp_path / name) - values / 257).max() <= 1


def test_floating_point_runs_from_0_to_1_or_is_refused(tmp_path):
    values = np.linspace(0, 1, 96, dtype=np.float32).reshape(8, 12)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(
        read_picture(tmp_path / "a.tiff")[..., 0], np.rint(values * 255.0)
    )
    for wrong in (values * 255, values - 1, values * np.nan):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / "a.tiff")
        with pytest.raises(
            UserError, match=r"a.tiff \(its floating point greys run from .*; give one in PNG"
        ):
            read_picture(tmp_path / "a.tiff")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="its 16-bit greys run from 70000 to 70000"):
        read_picture(tmp_path / "a.tiff")


def clear_left(mode):
    """Green that is not to be seen at the left, half seen red in the middle, red at the right."""
    picture = np.zeros((4, 12, 4), np.uint8)
    picture[:, :4], picture[:, 4:8], picture[:, 8:] = (0, 255, 0, 0), (*RED, 128), (*RED, 255)
    return Image.fromarray(picture).convert(mode)


@pytest.mark.parametrize(
    "form, mode", [("PNG", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("PNG", "LA")]
)
def test_what_is_transparent_is_white(tmp_path, form, mode):
    image = clear_left(mode)
    image.save(tmp_path / "a", form, **({"lossless": True} if form == "WEBP" else {}))
    colour = np.array(image.convert("RGB").getpixel((10, 0)))
    wanted = np.stack([np.full(3, 255), 255 + (colour - 255) * 128 / 255, colour])
    assert np.abs(read_picture(tmp_path / "a")[0, [1, 5, 9]] - wanted).max() <= 0.5


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "I;16"])
def test_a_colour_that_counts_as_transparent_is_white(tmp_path, mode):
    """PNG's tRNS for palettes, greys and colours; GIF's transparent entry."""
    if mode == "I;16":
        image, key = Image.fromarray(np.tile(np.array([0, 65535, 257 * 51], np.uint16), (4, 4))), 0
    else:
        pixels = np.tile(np.array([[0, 0, 0], [255, 255, 255], [51, 51, 51]], np.uint8), (4, 4, 1))
        image = Image.fromarray(pixels).convert(mode)
        key = {"P": image.convert("P").getpixel((0, 0)), "L": 0, "RGB": (0, 0, 0)}[mode]
    for form in ("PNG", "GIF") if mode == "P" else ("PNG",):
        image.save(tmp_path / "a", form, transparency=key)
        assert read_picture(tmp_path / "a")[0, :3, 0].tolist() == [255, 255, 51]


def p3_profile():
    """The sRGB profile with the colorants of Display P3, SMPTE EG 432-1, adapted to D50 as ICC
    wants.
    """
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    colorants = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for i in range(struct.unpack(">I", data[128:132])[0]):
        name, at, _ = struct.unpack(">4sII", data[132 + 12 * i : 144 + 12 * i])
        if name in colorants:
            data[at + 8 : at + 20] = struct.pack(
                ">3i", *(round(65536 * x) for x in colorants[name])
            )
    return bytes(data)


def to_p3(rgb):
    """sRGB -> Display P3, both with sRGB's curve and D65: by their primaries' matrices."""

    def matrix(red, green, blue, white=(0.3127, 0.3290)):
        xyz = lambda xy: np.array([xy[0] / xy[1], 1, (1 - xy[0] - xy[1]) / xy[1]])
        columns = np.stack([xyz(red), xyz(green), xyz(blue)], 1)
        return columns * np.linalg.solve(columns, xyz(white))

    value = np.array(rgb) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    srgb = matrix((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
    p3 = matrix((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
    linear = np.linalg.solve(p3, srgb @ linear)
    return np.rint(
        255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    )


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("colour", [RED, (40, 200, 40), (128, 128, 128), (180, 120, 90)])
def test_profiles_are_followed(tmp_path, form, colour):
    stored = Image.new("RGB", (32, 16), tuple(int(value) for value in to_p3(colour)))
    stored.save(tmp_path / "a", form, icc_profile=p3_profile(), quality=100)
    assert np.abs(read_picture(tmp_path / "a").astype(int) - colour).max() <= 4


def test_profiles_of_transparent_and_grey_pictures(tmp_path):
    stored = Image.new("RGBA", (8, 4), (*(int(value) for value in to_p3(RED)), 128))
    stored.save(tmp_path / "a.png", icc_profile=p3_profile())
    wanted = 255 + (np.array(RED) - 255) * 128 / 255
    assert np.abs(read_picture(tmp_path / "a.png") - wanted).max() <= 2
    Image.new("L", (8, 4), 100).save(tmp_path / "b.jpg", icc_profile=p3_profile())
    assert np.abs(read_picture(tmp_path / "b.jpg").astype(int) - 100).max() <= 1
    Image.new("RGB", (8, 4)).save(
        tmp_path / "c.png", icc_profile=b"no profile at all, of no colour space"
    )
    with pytest.raises(UserError, match=r"c.png \(its colour profile does not fit it"):
        read_picture(tmp_path / "c.png")


def test_cmyk_is_no_negative(tmp_path):
    """Red is no cyan, all magenta and yellow; Adobe's JPEG stores the complement."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.tiff")
    for name in ("a.jpg", "a.tiff"):
        assert np.abs(read_picture(tmp_path / name).astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr"])
def test_other_modes(tmp_path, mode):
    Image.new("RGB", (8, 4), "white").convert(mode).save(tmp_path / "a.tiff")
    assert (read_picture(tmp_path / "a.tiff") == 255).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_and_pages_are_refused(tmp_path, form):
    pages = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "white")]
    pages[0].save(tmp_path / "a", form, save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match="it has 3 frames or pages"):
        read_picture(tmp_path / "a")


def test_a_phones_picture_with_another_behind_it_is_its_first(tmp_path):
    pages = [Image.new("RGB", (16, 16), colour) for colour in (RED, "blue")]
    pages[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pages[1:], quality=100)
    assert np.abs(read_picture(tmp_path / "a.jpg").astype(int) - RED).max() <= 2


def with_cicp(primaries, curve):
    """A PNG with a chunk cICP, PNG 3rd edition, 11.3.2.6, behind its header."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), RED).save(file, "PNG")
    chunk = b"cICP" + bytes([primaries, curve, 0, 1])
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return file.getvalue()[:33] + chunk + file.getvalue()[33:]


@pytest.mark.parametrize(
    "primaries, curve, reason",
    [
        (9, 16, "it is HDR .PQ."),
        (9, 18, "it is HDR .HLG."),
        (12, 13, "numbers 12 and 13 of ITU-T H.273"),
    ],
)
def test_hdr_and_wide_gamut_by_number_are_refused(tmp_path, primaries, curve, reason):
    (tmp_path / "a.png").write_bytes(with_cicp(primaries, curve))
    file = io.BytesIO()
    Image.new("RGB", (16, 16), RED).save(file, "AVIF")
    data = bytearray(file.getvalue())
    at = data.index(b"colrnclx") + 8
    data[at : at + 4] = struct.pack(">HH", primaries, curve)
    (tmp_path / "a.avif").write_bytes(data)
    for name in ("a.png", "a.avif"):
        with pytest.raises(UserError, match=reason):
            read_picture(tmp_path / name)
    (tmp_path / "srgb.png").write_bytes(with_cicp(1, 13))
    assert (read_picture(tmp_path / "srgb.png") == RED).all()


def test_files_that_are_no_picture_have_one_sentence(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF"):
        noise.save(tmp_path / f"cut.{form}", form)
        data = (tmp_path / f"cut.{form}").read_bytes()
        (tmp_path / f"cut.{form}").write_bytes(data[: len(data) // 2])
    bomb = io.BytesIO()
    Image.new("1", (1, 1)).save(bomb, "PNG")
    head = bytearray(bomb.getvalue())
    (tmp_path / "folder").mkdir()
    for name, content in {
        "empty.png": b"",
        "a.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "a.svg": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "a.pdf": b"%PDF-1.7\n",
        "a.txt": b"A cat.",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, size in {"large.png": 12_000, "bomb.png": 60_000}.items():
        head[16:24] = struct.pack(">II", size, size)
        head[29:33] = struct.pack(">I", zlib.crc32(head[12:29]))
        (tmp_path / name).write_bytes(head)
    reasons = {
        "empty.png": "it is empty",
        "a.heic": "it is HEIC",
        "a.svg": "it is SVG",
        "a.pdf": "it is a PDF",
        "a.txt": "it is of no kind that is read",
        "large.png": "it has more than",
        "bomb.png": "it has more than",
        "folder": "Is a directory",
        "absent.png": "No such file",
        "a\0b": "null byte",
    } | {f"cut.{form}": r"\(." for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF")}
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as refused:
            read_picture(tmp_path / name)
        message = str(refused.value)
        assert (
            message.startswith(f"cannot read the picture {tmp_path / name} (")
            and "\n" not in message
        )
        assert message.endswith("give one in PNG or JPEG, in sRGB")


def test_long_pictures_are_read(tmp_path):
    Image.new("RGB", (10_000, 1), RED).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").shape == (1, 10_000, 3)
