"""Implementations of attention as calls that are ready to be launched again and again."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse import block_sparse_attention, hopper, reference
from pallas_kernels.block_sparse.api import IMPLEMENTATIONS
from pallas_kernels.block_sparse.hopper_common import Config
from pallas_kernels.block_sparse.types import BlockMap
from pallas_kernels.workloads import Case

TORCH = ("sdpa", "flex", "fa4")  # those of `peers`
NAMES = (*IMPLEMENTATIONS, "cudnn", *TORCH)
CALLS = 4  # in a launch: what it takes to start a program is shared, as in a network, which has many layers
DENSE_ONLY = "has no block lists: runs dense workloads only"  # said of every other workload, so the table leaves it out


class Missing(Exception):
    """The implementation cannot run this workload here; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Run:
    launch: Callable[[], Sequence[Any]]  # starts its calls and does not wait; the last one's output, or gradients of q, k and v
    wait: Callable[[Sequence[Any]], Any]  # until what was launched last is there
    head: Callable[[Any, int], np.ndarray]  # (array [b, t, head, e], head) -> [b, t, e] float32 on the host
    launched: str  # how: "program", "CUDA graph" or "calls"
    calls: int = 1  # in a launch, one after the other


def prepare(name: str, case: Case) -> Run:
    """
    Raises:
        ValueError: for an unknown name.
        Missing: if it cannot run this workload here.
    """
    if name not in NAMES:
        raise ValueError(f"implementation {name!r} must be one of {', '.join(NAMES)}")
    if name in TORCH:
        return _peer(name, case)
    if name == "cudnn":
        needs_full_lists(case)
        k, v = case.all_keys()
        return _jax(dataclasses.replace(case, k=k, v=v, past=None), _cudnn)
    try:
        return _jax(case, partial(_block_sparse, implementation=name))
    except NotImplementedError as error:
        raise Missing(str(error)) from error


def configured(case: Case, config: Config) -> Run:
    """The Hopper kernels in this configuration."""
    return _jax(case, partial(_hopper, config=config))


def needs_full_lists(case: Case) -> None:
    if not case.workload.full or case.workload.padded:
        raise Missing(DENSE_ONLY)


def _peer(name: str, case: Case) -> Run:
    try:
        from pallas_kernels import peers
    except ImportError as error:
        raise Missing(f"torch is not installed ({error})") from error
    return peers.run(name, case)


@partial(jax.jit, static_argnames=("scale", "frame_tokens", "implementation"))
def _block_sparse(q, k, v, blocks, past, *, scale, frame_tokens, implementation):
    return block_sparse_attention(
        q, k, v, blocks, past=past, scale=scale, frame_tokens=frame_tokens, implementation=implementation
    )


@partial(jax.jit, static_argnames=("scale", "frame_tokens", "config"))
def _hopper(q, k, v, blocks, past, *, scale, frame_tokens, config):
    return hopper.attention(q, k, v, blocks, past, scale, frame_tokens, config=config)[0]


@partial(jax.jit, static_argnames=("scale", "frame_tokens"))
def _cudnn(q, k, v, blocks, past, *, scale, frame_tokens):
    del blocks, past, frame_tokens  # of full lists without dead tokens
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")


def repeated(call: Callable[..., Any]) -> Callable[[tuple], list]:
    """The same call `CALLS` times, each after the one before: XLA would make one of equal calls."""

    def program(arguments: tuple) -> list:
        every = []
        for _ in range(CALLS):
            arguments, outputs = jax.lax.optimization_barrier((arguments, call(*arguments)))
            every.append(outputs)
        return every

    return program


def _jax(case: Case, attend: Callable[..., jax.Array]) -> Run:
    """A run of a jitted function, compiled."""
    work = case.workload
    attend = partial(attend, scale=work.scale, frame_tokens=work.frame_tokens if work.padded else None)
    if work.backward:
        _, pull = jax.vjp(lambda q, k, v: attend(q, k, v, case.blocks, case.past), case.q, case.k, case.v)
        call, arguments = jax.jit(lambda pull, dout: pull(dout)), (pull, case.dout)
    else:
        call, arguments = (lambda *given: (attend(*given),)), (case.q, case.k, case.v, case.blocks, case.past)

    program = jax.jit(repeated(call))

    def launch():
        return program(arguments)[-1]

    jax.block_until_ready(launch())
    return Run(launch, jax.block_until_ready, lambda array, h: np.asarray(array[:, :, h].astype(jnp.float32)), "program", CALLS)


@partial(jax.jit, static_argnames=("scale", "frame_tokens", "backward"))
def _reference(q, k, v, dout, blocks, *, scale, frame_tokens, backward):
    def attend(q, k, v):
        return reference.attention(q, k, v, blocks, None, scale, frame_tokens)[0]

    if not backward:
        return (attend(q, k, v),)
    return jax.vjp(attend, q, k, v)[1](dout)


def expected(case: Case, head: int) -> list[np.ndarray]:
    """What a run returns for one head, from the definition and in float32: arrays [b, t, e]."""
    work, (k, v), one = case.workload, case.all_keys(), slice(head, head + 1)
    arrays = (x[:, :, one].astype(jnp.float32) for x in (case.q, k, v, case.dout))
    blocks = BlockMap(case.blocks.index[:, one], case.blocks.count[:, one], work.block_q, work.block_k)
    results = _reference(*arrays, blocks, scale=work.scale, frame_tokens=work.frame_tokens, backward=work.backward)
    return [np.asarray(x[:, :, 0]) for x in results]


def error(run: Run, head: int, expected: Sequence[np.ndarray]) -> float:
    """Relative L2 distance of what it computes for this head from what is expected, the worst of its outputs."""
    outputs = run.launch()
    run.wait(outputs)
    found = (run.head(output, head) for output in outputs)
    pairs = zip(found, expected, strict=True)
    return max(float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in pairs)
