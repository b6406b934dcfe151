"""Block-sparse attention for Hopper (compute capability 9.0), Mosaic GPU: one forward kernel, two for the gradients.

With p = exp(scale * q k^T - lse), dp = dout v^T and ds = p * (dp - delta), delta = rowsum(dout * out) - dlse:

    dq = scale * ds k        `hopper_queries`: a thread block holds 128 queries and walks their lists, as the forward does
    dv = p^T dout            `hopper_keys`: a warpgroup holds 64 keys and walks the queries that name them, the map
    dk = scale * ds^T q      transposed (`lists.transpose`)

Both recompute the scores, seven products where one kernel would need five: the price of a sum in a fixed order, with
no atomics and nothing read back. Most training needs no gradient of the cached past; then `hopper_keys` has only the
chunk's own keys to serve, which saves more.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic, tuned
from pallas_kernels.block_sparse.differentiable import attend
from pallas_kernels.block_sparse.hopper_common import Config, aligned
from pallas_kernels.block_sparse.hopper_forward import forward
from pallas_kernels.block_sparse.hopper_keys import keys
from pallas_kernels.block_sparse.hopper_queries import queries
from pallas_kernels.block_sparse.types import BlockMap, Past
from pallas_kernels.choice import unmet


def reason(q: Any, blocks: BlockMap, past: Past | None, return_lse: bool) -> str | None:
    """Why the kernels cannot run such a call here; None if they can."""
    return mosaic.reason() or unfit(q, blocks)


def unfit(q: Any, blocks: BlockMap) -> str | None:
    """Why the kernels are not made for such a call on any device; None if they are."""
    rules = {
        f"needs bfloat16 or float16, received {q.dtype}": q.dtype in (jnp.bfloat16, jnp.float16),
        f"needs a head_dim of 64 or 128, received {q.shape[3]}": q.shape[3] in (64, 128),
        f"needs query blocks of 64 or 128, received {blocks.block_q}": blocks.block_q in (64, 128),
        f"needs key blocks of 32, 64 or 128, received {blocks.block_k}": blocks.block_k in (32, 64, 128),
    }
    return unmet(rules)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: BlockMap,
    past: Past | None,
    scale: float,
    frame_tokens: int | None,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.block_sparse_attention`; returns (out, lse), both differentiable.

    Args:
        config: how the kernels are laid out; None takes what was measured to be best on this device (see `tuned`).

    Raises:
        NotImplementedError: if the kernels are not made for such a call, with the reason.
    """
    cannot = unfit(q, blocks)
    if cannot is not None:
        raise NotImplementedError(f"block-sparse attention for Hopper: {cannot}")
    queries_given, q = q.shape[1], mosaic.eights(q, 1)
    call = q.shape, blocks.block_q, blocks.block_k, blocks.index.shape[-1]
    configs = (config or Config(**tuned.config(direction, *call)) for direction in tuned.DIRECTIONS)
    out, lse = attend(Hopper(scale, frame_tokens, *configs), q, k, v, past, blocks)
    return out[:, :queries_given], lse[:, :, :queries_given]


@dataclasses.dataclass(frozen=True)
class Hopper:
    """See `differentiable.Kernels`."""

    scale: float
    frame_tokens: int | None
    config: Config
    backward_config: Config

    def forward(self, q, k, v, blocks, past):
        return forward(q, k, v, blocks, past, **self._settings(self.config))

    def backward(self, q, k, v, blocks, past, out, lse, dout, dlse, past_gradient):
        delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - dlse
        # Padded with zeros, because a kernel reads rows behind the last query: p is 1 there, but what it is multiplied with is
        # 0. To rows that attend to nothing (lse -inf) no list leads.
        lse, delta = (jnp.pad(x, ((0, 0), (0, 0), (0, aligned(x.shape[2]) - x.shape[2]))) for x in (lse, delta))
        products = (q, dout, lse, delta, k, v, past, blocks)
        settings = self._settings(self.backward_config)
        dq = queries(*products, **settings)
        dk, dv, layer = keys(*products, past_gradient=past_gradient, **settings)
        return dq, dk, dv, layer

    def _settings(self, config: Config) -> dict[str, Any]:
        return dict(scale=self.scale, frame_tokens=self.frame_tokens, config=config)
