"""Prompts to embeddings: the tokenizer, the UMT5 encoder, and files of encoded prompts."""

from lf_jax.text.embeddings import Embeddings, fingerprint, load_embeddings, save_embeddings
from lf_jax.text.tokenizer import Tokenizer, clean, tiny_model
from lf_jax.text.umt5 import UMT5, encode

__all__ = [
    "UMT5",
    "Embeddings",
    "Tokenizer",
    "clean",
    "encode",
    "fingerprint",
    "load_embeddings",
    "save_embeddings",
    "tiny_model",
]
