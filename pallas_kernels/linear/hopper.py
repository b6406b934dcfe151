"""The linear layer for Hopper (compute capability 9.0), Mosaic GPU: which calls it takes, how a call is laid out."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.block_sparse.hopper_common import SXM
from pallas_kernels.linear.hopper_kernel import DEPTH, ROWS, Config, Epilogue, run
from pallas_kernels.linear.types import Quantised

TILES = (256, 224, 192, 160, 128)  # output channels of a thread block
CLUSTERS = (2, 1)
# Model of a tile's time, in cycles of a multiprocessor. A step of the products is held up by shared memory: 128 bytes a
# cycle, which it writes (the tiles) and reads (by two warpgroups, each 64 rows and all channels). An H200's second level
# cache cannot quite feed 132 multiprocessors that share nothing.
STEP, STEP_CHANNEL, ALONE = 256, 3, 1.06
FINISH, FINISH_CHANNEL = 1000, 10


def reason(inputs: int, outputs: int, frame_tokens: int | None, dtype: Any) -> str | None:
    """Why the kernel cannot run such a call here; None if it can. Arguments as in `api.explain`."""
    capability = platform.device().compute_capability
    if capability is None or capability[0] != 9:
        return f"needs an NVIDIA GPU of compute capability 9.0, this is {platform.describe()}"
    return unfit(inputs, outputs, frame_tokens, dtype)


def unfit(inputs: int, outputs: int, frame_tokens: int | None, dtype: Any) -> str | None:
    """Why the kernel is not made for such a call on any device; None if it is."""
    rules = {
        f"needs a multiple of 64 inputs, received {inputs}": inputs % 64 == 0,
        f"needs a multiple of 64 outputs, received {outputs}": outputs % 64 == 0,
        f"needs at least {ROWS} tokens a frame, received {frame_tokens}": frame_tokens is None or frame_tokens >= ROWS,
        f"returns bfloat16 or float8, not {dtype}": dtype is None or dtype == jnp.bfloat16,
    }
    return next((rule for rule, holds in rules.items() if not holds), None)


def linear(x, w, bias, layer, *, activation, gate, residual, reach, dtype, config: Config | None = None):
    """See `api.linear`; `reach` is None where the output is not quantised.

    Args:
        config: how the kernel is laid out; None: as `layout` does it.

    Raises:
        NotImplementedError: if the kernel is not made for such a call, with the reason.
    """
    (*lead, inputs), outputs = x.values.shape, w.values.shape[-2]
    tokens = None if gate is None else x.values.shape[1] // gate.shape[1]
    cannot = unfit(inputs, outputs, tokens, None if reach is not None else dtype)
    if cannot is not None:
        raise NotImplementedError(f"linear for Hopper: {cannot}")
    if layer is None:
        w, bias, reach = jax.tree.map(lambda array: array[None], (w, bias, reach))
    x = Quantised(x.values.reshape(-1, inputs), x.scale.reshape(-1))
    rows = x.scale.size
    epilogue = Epilogue(
        activation,
        None if gate is None else gate.astype(jnp.float32).reshape(-1, outputs),
        tokens,
        None if residual is None else residual.reshape(rows, outputs),
        reach,
    )
    config = config or layout(rows, inputs, outputs)
    out = run(x, w, bias.astype(jnp.float32), layer, epilogue, config)
    return jax.tree.map(lambda array: array.reshape(*lead, *array.shape[1:]), out)


def layout(rows: int, inputs: int, outputs: int) -> Config:
    """The tile and the cluster with which the last multiprocessor should be done first: it decides how full the waves are."""
    fits = platform.device().multiprocessors or SXM

    def duration(tile: int, cluster: int) -> float:
        items = -(-rows // (ROWS * cluster)) * -(-outputs // tile)
        step = (STEP + STEP_CHANNEL * tile) * (ALONE if cluster == 1 else 1)
        return -(-items // (fits // cluster)) * (-(-inputs // DEPTH) * step + FINISH + FINISH_CHANNEL * tile)

    tile, cluster = min(((t, c) for t in TILES for c in CLUSTERS), key=lambda choice: duration(*choice))
    return Config(tile=tile, cluster=cluster, multiprocessors=fits)
