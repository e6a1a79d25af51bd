"""The world is what its captions say: truth is read off the pixels without the code that drew
them.
"""

import itertools

import numpy as np
import pytest

from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.latents import to_latent, to_pixels
from salt_jax.moving_shapes.shapes import Mode, Scene, World

WORLDS = {
    "9 frames": World(),
    "21 frames": World(frames=21),
    "pair": World(pair=True, radius=2.0),
    "long pair": World(frames=21, pair=True, radius=2.0),
}
ROW_COLUMN = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}  # of a picture: row 0 is on top


def centre(mass: np.ndarray) -> np.ndarray:
    """Row and column [..., 2] of the centre of mass [..., H, W] on the torus: the circular mean."""
    size = mass.shape[-1]
    turn = np.exp(2j * np.pi * np.arange(size) / size)
    angles = np.stack(
        [np.angle((mass.sum(-1) * turn).sum(-1)), np.angle((mass.sum(-2) * turn).sum(-1))], -1
    )
    return angles * size / (2 * np.pi)


def around(distance: np.ndarray, size: int) -> np.ndarray:
    """A distance as the shorter way round the torus."""
    return (distance + size / 2) % size - size / 2


def some(items, count: int):
    """Evenly spread items, the first included."""
    return items[:: max(1, len(items) // count)]


@pytest.mark.parametrize(
    "world, num_scenes",
    [(World(), 48), (World(pair=True, radius=2.0), 48 * 4 * 3 * 3)],
    ids=["single", "pair"],
)
def test_captions_are_distinct_and_complete(world, num_scenes):
    scenes = shapes.scenes(world)
    captions = [shapes.caption(scene) for scene in scenes]
    assert len(scenes) == len(set(scenes)) == len(set(captions)) == num_scenes
    for scene, caption in zip(scenes, captions, strict=True):
        words = (
            scene.shape,
            scene.colour,
            scene.direction,
            scene.relation,
            scene.shape2,
            scene.colour2,
        )
        assert all(word in caption for word in words)
        assert scene.colour != scene.colour2


def test_captions_are_english():
    assert shapes.caption(Scene("circle", "red", "left")) == "A red circle moves left."
    pair = Scene("square", "blue", "up", "above", "triangle", "green")
    assert shapes.caption(pair) == "A blue square above a green triangle, both moving up."


@pytest.mark.parametrize("count", [1, 6, 48, 96, 100])
def test_captions_are_spread_evenly(count):
    drawn = shapes.spread(World(), count)
    times = np.bincount(drawn, minlength=48)
    assert len(drawn) == count and drawn == sorted(drawn) and times.max() - times.min() <= 1
    assert count > 6 or len({shapes.scenes(World())[i].shape for i in drawn}) == min(count, 3)


def test_modes_are_the_grid_of_starts_and_speeds():
    modes = shapes.modes(World())
    assert len(modes) == len(set(modes)) == 4 * 4 * 2
    assert {m.speed for m in modes} == {0.5, 1.0}
    assert {m.x for m in modes} == {m.y for m in modes} == {2.0, 4.0, 6.0, 8.0}


def test_the_mean_clip_of_a_caption_tells_its_direction():
    """Starts around the middle: even in pure noise, where only the mean is left, the four
    directions differ.
    """
    world = World()
    mean = lambda scene: np.mean(
        [shapes.render(scene, mode, world).astype(float) for mode in shapes.modes(world)], 0
    )
    means = [mean(Scene("circle", "red", direction)) for direction in shapes.DIRECTIONS]
    for i, j in itertools.combinations(range(4), 2):
        assert np.sqrt(np.mean((means[i] - means[j]) ** 2)) > 5


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        shapes.shape_mask("star", 0.0, 0.0, World())


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_clip_has_the_promised_form(world):
    clip = shapes.render(shapes.scenes(world)[0], shapes.modes(world)[0], world)
    assert clip.dtype == np.uint8
    assert clip.shape == (world.frames, world.size, world.size, 3)


def test_every_scene_and_mode_makes_another_clip():
    world = World()
    scenes, modes = some(shapes.scenes(world), 10), shapes.modes(world)
    clips = {shapes.render(scene, mode, world).tobytes() for scene in scenes for mode in modes}
    assert len(clips) == len(scenes) * len(modes)


@pytest.mark.parametrize("frames", [9, 21])
@pytest.mark.parametrize("direction", ROW_COLUMN)
def test_centre_of_mass_moves_by_speed_in_the_stated_direction(direction, frames):
    world = World(frames=frames)
    for shape in shapes.SHAPES:
        for mode in some(shapes.modes(world), 24):
            clip = shapes.render(Scene(shape, "yellow", direction), mode, world)
            step = around(np.diff(centre(clip.sum(-1, dtype=float)), axis=0), world.size)
            expected = mode.speed * np.asarray(ROW_COLUMN[direction])
            np.testing.assert_allclose(step, np.broadcast_to(expected, step.shape), atol=0.05)


def test_clip_starts_where_its_mode_says():
    world = World()
    for mode in shapes.modes(world):
        for shape in ("circle", "square"):  # symmetric, so the centre of mass is the centre
            clip = shapes.render(Scene(shape, "blue", "down"), mode, world)
            off = around(
                centre(clip[0].sum(-1, dtype=float)) - np.array([mode.y, mode.x]), world.size
            )
            np.testing.assert_allclose(off, 0, atol=0.01)


@pytest.mark.parametrize("speed, frames_per_pixel", [(0.5, 2), (1.0, 1)])
@pytest.mark.parametrize("direction", ROW_COLUMN)
def test_nothing_happens_at_the_seam(direction, speed, frames_per_pixel):
    """21 frames go round the torus, and a later frame is always an earlier one shifted."""
    world = World(frames=21)
    for shape in shapes.SHAPES:
        clip = shapes.render(Scene(shape, "green", direction), Mode(10.0, 10.0, speed), world)
        shifted = np.roll(clip[:-frames_per_pixel], ROW_COLUMN[direction], axis=(1, 2))
        np.testing.assert_array_equal(clip[frames_per_pixel:], shifted)


@pytest.mark.parametrize("radius, tolerance", [(2.0, 0.08), (3.0, 0.04)])
def test_shapes_have_equal_area_wherever_they_are(radius, tolerance):
    """So neither area nor brightness gives the shape away."""
    world = World(radius=radius)
    x, y = np.meshgrid(np.linspace(0, 2, 8, endpoint=False), np.linspace(0, 2, 8, endpoint=False))
    for shape in shapes.SHAPES:
        area = shapes.shape_mask(shape, x, y, world).sum((-1, -2))
        np.testing.assert_allclose(area, np.pi * radius**2, rtol=tolerance)


def test_shapes_look_like_their_names():
    world = World(size=24, radius=6.0)
    circle, square, triangle = (
        shapes.shape_mask(s, 12.0, 12.0, world) > 0.5 for s in shapes.SHAPES
    )
    row, column = np.indices(circle.shape) - 12
    np.testing.assert_array_equal(circle, row**2 + column**2 < 36)
    # half a side is 5.3
    np.testing.assert_array_equal(square, np.maximum(abs(row), abs(column)) <= 5)
    widths = triangle.sum(1)[triangle.any(1)]
    # points up
    assert np.all(np.diff(widths) >= 0) and widths[0] <= 2 and widths[-1] == widths.max() >= 15
    np.testing.assert_array_equal(triangle[:, 1:], triangle[:, :0:-1])  # column 12 is the axis


def test_colours_are_what_they_are_called():
    clip = {
        c: shapes.render(Scene("square", c, "left"), Mode(6.0, 6.0, 1.0), World())
        for c in shapes.COLOURS
    }
    pixel = {colour: video[0, 6, 6].astype(int) for colour, video in clip.items()}
    bright = {colour: tuple(value > 200) for colour, value in pixel.items()}
    assert bright == {
        "red": (True, False, False),
        "green": (False, True, False),
        "blue": (False, False, True),
        "yellow": (True, True, False),
    }


def test_pair_stands_in_the_stated_relation_in_every_frame():
    world = World(frames=21, pair=True, radius=2.0)
    from_second = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    for scene in some(shapes.scenes(world), 200):
        clip = shapes.render(scene, shapes.modes(world)[17], world).astype(float)
        colours = (
            np.array([[0, 0, 0], shapes.COLOURS[scene.colour], shapes.COLOURS[scene.colour2]]) * 255
        )
        nearest = np.argmin(((clip[..., None, :] - colours) ** 2).sum(-1), -1)
        first, second = (centre((nearest == i).astype(float)) for i in (1, 2))
        apart = around(first - second, world.size)
        along = apart @ np.array(from_second[scene.relation])
        across = apart @ np.array(from_second[scene.relation])[::-1]
        assert np.all((along > 4) & (along < 5.9)), (
            scene,
            along,
        )  # a triangle's centre of mass may be off by 1/2
        assert np.all(abs(across) < 0.75), (scene, across)


def test_pair_does_not_overlap():
    """Only soft edges touch: what two objects share is below 3% of the area of one."""
    world = World(pair=True, radius=2.0)
    for scene in (s for s in shapes.scenes(world) if (s.colour, s.colour2) == ("red", "green")):
        first, second = shapes.centres(scene, Mode(4.0, 8.0, 0.5), world)
        shared = shapes.shape_mask(scene.shape, *first, world) * shapes.shape_mask(
            scene.shape2, *second, world
        )
        assert shared.sum((-1, -2)).max() < 0.03 * np.pi * world.radius**2, scene


def test_latent_is_pixels_from_minus_one_to_one():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1)
    latent = to_latent(pixels, World())
    assert latent.dtype == np.float32 and latent.min() == -1 and latent.max() == 1
    np.testing.assert_array_equal(to_pixels(latent, World()), pixels)
    np.testing.assert_array_equal(to_pixels(np.array([-7.0, 7.0]), World()), [0, 255])
