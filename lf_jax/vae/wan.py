"""The Wan2.1 autoencoder, and LightVAE, which is the same at a quarter of the width."""

import jax.numpy as jnp
from flax import nnx

from lf_jax import config
from lf_jax.arrays import Array, Float, Leaf
from lf_jax.layers import Linear
from lf_jax.vae.decoder import Decoder
from lf_jax.vae.encoder import Encoder


class WanVae(nnx.Module):
    """Reference: `wan/modules/vae.py` of Wan2.1. One latent frame stands for one pixel frame at the start, then for four."""

    def __init__(self, part: config.Vae, *, rngs: nnx.Rngs):
        dtype = config.dtype_of(part)
        self.config = part
        self.encoder = Encoder(part, rngs=rngs)
        self.quant = Linear(2 * part.channels, 2 * part.channels, dtype=dtype, rngs=rngs)
        self.post_quant = Linear(part.channels, part.channels, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(part, rngs=rngs)

    @property
    def first_frames(self) -> int:
        """Pixel frames that make the first latent frame."""
        return 1

    def encode_chunk(self, video: Float[Array, "b f p q 3"], past: Leaf) -> tuple[Float[Array, "b g h w c"], Leaf]:
        """The means of the latents; their variances are never used."""
        mean, std = statistics(self.config)
        x, past = self.encoder(video.astype(config.dtype_of(self.config)), past)
        mu = self.quant(x)[..., : self.config.channels]
        return ((mu.astype(jnp.float32) - mean) / std).astype(mu.dtype), past

    def decode_chunk(self, latents: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q 3"], Leaf]:
        mean, std = statistics(self.config)
        z = (latents.astype(jnp.float32) * std + mean).astype(config.dtype_of(self.config))
        video, past = self.decoder(self.post_quant(z), past)
        return jnp.clip(video, -1, 1), past


def statistics(part: config.Vae) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and standard deviation of every latent channel; float32."""
    return jnp.array(part.mean, jnp.float32), jnp.array(part.std, jnp.float32)
