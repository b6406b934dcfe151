"""The causal Wan2.1 diffusion transformer (Self-Forcing's variant): one forward pass over one chunk of frames.

    patchify -> scan over the stacked blocks -> head -> unpatchify

The cache is read, never written: the pass returns the keys and values that its chunk made, and `lf_jax.cache.append`
commits them once the chunk is finished. The bidirectional teacher is the same pass: one chunk of all frames with an
empty cache.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from lf_jax import attention, config, quant, rope
from lf_jax.arrays import Array, Float, Leaf
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.config import check
from lf_jax.dit.block import Block, SelfAttention, Turn
from lf_jax.dit.linears import Full
from lf_jax.layers import Linear, Mlp, sinusoid
from lf_jax.sparsity import Budget, timeline
from lf_jax.tokens import Grid
from pallas_kernels import fused

SHALLOW = 8  # layers: such a network is no scan where its gradient keeps what is in them


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TextCache:
    """Keys and values of the prompt for the cross-attention of every layer, made once a prompt."""

    k: Leaf  # [layer, b, text_len, head, head_dim], after norm_k
    v: Leaf  # same shape


class Head(nnx.Module):
    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        dtype = config.dtype_of(model)
        self.eps = model.eps
        spread = jax.nn.initializers.normal(model.dim**-0.5)
        self.modulation = nnx.Param(spread(rngs.params(), (2, model.dim), dtype))
        # Wan starts this kernel at zero to train from scratch. Here it is drawn like the others, because under a zero
        # head every randomly initialised model computes the same, nothing, and no check of it could fail.
        self.linear = Linear(model.dim, patch_features(model), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], time: Float[Array, "b f d"]) -> Float[Array, "b t patch"]:
        shift, scale = self.modulation[...].astype(jnp.float32)[:, None, None] + time
        return self.linear(fused.norm_modulate(x, shift, scale, eps=self.eps))


class WanDiT(nnx.Module):
    """All parameters of the transformer. `forward` and `text_cache` are what it computes."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        dtype, small = config.dtype_of(model), jax.nn.initializers.normal(0.02)
        self.config = model
        self.patch_embedding = Linear(patch_features(model), model.dim, dtype=dtype, rngs=rngs)
        self.text_embedding = Mlp(model.text_dim, model.dim, model.dim, init=small, dtype=dtype, rngs=rngs)
        self.time_embedding = Mlp(model.freq_dim, model.dim, model.dim, init=small, dtype=dtype, rngs=rngs)
        self.time_projection = Linear(model.dim, 6 * model.dim, dtype=dtype, rngs=rngs)
        keys = jax.random.split(rngs.params(), model.layers)
        self.blocks = jax.vmap(lambda key: Block(model, rngs=nnx.Rngs(key)))(keys)  # leading [layer] axis on every leaf
        self.head = Head(model, rngs=rngs)


def patch_features(model: config.Model) -> int:
    """Numbers in one token's patch of the latent."""
    _, down, across = model.patch
    return down * across * model.channels


def text_cache(model: WanDiT, embeddings: Float[Array, "b n text_dim"]) -> TextCache:
    """What every layer's cross-attention reads of the prompts.

    Embeddings are padded with zero rows to `text_len` first, and all rows are attended to: a padded row becomes
    `text_embedding(0)`, which is not zero, and the released models were trained with it.

    Raises:
        ValueError: if there are more rows than `text_len`, or of another width than `text_dim`.
    """
    settings, (_, rows, width) = model.config, embeddings.shape
    check(rows <= settings.text_len, f"embeddings have {rows} rows, more than {settings.text_len=}")
    check(width == settings.text_dim, f"embeddings are {width} wide, expected {settings.text_dim=}")
    padded = jnp.pad(embeddings, ((0, 0), (0, settings.text_len - rows), (0, 0)))
    text = model.text_embedding(padded.astype(config.dtype_of(settings)))

    def layer(text: Array, index: Array, block: Block) -> tuple[Array, TextCache]:
        return text, TextCache(*block.cross_attention.keys_values(block.rows(text)))

    return over_layers(model, layer, text)[1]


def over_layers(model: WanDiT, layer: Callable, carry: Any, *inputs: Any, remat: bool | None = None) -> tuple[Any, Any]:
    """`layer(carry, index, block, *inputs) -> (carry, result)` from block to block, as one scan; all results, stacked.

    A scan copies what it hands to a step out of its stack. So linear layers get the whole stack, and the index of the layer,
    for their kernel to read; those in full precision are handed over as well, but sliced only if another implementation, or a
    gradient, asks for it. What a gradient keeps would be copied into stacks, too, which are filled with zeros first, so the
    scan of a shallow network is then unrolled.

    Args:
        inputs: with a leading [layer] axis.
        remat: as in `forward`.
    """
    parts, tree = jax.tree.flatten(model.blocks, is_leaf=lambda part: isinstance(part, quant.Linear | Full))
    quantised = {at: part for at, part in enumerate(parts) if isinstance(part, quant.Linear)}
    full = {at: jax.lax.stop_gradient(part.matrix()) for at, part in enumerate(parts) if isinstance(part, Full)}

    def of_layer(at: int, part: Any, index: Array) -> Any:
        if at in quantised:
            return partial(quantised[at], layer=index)
        return partial(part, stack=full[at], layer=index) if at in full else part

    def step(state: tuple[Array, Any], given: tuple) -> tuple[tuple[Array, Any], Any]:
        (index, carry), (sliced, inputs) = state, given
        mine = [of_layer(at, part, index) for at, part in enumerate(sliced)]
        carry, result = layer(carry, index, jax.tree.unflatten(tree, mine), *inputs)
        return (index + 1, carry), result

    sliced = [None if at in quantised else part for at, part in enumerate(parts)]
    body = jax.checkpoint(step, prevent_cse=False) if remat else step  # a scan shares nothing between its steps
    unrolled = remat is False and model.config.layers <= SHALLOW
    (_, carry), results = jax.lax.scan(body, (jnp.int32(0), carry), (sliced, inputs), unroll=unrolled)
    return carry, results


def embed_time(model: WanDiT, timestep: Float[Array, "b f"]) -> tuple[Float[Array, "b f d"], Float[Array, "b f 6 d"]]:
    """The time embedding of every frame, for the head, and its projection, for the blocks; float32."""
    with jax.named_scope("embed"):
        time = model.time_embedding(sinusoid(timestep, model.config.freq_dim), jax.nn.silu)
        return time, rearrange(model.time_projection(jax.nn.silu(time)), "b f (six d) -> b f six d", six=6)


def turns(model: WanDiT, cache: KVCache, frames: int, grid: Grid) -> Turn:
    """How the queries and keys of the `frames` frames that follow the cached ones are rotated, the same in all layers."""
    with jax.named_scope("embed"):
        angles = rope.angles(cache.end, frames, grid.rows, grid.columns, model.config.head_dim)
        return jnp.cos(angles), jnp.sin(angles)


def patchify(model: WanDiT, x: Float[Array, "b f h w c"]) -> Float[Array, "b t d"]:
    """One token a patch: frames in order, each frame row by row."""
    _, down, across = model.config.patch
    with jax.named_scope("embed"):
        patches = rearrange(x, "b f (h p) (w q) c -> b (f h w) (p q c)", p=down, q=across)
        return model.patch_embedding(patches.astype(config.dtype_of(model.config)))


def unpatchify(model: WanDiT, x: Float[Array, "b t patch"], grid: Grid) -> Float[Array, "b f h w c"]:
    """Channels are innermost in a token's patch."""
    _, down, across = model.config.patch
    return rearrange(x, "b (f h w) (p q c) -> b f (h p) (w q) c", h=grid.rows, w=grid.columns, p=down, q=across)


def forward(
    model: WanDiT,
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, "b f"],
    text: TextCache,
    cache: KVCache,
    budget: Budget | None,
    grid: Grid,
    sparsity: config.Sparsity,
    remat: bool | None = None,
) -> tuple[Float[Array, "b f h w c"], ChunkKV]:
    """Velocity of a chunk of frames that follow the committed ones (Self-Forcing, `causal_model.py`).

    Args:
        x: noisy latents, normalised.
        timestep: 0..1000, one a frame.
        text: of the same batch.
        cache: the frames before; `cache.end` is the absolute index of the chunk's first frame.
        budget: key blocks a query block may visit; None where attention is dense.
        remat: for gradients: keep what enters a layer and compute the layer again, instead of keeping all that is in it;
            None never unrolls the layers (`over_layers`), and is for where there is no gradient.

    Returns:
        The velocity `noise - clean`, in the dtype of `x`, and the keys and values of all layers, for `cache.append`.

    Raises:
        ValueError: if `x` does not have the grid's size.
    """
    _, frames, height, width, _ = x.shape
    settings, (_, down, across) = model.config, model.config.patch
    size = (grid.rows * down, grid.columns * across)
    check((height, width) == size, f"x has frames of {(height, width)}, expected {size} for {grid=} and {settings.patch=}")
    time, modulation = embed_time(model, timestep)
    turn = turns(model, cache, frames, grid)
    order = None if sparsity.dense else timeline(cache, frames, grid)

    def layer(tokens: Array, index: Array, block: Block, text: TextCache) -> tuple[Array, ChunkKV]:
        def attend(own: SelfAttention, qkv: Array) -> tuple[Array, ChunkKV]:
            with jax.named_scope("norm_rope"):
                q, means, new = own.queries_keys(qkv, turn, grid, pool=not sparsity.dense)
            given = cache, index, order, budget, grid, sparsity
            return attention.self_attention(q, new, *given, means=means, marginal=block.marginal), new

        return block(tokens, modulation, text.k, text.v, attend)

    tokens, new = over_layers(model, layer, patchify(model, x), text, remat=remat)
    with jax.named_scope("head"):
        velocity = unpatchify(model, model.head(tokens, time), grid)
    return velocity.astype(x.dtype), new
