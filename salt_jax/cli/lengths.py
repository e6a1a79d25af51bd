"""Length of a video of launch.sample, the frames it continues, and its prompt switches.

No jax in here.
"""

import math
from collections.abc import Callable

import numpy as np

from salt_jax.cli import sample_flags as f
from salt_jax.cli.parsing import refuse_frames
from salt_jax.data.clips import read_ending
from salt_jax.errors import UserError
from salt_jax.io.files import as_path
from salt_jax.models.cache_policy import MAX_FRAMES, CachePolicy
from salt_jax.models.latent_size import FPS, SPACE, TIME, latent_frames, pixel_frames
from salt_jax.moving_shapes import shapes
from salt_jax.rollout.settings import Switch

FRAMES = 81  # usual ones of Wan


def read_lengths(
    wan: bool, trained: int | None, policy: CachePolicy | None, place: tuple[int, int]
) -> tuple[int, np.ndarray | None]:
    """Latent frames of the video, and the frames it continues, uint8 [T, H, W, 3] of whole chunks.

    A length that is not given is what splits into chunks nearest below the usual length, behind the
    prefix.

    Args:
      wan: frames are Wan 2.1's; otherwise a frame is a latent frame.
      trained: latent frames in training, None: the usual ones of Wan.
      place: rows and columns of a latent frame.

    Raises:
      UserError: --frames has no latent, does not split into chunks, or has more frames than
        positions.
    """
    wanted, shown = f.FRAMES.value, shown_by(wan)
    if f.SECONDS.value and policy:
        wanted = shown(frames_of_seconds(wan, policy, f.SECONDS.value))
    if wanted and wan:
        refuse_frames(wanted)
    frames = wanted and (latent_frames(wanted) if wan else wanted)
    if frames:
        refuse_length(frames, policy, shown)
    given, prefix = 0, None
    if f.PREFIX.value and policy:
        given, prefix = read_prefix(wan, policy, place)
        if frames and frames <= given:
            raise UserError(
                f"--frames={wanted} is the length of the whole video and --prefix has "
                f"{len(prefix)} frames; give at least {shown(given + policy.chunk)}"
            )
    if not frames:
        frames = given + (trained or latent_frames(FRAMES))
        if policy:
            frames = max(policy.nearest(frames)[0], given + policy.chunk * bool(given))
        refuse_length(frames, policy, shown)
    return frames, prefix


def frames_of_seconds(wan: bool, policy: CachePolicy, seconds: float) -> int:
    """Latent frames of the shortest video of whole chunks that shows so many seconds."""
    frames = math.ceil(seconds * (FPS if wan else shapes.FPS))
    return policy.nearest(latent_frames(frames + -(frames - 1) % TIME) if wan else frames)[1]


def shown_by(wan: bool) -> Callable[[int], int]:
    """Latent frames -> frames that they show; also the first one shown by the next latent frame."""
    return pixel_frames if wan else int  # of Moving Shapes as many


def refuse_length(frames: int, policy: CachePolicy | None, shown: Callable[[int], int]) -> None:
    """Raises UserError for so many latent frames that do not split into chunks, or that have no
    positions.
    """
    if policy and frames not in (both := policy.nearest(frames)):
        nearest = " and ".join(str(shown(n)) for n in dict.fromkeys(both))
        raise UserError(
            f"--frames={shown(frames)} are {frames} latent frames, which do not split into a chunk "
            f"of {policy.first} "
            f"and chunks of {policy.chunk}; the nearest that do: {nearest}"
        )
    if frames > MAX_FRAMES and not (policy and policy.positions != "absolute"):
        most = policy.nearest(MAX_FRAMES)[0] if policy else MAX_FRAMES
        raise UserError(
            f"--frames={shown(frames)} are {frames} latent frames, more than there are positions; "
            "at most "
            f"{shown(most)}" + (", or a --memory with relative positions" if policy else "")
        )


def read_prefix(wan: bool, policy: CachePolicy, place: tuple[int, int]) -> tuple[int, np.ndarray]:
    """The end of the clip that is continued, as long as whole chunks allow: latent frames, and
    frames.

    Raises:
      UserError: it cannot be read, or is shorter than the first chunk.
    """
    file, scale, shown = as_path(f.PREFIX.value or ""), SPACE if wan else 1, shown_by(wan)
    try:
        clip = read_ending(file, shown(MAX_FRAMES), place[0] * scale, place[1] * scale, FPS)
    except ValueError as error:
        raise UserError(f"cannot use --prefix={file}: {error}; name another clip") from error
    latents = latent_frames(len(clip)) if wan else len(clip)
    if latents < policy.first:
        raise UserError(
            f"--prefix={file} has {len(clip)} frames at {FPS} a second, and the first chunk "
            f"{shown(policy.first)}; "
            "name a longer clip"
        )
    latents = policy.nearest(latents)[0]
    return latents, clip[-shown(latents) :]


def read_switches(wan: bool, policy: CachePolicy | None, frames: int) -> dict[int, Switch]:
    """--switch by latent frame.

    Raises:
      UserError: one is not FRAME:PROMPT, or its frame begins no chunk.
    """
    switches: dict[int, Switch] = {}
    if not policy:
        return switches
    latent = {shown_by(wan)(start): start for start in policy.starts(frames)[1:]}
    for text in f.SWITCH.value:
        number, _, prompt = text.partition(":")
        if not (number.isascii() and number.isdigit()) or not prompt.strip():
            raise UserError(
                f"--switch={text!r} is not FRAME:PROMPT, such as 9:'A red circle moves up.'"
            )
        frame = int(number)
        if frame not in latent:
            near = sorted(sorted(latent, key=lambda start: abs(start - frame))[:2])
            where = (
                f"the nearest that do: {' and '.join(map(str, near))}"
                if near
                else "this video has one"
            )
            raise UserError(f"--switch={text!r}: frame {frame} begins no later chunk; {where}")
        if latent[frame] in switches:
            raise UserError(f"--switch names frame {frame} twice; a chunk has one prompt")
        switches[latent[frame]] = Switch(prompt.strip(), f.FLUSH.value, f.CUT.value)
    return switches
