"""What this machine will run: versions, devices, and the implementation of every operation with the reason for it."""

import dataclasses
import importlib.metadata
import os
import platform as host

import jax

from lf_jax import attention, config, tokens
from lf_jax.config import Config, check
from pallas_kernels import conv, fused, linear, platform, selection, tuned

REQUIRED = (
    "jax", "jaxlib", "flax", "einops", "jaxtyping", "numpy", "ml_dtypes", "safetensors", "optax", "scipy", "orbax-checkpoint",
    "sentencepiece", "ftfy", "av", "tyro", "rich",
)  # fmt: skip
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
    tuning: dict[str, str]  # what was measured on such a device, and is chosen by


def examine(settings: Config) -> Report:
    """What would run for `settings` in this process.

    Raises:
        ValueError, NotImplementedError: if `settings.sparsity` names what is unknown or cannot run here, or what was measured
            on this device cannot be read.
    """
    return Report(
        device=f"{platform.describe()}, Python {host.python_version()}",
        versions={name: version(name) for name in REQUIRED},
        optional={name: version(name) for name in OPTIONAL},
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        operations=operations(settings),
        tuning=tuning(settings),
    )


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def operations(settings: Config) -> tuple[Operation, ...]:
    """The operations that have more than one implementation."""
    policy, grid = settings.sparsity.policy, tokens.Grid.of(settings)
    kind = "dense" if settings.sparsity.dense else f"{policy}, blocks {grid.block_q}x{grid.block_k}"
    sparse, model = settings.sparsity, settings.model
    low = model.linears == "fp8"
    choice = () if sparse.dense else (chosen("choice of blocks", selectors(settings, grid), sparse.selection),)
    return (
        chosen(f"self-attention ({kind})", attention.implementations(settings), sparse.implementation),
        *choice,
        chosen("cross-attention", attention.dense_implementations(attention.queries(settings))),
        chosen("norms and rotation", fused.explain(model.dim, model.head_dim, low)),
        *([chosen("float8 linear layers", linear.explain(model.dim, model.ffn_dim, dtype=None))] if low else []),
        chosen("finest convolutions of the autoencoder", convolutions(settings)),
    )


def selectors(settings: Config, grid: tokens.Grid) -> dict[str, str | None]:
    """The implementations that the choice of blocks may use, like `attention.implementations`."""
    slots = settings.cache.window or tokens.latent_frames(settings.video.num_frames, settings.vae.temporal_stride)
    can = selection.explain(settings.model.head_dim, slots + settings.rollout.chunk_frames, grid.frame_blocks)
    named = settings.sparsity.selection
    if named is None:
        return can
    check(named in can, f"sparsity.selection={named!r} must be one of {', '.join(can)}, or None")
    if can[named] is not None:
        raise NotImplementedError(f"sparsity.selection={named!r}: {can[named]}")
    return {named: None}


def chosen(name: str, reasons: dict[str, str | None], named: str | None = None) -> Operation:
    """The first that can run, and why those before it cannot; or the one that the config names."""
    if named is not None:
        return Operation(name, named, ("named in the config",))
    pick = next(key for key, reason in reasons.items() if reason is None)
    before = list(reasons)[: list(reasons).index(pick)]
    return Operation(name, pick, tuple(f"{key}: {reasons[key]}" for key in before) or ("the first choice",))


def tuning(settings: Config) -> dict[str, str]:
    """The table of measured configurations of this device and, for sparse attention, the break-even of its block sizes."""
    kind, found = platform.device().kind, tuned.table(platform.device().kind)
    if found is None:
        report = {"configurations": f"the defaults: there is no table for {kind} ({tuned.file(kind).name})"}
    else:
        measured = "; ".join(found.measured) or "empty"
        report = {"configurations": f"{tuned.file(kind).name}, classes of calls: {len(found.configs)} ({measured})"}
    if not settings.sparsity.dense:
        grid = tokens.Grid.of(settings)
        share = tuned.break_even(grid.block_q, grid.block_k)
        report[f"break-even of blocks {grid.block_q}x{grid.block_k}"] = (
            "not measured: taken as 100 % of the blocks" if share is None else f"{100 * share:.0f} % of the blocks"
        )
    return report


def convolutions(settings: Config) -> dict[str, str | None]:
    """The implementations of the decoder's largest layers; the tiny autoencoder has XLA's convolutions only."""
    part, video, dtype = settings.vae, settings.video, config.dtype_of(settings.vae)
    if part.kind == "tiny":
        return {"xla": None}
    frames, width = settings.rollout.chunk_frames * part.temporal_stride, part.base * part.multipliers[0]
    x = jax.ShapeDtypeStruct((1, frames, video.height, video.width, width), dtype)
    return conv.explain(x, jax.ShapeDtypeStruct((3, 3, 3, width, width), dtype))
