"""Scenes to pixels: signed distances, one elementwise computation over batch, frames, rows and columns."""

from functools import partial

import jax
import jax.numpy as jnp

from lf_jax.arrays import Array, Float, Int
from lf_jax.world import settings
from lf_jax.world.scene import Scene, camera, centres, wall
from lf_jax.world.settings import BACKGROUNDS, SHAPES, World


@partial(jax.jit, static_argnames=("world", "frames"))
def render(world: World, scene: Scene, start: Int[Array, ""] | int = 0, frames: int | None = None) -> Float[Array, "b f h w 3"]:
    """The frames `start` .. `start + frames - 1` of every scene, in [-1, 1]; of `world.num_frames` if `frames` is None.

    Any range of frames costs the same, and a video has no last frame: motion goes on after `world.num_frames`.
    Edges are antialiased over one pixel.
    """
    t = (start + jnp.arange(frames or world.num_frames)) / world.fps
    rows, columns = (jnp.arange(n) + 0.5 for n in (world.height, world.width))
    y = (rows / world.height)[:, None]
    x = (columns / world.height + camera(scene, t)[..., None])[:, :, None]  # [b, f, 1, w], in the room

    share = _background(world, scene, x, y)[..., None]
    tint = _levels(settings.TINTS)[scene.tints][:, :, None, None, None]
    video = tint[:, 0] + share * (tint[:, 1] - tint[:, 0])
    colours = _levels(settings.COLOURS)[scene.colour][:, :, None, None, None]
    places = centres(world, scene, t)[..., None, None]  # [b, f, o, 2, 1, 1]
    for index in reversed(range(world.max_objects)):  # the first in front
        distance = _distance(
            scene.shape[:, index, None, None, None],
            x - places[:, :, index, 0],
            y - places[:, :, index, 1],
            scene.radius[:, index, None, None, None],
        )
        seen = (index < scene.count)[:, None, None, None] * _cover(world, distance)
        video += seen[..., None] * (colours[:, index] - video)
    edge = jnp.abs(x - wall(world, scene, t)[..., None, None]) - scene.wall_width[:, None, None, None] / 2
    present = (scene.wall > 0)[:, None, None, None] * _cover(world, edge)
    return video + present[..., None] * (_levels({"wall": settings.WALL})[0] - video)


def _levels(table: dict[str, tuple[int, int, int]]) -> Float[Array, "n 3"]:
    return jnp.array(list(table.values()), jnp.float32) / 127.5 - 1


def _cover(world: World, distance: Array) -> Array:
    """How much of a pixel lies inside, from the signed distance of its middle in h."""
    return jnp.clip(0.5 - distance * world.height, 0, 1)


def _background(world: World, scene: Scene, x: Array, y: Array) -> Array:
    """The share of the second tint. Stripes run down, and no two are alike; a gradient runs from the top to the bottom."""
    stripes = sum((-1) ** k * _cover(world, scene.edges[:, k, None, None, None] - x) for k in range(scene.edges.shape[1]))

    def square_wave(u: Array, phase: Array) -> Array:  # -1 or 1 in turn, cell by cell
        cell = scene.cell[:, None, None, None]
        to_edge = cell * (jnp.abs((u / cell + phase[:, None, None, None]) % 2 - 1) - 0.5)
        return 2 * _cover(world, to_edge) - 1

    checker = 0.5 - 0.5 * square_wave(x, scene.phase[:, 0]) * square_wave(y, scene.phase[:, 1])
    kind = scene.background[:, None, None, None]
    share = jnp.where(kind == BACKGROUNDS.index("gradient"), y, 0.0)
    share = jnp.where(kind == BACKGROUNDS.index("stripes"), stripes, share)
    return jnp.where(kind == BACKGROUNDS.index("checker"), checker, share)


def _distance(shape: Array, dx: Array, dy: Array, radius: Array) -> Array:
    """Signed distance from the edge of a shape, negative inside; exact near straight edges, which is where it is used."""
    ax, ay = jnp.abs(dx), jnp.abs(dy)
    circle = jnp.sqrt(dx * dx + dy * dy) - radius
    square = jnp.maximum(ax, ay) - settings.SIDE * radius
    inner = settings.APEX / 2 * radius  # radius of the circle inside the triangle
    triangle = jnp.maximum(dy, 0.75**0.5 * ax - 0.5 * dy) - inner
    arm = settings.ARM * radius
    cross = jnp.minimum(jnp.maximum(ax - radius, ay - arm), jnp.maximum(ax - arm, ay - radius))
    distance = jnp.where(shape == SHAPES.index("square"), square, circle)
    distance = jnp.where(shape == SHAPES.index("triangle"), triangle, distance)
    return jnp.where(shape == SHAPES.index("cross"), cross, distance)
