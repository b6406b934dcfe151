"""The linear layer for Hopper (compute capability 9.0), Mosaic GPU: which calls it takes, how a call is laid out."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.choice import unmet
from pallas_kernels.linear.hopper_kernel import DEPTH, ROWS, Config, Epilogue, run
from pallas_kernels.linear.types import FLOAT8, Quantised

TILES = (256, 224, 192, 160, 128)  # output channels of a thread block
CLUSTERS = (2, 1)
# A model of a tile's time, in cycles of a multiprocessor, by counting. A step of the products is as long as its traffic with
# shared memory, 128 bytes a cycle: both tiles are written once, and read by two warpgroups, 64 rows and all channels each.
STEP, STEP_CHANNEL = 256, 3
ALONE = 1.06  # factor of it where no second thread block shares the loads from the second-level cache: a guess
FINISH, FINISH_CHANNEL = 1000, 10


def reason(inputs: int, outputs: int, frame_tokens: int | None, dtype: Any, operands: Any) -> str | None:
    """Why the kernel cannot run such a call here; None if it can. Arguments as in `api.explain`."""
    return mosaic.reason() or unfit(inputs, outputs, frame_tokens, dtype, operands)


def unfit(inputs: int, outputs: int, frame_tokens: int | None, dtype: Any, operands: Any) -> str | None:
    """Why the kernel is not made for such a call on any device; None if it is."""
    operands = jnp.dtype(operands)
    deep = DEPTH // operands.itemsize
    rules = {
        f"multiplies float8_e4m3fn or bfloat16, not {operands}": operands in (FLOAT8, jnp.bfloat16),
        f"needs a multiple of {deep} inputs, received {inputs}": inputs % deep == 0,
        f"needs a multiple of 64 outputs, received {outputs}": outputs % 64 == 0,
        f"needs at least {ROWS} tokens a frame, received {frame_tokens}": frame_tokens is None or frame_tokens >= ROWS,
        f"returns bfloat16 or float8, not {dtype}": dtype is None or dtype == jnp.bfloat16,
    }
    return unmet(rules)


def linear(x, w, bias, layer, *, activation, gate, residual, reach, dtype, turned=True, config: Config | None = None):
    """See `api.linear`; `reach` is None where the output is not quantised, `turned` is True in float8.

    Args:
        config: how the kernel is laid out; None: as `layout` does it.

    Raises:
        NotImplementedError: if the kernel is not made for such a call, with the reason.
    """
    numbers, weights = (x.values, w.values) if isinstance(x, Quantised) else (x, w)
    (*lead, inputs), outputs = numbers.shape, weights.shape[-2 if turned else -1]
    tokens = None if gate is None else numbers.shape[1] // gate.shape[1]
    operands = jnp.promote_types(numbers.dtype, weights.dtype)
    cannot = unfit(inputs, outputs, tokens, None if reach is not None else dtype, operands)
    if cannot is not None:
        raise NotImplementedError(f"linear for Hopper: {cannot}")
    if layer is None:
        w, bias, reach = jax.tree.map(lambda array: array[None], (w, bias, reach))
    gate = None if gate is None else gate.astype(jnp.float32).reshape(-1, outputs)
    rows = numbers.size // inputs
    x, residual = jax.tree.map(lambda array: mosaic.eights(array.reshape(rows, *array.shape[len(lead) :]), 0), (x, residual))
    config = config or layout(rows, inputs * operands.itemsize, outputs)
    out = run(x, w, bias, layer, turned, Epilogue(activation, gate, tokens, residual, reach), config)
    return jax.tree.map(lambda array: array[:rows].reshape(*lead, *array.shape[1:]), out)


def plain(x, w, bias, layer, sliced, *, activation, gate, residual, turned, config: Config | None = None):
    """See `api.linear`, of plain arrays; of `sliced` nothing is read. Everything else as in `linear`."""
    given = {"activation": activation, "gate": gate, "residual": residual, "reach": None, "dtype": x.dtype}
    return linear(x, w, bias, layer, **given, turned=turned, config=config)


def layout(rows: int, row_bytes: int, outputs: int) -> Config:
    """The tile and the cluster with which the last multiprocessor should be done first: it decides how full the waves are.

    Args:
        row_bytes: of a row of x.
    """
    fits = mosaic.multiprocessors()

    def duration(tile: int, cluster: int) -> float:
        items = -(-rows // (ROWS * cluster)) * -(-outputs // tile)
        step = (STEP + STEP_CHANNEL * tile) * (ALONE if cluster == 1 else 1)
        return -(-items // (fits // cluster)) * (-(-row_bytes // DEPTH) * step + FINISH + FINISH_CHANNEL * tile)

    tile, cluster = min(((t, c) for t in TILES for c in CLUSTERS if c <= fits), key=lambda choice: duration(*choice))
    return Config(tile=tile, cluster=cluster, multiprocessors=fits)
