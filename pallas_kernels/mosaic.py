"""What all Mosaic GPU kernels share: where they run, what they can be told, how they hold numbers, how one is started."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platform

SXM = 132  # multiprocessors of an H100 or H200 in its usual form
MATRIX, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def reason() -> str | None:
    """Why such kernels cannot run on the default device; None if they can."""
    capability = platform.device().compute_capability
    if capability is None or capability[0] != 9:
        return f"needs an NVIDIA GPU of compute capability 9.0, this is {platform.describe()}"
    return None


def multiprocessors() -> int:
    """Of the default device; where that is no NVIDIA GPU, those of an H100 or H200."""
    return platform.device().multiprocessors or SXM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every kernel can be told about how it is laid out."""

    multiprocessors: int = dataclasses.field(default_factory=multiprocessors)
    interpret: object = None  # `InterpretGPUParams` runs on the CPU

    def __post_init__(self):
        self.at_least(multiprocessors=1)

    @property
    def interpreted(self) -> bool:
        return self.interpret is not None

    def at_least(self, **least: int) -> None:
        """Raises ValueError for a field that is less. None is never: it leaves the choice to the kernel."""
        for name, bound in least.items():
            number = getattr(self, name)
            if number is not None and number < bound:
                raise ValueError(f"{name}={number} must be at least {bound}")


def swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """The layout in shared memory of a tile for the tensor cores, so many numbers of which lie in one piece."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)


def eights(array: jax.Array, axis: int) -> jax.Array:
    """With rows of zeros up to a multiple of eight: the copies of such tiles take as many at a time. Few calls need any."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % 8)
    return jnp.pad(array, widths) if any(widths[axis]) else array


def iota(shape: tuple[int, ...], axis: int, config: Config) -> jax.Array:
    if config.interpreted:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def zeros(shape: tuple[int, ...], config: Config) -> jax.Array:
    zeros = jnp.zeros(shape, jnp.float32)
    return zeros if config.interpreted else plgpu.layout_cast(zeros, MATRIX)


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


def turns(items: int, first: Any, every: int) -> Any:
    """How many of the items first, first + every and so on there are: what a thread block that stays has to do."""
    return lax.div(items - first + every - 1, every)


def kernel(
    body,
    config: Config,
    *,
    grid: dict[str, int],
    cluster: dict[str, int] | None = None,
    out_type: Any,
    scratch_types: list,
):
    """Starts thread blocks of three warpgroups; `grid` and `cluster` name their axes."""
    cluster = cluster or {}
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
        num_threads=3,
        thread_name="wg",
        **_started(config),
    )


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
    return {"compiler_params": params} | ({"interpret": config.interpret} if config.interpreted else {})
