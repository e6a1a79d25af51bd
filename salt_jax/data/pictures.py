"""A picture file becomes pixels as they are meant to be seen: turned, in sRGB, of 8 bits, over
white.
"""

import re
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from salt_jax.data.frames import HDR_CURVES, SDR_CURVES, SDR_PRIMARIES, over_background, to_srgb
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path

HEAD = 1 << 16  # bytes in which a file says what it is
FOREIGN = {
    rb"^....ftyp(hei|hev|mif1|msf1)": "it is HEIC",
    rb"^%PDF": "it is a PDF",
    rb"^%!PS": "it is PostScript",
    rb"^\s*(<\?xml.*)?<svg": "it is SVG",
    rb"^\xff\x0a|^....JXL ": "it is JPEG XL",
}
# ITU-T H.273: primaries and transfer of PNG, a byte each, and of AVIF, two each.
CODE_POINTS = {
    "PNG": rb"cICP(?P<primaries>.)(?P<curve>.)",
    "AVIF": rb"colrnclx(?P<primaries>..)(?P<curve>..)",
}


def read_picture(path: str | AnyPath) -> np.ndarray:
    """uint8 sRGB [H, W, 3]: turned as EXIF says, 16 bits divided by 257, profiles followed, over
    white.

    Raises:
      UserError: there is no such file, or none that can be shown rightly.
    """
    head = b""
    try:
        with warnings.catch_warnings(), as_path(path).open("rb") as file:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            head = file.read(HEAD)
            with Image.open(file) as image:
                return _pixels(image, head)
    except Exception as error:  # whatever a file does to a decoder
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
            reason = f"it has more than {Image.MAX_IMAGE_PIXELS} pixels"
        elif isinstance(error, UnidentifiedImageError):
            reason = next(
                (what for mark, what in FOREIGN.items() if re.match(mark, head, re.DOTALL)), ""
            )
            reason = reason or ("it is of no kind that is read" if head else "it is empty")
        reason = reason or type(error).__name__
        raise UserError(
            f"cannot read the picture {path} ({reason}); give one in PNG or JPEG, in sRGB"
        ) from error


def _pixels(image: Image.Image, head: bytes) -> np.ndarray:
    """Raises ValueError with the reason why it cannot be shown rightly, or what the decoder
    raises.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO of a phone starts with its picture
        raise ValueError(f"it has {frames} frames or pages")
    profile = image.info.get("icc_profile")
    if not profile:
        _refuse_hdr(str(image.format), head)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _in_8_bits(image)
    clear = image.has_transparency_data
    if clear and not profile:
        return over_background(np.asarray(image.convert("RGBA")))
    colours = image.convert("RGB") if clear or image.mode not in ("L", "CMYK", "LAB") else image
    if profile:
        colours = _follow(colours, image, profile)
    pixels = np.asarray(colours.convert("RGB"))
    if not clear:
        return pixels
    return over_background(np.dstack([pixels, np.asarray(image.convert("RGBA"))[..., 3]]))


def _follow(colours: Image.Image, image: Image.Image, profile: bytes) -> Image.Image:
    """In sRGB. A profile of RGB also belongs to greys, of which many pictures have one."""
    space = profile[16:20]  # ICC.1:2010, 7.2.6
    if space == b"GRAY" and image.mode in ("1", "L", "LA"):
        return to_srgb(image.convert("L"), profile)
    return to_srgb(
        colours.convert("RGB") if space == b"RGB " and colours.mode == "L" else colours, profile
    )


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits, and floating point in [0, 1]."""
    values = np.asarray(image).astype(np.float64)
    top, kind = (1.0, "floating point") if image.mode == "F" else (65535.0, "16-bit")
    if not (values.min() >= 0 and values.max() <= top):  # NaN too
        raise ValueError(
            f"its {kind} greys run from {values.min():g} to {values.max():g}, not from 0 to {top:g}"
        )
    greys = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        greys.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return greys


def _refuse_hdr(form: str, head: bytes) -> None:
    """Pillow does not look at these numbers."""
    found = re.search(CODE_POINTS[form], head, re.DOTALL) if form in CODE_POINTS else None
    if found:
        primaries, curve = (int.from_bytes(found[name], "big") for name in ("primaries", "curve"))
        if curve in HDR_CURVES:
            raise ValueError(f"it is HDR ({HDR_CURVES[curve]})")
        if curve not in SDR_CURVES or primaries not in SDR_PRIMARIES:
            raise ValueError(
                f"its colours are numbers {primaries} and {curve} of ITU-T H.273, not BT.709's"
            )
