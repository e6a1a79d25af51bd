"""All clips of a world, as the closed form (`moving_shapes.exact`) reads them.

An endless world has too many to list: 55,296 at the size `long`, 90 KB each and more. But all are
made of few frames, an object at a place, in the order that a motion gives. So frames are listed,
and per direction and mode which of them a clip consists of.
"""

import dataclasses

import numpy as np

from salt_jax.moving_shapes import latents, shapes
from salt_jax.moving_shapes.shapes import DIRECTIONS, Mode, World
from salt_jax.types import Params


def every_clip(world: World) -> Params:
    """{"clips": float32 [K, M, F, H, W, C]}, M modes for each of K captions.

    Of an endless world {"frames": float32 [O, P, H, W, C], O objects at P places, "paths": int32
    [F, D, M], the place in each frame of a clip of a direction and mode}. Captions go through
    objects, and directions within each.
    """
    scenes, modes = shapes.scenes(world), shapes.modes(world)
    if not shapes.is_endless(world):
        drawn = [[shapes.render(scene, mode, world) for mode in modes] for scene in scenes]
        return {"clips": latents.to_latent(np.array(drawn), world)}
    places = [Mode(x, y, 0.0) for y in world.starts for x in world.starts]
    still = dataclasses.replace(world, frames=1)
    drawn = [
        [shapes.render(scene, place, still)[0] for place in places]
        for scene in scenes[:: len(DIRECTIONS)]
    ]
    return {"frames": latents.to_latent(np.array(drawn), world), "paths": _paths(world)}


def _paths(world: World) -> np.ndarray:
    count, step = len(world.starts), world.size / len(world.starts)
    modes = np.array([(mode.x, mode.y, mode.speed) for mode in shapes.modes(world)])
    way = modes[:, 2] * np.arange(world.frames)[:, None, None]  # [F, 1, M]
    dx, dy = shapes.table(DIRECTIONS).T[..., None]  # [D, 1]
    column, row = (
        np.round((start + way * d) / step).astype(np.int32) % count
        for start, d in ((modes[:, 0], dx), (modes[:, 1], dy))
    )
    return row * count + column


def sizes(world: World) -> dict[str, tuple[int, ...]]:
    """The shapes of `every_clip`."""
    frames, *picture = latents.clip_shape(world)
    captions, modes = len(shapes.scenes(world)), len(shapes.modes(world))
    if not shapes.is_endless(world):
        return {"clips": (captions, modes, frames, *picture)}
    ways = len(DIRECTIONS)
    return {
        "frames": (captions // ways, len(world.starts) ** 2, *picture),
        "paths": (frames, ways, modes),
    }
