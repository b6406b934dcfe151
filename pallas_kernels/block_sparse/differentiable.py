"""Kernels that compute block-sparse attention and its gradients, as one function that JAX can differentiate."""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.block_sparse.types import BlockMap, Past

Layer = tuple[jax.Array, jax.Array]  # keys and values, or gradients of them: [b, s, head, e]


class Kernels(Protocol):
    """A hashable value that holds every static setting of a call."""

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, blocks: BlockMap, past: Past | None
    ) -> tuple[jax.Array, jax.Array]:
        """out [b, tq, head, e] and the log-sum-exp [b, head, tq] float32, natural logarithm."""

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        blocks: BlockMap,
        past: Past | None,
        out: jax.Array,
        lse: jax.Array,
        dout: jax.Array,
        dlse: jax.Array,
        past_gradient: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Layer | None]:
        """Gradients of q, k, v and, if asked for, of the one layer of the past that was read."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kernels: Kernels, q: jax.Array, k: jax.Array, v: jax.Array, past: Past | None, blocks: BlockMap
) -> tuple[jax.Array, jax.Array]:
    """(out, lse), differentiable in q, k, v and the past.

    The past has a gradient where one is asked for. Where it is a constant of the differentiated function, or under
    `jax.lax.stop_gradient`, nothing is computed for it and no array of its size is made.
    """
    return kernels.forward(q, k, v, blocks, past)


def _forward(kernels: Kernels, *arguments):
    q, k, v, past, blocks = jax.tree.map(lambda leaf: leaf.value, arguments)
    out, lse = kernels.forward(q, k, v, blocks, past)
    asked = arguments[3]
    past_gradient = asked is not None and (asked.k.perturbed or asked.v.perturbed)
    # What is kept is arrays and their structure; so whether there is an empty tuple or nothing says yes or no.
    return (out, lse), (q, k, v, blocks, past, out, lse, () if past_gradient else None)


def _backward(kernels: Kernels, kept, given):
    *arguments, asked = kept
    past = arguments[4]
    dout, dlse = (jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in given)
    dq, dk, dv, layer = kernels.backward(*arguments, dout, dlse, asked is not None)
    dpast = None
    if layer is not None:
        whole = (lax.dynamic_update_index_in_dim(jnp.zeros_like(past.k), one, past.layer, 0) for one in layer)
        dpast = Past(*whole, None)
    return dq, dk, dv, dpast, None


attend.defvjp(_forward, _backward, symbolic_zeros=True)
