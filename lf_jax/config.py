"""Every setting of the system: frozen dataclasses that check themselves.

A preset is a Python file that ends in `CONFIG = Config(...)`; the command line can override any field. All fields are
hashable, so a config can be a static argument of `jax.jit`.
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp


def check(holds: bool, rule: str) -> None:
    """Raises ValueError with `rule` unless it holds; `rule` names the field and its value."""
    if not holds:
        raise ValueError(rule)


def check_dtype(dtype: str) -> None:
    check(dtype in ("bfloat16", "float32", "float16"), f"{dtype=} must be 'bfloat16', 'float32' or 'float16'")


@dataclasses.dataclass(frozen=True)
class Model:
    """The causal Wan2.1 diffusion transformer (defaults: 1.3B)."""

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    channels: int = 16  # of a latent pixel, in and out
    freq_dim: int = 256  # sinusoidal features of a timestep
    text_dim: int = 4096
    text_len: int = 512  # text rows attended to; the rows after the prompt count too, as in training
    patch: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows and columns in one token
    eps: float = 1e-6
    linear_branch: bool = False  # SLA: sparse layers add a projection of linear attention to the blocks that they leave out
    linears: Literal["full", "fp8"] = "full"  # of the blocks; fp8: float8 weights and activations, for inference
    dtype: str = "bfloat16"  # of parameters and activations

    def __post_init__(self):
        check_dtype(self.dtype)
        fits = self.linears == "full" or self.dtype != "float16"
        check(fits, f"{self.linears=} needs bfloat16 or float32, not {self.dtype=}")
        check(self.dim % self.heads == 0, f"{self.heads=} must divide {self.dim=}")
        check(self.head_dim % 2 == 0 and self.head_dim >= 6, f"{self.head_dim=} must be even and at least 6")
        check(self.freq_dim % 2 == 0, f"{self.freq_dim=} must be even")
        check(self.patch[0] == 1, f"{self.patch=} must cover one latent frame")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclasses.dataclass(frozen=True)
class Vae:
    """The video autoencoder. `wan`: Wan2.1 (LightVAE is the same at `base=24`); `tiny`: TAEHV / LightTAE."""

    kind: Literal["wan", "tiny"] = "wan"
    channels: int = 16
    base: int = 96  # width of the finest level (`wan`)
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # widths of the levels over `base` (`wan`)
    res_blocks: int = 2  # a level of the encoder; the decoder has one more (`wan`)
    temporal: tuple[bool, ...] = (False, True, True)  # which halvings also halve time, encoder order; TAEHV: (1, 1, 0)
    widths: tuple[int, ...] = (256, 128, 64, 64)  # of the decoder's stages, and last of the whole encoder (`tiny`)
    scaled: bool = False  # `tiny`: multiply by `std` and add `mean` first (LightTAE)
    mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_dtype(self.dtype)
        name, levels = ("widths", self.widths) if self.kind == "tiny" else ("multipliers", self.multipliers)
        check(len(self.temporal) == len(levels) - 1, f"{self.temporal=} needs one entry fewer than self.{name}={levels}")
        check(len(self.mean) == len(self.std) == self.channels, f"mean and std need {self.channels=} entries each")

    @property
    def spatial_stride(self) -> int:
        return 2 ** len(self.temporal)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal)


@dataclasses.dataclass(frozen=True)
class Text:
    """The UMT5 encoder (defaults: XXL)."""

    vocab: int = 256384
    dim: int = 4096
    ffn_dim: int = 10240
    heads: int = 64
    head_dim: int = 64
    layers: int = 24
    buckets: int = 32  # of relative positions
    max_distance: int = 128
    length: int = 512  # tokens of a prompt, padding included
    eps: float = 1e-6
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_dtype(self.dtype)
        check(self.buckets % 4 == 0, f"{self.buckets=} must be a multiple of 4")


@dataclasses.dataclass(frozen=True)
class Cache:
    """Which frames stay visible (Self-Forcing: all; LongLive: window 12, sink 3; Light Forcing long: 12, 1, relative)."""

    window: int | None = None  # frames attended to, the current chunk included; None keeps every frame
    sink: int = 0  # first frames, kept for ever inside the window
    positions: Literal["absolute", "relative"] = "absolute"  # relative: sink and window count as adjacent

    def __post_init__(self):
        check(self.window is None or self.window > self.sink >= 0, f"{self.window=} must be larger than {self.sink=} >= 0")
        check(self.window is not None or self.sink == 0, f"{self.sink=} needs a window: without one every frame is kept")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Chunk-Aware Growth and the choice of key blocks (Light Forcing, sections 3.2 and 3.3)."""

    policy: str | Callable = "dense"  # a name of `lf_jax.sparsity.SELECTORS`, "dense", or a selector function
    target: float = 0.88  # fraction of key blocks left out, averaged over the key work of all chunks but the first
    base: float | None = 0.98  # where growth tends to; None means `target`: the same sparsity in every chunk
    keep_frames: int = 6  # past frames whose blocks are candidates, sink and near included
    sink_frames: int = 1
    near_frames: int = 2
    block_q: int = 64  # tokens of a query block
    block_k: int = 64  # tokens of a key block
    implementation: str | None = None  # of self-attention, dense or sparse; None chooses, a name runs or raises
    selection: str | None = None  # implementation of the choice of blocks, likewise
    attention: Literal["sparse", "auto"] = "sparse"  # auto: chunks that keep so much that selecting costs more keep everything

    def __post_init__(self):
        check(0 <= self.target < 1, f"{self.target=} must lie in [0, 1)")
        check(self.base is None or self.target <= self.base < 1, f"{self.base=} must lie in [{self.target=}, 1)")
        check(
            self.keep_frames > self.sink_frames + self.near_frames,
            f"{self.keep_frames=} must exceed {self.sink_frames=} + {self.near_frames=}",
        )
        check(self.block_q > 0 and self.block_k > 0, f"{self.block_q=} and {self.block_k=} must be positive")
        check(
            self.attention == "sparse" or self.policy not in ("dense", "full", "window"),
            f"{self.attention=} needs a policy that selects by budget, received {self.policy=}",
        )

    @property
    def dense(self) -> bool:
        return self.policy == "dense"


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How a chunk is denoised. Timesteps are in 0..1000; sigma = timestep / 1000."""

    chunk_frames: int = 3  # latent frames generated together
    independent_first_frame: bool = False  # the first chunk is one frame: 1, 3, 3, ... (image-to-video checkpoints)
    sampler: Literal["few_step", "unipc", "euler"] = "few_step"
    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)  # of `few_step`, before warping
    warp: bool = True  # send `timesteps` through the shifted schedule (Self-Forcing, `warp_denoising_step`)
    shift: float = 5.0
    num_inference_steps: int = 50  # of `unipc` and `euler`
    guidance_scale: float = 1.0  # classifier-free; 1 runs the conditional branch alone
    context_timestep: float = 0.0  # the timestep of the pass that fills the cache
    context_noise: bool = False  # add that much noise to the finished chunk first (training rollouts do)

    def __post_init__(self):
        check(self.chunk_frames > 0, f"{self.chunk_frames=} must be positive")
        check(self.shift > 0, f"{self.shift=} must be positive")
        check(self.num_inference_steps > 0, f"{self.num_inference_steps=} must be positive")
        check(0 <= self.context_timestep <= 1000, f"{self.context_timestep=} must lie in [0, 1000]")
        steps = self.timesteps
        check(
            len(steps) > 0 and all(a > b for a, b in zip(steps, steps[1:], strict=False)) and 0 < steps[-1] <= steps[0] <= 1000,
            f"{self.timesteps=} must fall strictly within (0, 1000]",
        )
        check(
            self.sampler != "few_step" or self.guidance_scale == 1.0,
            f"{self.guidance_scale=} needs sampler 'unipc' or 'euler': the few-step models are distilled with guidance",
        )


@dataclasses.dataclass(frozen=True)
class Video:
    height: int = 480  # pixels
    width: int = 832  # pixels
    num_frames: int = 81  # pixel frames
    fps: int = 16
    negative_prompt: str = ""  # used when `guidance_scale` is not 1

    def __post_init__(self):
        for name in ("height", "width", "num_frames", "fps"):
            value = getattr(self, name)
            check(isinstance(value, numbers.Integral), f"{name}={value!r} must be an integer")
            check(value > 0, f"{name}={value} must be positive")


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    vae: Vae = Vae()
    text: Text = Text()
    cache: Cache = Cache()
    sparsity: Sparsity = Sparsity()
    rollout: Rollout = Rollout()
    video: Video = Video()

    def __post_init__(self):
        check(self.model.channels == self.vae.channels, f"{self.model.channels=} must equal {self.vae.channels=}")
        check(self.model.text_dim == self.text.dim, f"{self.model.text_dim=} must equal {self.text.dim=}")
        check(self.text.length <= self.model.text_len, f"{self.text.length=} must not exceed {self.model.text_len=}")
        window, chunk = self.cache.window, self.rollout.chunk_frames
        check(
            window is None or window >= self.cache.sink + chunk,
            f"{self.cache.window=} must hold {self.cache.sink=} and {self.rollout.chunk_frames=}",
        )
        for name, patch in zip(("height", "width"), self.model.patch[1:], strict=True):
            unit = self.vae.spatial_stride * patch
            check(
                getattr(self.video, name) % unit == 0, f"video.{name}={getattr(self.video, name)} must be a multiple of {unit}"
            )


def dtype_of(part: Model | Vae | Text) -> jnp.dtype:
    return jnp.dtype(part.dtype)
