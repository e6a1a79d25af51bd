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
from typing import Any, NamedTuple

import numpy as np

from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.shapes import World

# distance of neighbouring places, pixels; an object between them leaves a residual of up to 0.2
STEP = 0.5
EMPTY = 0.25  # an object with less than this part of its brightness is not there
CHUNK = 32  # clips read at once; bounds the memory
# A clean object, see `is_clean`.
MAX_RESIDUAL = 0.35
MIN_SHARPNESS = 0.75
MIN_IDENTITY = 0.75
MAX_WOBBLE = 1.0  # pixels
MODE_TOLERANCE = 0.5  # pixels; an average of starts 2 pixels apart is 1 away from both


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


def is_clean(reading: Reading) -> np.ndarray:
    """[N] bool: one sharp object (or pair) that stays itself and moves straight at one speed.

    Residual <= 0.35 (worst frame), sharpness >= 0.75, identity >= 0.75, wobble <= 1 pixel. The
    nearest failures at size 12: the mean of two modes 2 px apart has residual 0.3 and sharpness
    0.6; of two speeds, 0.55 and 0.65; Gaussian blur of 0.7 px, 0.2 and 0.6. Noise passes at a
    standard deviation of 0.05 (of a range of 1), is on the edge at 0.1 and fails at 0.2. Dimming
    passes down to a brightness of 0.8.
    """
    return (
        (reading.residual <= MAX_RESIDUAL)
        & (reading.sharpness >= MIN_SHARPNESS)
        & (reading.identity >= MIN_IDENTITY)
        & (reading.wobble <= MAX_WOBBLE)
    )


def compare(reading: Reading, scene_index: np.ndarray, world: World) -> dict[str, np.ndarray]:
    """Which statements of its caption each clip fulfils, [N] bool each; `all` of them, by a clean
    object.

    Statements are shape, colour and direction. With pairs also relation; shape and colour then mean
    both.
    """
    asked, _ = _statements(world)
    same = np.stack(reading[:6], -1) == asked[scene_index]
    right = {
        "shape": same[:, 0] & same[:, 4],
        "colour": same[:, 1] & same[:, 5],
        "direction": same[:, 2],
    }
    if world.pair:
        right["relation"] = same[:, 3]
    return right | {"all": same.all(-1) & is_clean(reading)}


def nearest_mode(
    reading: Reading, scene_index: np.ndarray, world: World
) -> tuple[np.ndarray, np.ndarray]:
    """Index into `shapes.modes(world)` and rms distance in pixels [N] of the mode whose path is
    nearest.

    Modes move the way the clip moves (a still clip: the way its caption asks), so that a wrong
    direction alone is not far from a mode. A mode places the object that the caption names first.
    """
    asked, first = _statements(world)
    direction = np.where(reading.direction < 0, asked[scene_index, 2], reading.direction)
    path = reading.centres[np.arange(len(scene_index)), first[scene_index]]  # [N, F, 2]
    modes = np.array([(mode.x, mode.y, mode.speed) for mode in shapes.modes(world)], np.float32)
    start, travelled = modes[:, None, :2], modes[:, None, 2:] * np.arange(path.shape[1])[:, None]
    distance = np.empty((len(path), len(start)))
    for i, (way, dx_dy) in enumerate(zip(path, _table(shapes.DIRECTIONS)[direction], strict=True)):
        off = _wrap(way - (start + travelled * dx_dy), world)
        distance[i] = np.sqrt((off**2).sum(-1).mean(-1))
    return distance.argmin(-1), distance.min(-1)


def score(videos: np.ndarray, scene_index: np.ndarray, world: World) -> dict[str, float]:
    """The report card of clips, uint8 [N, F, H, W, 3], captioned by
    `shapes.scenes(world)[scene_index]`.

    Fractions of clips, 0 to 1, higher is better:
      shape, colour, direction, (relation): the caption is right about it. Chance is 1/3, 1/4, 1/4,
        (1/4); in a pair, both shapes (1/9) and both colours (1/6) count.
      clean: passes `is_clean`. all: everything the caption states, by a clean object;
        chance <= 1/48.
      identity: mean part of the frames that show the clip's own object.
      coverage: modes of a caption that some clip hits (`all`, and a path within 0.5 px rms), mean
        over captions.
      coverage_expected: the same for as many samples of the true distribution, 1 - (1 - 1/M)^n.
    Ratio: coverage_ratio is coverage over what as many hits would cover if they were uniform. About
      1 is no mode dropping, whatever the accuracy; less is worse, 0 is no hit. It needs many clips
      per caption: a single one always gives 1.
    Fraction, lower is better: off_grid, not a clean object within 0.5 px rms of any mode (mode
      averaging or a wrong speed; its shape, colour and direction are not asked for).
    Means over clips: sharpness (1 as the truth, less is blur), residual (0 exact), flicker
      (0 none), wobble (pixels, 0 straight), speed and motion (pixels per frame; right when equal to
      those of the data).

    Raises ValueError if clips and captions do not match in number, or do not fit the world.
    """
    count = len(shapes.scenes(world))
    if len(scene_index) != len(videos) or not np.isin(scene_index, np.arange(count)).all():
        raise ValueError(
            f"scene_index must hold one scene of 0..{count - 1} for each of the {len(videos)} "
            "clips, "
            f"got {len(scene_index)} indices: {scene_index}"
        )
    reading = read(videos, world)
    right, clean = compare(reading, scene_index, world), is_clean(reading)
    mode, distance = nearest_mode(reading, scene_index, world)
    near = distance <= MODE_TOLERANCE
    measured = ("identity", "sharpness", "residual", "flicker", "wobble", "speed", "motion")
    means = {name: getattr(reading, name) for name in measured} | right
    means |= {"clean": clean, "off_grid": ~(clean & near)}
    return {name: float(np.mean(value)) for name, value in means.items()} | _coverage(
        mode, right["all"] & near, scene_index, len(shapes.modes(world))
    )


def _coverage(mode, hit, scene_index, num_modes: int) -> dict[str, float]:
    groups = [scene_index == scene for scene in np.unique(scene_index)]
    uniform = lambda n: 1 - (1 - 1 / num_modes) ** n
    covered = np.mean([len(set(mode[group & hit])) / num_modes for group in groups])
    possible = np.mean([uniform((group & hit).sum()) for group in groups])
    return {
        "coverage": float(covered),
        "coverage_expected": float(np.mean([uniform(group.sum()) for group in groups])),
        "coverage_ratio": float(covered / possible) if possible else 0.0,
    }


@functools.cache
def _statements(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Per scene, the first six fields of its Reading [scenes, 6] and where its first object is
    there [scenes].
    """
    tables = [list(t) for t in (shapes.SHAPES, shapes.COLOURS, shapes.DIRECTIONS, shapes.RELATIONS)]
    shape, colour, direction, relation = (
        {name: i for i, name in enumerate(t)} | {"": -1} for t in tables
    )
    opposite = {
        "left of": "right of",
        "right of": "left of",
        "above": "below",
        "below": "above",
        "": "",
    }
    rows, first = [], []
    for s in shapes.scenes(world):
        one, two, where = (
            (shape[s.shape], colour[s.colour]),
            (shape[s.shape2], colour[s.colour2]),
            s.relation,
        )
        first.append(int(bool(where) and one[1] > two[1]))
        if first[-1]:
            one, two, where = two, one, opposite[where]
        rows.append((*one, direction[s.direction], relation[where], *two))
    return np.array(rows), np.array(first)


def _read_chunk(videos: np.ndarray, world: World) -> Reading:
    pixels = videos.reshape(*videos.shape[:2], -1, 3).astype(np.float32) / 255  # [N, F, P, 3]
    colour, colour_alone = _find_colours(pixels, 2 if world.pair else 1)
    palette = _table(shapes.COLOURS)[colour]  # [N, K, 3]
    maps = np.maximum(
        np.einsum("nfpc,nck->nkfp", pixels, np.linalg.pinv(palette), optimize=True), 0
    )
    shape, shape_alone, places, masks, brightness = _find_objects(maps, world)
    there = brightness > EMPTY  # [N, K, F]
    same = there & (shape_alone == shape[..., None]) & (colour_alone == colour[..., None])
    seen = there.mean(-1) > 0.5
    shape, colour = np.where(seen, shape, -1), np.where(seen, colour, -1)
    direction, centres, *motion = _find_motion(places, world)
    none = np.full(len(videos), -1)
    second = (
        (_find_relation(centres, world), shape[:, 1], colour[:, 1])
        if world.pair
        else (none, none, none)
    )
    rest = _find_differences(pixels, _render(pixels, masks, palette), world)
    stated = shape[:, 0], colour[:, 0], direction, *second
    values: Any = (*stated, centres, *motion, same.all(1).mean(-1), *rest)
    return Reading(*values)


def _find_colours(pixels, objects: int):
    """Colours [N, K] of the clip, and [N, K, F] of each frame read alone."""
    palette = _table(shapes.COLOURS)
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
    match = lambda a, b: np.tensordot(a, b, axes=(-1, -1))  # [., ., shapes, places]
    explained = match(weight * amount, templates) ** 2 / np.maximum(
        match(weight, templates**2), 1e-3
    )
    place, energy = explained.argmax(-1), explained.max(-1)  # [N, F, shapes]
    shape = energy.sum(1).argmax(-1)
    place = np.take_along_axis(place, shape[:, None, None], -1)[..., 0]
    mask = templates[shape[:, None], place]
    brightness = (weight * amount * mask).sum(-1) / np.maximum((weight * mask**2).sum(-1), 1e-3)
    return shape, energy.argmax(-1), places[place], mask, brightness


@functools.cache
def _templates(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Masks [shapes, places, P] and the places [places, 2] as (x, y)."""
    axis = np.arange(0, world.size, STEP, dtype=np.float32)
    y, x = (a.ravel() for a in np.meshgrid(axis, axis, indexing="ij"))
    masks = [shapes.shape_mask(shape, x, y, world).reshape(len(x), -1) for shape in shapes.SHAPES]
    return np.stack(masks), np.stack([x, y], -1)


def _find_motion(places, world: World):
    """Direction [N], centres [N, K, F, 2], speed, motion and wobble [N].

    A pair shares one velocity.
    """
    steps = _wrap(np.diff(places, axis=2), world)
    centres = np.concatenate([places[:, :, :1], places[:, :, :1] + np.cumsum(steps, 2)], 2)
    time = np.arange(places.shape[2]) - (places.shape[2] - 1) / 2
    # least squares
    velocity = np.einsum("f,nkfc->nc", time, centres) / (time @ time * places.shape[1])
    axes = _table(shapes.DIRECTIONS)
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
    return (np.angle(turn.mean(1)) @ _table(shapes.RELATIONS).T).argmax(-1)


def _render(pixels, masks, palette):
    """The reading as pixels [N, F, P, 3].

    Of a pair, the order of drawing that is nearer to the clip.
    """
    alpha, colour = masks[..., None], palette[:, :, None, None]
    paint = lambda below, k: below * (1 - alpha[:, k]) + alpha[:, k] * colour[:, k]
    orders = itertools.permutations(range(masks.shape[1]))
    drawn = np.stack([functools.reduce(paint, order, np.zeros_like(pixels)) for order in orders])
    return drawn[((drawn - pixels) ** 2).sum((2, 3, 4)).argmin(0), np.arange(len(pixels))]


def _find_differences(pixels, rendering, world: World):
    """Residual, sharpness and flicker, [N] each."""
    error, power = pixels - rendering, (rendering**2).mean((2, 3))  # power: [N, F]
    residual = np.sqrt(((error**2).mean((2, 3)) / power).max(-1))
    flicker = np.sqrt((np.diff(error, axis=1) ** 2).mean((1, 2, 3)) / power.mean(1))
    picture = lambda a: a.reshape(*a.shape[:2], world.size, world.size, 3)
    slopes = lambda a: np.stack([np.roll(picture(a), 1, axis) - picture(a) for axis in (2, 3)], 1)
    truth = slopes(rendering)
    pixels_of = tuple(range(1, truth.ndim))
    sharpness = (slopes(pixels) * truth).sum(pixels_of) / (truth**2).sum(pixels_of)
    return residual, sharpness, flicker


def _wrap(difference, world: World):
    return (difference + world.size / 2) % world.size - world.size / 2


def _table(named: dict) -> np.ndarray:
    return np.array(list(named.values()), np.float32)
