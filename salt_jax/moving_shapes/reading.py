"""Reads the truth of Moving Shapes back off the pixels: which object, where, moving how, and how
cleanly.

No network. Every hypothesis is rendered and matched, object by object and frame by frame:

1. Colours. A pixel f is explained by a palette colour c to the extent (f . c)^2 / |c|^2. The
   clip's colours are those that explain most when each pixel takes the better one. Unmixing the
   pixels into them gives one coverage map A per object.
2. Shape and place. `shape_mask` of every shape at every half pixel of the torus is a template a.
   With its best brightness it explains (sum w A a)^2 / sum w a^2 of the map, where the weight w is
   0 behind the other object. Each frame takes the best place, the clip takes the shape that
   explains most.
3. Motion. Places are unwrapped over time and fitted by a straight path at constant speed.
4. What is left. The reading is rendered in full palette colours and compared with the clip.

A pair is read in the order of the palette, because a caption does not say which object was drawn
first: "a red circle left of a blue square" and "a blue square right of a red circle" are one
statement.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.shapes import World

# distance of neighbouring places, pixels; an object between them leaves a residual of up to 0.2
STEP = 0.5
WIDE, WIDE_STEP = 24, 1.0  # in pictures wider than this, whose objects are larger
EMPTY = 0.25  # an object with less than this part of its brightness is not there
CHUNK = 32  # clips read at once; bounds the memory


class Reading(NamedTuple):
    """What N clips of F frames with K objects show.

    The first six fields are what a caption states, as indices into the tables of
    `moving_shapes.shapes`; -1 is none. Of a pair, the object whose colour is earlier in COLOURS
    comes first.
    """

    shape: np.ndarray  # [N] -1 where no object is there in most frames
    colour: np.ndarray  # [N] likewise
    direction: np.ndarray  # [N] -1 if slower than half the slowest speed of the world
    relation: np.ndarray  # [N] -1 in a world without pairs
    shape2: np.ndarray  # [N] likewise
    colour2: np.ndarray  # [N] likewise
    centres: np.ndarray  # [N, K, F, 2] x and y of each object, pixels, unwrapped over time
    speed: np.ndarray  # [N] of the fitted path, pixels per frame, >= 0
    motion: np.ndarray  # [N] mean distance from frame to frame, px per frame; jitter adds to it
    wobble: np.ndarray  # [N] rms distance of the centres from the fitted path, pixels; 0 is best
    # [N] part of the frames that alone read as the same shapes and colours; 1 is best
    identity: np.ndarray
    # [N] rms(clip - rendering) / rms(rendering), worst frame; 0 exact, 1 black
    residual: np.ndarray
    # [N] slope of the clip's gradients on the rendering's; 1 is sharp, 0 is flat
    sharpness: np.ndarray
    # [N] rms change between frames that is not motion, over rms(rendering); 0 is best
    flicker: np.ndarray


def read(videos: np.ndarray, world: World) -> Reading:
    """Reads clips, uint8 [N, F, H, W, 3].

    F need not be `world.frames`; H and W must be `world.size`.
    """
    if (
        videos.dtype != np.uint8
        or videos.ndim != 5
        or videos.shape[2:] != (world.size, world.size, 3)
    ):
        raise ValueError(
            f"expected clips as uint8 [N, F, {world.size}, {world.size}, 3] for this world, "
            f"got {videos.dtype} {list(videos.shape)}; shapes.to_pixels converts latents"
        )
    if not len(videos) or videos.shape[1] < 2:
        raise ValueError(
            f"expected one clip or more, of two frames or more, got {list(videos.shape)}"
        )
    parts = [_read_chunk(videos[i : i + CHUNK], world) for i in range(0, len(videos), CHUNK)]
    return Reading(*map(np.concatenate, zip(*parts, strict=True)))


def _read_chunk(videos: np.ndarray, world: World) -> Reading:
    pixels = videos.reshape(*videos.shape[:2], -1, 3).astype(np.float32) / 255  # [N, F, P, 3]
    colour, colour_alone = _find_colours(pixels, 2 if world.pair else 1)
    palette = shapes.table(shapes.COLOURS)[colour]  # [N, K, 3]
    maps = np.maximum(
        np.einsum("nfpc,nck->nkfp", pixels, np.linalg.pinv(palette), optimize=True), 0
    )
    shape, shape_alone, places, masks, brightness = _find_objects(maps, world)
    there = brightness > EMPTY  # [N, K, F]
    same = there & (shape_alone == shape[..., None]) & (colour_alone == colour[..., None])
    seen = there.mean(-1) > 0.5
    shape, colour = np.where(seen, shape, -1), np.where(seen, colour, -1)
    direction, centres, speed, motion, wobble = _find_motion(places, world)
    residual, sharpness, flicker = _find_differences(pixels, _render(pixels, masks, palette), world)
    none = np.full(len(videos), -1)
    return Reading(
        shape=shape[:, 0],
        colour=colour[:, 0],
        direction=direction,
        relation=_find_relation(centres, world) if world.pair else none,
        shape2=shape[:, 1] if world.pair else none,
        colour2=colour[:, 1] if world.pair else none,
        centres=centres,
        speed=speed,
        motion=motion,
        wobble=wobble,
        identity=same.all(1).mean(-1),
        residual=residual,
        sharpness=sharpness,
        flicker=flicker,
    )


def _find_colours(pixels, objects: int):
    """Colours [N, K] of the clip, and [N, K, F] of each frame read alone."""
    palette = shapes.table(shapes.COLOURS)
    explained = (
        np.maximum(pixels @ (palette / np.linalg.norm(palette, axis=1, keepdims=True)).T, 0) ** 2
    )
    choices = np.array(list(itertools.combinations(range(len(palette)), objects)))
    # [N, F, choices]
    energy = np.stack([explained[..., choice].max(-1).sum(-1) for choice in choices], -1)
    return choices[energy.sum(1).argmax(-1)], np.moveaxis(choices[energy.argmax(-1)], -1, 1)


def _find_objects(maps, world: World):
    """Shape [N, K] of the clip and [N, K, F] of each frame read alone; place [N, K, F, 2],
    mask [N, K, F, P] and brightness [N, K, F] in each frame.
    """
    count = maps.shape[1]
    whole = np.ones((1, 1, maps.shape[-1]), np.float32)
    found = [_find_object(maps[:, k], whole, world) for k in range(count)]
    for k in (0, 1) * (count == 2):  # of a pair, each again without what the other hides
        found[k] = _find_object(maps[:, k], 1 - found[1 - k][3], world)
    return [np.stack(field, 1) for field in zip(*found, strict=True)]


def _find_object(amount, weight, world: World):
    """As `_find_objects`, for one map [N, F, P] and its weights [N or 1, F or 1, P]."""
    templates, places = _templates(world)
    found = np.tensordot(weight * amount, templates, axes=(-1, -1))  # [N, F, shapes, places]
    power = np.tensordot(weight, templates**2, axes=(-1, -1))
    explained = found**2 / np.maximum(power, 1e-3)
    place, energy = explained.argmax(-1), explained.max(-1)  # [N, F, shapes]
    shape = energy.sum(1).argmax(-1)
    place = np.take_along_axis(place, shape[:, None, None], -1)[..., 0]
    mask = templates[shape[:, None], place]
    brightness = (weight * amount * mask).sum(-1) / np.maximum((weight * mask**2).sum(-1), 1e-3)
    return shape, energy.argmax(-1), places[place], mask, brightness


@functools.cache
def _templates(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Masks [shapes, places, P] and the places [places, 2] as (x, y)."""
    step = STEP if world.size <= WIDE else WIDE_STEP
    axis = np.arange(0, world.size, step, dtype=np.float32)
    y, x = (a.ravel() for a in np.meshgrid(axis, axis, indexing="ij"))
    masks = [shapes.shape_mask(shape, x, y, world).reshape(len(x), -1) for shape in shapes.SHAPES]
    return np.stack(masks), np.stack([x, y], -1)


def _find_motion(places, world: World):
    """Direction [N], centres [N, K, F, 2], speed, motion and wobble [N].

    A pair shares one velocity.
    """
    steps = shapes.wrapped(np.diff(places, axis=2), world)
    centres = np.concatenate([places[:, :, :1], places[:, :, :1] + np.cumsum(steps, 2)], 2)
    time = np.arange(places.shape[2]) - (places.shape[2] - 1) / 2
    # least squares
    velocity = np.einsum("f,nkfc->nc", time, centres) / (time @ time * places.shape[1])
    axes = shapes.table(shapes.DIRECTIONS)
    along = velocity @ axes.T
    direction, speed = along.argmax(-1), along.max(-1)
    path = (speed[:, None] * axes[direction])[:, None, None] * time[:, None]  # [N, 1, F, 2]
    off = centres - centres.mean(2, keepdims=True) - path
    wobble = np.sqrt((off**2).sum(-1).mean((1, 2)))
    motion = np.linalg.norm(steps, axis=-1).mean((1, 2))
    return np.where(speed < min(world.speeds) / 2, -1, direction), centres, speed, motion, wobble


def _find_relation(centres, world: World):
    """[N] the relation nearest to the mean offset of the second object on the torus
    (a mean of angles).
    """
    turn = np.exp(2j * np.pi / world.size * (centres[:, 1] - centres[:, 0]))
    return (np.angle(turn.mean(1)) @ shapes.table(shapes.RELATIONS).T).argmax(-1)


def _render(pixels, masks, palette):
    """The reading as pixels [N, F, P, 3].

    Of a pair, the order of drawing that is nearer to the clip.
    """
    alpha, colour = masks[..., None], palette[:, :, None, None]

    def paint(below, k):
        return below * (1 - alpha[:, k]) + alpha[:, k] * colour[:, k]

    orders = itertools.permutations(range(masks.shape[1]))
    drawn = np.stack([functools.reduce(paint, order, np.zeros_like(pixels)) for order in orders])
    return drawn[((drawn - pixels) ** 2).sum((2, 3, 4)).argmin(0), np.arange(len(pixels))]


def _find_differences(pixels, rendering, world: World):
    """Residual, sharpness and flicker, [N] each."""
    error, power = pixels - rendering, (rendering**2).mean((2, 3))  # power: [N, F]
    residual = np.sqrt(((error**2).mean((2, 3)) / power).max(-1))
    flicker = np.sqrt((np.diff(error, axis=1) ** 2).mean((1, 2, 3)) / power.mean(1))
    truth = _slopes(rendering, world)
    pixels_of = tuple(range(1, truth.ndim))
    sharpness = (_slopes(pixels, world) * truth).sum(pixels_of) / (truth**2).sum(pixels_of)
    return residual, sharpness, flicker


def _slopes(pixels, world: World):
    """Differences of neighbours down and across, [N, 2, F, H, W, 3]."""
    picture = pixels.reshape(*pixels.shape[:2], world.size, world.size, 3)
    return np.stack([np.roll(picture, 1, axis) - picture for axis in (2, 3)], 1)
