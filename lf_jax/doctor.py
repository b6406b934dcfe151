"""What this machine will run: versions, devices, and the implementation of every operation with the reason for it."""

import dataclasses
import importlib.metadata
import os
import platform as host

import jax
import jax.numpy as jnp

from lf_jax import attention, config, tokens
from lf_jax.config import Config
from pallas_kernels import BlockMap, platform
from pallas_kernels.block_sparse import api

REQUIRED = ("jax", "jaxlib", "flax", "numpy", "safetensors", "orbax-checkpoint", "sentencepiece", "ftfy", "av", "tyro")
OPTIONAL = {
    "torch": "lf-jax convert reads .pt and .pth files with it",
    "huggingface-hub": "its command hf fetches checkpoints",
    "diffusers": "parity tests",
    "transformers": "parity tests",
}
ENVIRONMENT = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True)
class Operation:
    name: str
    choice: str  # the implementation that will run here
    reasons: tuple[str, ...]  # why not the others, in the order in which they are preferred


@dataclasses.dataclass(frozen=True)
class Report:
    device: str
    versions: dict[str, str | None]  # None: not installed
    optional: dict[str, str | None]
    environment: dict[str, str]
    operations: tuple[Operation, ...]


def examine(settings: Config) -> Report:
    """What would run for `settings` in this process.

    Raises:
        ValueError, NotImplementedError: if `settings.sparsity.implementation` names what cannot run here.
    """
    return Report(
        device=f"{platform.describe()}, Python {host.python_version()}",
        versions={name: version(name) for name in REQUIRED},
        optional={name: version(name) for name in OPTIONAL},
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        operations=operations(settings),
    )


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def operations(settings: Config) -> tuple[Operation, ...]:
    """The operations that have more than one implementation, and the convolutions, which have one."""
    q = queries(settings)
    dense = {name: choice.reason(q) for name, choice in attention.DENSE.items()}
    return (
        self_attention(settings, dense),
        chosen("cross-attention", dense),
        Operation("convolutions of the autoencoder", "xla", (f"the only one; {convolutions()}",)),
    )


def self_attention(settings: Config, dense: dict[str, str | None]) -> Operation:
    if settings.sparsity.dense:
        return chosen("self-attention (dense)", dense)
    grid, model, named = tokens.Grid.of(settings), settings.model, settings.sparsity.implementation
    rows = (1, model.heads, grid.query_blocks(settings.rollout.chunk_frames))
    blocks = BlockMap(
        jax.ShapeDtypeStruct((*rows, grid.frame_blocks), jnp.int32),
        jax.ShapeDtypeStruct(rows, jnp.int32),
        grid.block_q,
        grid.block_k,
    )
    can = api.explain(queries(settings), blocks)
    title = f"self-attention ({settings.sparsity.policy}, blocks {grid.block_q}x{grid.block_k})"
    if named is not None:
        config.check(named in can, f"sparsity.implementation={named!r} must be one of {', '.join(can)}, or None")
        if can[named] is not None:
            raise NotImplementedError(f"sparsity.implementation={named!r}: {can[named]}")
        return Operation(title, named, ("named in the config",))
    return chosen(title, {name: reason for name, reason in can.items() if api.IMPLEMENTATIONS[name].automatic})


def chosen(name: str, reasons: dict[str, str | None]) -> Operation:
    """The first that can run, and why those before it cannot."""
    pick = next(key for key, reason in reasons.items() if reason is None)
    before = list(reasons)[: list(reasons).index(pick)]
    return Operation(name, pick, tuple(f"{key}: {reasons[key]}" for key in before) or ("the first choice",))


def queries(settings: Config) -> jax.ShapeDtypeStruct:
    """The queries of one chunk of one video."""
    grid, model = tokens.Grid.of(settings), settings.model
    live = settings.rollout.chunk_frames * grid.frame_tokens
    return jax.ShapeDtypeStruct((1, live, model.heads, model.head_dim), config.dtype_of(model))


def convolutions() -> str:
    here = platform.device()
    return "XLA calls cuDNN here" if here.nvidia else f"XLA's own on {here.backend}"
