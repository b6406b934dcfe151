"""Published baselines against their rules read aloud: every list, on caches of all kinds, against loops over raw tokens."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_rollout as tiny
from test_sparsity import SMALL, VIDEOS, Video, as_sets, key_blocks, means

from lf_jax import config, sparsity
from lf_jax.chunk import compiled_chunk
from lf_jax.rollout import initial_state, stream
from lf_jax.sparsity.clusters import MEMBERS, STEPS
from lf_jax.tokens import Grid

SETTINGS = config.Sparsity(policy="sta", sink_frames=1, near_frames=1, keep_frames=4)
CASES = ["no past", "two stages", "ring, sink 3", "ring without a sink", "chunks of two"]
_select = jax.jit(sparsity.select)


@cache
def video_of(name: str) -> Video:
    return Video(SMALL, **VIDEOS[name])


def select(video: Video, policy: str, budget: int, layer: int = 0) -> dict:
    """{(head, query block): set of block numbers}, of a cache whose layers are all the same."""
    inputs = video.inputs(dataclasses.replace(SETTINGS, policy=policy), budget, key_blocks(video))
    pooled = jnp.broadcast_to(inputs.cache.pooled[1:], (6, *inputs.cache.pooled.shape[1:]))
    inputs = dataclasses.replace(inputs, cache=dataclasses.replace(inputs.cache, pooled=pooled), layer=jnp.int32(layer))
    return as_sets(_select(inputs), key_blocks(video))


def seen(video: Video) -> list[int]:
    """Visible frames and those of the chunk, in the order of time."""
    return [*video.visible(), *(len(video.keys) + i for i in range(video.chunk))]


def blocks_of(video: Video) -> list[tuple[int, int]]:
    """(place of the frame among the visible ones, block of the frame), in the order of time."""
    return [(rank, j) for rank in range(len(seen(video))) for j in range(video.grid.frame_blocks)]


def number(video: Video, rank: int, block: int) -> int:
    return video.number(seen(video)[rank], block)


def rows(video: Video) -> list[tuple[int, int]]:
    return [(head, i) for head in range(2) for i in range(video.grid.query_blocks(video.chunk))]


def pooled(video: Video) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """Mean queries [head, e] of all query blocks; mean keys and live tokens of `blocks_of`."""
    frames = [(video.keys + video.current)[f] for f in seen(video)]
    size = video.grid.block_k
    keys = [mean for frame in frames for mean in means(frame, size)]
    live = [len(frame[i : i + size]) for frame in frames for i in range(0, len(frame), size)]
    return means(np.asarray(video.q[0]), video.grid.block_q), keys, live


# ---- masks that depend on positions alone -----------------------------------------------------


@cache
def smallest_window(query: int, key: int, size: int) -> float:
    """Of the windows of 2 r + 1 places, on the query or moved to lie within, the r of the smallest that holds the key."""
    for r in np.arange(0, size, 0.5):
        centre = min(max(query, r), size - 1 - r)
        if abs(key - centre) <= r:
            return r
    raise AssertionError


def sliding_tile(video: Video):
    """What the mask makes of two frames and of two tokens of a frame, and how large it must be for both."""
    grid, frames = video.grid, len(seen(video))

    def space(query: int, key: int) -> float:
        (q_row, q_column), (k_row, k_column) = divmod(query, grid.columns), divmod(key, grid.columns)
        rows, columns = (q_row, k_row, grid.rows), (q_column, k_column, grid.columns)
        return max(smallest_window(*axis) / axis[-1] for axis in (rows, columns))

    return (
        lambda q, k: smallest_window(q, k, frames) / frames,
        space,
        lambda time, space: max(time, space) + 1e-3 * (time + space),
    )


def radial_band(video: Video):
    """Likewise: the factor c of the smallest band |k - l| + 1 <= c s / 2**floor(log2 d) that holds the key, times s."""

    def time(query: int, key: int) -> tuple[int, float]:
        distance = abs(query - key)
        halvings = 0 if key < SETTINGS.sink_frames else int(np.floor(np.log2(max(distance, 1))))
        return 2**halvings, distance / len(seen(video))

    return time, lambda q, k: abs(q - k) + 1, lambda time, width: width * time[0] + time[1]


def admitted(video: Video, mask) -> dict:
    """{query block: {block number: how large the mask must be to hold a pair of their tokens}}."""
    grid, past, (time, space, size) = video.grid, len(video.visible()), mask(video)
    tokens = range(grid.frame_tokens)
    apart = [[space(query, key) for key in tokens] for query in tokens]
    result = {}
    for frame, rank in ((f, r) for f in range(video.chunk) for r in range(past + video.chunk)):
        between, numbers = time(past + frame, rank), [number(video, rank, key // grid.block_k) for key in tokens]
        for query in tokens:
            sizes = result.setdefault((frame * grid.frame_tokens + query) // grid.block_q, {})
            for block, distance in zip(numbers, apart[query], strict=True):
                sizes[block] = min(sizes.get(block, np.inf), size(between, distance))
    return result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("policy", "mask"), [("sta", sliding_tile), ("radial", radial_band)])
def test_the_mask_grows_to_the_budget(policy, mask, name):
    video = video_of(name)
    sizes = admitted(video, mask)
    for budget in (1, 9, 25):
        found = select(video, policy, budget)
        assert set(found) == set(rows(video))
        for (_, query), chosen in found.items():
            left = set(sizes[query]) - chosen
            assert chosen <= set(sizes[query])
            assert len(chosen) == (budget if video.visible() else len(sizes[query]))
            assert not left or max(sizes[query][j] for j in chosen) <= min(sizes[query][j] for j in left) * (1 + 1e-5)


def test_the_band_halves_when_the_distance_doubles():
    video = Video(Grid(rows=32, columns=48, block_q=64, block_k=64), window=None, sink=0, frames=18)
    chosen = select(video, "radial", 159)[0, 12]  # a query block amid frame 18; 159 of 504 key blocks
    place = {number(video, rank, j): rank for rank, j in blocks_of(video)}
    kept = np.bincount([place[block] for block in chosen], minlength=21)
    near, *farther = (set(kept[frames].tolist()) for frames in ([0, 17, 18, 19], [15, 16, 20], range(11, 15), range(3, 11)))
    assert near == {19} and farther == [{11}, {5}, {3}]  # of 24; a band touches about one block more than it fills


# ---- masks that depend on what is there -------------------------------------------------------


def best_groups(video: Video, groups: list, scores: dict, budget: int) -> set[int]:
    """The first `budget` blocks, the groups with the highest scores first and the earliest blocks of a group first."""
    blocks = blocks_of(video)
    order = sorted(range(len(blocks)), key=lambda i: (-scores[groups[i]], i))
    kept = order if not video.visible() else order[:budget]
    return {number(video, *blocks[i]) for i in kept}


@pytest.mark.parametrize("layer", [0, 1, 5])
@pytest.mark.parametrize("name", CASES)
def test_vmoba_takes_the_best_groups(name, layer):
    video = video_of(name)
    queries, _, _ = pooled(video)
    keys, size = video.keys + video.current, video.grid.block_k
    span = video.chunk
    group_of = [lambda f, j: f, lambda f, j: j, lambda f, j: (f // span, j)][layer % 3]
    groups, members = [group_of(*block) for block in blocks_of(video)], {}
    for group, (rank, j) in zip(groups, blocks_of(video), strict=True):
        members.setdefault(group, []).append(keys[seen(video)[rank]][j * size : (j + 1) * size])
    mean = {group: np.concatenate(parts).mean(0) for group, parts in members.items()}
    found = select(video, "vmoba", 9, layer)
    for head, i in rows(video):
        scores = {group: queries[i][head] @ mean[group][head] for group in mean}
        assert found[head, i] == best_groups(video, groups, scores, 9)


def lloyd(points: np.ndarray, weights: list[int], start: list[int]) -> tuple[np.ndarray, np.ndarray]:
    centroids, weights = points[start], np.asarray(weights)
    for step in range(STEPS + 1):
        labels = np.asarray([np.argmin(((point - centroids) ** 2).sum(-1)) for point in points])
        for cluster in set(labels) if step < STEPS else ():
            own = labels == cluster
            centroids[cluster] = np.average(points[own], axis=0, weights=weights[own])
    return centroids, labels


@pytest.mark.parametrize("name", CASES)
def test_svg2_takes_the_best_clusters(name):
    video = video_of(name)
    queries, keys, live = pooled(video)
    clusters, few = -(-key_blocks(video) // MEMBERS), -(-len(queries) // MEMBERS)
    tokens = [min(8, video.q.shape[1] - 8 * i) for i in range(len(queries))]
    found = select(video, "svg2", 9)
    for head in range(2):
        start = [i * len(keys) // clusters for i in range(clusters)]
        key_centroids, key_labels = lloyd(np.stack(keys)[:, head], live, start)
        sizes = {cluster: np.asarray(live)[key_labels == cluster].sum() for cluster in set(key_labels)}
        start = [i * len(queries) // few for i in range(few)]
        query_centroids, query_labels = lloyd(np.stack(queries)[:, head], tokens, start)
        for i, label in enumerate(query_labels):
            logits = key_centroids @ query_centroids[label] / np.sqrt(8)
            scores = {cluster: logits[cluster] + np.log(size) for cluster, size in sizes.items()}
            assert found[head, i] == best_groups(video, key_labels, scores, 9)


@pytest.mark.parametrize("name", CASES)
def test_sla_takes_the_mean_off_the_keys(name):
    video = video_of(name)
    queries, keys, live = pooled(video)
    mean = np.average(keys, axis=0, weights=live)
    found = select(video, "sla", 9)
    for head, i in rows(video):
        scores = {k: queries[i][head] @ (key - mean)[head] for k, key in enumerate(keys)}
        assert found[head, i] == best_groups(video, list(scores), scores, 9)


# ---- in a rollout -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["sta", "radial", "vmoba", "svg2"])
def test_one_compilation_makes_a_video(policy):
    settings = tiny.change(sparsity=dataclasses.replace(tiny.SPARSE, policy=policy), cache=dict(window=8, sink=1))
    settings = dataclasses.replace(settings, rollout=config.Rollout(timesteps=(1000.0,)))
    model = tiny.make_model()
    text = tiny.make_text(model, 1)
    before = compiled_chunk._cache_size()
    state = initial_state(settings, 1, 15, tiny.make_keys(1))
    chunks = [latents for latents, _ in stream(model, text, tiny.draw(1, 15, *tiny.FRAME), state, settings, 15)]
    assert compiled_chunk._cache_size() == before + 1
    assert len(chunks) == 5 and all(np.isfinite(latents).all() for latents in chunks)
