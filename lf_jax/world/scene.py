"""What happens in a video, as a few numbers: everything that moves is a closed function of time.

A scene lies in a room. The camera sees a part of it as large as the frame: the room's x from 0 to the aspect where it
does not pan, and more to the side where it pans. Objects move straight and bounce at the room's borders; a wall hides
them. Positions and speeds are relative to the room.
"""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp

from lf_jax.arrays import Array, Float, Key, Leaf
from lf_jax.world.settings import BACKGROUNDS, COLOURS, HEADINGS, SHAPES, SIZES, TINTS, WALLS, World

EDGES = 16  # of stripes; more than any room shows
LAYOUTS = 64  # tries at placing the objects apart
CLEAR = 0.7  # seconds from the start before an object may bounce, so that its direction shows
LEAD = 0.5  # seconds before an object may touch a wall, where there is room for that


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene, or a batch of them with a leading axis [b]. Names are indices into the tables of `settings`.

    `o` counts objects up to `World.max_objects`; the first `count` are there, the first of all in front.
    """

    count: Leaf  # [b] int32
    colour: Leaf  # [b, o] int32, all different in a scene
    shape: Leaf  # [b, o] int32
    size: Leaf  # [b, o] int32
    speed: Leaf  # [b, o] int32
    heading: Leaf  # [b, o] int32, at the start; without meaning where the object stands still
    hidden: Leaf  # [b, o] bool: disappears behind the wall and comes out again within the video
    radius: Leaf  # [b, o] h
    start: Leaf  # [b, o, 2] h: x and y of the centre at the first frame
    velocity: Leaf  # [b, o, 2] h/s at the first frame
    wall: Leaf  # [b] int32
    wall_x: Leaf  # [b] h: middle of the wall at the first frame
    wall_width: Leaf  # [b] h; 0 where there is no wall
    wall_speed: Leaf  # [b] h/s
    camera: Leaf  # [b] int32
    pan: Leaf  # [b] h/s, to the right; 0 where the camera is fixed
    reach: Leaf  # [b] h: how far the camera goes before it turns back, with the sign of `pan`
    background: Leaf  # [b] int32
    tints: Leaf  # [b, 2] int32, different; plain shows the first
    edges: Leaf  # [b, EDGES] h: where stripes change tint
    cell: Leaf  # [b] h: side of a checker
    phase: Leaf  # [b, 2] where the checkers start, in cells
    said: Leaf  # [b, o, 3] bool: whether the caption says size, speed and heading of an object
    said_of_all: Leaf  # [b, 3] bool: whether it says wall, background and camera

    def __getitem__(self, index: int | slice) -> "Scene":
        """One scene of a batch, or some."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def reflect(x: Array, low: Leaf, high: Leaf) -> Array:
    """A straight line folded back and forth between `low` and `high`: a triangle wave."""
    span = high - low
    return high - jnp.abs((x - low) % (2 * span) - span)


def camera(scene: Scene, t: Float[Array, " f"]) -> Float[Array, "*b f"]:
    """How far to the right the camera stands at the times `t`, in h."""
    pan, reach = scene.pan[..., None], jnp.abs(scene.reach)[..., None]
    moved = reflect(jnp.abs(pan) * t, 0.0, jnp.where(reach > 0, reach, 1.0))
    return jnp.sign(pan) * moved


def wall(world: World, scene: Scene, t: Float[Array, " f"]) -> Float[Array, "*b f"]:
    """The middle of the wall, in the room. A sliding wall goes from outside one side of the view to outside the other."""
    half = scene.wall_width[..., None] / 2
    x = scene.wall_x[..., None] + scene.wall_speed[..., None] * t
    return reflect(x, -half, world.aspect + half)


def centres(world: World, scene: Scene, t: Float[Array, " f"]) -> Float[Array, "*b f o 2"]:
    """x and y of the objects, in the room."""
    reach, radius = scene.reach[..., None], scene.radius
    low = jnp.stack([jnp.minimum(reach, 0) + radius, radius], axis=-1)[..., None, :, :]
    high = jnp.stack([world.aspect + jnp.maximum(reach, 0) - radius, 1 - radius], axis=-1)[..., None, :, :]
    straight = scene.start[..., None, :, :] + scene.velocity[..., None, :, :] * t[:, None, None]
    return reflect(straight, low, high)


@partial(jax.jit, static_argnames="world")
def sample(world: World, keys: Key[Array, " b"]) -> Scene:
    """Random scenes, one a key; the same key gives the same scene in any batch.

    Three scenes in ten have no wall and a fixed camera, as many a standing wall (the first object then passes behind it),
    the others a sliding wall or a pan. A camera pans only over stripes and checkers, where it shows.
    """
    return jax.vmap(partial(_sample, world))(keys)


def _sample(world: World, key: Key[Array, ""]) -> Scene:
    drawn = (jax.random.fold_in(key, number) for number in itertools.count())
    objects = world.max_objects

    def pick(options: int | Array, shape=(), p=None) -> Array:
        return jax.random.choice(next(drawn), options, shape, p=None if p is None else jnp.array(p))

    def between(low, high, shape=()) -> Array:
        return jax.random.uniform(next(drawn), shape, minval=low, maxval=high)

    def ranged(table: tuple, index: Array) -> Array:
        low, high = jnp.array(table).T
        return between(low[index], high[index], index.shape)

    plot = pick(5, p=(0.3, 0.3, 0.15, 0.1, 0.15))  # plain, standing wall, sliding wall, pan, pan and back
    standing, panning = plot == 1, plot >= 3
    side = jnp.where(pick(2) == 0, -1, 1)

    crosses = standing & (jnp.arange(objects) == 0)
    speed = jnp.where(crosses, pick(2, (objects,)) + 1, pick(3, (objects,), p=(0.15, 0.45, 0.4)))
    heading = jnp.where(crosses, 4 * pick(2, (objects,)), pick(len(HEADINGS), (objects,)))
    count = 1 + pick(objects)
    roomy = (count < 3) | (jnp.arange(objects) == 0)  # beside a wall there is no room for three large objects
    size = jnp.where(roomy, pick(len(SIZES), (objects,)), 0)
    radius, pace = ranged(world.radii, size), ranged(world.speeds, speed)
    angle = jnp.arange(len(HEADINGS)) * math.pi / 4
    velocity = pace[:, None] * jnp.stack([jnp.cos(angle), -jnp.sin(angle)], axis=-1).round(6)[heading]

    wall_width = jnp.where((plot == 1) | (plot == 2), between(*world.wall_widths), 0.0)
    outside = world.aspect / 2 - side * (world.aspect + wall_width) / 2
    middle = world.aspect / 2 + between(-0.04, 0.04)
    pan = jnp.where(panning, side * between(*world.pan_speeds), 0.0)
    textured, any_kind = 2 + pick(2), pick(len(BACKGROUNDS))
    chance = between(*world.mention)
    scene = Scene(
        count=count,
        colour=jax.random.permutation(next(drawn), len(COLOURS))[:objects],
        shape=pick(len(SHAPES), (objects,)),
        size=size,
        speed=speed,
        heading=heading,
        hidden=jnp.zeros(objects, bool),
        radius=radius,
        start=jnp.zeros((objects, 2)),
        velocity=velocity,
        wall=jnp.where(plot < len(WALLS), plot, 0),
        wall_x=jnp.where(standing, middle, outside),
        wall_width=wall_width,
        wall_speed=jnp.where(plot == 2, side * between(*world.wall_speeds), 0.0),
        camera=jnp.where(panning, 2 * (plot == 4) + jnp.where(side > 0, 1, 2), 0),
        pan=pan,
        reach=pan * world.seconds / jnp.where(plot == 4, 2, 1),
        background=jnp.where(panning, textured, any_kind),
        tints=jax.random.permutation(next(drawn), len(TINTS))[:2],
        edges=jnp.cumsum(between(0.18, 0.42, (EDGES,))) - 1.0,
        cell=between(0.22, 0.34),
        phase=between(0.0, 2.0, (2,)),
        said=between(0.0, 1.0, (objects, 3)) < chance,
        said_of_all=between(0.0, 1.0, (3,)) < chance,
    )
    scene = dataclasses.replace(scene, start=_starts(world, scene, next(drawn)))
    return dataclasses.replace(scene, hidden=_hidden(world, scene))


def _starts(world: World, scene: Scene, key: Key[Array, ""]) -> Float[Array, "o 2"]:
    """Places in view from which every object can be seen to move for a while; of many tries, that with most space between."""
    radius, (vx, vy) = scene.radius, scene.velocity.T
    objects = len(radius)
    coin, place = jax.random.split(key)
    on_screen = vx - scene.pan
    left, right = jnp.minimum(vx, on_screen), jnp.maximum(vx, on_screen)
    entering = LEAD * (scene.wall_speed - vx)  # what a sliding wall gains on an object
    left = jnp.maximum(jnp.maximum(-left, 0) * CLEAR, jnp.where(scene.wall_speed > 0, entering, 0))
    right = jnp.maximum(jnp.maximum(right, 0) * CLEAR, jnp.where(scene.wall_speed < 0, -entering, 0))
    low = radius[:, None] + jnp.stack([left, jnp.maximum(-vy, 0) * CLEAR], axis=-1)
    high = jnp.array([world.aspect, 1.0]) - radius[:, None] - jnp.stack([right, jnp.maximum(vy, 0) * CLEAR], axis=-1)

    # Before a standing wall: on the side from which the object comes, near enough to come out again within the video.
    heads_right = jnp.where(vx == 0, jax.random.bernoulli(coin, shape=(objects,)), vx > 0)
    room = scene.wall_x - scene.wall_width / 2  # between the left border and the wall
    room = jnp.where(heads_right, room, world.aspect - scene.wall_x - scene.wall_width / 2)
    near = jnp.minimum(jnp.abs(vx) * LEAD, room - 2 * radius)  # from the wall
    far = jnp.abs(vx) * (world.seconds - 2 * LEAD) - 2 * radius - scene.wall_width
    far = jnp.clip(jnp.where(vx == 0, room, far), near, room - 2 * radius)
    from_border = jnp.stack([room - radius - far, room - radius - near], axis=-1)
    sided = jnp.where(heads_right[:, None], from_border, world.aspect - from_border[:, ::-1])
    standing = scene.wall == WALLS.index("standing")
    low = low.at[:, 0].set(jnp.where(standing, sided[:, 0], low[:, 0]))
    high = high.at[:, 0].set(jnp.where(standing, sided[:, 1], high[:, 0]))

    tries = jax.random.uniform(place, (LAYOUTS, objects, 2), minval=low, maxval=high)
    gaps = jnp.linalg.norm(tries[:, :, None] - tries[:, None], axis=-1) - radius[:, None] - radius
    present = jnp.arange(objects) < scene.count
    counts = present[:, None] & present & ~jnp.eye(objects, dtype=bool)
    return tries[jnp.argmax(jnp.where(counts, gaps, jnp.inf).min((1, 2)))]


def _hidden(world: World, scene: Scene) -> Array:
    """Which objects are wholly behind the wall for a quarter of a second, and in full view before and after it."""
    t = jnp.arange(world.num_frames) / world.fps
    x, middle = centres(world, scene, t)[:, :, 0], wall(world, scene, t)[:, None]
    away = jnp.abs(x - middle) - scene.wall_width / 2  # of the centre from the nearer edge of the wall
    covered, clear = away <= -scene.radius, away >= scene.radius
    since = jnp.cumsum(covered, axis=0)
    quarter = max(2, round(0.25 * world.fps))
    present = jnp.arange(len(scene.radius)) < scene.count
    seen_before = (clear & (since == 0)).sum(0) >= 2
    seen_after = (clear & (since >= quarter)).sum(0) >= quarter
    return present & (scene.wall > 0) & seen_before & seen_after
