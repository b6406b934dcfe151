"""Semantic clustering in the manner of Sparse VideoGen 2 (arXiv 2505.18875), on blocks instead of tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Array, Float, Int
from lf_jax.sparsity.select import Inputs, best_blocks, mean_queries, visible_tokens
from pallas_kernels import BlockMap

MEMBERS = 4  # blocks of a cluster, on average
STEPS = 4  # of k-means


def svg2(inputs: Inputs) -> BlockMap:
    """SVG2's clustering, of blocks: key blocks of the clusters whose centroids promise the most attention.

    The paper clusters tokens by k-means, queries and keys apart, estimates what a query cluster pays to a key cluster as
    tokens * exp(centroid . centroid / sqrt(e)), and takes the best until they have a share p of all. To run that it permutes
    queries, keys and values so that clusters become contiguous. A cache that is read in place cannot be permuted: every head
    and layer would need its own order, a copy of keys and values in every pass, and clusters would straddle the frames that
    come and go in the ring. So the mean queries and mean keys of blocks are clustered, weighted by their live tokens, and lists
    name blocks where they lie. The budget takes the place of p: the last cluster is cut to it, the earliest blocks first.

    K-means starts from blocks evenly spaced in time in every call; the paper goes on from the denoising step before.
    """
    time, grid, e = inputs.time, inputs.grid, inputs.q.shape[-1]
    blocks, past = time.blocks.size, time.past * time.frame_blocks
    keys = jnp.moveaxis(inputs.of_layer("pooled")[:, time.blocks], 2, 1)
    queries = jnp.moveaxis(mean_queries(inputs), 2, 1)
    live = visible_tokens(inputs)
    tokens = np.minimum(grid.block_q, inputs.q.shape[1] - np.arange(queries.shape[2]) * grid.block_q).astype(np.float32)

    start = spread(blocks, past + time.current)
    start = jnp.where(start < past, start, start - past + time.cached)
    key_centroids, key_labels = kmeans(keys, live, start)
    query_centroids, query_labels = kmeans(queries, jnp.asarray(tokens), spread(tokens.size, tokens.size))
    sizes = jnp.einsum("bhkc,k->bhc", jax.nn.one_hot(key_labels, start.size), live)
    logits = jnp.einsum("bhqe,bhke->bhqk", query_centroids, key_centroids, precision=jax.lax.Precision.HIGHEST) * e**-0.5
    logits += jnp.log(sizes)[:, :, None]
    rows = jnp.take_along_axis(logits, query_labels[..., None], axis=2)
    return best_blocks(inputs, jnp.take_along_axis(rows, key_labels[:, :, None], axis=3))


def spread(points: int, real: int | Int[Array, ""]) -> Int[Array, " cluster"]:
    """Evenly spaced numbers below `real`, one for every `MEMBERS` of `points`."""
    clusters = -(-points // MEMBERS)
    return jnp.arange(clusters) * real // clusters


def kmeans(
    points: Float[Array, "b head n e"], weights: Float[Array, " n"], start: Int[Array, " cluster"]
) -> tuple[Float[Array, "b head cluster e"], Int[Array, "b head n"]]:
    """Centroids after `STEPS` steps of Lloyd's from the points `start`, and the nearest centroid of every point.

    Of equally near centroids the first is taken. A cluster without weight keeps its centroid.
    """

    def label(centroids: Array) -> Array:
        products = jnp.einsum("bhne,bhce->bhnc", points, centroids, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmax(products - jnp.square(centroids).sum(-1)[:, :, None] / 2, axis=-1)

    centroids = points[:, :, start]
    for _ in range(STEPS):
        member = jax.nn.one_hot(label(centroids), start.size) * weights[:, None]
        total = member.sum(2)[..., None]
        sums = jnp.einsum("bhnc,bhne->bhce", member, points, precision=jax.lax.Precision.HIGHEST)
        centroids = jnp.where(total > 0, sums / jnp.maximum(total, 1), centroids)
    return centroids, label(centroids)
