"""Joins the parts of lists that `hopper_walk` cut: a kernel that writes the rows which the one before it left out.

XLA would make several kernels of it: of the weights of the rows, of their use in all columns, of the write.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse.hopper_common import QUERIES, ROWS, SWIZZLED
from pallas_kernels.block_sparse.hopper_walk import Walk
from pallas_kernels.mosaic import MATRIX, ROW, across, load, rewrite


def join(walk: Walk, whole: tuple[jax.Array, ...], parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The arrays `whole` with the joined parts in the place of the cut items.

    Args:
        whole: out [b, tq, head, e], which is a sum of the parts; or (out, lse [b, head, tq padded]), where the parts are
            those of a softmax.
        parts: the same for every cut item, [item, 128, e] and [item, 128].
    """
    if not walk.cut:
        return whole
    n, shape = len(whole), (ROWS, walk.e)

    def body(*refs):
        (o_g, *lse_g), (part_g, *part_lse_g), (o_s, *lse_s) = refs[:n], refs[n : 2 * n], refs[2 * n :]
        cut, half = lax.axis_index("cut"), lax.axis_index("half")
        b, head, at = walk.place(walk.uncut + cut)
        mine, theirs = pl.ds(at * QUERIES + half * ROWS, ROWS), pl.ds(half * ROWS, ROWS)
        items = [cut * walk.parts + i for i in range(walk.parts)]

        def part(item):
            return load(part_g.at[item, theirs], MATRIX).astype(jnp.float32)

        if part_lse_g:
            lses = [load(part_lse_g[0].at[item, theirs], ROW) for item in items]
            peak = functools.reduce(jnp.maximum, lses)
            peak = jnp.where(peak == -jnp.inf, 0, peak)
            weights = [jnp.exp(lse - peak) for lse in lses]
            total = sum(weights)
            out = sum(across(weight, shape, 0) * part(item) for weight, item in zip(weights, items, strict=True))
            out = out * across(1 / jnp.where(total == 0, 1, total), shape, 0)
            lse_s[0][...] = peak + jnp.log(total)
        else:
            out = sum(part(item) for item in items)
        o_s[...] = out.astype(walk.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o_g.at[b, mine, head])
        if lse_g:
            plgpu.copy_smem_to_gmem(lse_s[0], lse_g[0].at[b, head, mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = [plgpu.SMEM(shape, walk.dtype, transforms=SWIZZLED), plgpu.SMEM((ROWS,), jnp.float32)]
    grid = {"cut": walk.cut, "half": QUERIES // ROWS}
    return rewrite(body, walk.config, whole, parts, grid=grid, scratch_types=scratch[:n])
