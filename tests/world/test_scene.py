"""Scenes from seeds, and their pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax.world import World, render, sample
from lf_jax.world.scene import camera, centres, reflect, wall
from lf_jax.world.settings import AREAS, COLOURS, SHAPES, TINTS, WALL

WORLD = World(height=64, width=96, num_frames=33, fps=8)
MANY = 500


@pytest.fixture(scope="module")
def scenes():
    return jax.device_get(sample(World(), jax.random.split(jax.random.key(0), MANY)))


def levels(colour):
    return np.array(colour) / 127.5 - 1


def one(**fields):
    """A scene of one red circle at rest on plain white; `fields` differ."""
    scene = jax.device_get(sample(WORLD, jax.random.split(jax.random.key(0), 1)))
    still = {"velocity": 0, "wall": 0, "wall_width": 0, "wall_speed": 0, "pan": 0, "reach": 0, "background": 0, "radius": 0.15}
    still |= {"start": 0.5, "colour": 0, "shape": 0}
    scene = dataclasses.replace(scene, **{name: np.full_like(getattr(scene, name), x) for name, x in still.items()})
    scene = dataclasses.replace(scene, count=np.array([1]), tints=np.array([[0, 1]]))
    return dataclasses.replace(scene, **{name: np.asarray(x) for name, x in fields.items()})


def test_a_key_gives_one_scene_wherever_it_stands(scenes):
    turned = sample(World(), jax.random.split(jax.random.key(0), MANY)[::-1])
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a[::-1], b), turned, scenes)))


def test_scenes_keep_their_promises(scenes):
    world, t = World(), jnp.arange(81) / 16
    present = np.arange(3) < scenes.count[:, None]
    assert all(len(set(row)) == 3 for row in scenes.colour)
    places = np.asarray(centres(world, scenes, t)) - np.asarray(camera(scenes, t))[:, :, None, None] * [1, 0]
    soon = places[:, :8]  # half a second
    in_view = (soon >= scenes.radius[:, None, :, None] - 1e-3) & (
        soon <= np.array([world.aspect, 1]) - scenes.radius[:, None, :, None] + 1e-3
    )
    assert in_view.all()
    steps = np.diff(soon, axis=1)
    assert np.allclose(steps, steps[:, :1], atol=1e-4)  # no bounce yet, so the direction shows
    apart = (
        np.linalg.norm(places[:, 0, :, None] - places[:, 0, None], axis=-1) - scenes.radius[:, None] - scenes.radius[:, :, None]
    )
    both = present[:, None] & present[:, :, None] & ~np.eye(3, dtype=bool)
    assert apart[both].min() > -0.05 and np.mean(apart[both] > 0) > 0.99
    assert (np.abs(scenes.velocity[..., 0]) - np.abs(scenes.pan)[:, None] > 0)[np.abs(scenes.velocity[..., 0]) > 1e-3].all()
    assert set(scenes.background[scenes.camera > 0]) == {2, 3}  # where a pan shows
    assert scenes.hidden[scenes.wall == 1, 0].mean() > 0.95 and not scenes.hidden[scenes.wall == 0].any()
    assert not (scenes.hidden & ~present).any()


def test_bounces_and_turns():
    x = reflect(jnp.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5]), 0.0, 1.0)
    assert np.allclose(x, [0, 0.5, 1, 0.5, 0, 0.5])
    scene = one(velocity=np.tile([0.5, 0.0], (1, 3, 1)))
    t = jnp.arange(81) / 8
    xs = np.asarray(centres(WORLD, scene, t))[0, :, 0, 0]
    assert xs.min() >= 0.15 - 1e-6 and xs.max() <= 1.35 + 1e-6 and (np.diff(np.sign(np.diff(xs))) != 0).sum() >= 3
    back = one(pan=[0.1], reach=[0.2])
    assert np.allclose(camera(back, jnp.array([0.0, 1.0, 2.0, 3.0, 4.0])), [[0, 0.1, 0.2, 0.1, 0]], atol=1e-6)
    slides = one(wall=[2], wall_width=[0.4], wall_speed=[0.4], wall_x=[-0.2])
    assert np.allclose(wall(WORLD, slides, jnp.array([0.0, 1.0, 4.75])), [[-0.2, 0.2, 1.7]], atol=1e-6)


def test_any_range_of_frames_is_the_same_video():
    scene = one(velocity=np.tile([0.5, 0.1], (1, 3, 1)), wall=[2], wall_width=[0.4], wall_speed=[0.4], wall_x=[-0.2])
    whole = render(WORLD, scene)
    assert whole.shape == (1, 33, 64, 96, 3) and float(jnp.abs(whole).max()) <= 1
    for start in (20, jnp.int32(27)):
        assert np.allclose(render(WORLD, scene, start, 5), whole[:, start : start + 5], atol=1e-5)
    assert not np.allclose(render(WORLD, scene, 1000, 5)[:, 0], render(WORLD, scene, 1000, 5)[:, 4])  # it never ends


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_shapes_have_their_area_and_colour(shape):
    frame = np.asarray(render(WORLD, one(shape=np.full((1, 3), shape)), 0, 1))[0, 0]
    white, red = levels(TINTS["white"]), levels(COLOURS["red"])
    share = (frame - white)[..., 1] / (red - white)[1]
    assert np.allclose(frame, white + share[..., None] * (red - white), atol=1e-5)
    assert share.sum() / 64**2 == pytest.approx(AREAS[SHAPES[shape]] * 0.15**2, rel=0.03)
    assert 0 < np.mean((share > 0.01) & (share < 0.99)) < 0.03  # edges are soft, over a pixel


def test_walls_hide_and_the_first_object_is_in_front():
    behind = np.asarray(render(WORLD, one(wall=[1], wall_width=[0.4], wall_x=[0.5]), 0, 1))[0, 0]
    assert np.allclose(behind[32, 32], levels(WALL)) and not np.allclose(behind[32, 60], levels(WALL))
    over = np.asarray(render(WORLD, one(count=[2], colour=[[2, 4, 1]]), 0, 1))[0, 0]
    assert np.allclose(over[32, 32], levels(COLOURS["green"]))


def test_backgrounds():
    def ground(kind, **fields):
        return np.asarray(render(WORLD, one(background=[kind], count=[0], **fields), 0, 1))[0, 0]

    white, grey = levels(TINTS["white"]), levels(TINTS["grey"])
    assert np.allclose(ground(0), white)
    gradient = ground(1)
    assert np.allclose(gradient, gradient[:, :1]) and (np.diff(gradient[:, 0, 0]) < 0).all()
    stripes = ground(2)
    assert np.allclose(stripes, stripes[:1], atol=1e-6)
    for tint in (white, grey):
        assert (np.abs(stripes[0] - tint).max(axis=1) < 1e-5).any()
    checker = ground(3, cell=[0.25], phase=np.zeros((1, 2)))
    assert np.allclose(checker[8::16, 8::16, 0][0, ::2], checker[24, 24, 0])
    assert not np.allclose(checker[8, 8], checker[8, 24])


def test_a_pan_moves_the_background_and_comes_back():
    scene = one(background=[2], count=[0], pan=[0.125], reach=[0.25])
    video = np.asarray(render(WORLD, scene, 0, 33))[0]
    assert np.allclose(video[8, :, :-8], video[0, :, 8:], atol=1e-4)  # a second: 0.125 h are 8 pixels
    assert np.allclose(video[32], video[0], atol=1e-4) and not np.allclose(video[16], video[0], atol=0.1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"height": 0}, "height=0 must be positive"),
        ({"height": 128, "width": 128}, "within 1.25..2"),
        ({"max_objects": 4}, "within 1..3"),
        ({"radii": ((0.1, 0.2),)}, "one range for each"),
        ({"speeds": ((0.1, 0.2),)}, "one range for each"),
        ({"wall_widths": (0.5, 0.4)}, "must rise"),
        ({"mention": (-1.0, 0.5)}, "must rise from 0"),
    ],
)
def test_settings_check_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        World(**fields)
