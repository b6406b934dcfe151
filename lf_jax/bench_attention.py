"""What the choice of blocks costs beside the attention that it feeds, and what both save: the last chunk of a video.

Every row is the time of one layer. A launch computes some layers, each with its own queries, keys and values and its own
layer of the cache, so that no layer finds in the GPU's caches what only another has put there. Rows are timed as
`pallas_kernels.bench` does it, but without the gaps between kernels: the host takes longer to launch a selection than the
device to run it, and has run ahead by then in a network.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import attention, bench, rope, sparsity
from lf_jax import cache as kv
from lf_jax.arrays import Array
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.config import Config, check, dtype_of
from lf_jax.dit.block import SelfAttention
from lf_jax.tokens import Grid, chunk_lengths, latent_frames
from pallas_kernels import BlockMap, Past, block_sparse_attention, platform, selection, timing, trace
from pallas_kernels.runs import Run

LAYERS = 8  # at most, of a launch: 1.7 GB of cache at full size
WITHOUT, WITH = "norms, rotation", "norms, rotation, means"


class Made(NamedTuple):
    """What stands between the projections of a layer and its attention."""

    q: Array  # [b, t, head, head_dim], normalised and rotated
    means: Array | None  # [b, query block, head, head_dim]
    new: ChunkKV


class Scene(NamedTuple):
    """One chunk and all it sees."""

    own: SelfAttention  # of all layers
    turn: tuple[Array, Array]  # cosines and sines of the chunk's tokens
    qkv: list[Array]  # the projections of every layer: [b, t, 3 dim]
    made: list[Made]  # of every layer
    lists: list[BlockMap]
    cache: KVCache
    time: sparsity.Timeline
    budget: sparsity.Budget
    dense: tuple[Array, Array]  # keys and values in sight, dead tokens left out: [b, s, head, head_dim]


# What is timed of a layer: (scene, number of the layer, grid, settings) -> arrays
def _prepare(scene: Scene, layer: int, grid: Grid, settings: Config, pool: bool = True) -> Made:
    """Normalises and rotates queries and keys; with the means that selection compares, or without."""
    return Made(*scene.own.queries_keys(scene.qkv[layer], scene.turn, grid, pool))


def _select(scene: Scene, layer: int, grid: Grid, settings: Config) -> BlockMap:
    """From means to lists."""
    q, means, new = scene.made[layer]
    given = scene.cache, jnp.int32(layer), scene.time, scene.budget, grid, settings.sparsity
    return sparsity.select(sparsity.Inputs(q, new, *given, means))


def _attend(scene: Scene, layer: int, grid: Grid, settings: Config) -> Array:
    q, _, new = scene.made[layer]
    return block_sparse_attention(
        q,
        new.k,
        new.v,
        scene.lists[layer],
        scale=settings.model.head_dim**-0.5,
        past=Past(scene.cache.k, scene.cache.v, jnp.int32(layer)) if scene.cache.frames else None,
        frame_tokens=grid.frame_tokens,
        implementation=settings.sparsity.implementation,
    )


def _both(scene: Scene, layer: int, grid: Grid, settings: Config) -> Array:
    """As the network calls them."""
    q, means, new = scene.made[layer]
    given = scene.cache, jnp.int32(layer), scene.time, scene.budget, grid, settings.sparsity
    return attention.self_attention(q, new, *given, means=means)


def _dense(scene: Scene, layer: int, grid: Grid, settings: Config) -> Array:
    return attention.dense_attention(scene.made[layer].q, *scene.dense)


def _launch(piece: Callable, scene: Scene, grid: Grid, settings: Config) -> Callable[[], list]:
    """`piece` of every layer, in one program. It takes the leaves of the scene, so that a launch does not walk the tree."""
    leaves, tree = jax.tree.flatten(scene)

    @jax.jit
    def layers(*leaves):
        given = jax.tree.unflatten(tree, leaves)
        return [piece(given, layer, grid, settings) for layer in range(len(given.qkv))]

    return partial(layers, *leaves)


def scene(config: Config) -> Scene:
    """The last chunk of a video with normal queries, keys and values, and the lists that the policy makes of them.

    Raises:
        ValueError: if attention is dense, or the frames do not make whole chunks.
    """
    check(not config.sparsity.dense, f"{config.sparsity.policy=} has no block lists to time")
    grid, lengths = Grid.of(config), _lengths(config)
    model = dataclasses.replace(config.model, layers=min(LAYERS, config.model.layers))
    cache = kv.empty(model, grid, config.cache, sparse=True, batch=1, frames=sum(lengths) if len(lengths) > 1 else 0)

    own = SelfAttention(model, rngs=nnx.Rngs(0))

    @partial(jax.jit, static_argnums=1)
    def draw(key: Array, frames: int) -> Array:
        return jax.random.normal(key, (model.layers, frames * grid.frame_tokens, 3 * model.dim), dtype_of(model))

    @partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
    def commit(cache: KVCache, qkv: Array, frames: int, following: int) -> KVCache:
        _, _, new = own.queries_keys(qkv, turn(cache, frames), grid, pool=True)  # layers in the place of a batch
        return kv.append(cache, jax.tree.map(lambda x: x[:, None], new), frames, following)

    def turn(cache: KVCache, frames: int) -> tuple[Array, Array]:
        angles = rope.angles(cache.end, frames, grid.rows, grid.columns, model.head_dim)
        return jnp.cos(angles), jnp.sin(angles)

    for i, (now, following) in enumerate(zip(lengths, lengths[1:], strict=False)):
        cache = commit(cache, draw(jax.random.key(i), now), now, following)
    drawn = draw(jax.random.key(-1), lengths[-1])
    order = sparsity.timeline(cache, lengths[-1], grid)
    budgets = sparsity.chunk_budgets(lengths, 0, grid, config.sparsity, config.cache)
    budget = sparsity.Budget(jnp.asarray(budgets.blocks[-1]), budgets.width)
    qkv = [drawn[layer : layer + 1] for layer in range(model.layers)]
    found = Scene(own, turn(cache, lengths[-1]), qkv, [], [], cache, order, budget, ())
    found = found._replace(made=_launch(_prepare, found, grid, config)())
    new = (attention.without_padding(x, grid) for x in (found.made[0].new.k, found.made[0].new.v))
    dense = tuple(_in_sight(x, own, order, grid) for x, own in zip((cache.k, cache.v), new, strict=True))
    return found._replace(lists=_launch(_select, found, grid, config)(), dense=dense)


def _lengths(config: Config) -> tuple[int, ...]:
    """Frames of every chunk."""
    frames = latent_frames(config.video.num_frames, config.vae.temporal_stride)
    return chunk_lengths(frames, config.rollout.chunk_frames, config.rollout.independent_first_frame)


def _in_sight(cached: Array, new: Array, order: sparsity.Timeline, grid: Grid) -> Array:
    """The live tokens of the visible past, in layer 0, and of the chunk."""
    past = int(order.past) * order.frame_blocks
    blocks = cached[0].reshape(1, -1, grid.block_k, *cached.shape[3:])[:, order.blocks[:past]]
    return jnp.concatenate([attention.without_padding(blocks.reshape(1, -1, *cached.shape[3:]), grid), new], axis=1)


def measure(config: Config, repeats: int) -> bench.Report:
    """Times selection by every implementation that runs here, attention on its lists, both, and dense attention.

    Selection begins where queries and keys are normalised and rotated, by a kernel that makes their means on the way: that
    kernel is timed with and without.

    Raises:
        ValueError: as `scene`.
    """
    grid, case = Grid.of(config), scene(config)
    frames = case.time.blocks.size // grid.frame_blocks
    pieces = {WITHOUT: _launch(partial(_prepare, pool=False), case, grid, config)}
    pieces[WITH] = _launch(_prepare, case, grid, config)
    for name, reason in selection.explain(config.model.head_dim, frames, grid.frame_blocks).items():
        if reason is None:
            named = dataclasses.replace(config, sparsity=dataclasses.replace(config.sparsity, selection=name))
            pieces[f"selection, {name}"] = _launch(_select, case, grid, named)
    pieces["attention"] = _launch(_attend, case, grid, config)
    pieces["selection + attention"] = _launch(_both, case, grid, config)
    dense = next(name for name, reason in attention.dense_implementations(case.made[0].q).items() if reason is None)
    pieces[f"dense, {dense}"] = _launch(_dense, case, grid, config)
    first, runs = {}, {}
    for name, launch in pieces.items():
        start = time.perf_counter()
        jax.block_until_ready(launch())
        first[name] = 1000 * (time.perf_counter() - start)
        runs[name] = Run(launch, jax.block_until_ready, None, "calls")
    chunk, rows = len(_lengths(config)) - 1, []
    for name, times in timing.bursts(runs, repeats, trace.busy).items():
        per_layer = [ms / len(case.qkv) for ms in times]
        rows.append(bench.Row(name, chunk, first[name], statistics.median(per_layer), min(per_layer), max(per_layer)))
    return bench.Report(facts(config, case, rows, repeats), tuple(rows))


def facts(config: Config, case: Scene, rows: list[bench.Row], repeats: int) -> dict[str, str | int | float]:
    """What a figure must name to mean anything, and the shares that matter."""
    ms = {row.stage: row.median for row in rows}
    chosen = config.sparsity.selection
    chosen = chosen or next(name.partition(", ")[2] for name in ms if name.startswith("selection, "))
    select, dense = ms[WITH] - ms[WITHOUT] + ms[f"selection, {chosen}"], rows[-1].median
    both = ms[WITH] - ms[WITHOUT] + ms["selection + attention"]
    grid, kept, seen = Grid.of(config), int(case.budget.blocks), int(case.time.visible.sum())
    common = timing.facts(platform.describe(), repeats)
    return common | {
        "timed": f"{common['timed']}; without gaps between kernels",
        "layer": f"{len(case.qkv)} layers a launch; {case.qkv[0].shape[1]} queries, {case.dense[0].shape[1]} keys, "
        f"{config.model.heads} heads of {config.model.head_dim}, {config.model.dtype}, blocks {grid.block_q}x{grid.block_k}, "
        f"budget {kept} of {seen} blocks, {config.sparsity.policy}",
        "(means + selection) / attention": round(select / ms["attention"], 4),
        "the same from both together": round(both / ms["attention"] - 1, 4),
        "dense / (means + selection + attention)": round(dense / both, 2),
    }
