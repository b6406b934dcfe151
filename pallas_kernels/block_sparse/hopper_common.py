"""What the Hopper kernels share: layouts, the block arithmetic, the way of starting one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platform
from pallas_kernels.block_sparse.types import Past

ROWS = 64  # of a warpgroup: queries, or in the gradient of the keys, keys
QUERIES = 2 * ROWS  # of a thread block
SXM = 132  # multiprocessors of an H100 or H200 in its usual form
LOG2E = math.log2(math.e)
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
MATRIX, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are laid out. The defaults are for an H100 or H200."""

    stages: int = 2  # key and value tiles in flight, per stream
    parts: int | None = None  # into which the lists of the last wave are cut; 1 leaves it, None takes what should be fastest
    key_stages: int = 2  # of the gradient of the keys: query tiles in flight for each warpgroup
    multiprocessors: int = dataclasses.field(default_factory=lambda: platform.device().multiprocessors or SXM)
    interpret: object = None  # `InterpretGPUParams` runs on the CPU

    def __post_init__(self):
        for name in ("stages", "parts", "key_stages", "multiprocessors"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1")


def stacked(past: Past | None, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """The past as [layer * b, s, head, e], the layer to read [1], and its tokens; the chunk stands in for none."""
    if past is None:
        return k, v, jnp.zeros(1, jnp.int32), 0
    flat = (-1, *past.k.shape[2:])
    return past.k.reshape(flat), past.v.reshape(flat), past.layer.astype(jnp.int32).reshape(1), past.k.shape[2]


def aligned(tokens: int) -> int:
    """The size of an axis with a number for each query. A copy of one row of numbers is not cut off where the row ends, as a
    copy of a matrix is: it would run into the next row."""
    return -(-tokens // QUERIES) * QUERIES


def live(block, block_k: int, frame_tokens: int | None):
    """Live tokens of a key block; a number where every block is whole."""
    if frame_tokens is None or frame_tokens % block_k == 0:
        return block_k
    frame_blocks = -(-frame_tokens // block_k)
    return lax.select(lax.rem(block, frame_blocks) == frame_blocks - 1, frame_tokens % block_k, block_k)


def iota(shape: tuple[int, ...], axis: int, config: Config) -> jax.Array:
    if config.interpret is not None:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def zeros(shape: tuple[int, ...], config: Config) -> jax.Array:
    zeros = jnp.zeros(shape, jnp.float32)
    return zeros if config.interpret is not None else plgpu.layout_cast(zeros, MATRIX)


def load(ref, layout: object) -> jax.Array:
    """From memory into registers that are laid out as a matrix, or as its rows or columns."""
    whole = {"idx": ()} if jax.__version_info__ < (0, 11) else {}  # required until 0.10, deprecated since
    return plgpu.load(ref, **whole, layout=layout, optimized=False)


def across(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [axis])


def dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """a @ b (contract 0) or a @ b^T (1): stands for the tensor cores in the interpreter, which knows no wgmma with a
    left operand in registers."""
    return lax.dot_general(a, b, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32)


def kernel(body, config: Config, *, grid: dict[str, int], out_type: tuple, scratch_types: list):
    """Starts thread blocks of three warpgroups; `grid` names its axes."""
    mesh = {"grid": tuple(grid.values()), "grid_names": tuple(grid), "num_threads": 3, "thread_name": "wg"}
    return plgpu.kernel(body, out_type=out_type, scratch_types=scratch_types, **mesh, **_started(config))


def rewrite(body, config: Config, arrays: tuple, given: tuple, *, grid: dict[str, int], scratch_types: list) -> tuple:
    """Starts thread blocks of one warpgroup that write over `arrays` where they lie, and returns these."""
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=1, thread_name="wg")

    def scoped(*refs):
        pl.run_scoped(lambda *scratch: body(*refs, *scratch), *scratch_types, collective_axes="wg")

    @sequential_vmap  # run_state has no rule for vmap
    def run(arrays, given):
        return pl.run_state(lambda refs: pl.kernel(scoped, mesh=mesh, **_started(config))(*refs, *given))(arrays)

    return run(arrays, given)


def _started(config: Config) -> dict[str, object]:
    lane = plgpu.LoweringSemantics.Lane
    params = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0, lowering_semantics=lane)
    return {"compiler_params": params} | ({} if config.interpret is None else {"interpret": config.interpret})
