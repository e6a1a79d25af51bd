"""How the pixels and the latents of Wan 2.1 correspond. No jax in here, as in `choices`."""

import math

SPACE, TIME = 8, 4  # pixels per latent row or column, frames per latent frame after the first
TOKEN = 2  # latent rows or columns of a token
FPS = 16  # of all Wan 2.1 videos


def latent_frames(frames: int) -> int:
    """Latent frames of a video of 4k + 1 frames; of another number, those of the longest such
    beginning.
    """
    return 1 + (frames - 1) // TIME


def pixel_frames(latents: int) -> int:
    """Frames of a video of so many latent frames; also the first frame that the next latent frame
    shows, from 0.
    """
    return TIME * (latents - 1) + 1 if latents else 0


def fit_size(image_height: int, image_width: int, max_area: int) -> tuple[int, int]:
    """Height and width in pixels of a video of about the picture's shape and of at most `max_area`
    pixels.

    Both are multiples of 16, a token's side. Wan 2.1's areas are 480 * 832 and 720 * 1280.

    Raises:
        ValueError: if the picture is so long or the area so small that a side has no token.
    """
    # Wan 2.1's rule in whole numbers: its floating point makes 464 rows of a picture that is 832 x
    # 480 already.
    token = TOKEN * SPACE
    height, width = (
        math.isqrt(max_area * along // across) // token * token
        for along, across in ((image_height, image_width), (image_width, image_height))
    )
    if not height * width:
        raise ValueError(
            f"a picture of {image_width} x {image_height} pixels does not fit into {max_area} "
            "pixels with at "
            f"least {token} on each side: crop the picture or use a larger area"
        )
    return height, width
