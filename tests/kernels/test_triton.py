"""The Triton-lowered kernels against the reference: in the Pallas interpreter, and as they are on a GPU."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.test_block_sparse import CASES, Case, arguments, every_equation

from pallas_kernels import Past, platform
from pallas_kernels.block_sparse import lists, reference, triton_backward, triton_forward, xla
from pallas_kernels.block_sparse.triton_backward import Configs
from pallas_kernels.block_sparse.triton_forward import Config

# pytest shows every deprecation, whatever filter the module has set
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

MODES = [pytest.param(True, id="interpreter"), pytest.param(False, id="gpu", marks=pytest.mark.gpu)]


def enlarged(case: Case, **fields) -> Case:
    """Triton's tiles have at least 16 rows: four times the tokens of a case, and twice its head dimension."""
    tokens = {name: getattr(case, name) * 4 for name in ("tq", "block_q", "block_k")}
    frame_tokens = case.frame_tokens and case.frame_tokens * 4
    return dataclasses.replace(case, **tokens, frame_tokens=frame_tokens, e=case.e * 2, **fields)


def configs(rows=16, columns=16) -> Configs:
    return Configs(*[Config(rows, columns, warps=4, stages=2)] * 3)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def attend(case: Case, interpret: bool | None, sizes: Configs | None, q, k, v, blocks, past):
    """`interpret` None: the reference."""
    given = q, k, v, blocks, past, case.e**-0.5, case.frame_tokens
    if interpret is None:
        return reference.attention(*given)
    return triton_backward.attention(*given, configs=sizes, interpret=interpret)


def check(case: Case, interpret: bool, sizes: Configs | None, seed: int, atol: float = 1e-5):
    given = arguments(case, seed)
    out, lse = attend(case, interpret, sizes, *given)
    expected, expected_lse = attend(case, None, None, *given)
    assert out.dtype == given[0].dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=atol)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=atol)
    return out, lse


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("name", CASES)
def test_the_forward_equals_the_reference(name, interpret):
    case = enlarged(CASES[name], b=1)
    # A logit of 1500 is a float32 to 6e-5. Summed in another order and in base 2, as on a GPU, it gives other weights: plain
    # float32 sums of this case, in reverse order and in base 2, are up to 6e-5 from those of the reference.
    check(case, interpret, configs(), seed=1, atol=1e-4 if case.size > 1 else 1e-5)


@pytest.mark.parametrize("dtype, precision", [("float32", "HIGHEST"), ("bfloat16", None)])
def test_products_of_float32_are_not_rounded_to_tf32(dtype, precision):
    q, k, v, blocks, past = arguments(enlarged(Case(b=1, heads=1, dtype=dtype)))

    def loss(attention, q):
        return attention(q, k, v, blocks, past, 0.1, None)[0].astype(jnp.float32).sum()

    with jax.default_matmul_precision("default"):  # what a user has, who sets nothing
        for attention, products in ((functools.partial(triton_backward.attention, interpret=True), 3), (xla.attention, 2)):
            jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, attention)))(q).jaxpr
            dots = [eqn.params["precision"] for eqn in every_equation(jaxpr) if eqn.primitive.name == "dot_general"]
            names = {each.name for asked in dots for each in asked or ()}
            assert len(dots) > products and names == ({precision} if precision else {"DEFAULT"}), dots


@pytest.mark.parametrize(
    ("dtype", "interpret"),
    [("bfloat16", True), *(pytest.param(name, False, marks=pytest.mark.gpu) for name in ("bfloat16", "float16"))],
)
def test_sixteen_bits(dtype, interpret):
    check(Case(b=1, tq=24, e=16, block_q=16, block_k=16, count=5, dtype=dtype), interpret, None, seed=2, atol=1e-2)


def test_an_empty_list_gives_zero_and_minus_infinity():
    case = enlarged(CASES["nothing"], b=1)
    out, lse = attend(case, True, configs(), *arguments(case))
    assert not out.any() and (lse == -jnp.inf).all()


@pytest.mark.parametrize("interpret", MODES)
def test_tiles_may_be_smaller_than_blocks_by_any_factor(interpret):
    """A tile may even lie wholly in the padding of a frame: 70 of 96 tokens are live, the last 16 of a block are not."""
    case = Case(b=1, tq=40, heads=1, e=16, cached=3, chunk=3, block_q=32, block_k=32, width=4, frame_tokens=70)
    for sizes in (configs(32, 16), configs(16, 32)):
        check(case, interpret, sizes, seed=3)


GRADIENTS = {
    "padded frames": enlarged(CASES["padded frames"], b=1, heads=1, count=None),
    "one source": enlarged(CASES["one source"], heads=1),
    "large logits": enlarged(CASES["large logits"], b=1, heads=1),
    "small tiles": Case(b=1, tq=40, heads=1, e=16, cached=3, chunk=3, block_q=32, block_k=32, width=4, frame_tokens=70),
}


def losses(case: Case, past, weights):
    def loss(arrays, blocks, interpret):
        q, k, v, kv = arrays
        out, lse = attend(case, interpret, configs(), q, k, v, blocks, past and Past(*kv, past.layer))
        return (out * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    return loss


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_those_of_the_reference(name, interpret):
    case = GRADIENTS[name]
    q, k, v, blocks, past = arguments(case)
    loss = losses(case, past, jax.random.normal(jax.random.key(5), q.shape))
    arrays = (q, k, v, past and (past.k, past.v))
    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    found, expected = gradient(arrays, blocks, interpret), gradient(arrays, blocks, None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and jnp.abs(b).max() > 0.01
        # weights are recomputed from the log-sum-exp: float32 holds a logarithm of 1000 to 1e-4 only
        np.testing.assert_allclose(a, b, atol=(2e-4 if case.size > 1 else 1e-5) * float(jnp.abs(b).max()))
    again = gradient(arrays, blocks, interpret)
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_a_frozen_past_costs_nothing_and_changes_nothing():
    case = GRADIENTS["padded frames"]
    q, k, v, blocks, past = arguments(case)
    loss = losses(case, past, jnp.ones(q.shape))

    def both(arrays):
        return jax.grad(loss)((*arrays, (past.k, past.v)), blocks, True)[:3]

    def frozen(arrays):
        return jax.grad(lambda arrays: loss((*arrays, (past.k, past.v)), blocks, True))(arrays)

    def programs(f):
        return sum(eqn.primitive.name == "pallas_call" for eqn in every_equation(jax.make_jaxpr(f)((q, k, v)).jaxpr))

    assert (programs(both), programs(frozen)) == (4, 3)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(both)((q, k, v)), jax.jit(frozen)((q, k, v)))


def test_the_layer_and_the_lists_are_traced():
    case = Case(b=1, tq=16, heads=1, e=16, block_q=16, block_k=16)
    q, k, v, blocks, past = arguments(case)
    call = jax.jit(lambda past, blocks: attend(case, True, None, q, k, v, blocks, past)[0])
    for layer in range(case.layers):
        at = dataclasses.replace(past, layer=jnp.int32(layer))
        lists = dataclasses.replace(blocks, count=jnp.minimum(blocks.count, layer))
        np.testing.assert_allclose(call(at, lists), attend(case, None, None, q, k, v, lists, at)[0], atol=1e-5)
    assert call._cache_size() == 1


def lowered(f, *shapes):
    """For an NVIDIA GPU, wherever this runs; from jax 0.11 on that takes the description of one."""
    if jax.default_backend() == "gpu" or not hasattr(jax.sharding, "AbstractDevice"):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu)):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_kernels_lower_to_triton_and_no_layer_leaves_the_cache(dtype):
    case = Case(b=1, tq=200, e=64, cached=24, chunk=8, block_q=64, block_k=32, layers=3, frame_tokens=250, dtype=dtype)
    q, k, v, blocks, past = arguments(case)

    def loss(arrays, blocks, past):
        out, _ = triton_backward.attention(*arrays, blocks, past, 0.1, case.frame_tokens)
        return out.astype(jnp.float32).sum()

    call = jax.grad(loss)
    assert lowered(call, (q, k, v), blocks, past).as_text().count("__gpu$xla.gpu.triton") == 3
    jaxpr = jax.make_jaxpr(call)((q, k, v), blocks, past).jaxpr
    sizes = [(eqn.primitive.name, v.aval.size) for eqn in every_equation(jaxpr) for v in eqn.outvars if v.aval.shape]
    assert sizes and max(size for _, size in sizes) < past.k.size // case.layers


def test_default_tiles_fit_blocks_and_device(monkeypatch):
    devices = {(8, 0): 163, (8, 6): 99, (9, 0): 227, (12, 0): 99, None: 99}  # KiB of shared memory
    shapes = itertools.product((16, 128), (16, 256), (16, 32, 128), (jnp.bfloat16, jnp.float32), devices)
    for e, block_q, block_k, dtype, capability in shapes:
        monkeypatch.setattr(platform, "device", lambda c=capability: SimpleNamespace(compute_capability=c))
        q = jax.ShapeDtypeStruct((1, 512, 1, e), dtype)
        chosen = triton_backward.default_configs(q, SimpleNamespace(block_q=block_q, block_k=block_k))
        for config, held, walked, tensors in (
            (chosen.forward, block_q, block_k, 1),
            (chosen.queries, block_q, block_k, 2),
            (chosen.keys, block_k, block_q, 2),
        ):
            assert held % config.rows == 0 and walked % config.columns == 0 and min(config.rows, config.columns) >= 16
            buffers = config.stages - (tensors == 1 and q.dtype.itemsize == 2 and capability != (9, 0))
            tokens = tensors * config.rows + 2 * buffers * config.columns
            assert tokens * e * q.dtype.itemsize < devices[capability] * 1024


def test_reasons(monkeypatch):
    q, blocks = jax.ShapeDtypeStruct((1, 32, 1, 64), jnp.bfloat16), SimpleNamespace(block_q=32, block_k=16)

    def reason(backend, capability, q=q, **sizes):
        here = platform.Device(backend, "Some Device", capability, 1)
        monkeypatch.setattr(platform, "device", lambda: here)
        return triton_forward.reason(q, SimpleNamespace(**(vars(blocks) | sizes)), None, True)

    assert reason("cpu", None) == "needs an NVIDIA GPU, the default device is Some Device (cpu)"
    assert "has 7.5" in reason("gpu", (7, 5)) and "has 10.0" in reason("gpu", (10, 0))
    assert reason("gpu", (8, 6)) is reason("gpu", (9, 0)) is reason("gpu", (12, 0)) is None
    assert "block_q must be a power of two of at least 16, received 8" in reason("gpu", (8, 0), block_q=8)
    assert "block_k must be a power of two of at least 16, received 48" in reason("gpu", (8, 0), block_k=48)
    wide = jax.ShapeDtypeStruct((1, 32, 1, 96), jnp.bfloat16)
    assert "head_dim must be 16, 32, 64 or 128, received 96" in reason("gpu", (8, 0), q=wide)


def test_a_call_that_cannot_be_built_is_refused():
    case = CASES["random"]
    with pytest.raises(NotImplementedError, match="through Triton: head_dim must be .* received 8"):
        triton_backward.attention(*arguments(case), 1.0, None, interpret=True)


def test_past_first_parts_a_list():
    case = Case(count=None)
    blocks = arguments(case)[3]
    for cached in (0, case.cached):
        index, old = lists.past_first(blocks, cached)
        for row in np.ndindex(blocks.count.shape):
            given = np.asarray(blocks.index[row])[: int(blocks.count[row])]
            expected = [*given[given < cached], *given[given >= cached]]
            np.testing.assert_array_equal(index[row][: len(expected)], expected)
            assert old[row] == (given < cached).sum()
