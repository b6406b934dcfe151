"""What this device reaches, measured in the run whose figures it bounds."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lf_jax.bench.floors import Work
from pallas_kernels import platform, timing
from pallas_kernels.linear import Quantised, linear
from pallas_kernels.runs import Run

ROUNDS = 5
SIDE = {"gpu": 8192, "cpu": 512}  # of the matrices; any other backend as a GPU
COPIED = {"gpu": 2**30, "cpu": 2**26}  # bytes


@dataclasses.dataclass(frozen=True)
class Ceilings:
    product: float  # FLOP/s of a large product of matrices in the dtype of the model
    eight_bits: float | None  # the same in float8, the faster of XLA's and `pallas_kernels.linear`; None where unsupported
    copy: float  # bytes/s in the device's memory, read and written together
    to_host: float  # bytes/s from the device to an array of the host

    def floor(self, work: Work) -> float:
        """Milliseconds that `work` takes at least: its products or its bytes, whichever takes longer."""
        linear = self.eight_bits if work.eight_bits and self.eight_bits else self.product
        return 1000 * max(work.linear / linear + work.other / self.product, work.bytes / self.copy)


def measure(dtype: str) -> Ceilings:
    """Best of a few bursts each."""
    here = platform.device()
    side, size = SIDE.get(here.backend, SIDE["gpu"]), COPIED.get(here.backend, COPIED["gpu"])
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.dtype(dtype))
    x = jnp.zeros(size // 4, jnp.float32)
    runs = {"product": _run(_product, a, b), "copy": _run(lambda x: x + 1, x)}
    if here.compute_capability is not None and here.compute_capability >= (8, 9):
        a8, b8, ones = a.astype(jnp.float8_e4m3fn), b.astype(jnp.float8_e4m3fn), jnp.ones(side, jnp.float32)
        runs["8 bits, xla"] = _run(_product, a8, b8)
        runs["8 bits, linear"] = _run(linear, Quantised(a8, ones), Quantised(b8, ones), jnp.zeros(side, jnp.bfloat16))
    seconds = {name: min(times) / 1000 for name, times in timing.bursts(runs, ROUNDS).items()}
    eight_bits = [taken for name, taken in seconds.items() if name.startswith("8 bits")]
    flops = 2.0 * side**3
    return Ceilings(
        product=flops / seconds["product"],
        eight_bits=flops / min(eight_bits) if eight_bits else None,
        copy=2 * size / seconds["copy"],
        to_host=size / _fetched(x),
    )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Rows with rows, as float8 needs it on NVIDIA GPUs; wider numbers do not mind."""
    out = jnp.bfloat16 if a.dtype.itemsize == 1 else a.dtype
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _run(function: Callable, *arguments) -> Run:
    compiled = jax.jit(function)
    return Run(lambda: compiled(*arguments), jax.block_until_ready, None, "calls")


def _fetched(x: jax.Array) -> float:
    """Seconds from the device to the host; every time another array, since JAX keeps what it has fetched."""
    times = []
    for _ in range(ROUNDS):
        fresh = jax.block_until_ready(x + 1)
        start = time.perf_counter()
        jax.device_get(fresh)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
