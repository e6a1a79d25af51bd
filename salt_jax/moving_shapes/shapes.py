"""Moving Shapes: a world small enough to know everything about it.

A scene is a shape of one colour that moves in one direction on a torus. Its caption states these
three and nothing else: where the shape starts and how fast it moves is free. So a caption fits many
clips, all of which can be listed. That makes regression to the mean visible as blur, and gives the
optimal denoiser in closed form (`moving_shapes.exact`). Starts lie around the middle, not
everywhere: over all starts of a torus the mean clip is the same for every direction, and a network
then finds it hard to see that the caption matters. An endless world (`is_endless`, the size `long`
of the configs) has them everywhere all the same, because only then a long video stays what clips
are. The `pair` variant adds a second object and their spatial relation.

All functions are pure; positions and speeds are in pixels and pixels per frame, colours in [0, 1].
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from salt_jax.keys import COUNT, NUMBERS, key

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
# (dx, dy), y points down
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RELATIONS = {
    "left of": (1, 0),
    "right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
}  # where the second object is
FPS = 16


@dataclass(frozen=True)
class World:
    """Everything that turns a scene into pixels, and the grid of what captions leave open."""

    size: int = key(
        12,
        "height and width, pixels; a multiple of the preset's patch: 6 for `tiny`, 4 for `small`",
        COUNT,
    )
    frames: int = key(9, "at 16 per second", COUNT)
    radius: float = key(3.0, "of the circle, pixels; other shapes have its area")
    softness: float = key(1.0, "width of an edge, pixels")
    starts: tuple[float, ...] = key(
        (2.0, 4.0, 6.0, 8.0), "possible x, and possible y, of the first frame, pixels", NUMBERS
    )
    speeds: tuple[float, ...] = key((0.5, 1.0), "pixels per frame", NUMBERS)
    pair: bool = key(
        False,
        "two objects and their relation; needs `small` (captions of up to 63 bytes) and "
        "`teacher.kind` other than `closed_form`",
    )
    patch: int = key(
        1,
        "side of the squares of pixels that the fixed autoencoder makes one place of latent of; "
        "1: pixels are the latent",
        COUNT,
    )


@dataclass(frozen=True)
class Scene:
    """What a caption states."""

    shape: str
    colour: str
    direction: str
    relation: str = ""  # the rest only in the pair variant
    shape2: str = ""
    colour2: str = ""


@dataclass(frozen=True)
class Mode:
    """What a caption leaves open."""

    x: float
    y: float
    speed: float


@functools.cache
def scenes(world: World) -> tuple[Scene, ...]:
    """All scenes in a fixed order. Objects of a pair differ in colour."""
    singles = tuple(Scene(*s) for s in itertools.product(SHAPES, COLOURS, DIRECTIONS))
    if not world.pair:
        return singles
    others = itertools.product(RELATIONS, SHAPES, COLOURS)
    return tuple(
        Scene(s.shape, s.colour, s.direction, *other)
        for s, other in itertools.product(singles, tuple(others))
        if other[2] != s.colour
    )


@functools.cache
def modes(world: World) -> tuple[Mode, ...]:
    """All starts and speeds in a fixed order: the finite set of clips that fit one caption."""
    return tuple(
        Mode(x, y, v) for y, x, v in itertools.product(world.starts, world.starts, world.speeds)
    )


def caption(scene: Scene) -> str:
    """The English sentence of a scene."""
    if not scene.relation:
        return f"A {scene.colour} {scene.shape} moves {scene.direction}."
    return (
        f"A {scene.colour} {scene.shape} {scene.relation} a {scene.colour2} {scene.shape2}, "
        f"both moving {scene.direction}."
    )


def spread(world: World, count: int) -> list[int]:
    """`count` indices into `scenes`, spread evenly over them."""
    total = len(scenes(world))
    return [i * total // count for i in range(count)]


def table(named: Mapping[str, Sequence[float | int]]) -> np.ndarray:
    """The values of COLOURS, DIRECTIONS or RELATIONS, float32 [names, components]."""
    return np.array(list(named.values()), np.float32)


def wrapped(difference: np.ndarray, world: World) -> np.ndarray:
    """Of two positions on the torus, the way between them that is shorter."""
    return (difference + world.size / 2) % world.size - world.size / 2


def shape_mask(shape: str, x, y, world: World) -> np.ndarray:
    """Coverage in [0, 1] of a shape centred at (x, y) on the torus.

    `x` and `y` are arrays of one shape [...]; the result is [..., size, size] float32. Edges are
    the signed distance to the outline, ramped over `softness` pixels. Pixel (i, j) has its centre
    at y = i, x = j.
    """
    x, y = np.asarray(x, np.float32)[..., None, None], np.asarray(y, np.float32)[..., None, None]
    pixel = np.arange(world.size, dtype=np.float32)
    dx, dy = wrapped(pixel[None, :] - x, world), wrapped(pixel[:, None] - y, world)
    area = np.pi * world.radius**2
    if shape == "circle":
        distance = np.hypot(dx, dy) - world.radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - np.sqrt(area) / 2
    elif shape == "triangle":  # equilateral, pointing up
        slope = np.sqrt(3) / 2
        distance = np.maximum(dy, np.maximum(slope * dx - dy / 2, -slope * dx - dy / 2)) - np.sqrt(
            area / 3**1.5
        )
    else:
        raise ValueError(f"unknown shape {shape!r}, expected one of {SHAPES}")
    return np.clip(0.5 - distance / world.softness, 0, 1).astype(np.float32)


def centres(scene: Scene, mode: Mode, world: World) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Per object, its x [F] and y [F] over time, not wrapped."""
    dx, dy = DIRECTIONS[scene.direction]
    time = np.arange(world.frames, dtype=np.float32)
    x, y = mode.x + dx * mode.speed * time, mode.y + dy * mode.speed * time
    if not scene.relation:
        return ((x, y),)
    rx, ry = RELATIONS[scene.relation]
    apart = world.size / 2 - 1  # less than half way round, so that "left of" has one meaning
    return ((x, y), (x + rx * apart, y + ry * apart))


def render(scene: Scene, mode: Mode, world: World) -> np.ndarray:
    """The clip, uint8 [F, H, W, 3], on black."""
    frame = np.zeros((world.frames, world.size, world.size, 3), np.float32)
    objects = ((scene.shape, scene.colour), (scene.shape2, scene.colour2))
    for (shape, colour), (x, y) in zip(objects, centres(scene, mode, world), strict=False):
        alpha = shape_mask(shape, x, y, world)[..., None]
        frame = frame * (1 - alpha) + alpha * np.asarray(COLOURS[colour], np.float32)
    return np.round(255 * frame).astype(np.uint8)


def is_endless(world: World) -> bool:
    """Whether every window of a video that goes on for ever is a clip of the world, and all are
    equally likely.

    That is so if starts cover the torus evenly, and every frame moves from start to start.
    """
    step = world.size / len(world.starts)
    even = np.allclose(world.starts, step * np.arange(len(world.starts)))
    return bool(even and not np.remainder(np.array(world.speeds), step).any())
