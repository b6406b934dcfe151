"""Light Forcing in JAX: autoregressive video diffusion with block-sparse attention."""

from lf_jax.cache import KVCache
from lf_jax.checkpoint import load_state, save_state
from lf_jax.config import Config
from lf_jax.dit import TextCache, WanDiT, forward, text_cache
from lf_jax.generate import Chunk, StreamState
from lf_jax.pipeline import Pipeline, load
from lf_jax.rollout import RolloutState, fork, initial_state, prefill, rollout
from lf_jax.sparsity import SELECTORS, Budget, chunk_budgets, chunk_sparsities
from lf_jax.text import UMT5, Embeddings, Tokenizer, load_embeddings, save_embeddings
from lf_jax.vae import TinyVae, WanVae

__all__ = [
    "SELECTORS",
    "Budget",
    "Chunk",
    "Config",
    "Embeddings",
    "KVCache",
    "Pipeline",
    "RolloutState",
    "StreamState",
    "TextCache",
    "TinyVae",
    "Tokenizer",
    "UMT5",
    "WanDiT",
    "WanVae",
    "chunk_budgets",
    "chunk_sparsities",
    "fork",
    "forward",
    "initial_state",
    "load",
    "load_embeddings",
    "load_state",
    "prefill",
    "rollout",
    "save_embeddings",
    "save_state",
    "text_cache",
]
