"""What every implementation must get right, at sizes that all of them take: against the float32 reference, which shares
nothing with any. In the interpreters, and on a GPU as they are."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.test_block_sparse import Case, arguments

from pallas_kernels.block_sparse import api, hopper, reference, triton_backward
from pallas_kernels.block_sparse.hopper_common import Config

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

old = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU interpreter of jax 0.10 cannot run the kernels")
NAMES = [
    "xla",
    "triton interpreted",
    pytest.param("hopper interpreted", marks=old),
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("hopper", marks=pytest.mark.gpu),
]
WIDE = Case(b=1, tq=200, heads=1, e=64, cached=4, chunk=2, block_q=128, block_k=64, width=4, dtype="bfloat16")
CASES = {
    "random, ring slots out of order": WIDE,
    "nothing": dataclasses.replace(WIDE, count=0),
    "single block": dataclasses.replace(WIDE, width=1, count=1),
    "full": dataclasses.replace(WIDE, width=6, count=6),
    "no past": dataclasses.replace(WIDE, cached=0, width=2),
    "equal scores": dataclasses.replace(WIDE, size=0.0, count=4),
    "large logits": dataclasses.replace(WIDE, size=100.0, count=4),
    "padded frames": dataclasses.replace(WIDE, frame_tokens=100, count=4),
}


@functools.partial(jax.jit, static_argnums=(0, 6))
def attend(name: str, q, k, v, blocks, past, frame_tokens: int | None):
    given = q, k, v, blocks, past, q.shape[-1] ** -0.5, frame_tokens
    if name == "triton interpreted":
        return triton_backward.attention(*given, interpret=True)
    if name == "hopper interpreted":
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        config = Config(multiprocessors=2, interpret=InterpretGPUParams(detect_races=True))
        return hopper.attention(*given, config=config)
    return api.IMPLEMENTATIONS[name].run(*given)


def check(name: str, case: Case, seed: int):
    given = arguments(case, seed)
    if name in api.IMPLEMENTATIONS and (reason := api.IMPLEMENTATIONS[name].reason(given[0], given[3], given[4], True)):
        pytest.skip(reason)
    out, lse = attend(name, *given, case.frame_tokens)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, given)
    wanted, wanted_lse = reference.attention(*exact, case.e**-0.5, case.frame_tokens)
    assert out.dtype == given[0].dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-4)
    error = np.linalg.norm(out.astype(jnp.float32) - wanted)
    assert error <= 4e-3 * np.linalg.norm(wanted)
    return out, lse


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_lists_and_numbers_of_every_kind(case, name):
    out, lse = check(name, CASES[case], seed=4)
    if case == "nothing":
        assert not out.any() and (lse == -jnp.inf).all()


@pytest.mark.parametrize("name", NAMES[1:])  # `test_block_sparse` has many more shapes for "xla"
def test_any_shape(name):
    @hypothesis.settings(max_examples=2 if name.endswith("interpreted") else 12, deadline=None, derandomize=True)
    @hypothesis.given(st.data())
    def shapes(data):
        def draw(*values):
            return data.draw(st.sampled_from(values))

        block_k, frame_tokens = draw(32, 64, 128), draw(None, 72, 200)
        frame_blocks = 1 if frame_tokens is None else -(-frame_tokens // block_k)
        cached, chunk = draw(0, 1, 2) * frame_blocks, draw(1, 2) * frame_blocks
        case = Case(
            b=draw(1, 2),
            tq=draw(1, 64, 129, 200),
            heads=draw(1, 2),
            e=draw(64, 128),
            layers=draw(1, 2),
            cached=cached,
            chunk=chunk,
            block_q=draw(64, 128),
            block_k=block_k,
            width=data.draw(st.integers(1, cached + chunk)),
            frame_tokens=frame_tokens,
            dtype="bfloat16",
        )
        check(name, case, seed=draw(0, 1, 2))

    shapes()
