"""The report card of clips of Moving Shapes: what `reading` reads off them against what their
captions state.

A pair is read in the order of the palette, because a caption does not say which object was drawn
first: "a red circle left of a blue square" and "a blue square right of a red circle" are one
statement.
"""

import functools

import numpy as np

from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.reading import Reading, read
from salt_jax.moving_shapes.shapes import World

# A clean object, see `is_clean`.
MAX_RESIDUAL = 0.35
MIN_SHARPNESS = 0.75
MIN_IDENTITY = 0.75
MAX_WOBBLE = 1.0  # pixels
MODE_TOLERANCE = 0.5  # pixels; an average of starts 2 pixels apart is 1 away from both


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
    for i, (way, dx_dy) in enumerate(
        zip(path, shapes.table(shapes.DIRECTIONS)[direction], strict=True)
    ):
        off = shapes.wrapped(way - (start + travelled * dx_dy), world)
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
    cards, mode = each(videos, scene_index, world)
    means = {name: float(np.mean(value)) for name, value in cards.items()}
    hit = cards["all"] & (cards["off_grid"] == 0)
    return means | _coverage(mode, hit, scene_index, len(shapes.modes(world)))


def each(
    videos: np.ndarray, scene_index: np.ndarray, world: World
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What `score` means over, of each clip, [N] each; and the mode that is nearest, [N]."""
    reading = read(videos, world)
    right, clean = compare(reading, scene_index, world), is_clean(reading)
    mode, distance = nearest_mode(reading, scene_index, world)
    measured = ("identity", "sharpness", "residual", "flicker", "wobble", "speed", "motion")
    cards = {name: getattr(reading, name) for name in measured} | right
    cards |= {"clean": clean, "off_grid": ~(clean & (distance <= MODE_TOLERANCE))}
    return cards, mode


def _coverage(mode, hit, scene_index, num_modes: int) -> dict[str, float]:
    def uniform(count):  # part of the modes that so many uniform draws are expected to hit
        return 1 - (1 - 1 / num_modes) ** count

    groups = [scene_index == scene for scene in np.unique(scene_index)]
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
