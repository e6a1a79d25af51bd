"""The scorer must read clean clips without fault, and must not be fooled by any kind of broken
clip.
"""

import numpy as np
import pytest

from salt_jax.moving_shapes import score, shapes
from salt_jax.moving_shapes.reading import read
from salt_jax.moving_shapes.shapes import Mode, World

SINGLE, PAIR = World(), World(pair=True)


def clips(world: World, count: int, seed: int = 0):
    """Random true clips with their scene and mode indices."""
    rng = np.random.default_rng(seed)
    scene = rng.integers(len(shapes.scenes(world)), size=count)
    mode = rng.integers(len(shapes.modes(world)), size=count)
    return render(scene, mode, world), scene, mode


def render(scene, mode, world: World):
    scenes, modes = shapes.scenes(world), shapes.modes(world)
    return np.stack(
        [shapes.render(scenes[s], modes[m], world) for s, m in zip(scene, mode, strict=True)]
    )


def to_uint8(a):
    return np.clip(np.round(a), 0, 255).astype(np.uint8)


def blur(videos, sigma: float):
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    for axis in (2, 3):
        videos = sum(k / kernel.sum() * np.roll(videos, i - 4, axis) for i, k in enumerate(kernel))
    return to_uint8(videos)


def averaged_with(other, videos, scene, mode, world: World):
    """Mean of each clip and the clip of the same scene at `other(mode)`."""
    scenes, modes = shapes.scenes(world), shapes.modes(world)
    seconds = [
        shapes.render(scenes[s], other(modes[m]), world) for s, m in zip(scene, mode, strict=True)
    ]
    return to_uint8((videos.astype(float) + np.stack(seconds)) / 2)


@pytest.mark.parametrize(
    "world",
    [
        SINGLE,
        World(frames=21),
        World(size=24, radius=6.0),
        World(size=24),
        PAIR,
        World(frames=21, pair=True),
        World(size=24, radius=6.0, pair=True),
        # objects that do not overlap: the order of drawing does not show
        World(size=24, pair=True),
    ],
    ids=str,
)
def test_clean_clips_are_read_without_fault(world):
    videos, scene, mode = clips(world, 16 if world.pair and world.size == 24 else 96)
    reading = read(videos, world)
    for name, right in score.compare(reading, scene, world).items():
        assert right.mean() >= 0.99, name
    found, distance = score.nearest_mode(reading, scene, world)
    np.testing.assert_array_equal(found, mode)
    np.testing.assert_allclose(distance, 0, atol=0.05)
    speed = [shapes.modes(world)[m].speed for m in mode]
    np.testing.assert_allclose(reading.speed, speed, atol=0.02)
    np.testing.assert_allclose(reading.motion, speed, atol=0.02)
    np.testing.assert_allclose(reading.sharpness, 1, atol=0.02)
    assert reading.identity.min() == 1
    assert max(reading.residual.max(), reading.flicker.max(), reading.wobble.max()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("world", [SINGLE, PAIR], ids=["single", "pair"])
def test_every_scene_is_read_without_fault(world):
    scene = np.arange(len(shapes.scenes(world)))
    mode = np.random.default_rng(1).integers(len(shapes.modes(world)), size=len(scene))
    reading = read(render(scene, mode, world), world)
    assert score.compare(reading, scene, world)["all"].mean() >= 0.99
    assert (score.nearest_mode(reading, scene, world)[0] == mode).mean() >= 0.99


def test_reading_is_independent_of_the_table_of_statements():
    """`compare` and `read` could agree on a wrong numbering; so one clip of each world is spelt
    out.
    """
    red, blue = list(shapes.COLOURS).index("red"), list(shapes.COLOURS).index("blue")
    up, above = list(shapes.DIRECTIONS).index("up"), list(shapes.RELATIONS).index("above")
    mode = Mode(4.0, 2.0, 0.5)
    alone = shapes.render(shapes.Scene("square", "blue", "up"), mode, SINGLE)
    got = read(alone[None], SINGLE)
    assert [int(f[0]) for f in got[:6]] == [shapes.SHAPES.index("square"), blue, up, -1, -1, -1]
    np.testing.assert_allclose(got.centres[0, 0], [(4, 2 - 0.5 * t) for t in range(SINGLE.frames)])
    # The red triangle is above the blue square, whichever of them the caption names first.
    for scene in (
        shapes.Scene("square", "blue", "up", "below", "triangle", "red"),
        shapes.Scene("triangle", "red", "up", "above", "square", "blue"),
    ):
        got = read(shapes.render(scene, mode, PAIR)[None], PAIR)
        square, triangle = shapes.SHAPES.index("square"), shapes.SHAPES.index("triangle")
        assert [int(f[0]) for f in got[:6]] == [triangle, red, up, above, square, blue]


@pytest.mark.parametrize("world", [SINGLE, PAIR], ids=["single", "pair"])
def test_places_and_speeds_between_the_modes(world):
    """A model may put an object anywhere: still the right statements, but off the grid."""
    rng = np.random.default_rng(0)
    scene = rng.integers(len(shapes.scenes(world)), size=64)
    starts, speeds = 2 * rng.integers(6, size=(64, 2)) + 1.0, rng.uniform(0.6, 0.9, 64)
    speeds[:32] = 0.5
    free = [Mode(*start, speed) for start, speed in zip(starts, speeds, strict=True)]
    scenes = shapes.scenes(world)
    videos = np.stack(
        [shapes.render(scenes[s], m, world) for s, m in zip(scene, free, strict=True)]
    )
    card = score.score(videos, scene, world)
    assert card["all"] >= 0.99
    assert card["off_grid"] == 1
    assert card["coverage"] == 0 and card["coverage_ratio"] == 0
    np.testing.assert_allclose(read(videos, world).speed, speeds, atol=0.07)


@pytest.mark.parametrize("world", [SINGLE, PAIR], ids=["single", "pair"])
def test_flaws_that_are_small_pass_and_flaws_that_are_large_fail(world):
    videos, scene, mode = clips(world, 32)
    rng = np.random.default_rng(1)
    noisy = lambda std: to_uint8(videos + rng.normal(0, 255 * std, videos.shape))
    aside = lambda m: Mode(m.x + 2, m.y, m.speed)
    small = {"noise": noisy(0.05), "blur": blur(videos, 0.4), "dark": to_uint8(0.85 * videos)}
    holed = videos.copy()
    holed[:, 4] = 0
    large = {
        "noise": noisy(0.2),
        "blur": blur(videos, 0.8),
        "dark": to_uint8(0.6 * videos),
        "mean of neighbouring starts": averaged_with(aside, videos, scene, mode, world),
        "mean of two speeds": averaged_with(
            lambda m: Mode(m.x, m.y, 1.5 - m.speed), videos, scene, mode, world
        ),
        "mean of far starts": averaged_with(
            lambda m: Mode(m.x + 6, m.y + 6, m.speed), videos, scene, mode, world
        ),
        "one empty frame": holed,
        "black": np.zeros_like(videos),
        "grey": np.full_like(videos, 128),
        "nothing but noise": rng.integers(0, 256, videos.shape, dtype=np.uint8),
    }
    for name, broken in small.items():
        assert score.score(broken, scene, world)["all"] >= 0.95, name
    for name, broken in large.items():
        card = score.score(broken, scene, world)
        # A neighbouring start on the side of a pair's outline may blur as little as a fair edge
        # does.
        assert card["all"] <= 0.05 and card["clean"] <= 0.05 and card["off_grid"] >= 0.95, name


def test_scales_of_sharpness_and_residual():
    videos, scene, _ = clips(SINGLE, 32)
    blurred = [
        score.score(blur(videos, s), scene, SINGLE)["sharpness"] for s in (0.4, 0.7, 1.0, 2.0)
    ]
    assert 1 > blurred[0] and all(np.diff(blurred) < -0.05) and blurred[-1] < 0.3
    for left in (0.9, 0.7, 0.5):  # an object of this brightness misses the rest
        dark = read(to_uint8(left * videos), SINGLE)
        np.testing.assert_allclose(dark.residual, 1 - left, atol=0.01)
        np.testing.assert_allclose(dark.sharpness, left, atol=0.02)
    noise = np.random.default_rng(1).normal(0, 255 * 0.05, videos.shape)
    noisy = score.score(to_uint8(videos + noise), scene, SINGLE)
    assert noisy["residual"] > 0.1 and noisy["flicker"] > 0.1
    assert abs(noisy["sharpness"] - 1) < 0.05  # noise is not sharpness


@pytest.mark.parametrize("world", [SINGLE, PAIR], ids=["single", "pair"])
def test_black_is_right_about_nothing(world):
    _, scene, _ = clips(world, 8)
    card = score.score(np.zeros((8, 9, 12, 12, 3), np.uint8), scene, world)
    for name in (
        "shape",
        "colour",
        "direction",
        "all",
        "clean",
        "identity",
        "sharpness",
        "speed",
        "motion",
    ):
        assert card[name] == 0, name
    assert card["residual"] == pytest.approx(1) and card["off_grid"] == 1


def test_a_change_of_colour_or_shape_midway_breaks_identity():
    scene, mode = shapes.Scene("circle", "red", "left"), Mode(4.0, 6.0, 1.0)
    index = np.array([shapes.scenes(SINGLE).index(scene)])
    before = shapes.render(scene, mode, SINGLE)
    for after in (shapes.Scene("circle", "green", "left"), shapes.Scene("square", "red", "left")):
        broken = np.concatenate([before[:5], shapes.render(after, mode, SINGLE)[5:]])[None]
        assert read(broken, SINGLE).identity[0] == pytest.approx(5 / 9)
        card = score.score(broken, index, SINGLE)
        assert card["all"] == 0 and card["shape"] == card["colour"] == card["direction"] == 1


@pytest.mark.parametrize("world", [SINGLE, PAIR], ids=["single", "pair"])
def test_time_out_of_order(world):
    videos, scene, _ = clips(world, 48)
    # Frozen: no motion, no direction.
    card = score.score(np.repeat(videos[:, :1], world.frames, axis=1), scene, world)
    assert card["motion"] == card["speed"] == card["direction"] == card["all"] == 0
    assert card["shape"] == card["colour"] == card["clean"] == 1 and card["off_grid"] == 1
    # Backwards: every direction is the opposite one.
    forwards, backwards = read(videos, world), read(videos[:, ::-1], world)
    way = np.array(list(shapes.DIRECTIONS.values()))
    np.testing.assert_array_equal(way[backwards.direction], -way[forwards.direction])
    assert score.score(videos[:, ::-1], scene, world)["direction"] == 0
    # Shuffled: some directions by chance, no straight path.
    rng = np.random.default_rng(0)
    shuffled = np.stack([video[rng.permutation(world.frames)] for video in videos])
    card = score.score(shuffled, scene, world)
    assert card["direction"] < 0.6 and card["all"] < 0.15
    assert card["wobble"] > 1 and card["motion"] > 1.5 * score.score(videos, scene, world)["motion"]
    assert card["shape"] == card["colour"] == 1


def test_changing_brightness_is_flicker():
    videos, scene, _ = clips(SINGLE, 32)
    bright = np.where(np.arange(SINGLE.frames) % 2, 0.8, 1.0)[:, None, None, None]
    card = score.score(to_uint8(videos * bright), scene, SINGLE)
    assert card["flicker"] == pytest.approx(0.2, abs=0.03)  # the change, as a part of the object
    assert score.score(to_uint8(videos * 0.9), scene, SINGLE)["flicker"] < 0.05
    assert card["all"] >= 0.99


def test_a_pair_must_move_together():
    one, two = shapes.Scene("circle", "red", "left"), shapes.Scene("square", "blue", "right")
    both = [
        shapes.render(s, Mode(6.0 + 12 * i, 12.0, 0.5), World(size=24))
        for i, s in enumerate((one, two))
    ]
    reading = read(np.maximum(*both)[None], World(size=24, pair=True))
    assert (
        reading.direction[0] == -1
        and reading.speed[0] == 0
        and reading.motion[0] == pytest.approx(0.5)
    )
    assert not score.is_clean(reading)[0]


def test_mismatched_captions_score_by_chance():
    videos, _, _ = clips(SINGLE, 480)
    scene = np.random.default_rng(5).integers(48, size=480)
    card = score.score(videos, scene, SINGLE)
    for name, chance in (
        ("shape", 1 / 3),
        ("colour", 1 / 4),
        ("direction", 1 / 4),
        ("all", 1 / 48),
    ):
        assert abs(card[name] - chance) < 4 * np.sqrt(chance * (1 - chance) / 480), name
    assert card["clean"] == 1 and card["off_grid"] == 0


def test_coverage_tells_dropped_modes_from_few_samples():
    rng = np.random.default_rng(0)
    scene = np.repeat([3, 17], 100)
    modes = len(shapes.modes(SINGLE))
    fair = score.score(render(scene, rng.integers(modes, size=200), SINGLE), scene, SINGLE)
    assert fair["coverage_expected"] == pytest.approx(1 - (1 - 1 / modes) ** 100)
    assert fair["coverage"] == pytest.approx(fair["coverage_expected"], abs=0.08)
    assert fair["coverage_ratio"] == pytest.approx(1, abs=0.1)
    some = score.score(render(scene, rng.integers(modes // 4, size=200), SINGLE), scene, SINGLE)
    assert some["coverage"] == pytest.approx(1 / 4, abs=0.02) and some["coverage_ratio"] < 0.4
    # Wrong clips cost coverage, but are not taken for dropped modes.
    few = render(scene, rng.integers(modes, size=200), SINGLE)
    elsewhere = score.score(few, scene + 1, SINGLE)  # modes of a caption that nobody asked for
    assert elsewhere["coverage"] == 0 and elsewhere["off_grid"] == 0
    few[np.arange(200) % 4 > 0] = 0
    few = score.score(few, scene, SINGLE)
    assert few["coverage"] < 0.75 * few["coverage_expected"]
    assert few["coverage_ratio"] == pytest.approx(1, abs=0.15)


def test_wrong_input_is_refused_with_a_reason():
    videos, scene, _ = clips(SINGLE, 2)
    for wrong in (
        videos.astype(np.float32),
        videos[0],
        videos[:, :, :8],
        videos[:, :1],
        videos[:0],
    ):
        with pytest.raises(ValueError, match="expected"):
            read(wrong, SINGLE)
    for wrong in (scene[:1], np.array([0, 48]), np.array([-1, 0])):
        with pytest.raises(ValueError, match="scene_index must hold"):
            score.score(videos, wrong, SINGLE)
