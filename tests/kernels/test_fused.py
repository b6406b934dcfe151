"""The passes between linear layers against numpy in float64: in XLA, in the Pallas interpreter, and as they are on a GPU."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels import fused, platform
from pallas_kernels.fused import api, triton, xla
from pallas_kernels.fused.types import Layout

# pytest shows every deprecation, whatever filter the module has set
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

MODES = ["xla", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)]
ROUNDING = {"float32": 2e-6, "bfloat16": 2**-8}  # the error of one
EPS = 1e-6


@pytest.fixture
def call(request, monkeypatch):
    """The public calls with the implementation of a mode."""
    if request.param == "interpreter":
        runs = {
            name: functools.partial(getattr(triton, name), interpret=True)
            for name in api.Implementation._fields
            if name != "reason"
        }
        monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", api.Implementation(lambda *call: None, **runs))
    name = "xla" if request.param == "xla" else "triton"
    return SimpleNamespace(
        **{f: functools.partial(getattr(fused, f), implementation=name) for f in fused.__all__ if f != "explain"}
    )


each_mode = pytest.mark.parametrize("call", MODES, indirect=True)


def draw(seed: int, *shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 2, shape), dtype)


def exact(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def layer_normed(x) -> np.ndarray:
    x = exact(x)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)


def assert_quantised(found, expected):
    """Values within half a step of float8: a sixteenth of a number, or half the smallest step."""
    assert found.values.dtype == jnp.float8_e4m3fn and found.scale.dtype == jnp.float32
    most = np.maximum(np.abs(expected).max(-1), 1e-5)
    np.testing.assert_allclose(found.scale, most / 448, rtol=1e-5)
    scale = exact(found.scale)[..., None]
    off = np.abs(exact(found.values) * scale - expected)
    assert (off <= np.abs(expected) * (2**-4 + 1e-4) + scale * 2**-10 + 1e-6).all()


# b, frames, tokens of a frame, width; 13 tokens do not fill programs of 4, 96 and 384 are no powers of two
SHAPES = [(2, 3, 8, 96, "bfloat16"), (1, 2, 13, 32, "float32"), (2, 1, 5, 384, "bfloat16")]


@each_mode
@pytest.mark.parametrize(("b", "frames", "tokens", "d", "dtype"), SHAPES)
def test_norms_equal_numpy(call, b, frames, tokens, d, dtype):
    x = draw(0, b, frames * tokens, d, dtype=dtype)
    shift, scale = draw(1, b, frames, d), draw(2, b, frames, d)
    of_token = lambda vectors: np.repeat(exact(vectors), tokens, axis=1)  # noqa: E731
    expected = layer_normed(x) * (1 + of_token(scale)) + of_token(shift)
    found = call.norm_modulate(x, shift, scale, eps=EPS)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(exact(found), expected, rtol=ROUNDING[dtype], atol=5e-6)
    assert_quantised(call.norm_modulate(x, shift, scale, eps=EPS, quantise=True), expected)

    weight, bias = draw(3, d, dtype=dtype), draw(4, d, dtype=dtype)
    expected = layer_normed(x) * exact(weight) + exact(bias)
    np.testing.assert_allclose(exact(call.layer_norm(x, weight, bias, eps=EPS)), expected, rtol=ROUNDING[dtype], atol=5e-6)
    assert_quantised(call.layer_norm(x, weight, bias, eps=EPS, quantise=True), expected)


@each_mode
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_tokens(call, dtype):
    x = draw(5, 2, 7, 96, dtype=dtype) * jnp.logspace(-8, 8, 7, dtype=dtype)[:, None]
    x = x.at[1, 2].set(0).at[0, 3].set(0).at[0, 3, 5].set(-1e4)
    found = call.quantise(x)
    assert_quantised(found, exact(x))
    assert not exact(found.values)[1, 2].any() and exact(found.values)[0, 3, 5] == -448


def rotated(y, angle):
    """As a product of complex numbers."""
    turned = (y[..., 0::2] + 1j * y[..., 1::2]) * np.exp(1j * exact(angle))[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(y.shape)


# frames, tokens of a frame, block, new blocks in every frame; heads, whether they turn, which part of three; dtype
LAYOUTS = {
    "whole blocks": (2, 32, 16, True, 6, True, 2, "float32"),
    "short last block of a frame": (2, 26, 16, True, 3, True, 1, "bfloat16"),
    "dead programs": (2, 48, 32, True, 3, True, 0, "float32"),  # of 16 tokens, whole ones
    "dead programs at the end": (1, 48, 32, False, 3, True, 0, "float32"),
    "short last block of all": (3, 26, 32, False, 6, True, 0, "bfloat16"),
    "blocks that powers of two do not divide": (2, 10, 6, True, 3, False, 1, "float32"),
    "no blocks": (2, 13, None, False, 3, True, 2, "bfloat16"),
    "a norm alone": (2, 13, None, False, 3, False, 0, "float32"),
}


@each_mode
@pytest.mark.parametrize("name", LAYOUTS)
def test_queries_and_keys_equal_numpy(call, name):
    frames, tokens, block, anew, heads, turn, part, dtype = LAYOUTS[name]
    b, t, d = 2, frames * tokens, 96
    x, weight, angle = draw(6, b, t, 3 * d, dtype=dtype), draw(7, d, dtype=dtype), 9 * draw(8, t, d // heads // 2)
    tables = (jnp.cos(angle), jnp.sin(angle)) if turn else ()
    found, means = call.norm_rope(
        x, weight, *tables, heads=heads, eps=EPS, part=part, block=block, frame_tokens=tokens if anew else None
    )

    y = exact(x)[..., part * d :][..., :d]
    y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + EPS) * exact(weight)
    y = y.reshape(b, t, heads, -1)
    y = rotated(y, angle) if turn else y
    runs = y.reshape(b, frames if anew else 1, -1, *y.shape[2:])
    expected = y
    if anew:
        expected = np.pad(runs, ((0, 0), (0, 0), (0, -tokens % block), (0, 0), (0, 0))).reshape(b, -1, *y.shape[2:])
    assert found.dtype == x.dtype and found.shape == expected.shape
    np.testing.assert_allclose(exact(found), expected, rtol=ROUNDING[dtype], atol=2e-5)
    if block is None:
        assert means is None
        return
    blocks = [runs[:, f, at : at + block].mean(1) for f in range(runs.shape[1]) for at in range(0, runs.shape[2], block)]
    assert means.dtype == jnp.float32
    np.testing.assert_allclose(means, np.stack(blocks, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", ["interpreter"], indirect=True)
def test_gradients_are_those_of_xla(call):
    x, weight, angle = draw(9, 1, 26, 32), draw(10, 32), draw(11, 26, 8)
    shift, scale = draw(12, 1, 2, 32), draw(13, 1, 2, 32)
    probe = draw(14, 1, 26, 2, 16)

    def loss(x, weight, shift, scale, **options):
        y = fused.layer_norm(fused.norm_modulate(x, shift, scale, eps=EPS, **options), weight, weight, eps=EPS, **options)
        tables, blocks = (jnp.cos(angle), jnp.sin(angle)), dict(block=8, frame_tokens=13)
        y, means = fused.norm_rope(y, weight, *tables, heads=2, eps=EPS, **blocks, **options)
        return (y[:, :26] * probe).sum() + means.sum()

    arrays = (x, weight, shift, scale)
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, implementation=name), argnums=(0, 1, 2, 3)))(*arrays)
        for name in ("triton", "xla")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    means = lambda x: fused.norm_rope(x, weight, heads=2, eps=EPS, block=8, implementation="triton")[1].sum()  # noqa: E731
    assert not jax.grad(means)(x).any() and means(x) != 0


@pytest.mark.parametrize("call", ["interpreter"], indirect=True)
def test_a_stack_of_layers(call):
    """As the keys of the text are made, for all layers at once."""
    x, weight = draw(15, 1, 10, 32), draw(16, 3, 32)
    each = functools.partial(fused.norm_rope, x, heads=2, eps=EPS, block=4)
    found = jax.vmap(functools.partial(each, implementation="triton"))(weight)
    for i, expected in enumerate(each(w, implementation="xla") for w in weight):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("tokens", [1536, 1560])
@pytest.mark.gpu
def test_full_size(tokens):
    """Three frames of the 1.3B model: the kernels, compiled, equal XLA."""
    x, wide = (draw(i, 1, 3 * tokens, n * 1536, dtype="bfloat16") for i, n in enumerate((1, 3)))
    shift, scale, weight = draw(2, 1, 3, 1536), draw(3, 1, 3, 1536), draw(4, 1536, dtype="bfloat16")
    angle = 20 * draw(5, 3 * tokens, 64)
    tables = jnp.cos(angle), jnp.sin(angle)

    def near(found, expected):
        error = jnp.linalg.norm(found.astype(jnp.float32) - expected.astype(jnp.float32))
        assert error <= 3e-3 * jnp.linalg.norm(expected.astype(jnp.float32))

    names = ("triton", "xla")
    for quantise in (False, True):
        for call in (
            functools.partial(fused.norm_modulate, x, shift, scale, eps=EPS, quantise=quantise),
            functools.partial(fused.layer_norm, x, weight, weight, eps=EPS, quantise=quantise),
            functools.partial(fused.quantise, x),
        ):
            jax.tree.map(near, *(jax.jit(functools.partial(call, implementation=name))() for name in names))
    for part, options in enumerate((dict(block=128), dict(block=64, frame_tokens=tokens), dict(block=32, frame_tokens=tokens))):
        call = functools.partial(fused.norm_rope, wide, weight, *tables, heads=12, eps=EPS, part=part, **options)
        jax.tree.map(near, *(jax.jit(functools.partial(call, implementation=name))() for name in names))


@pytest.mark.parametrize(("tokens", "block_k"), [(1536, 64), (1560, 32)])
def test_the_kernels_lower_for_a_gpu_at_full_size(tokens, block_k):
    def block(x, wide, shift, weight, table):
        layouts = Layout(1, 3 * tokens, 128, False), Layout(3, tokens, block_k, tokens % block_k > 0)
        rope = [triton.norm_rope(wide, weight, table, table, 12, EPS, i, layout) for i, layout in enumerate(layouts)]
        one = triton.norm_rope(x, weight, None, None, 12, EPS, 0, Layout(1, 3 * tokens, None, False))
        norms = [triton.norm(x, shift, shift, 1.0, EPS, quantised) for quantised in (False, True)]
        return rope, one, norms, triton.quantise(x)

    shapes = [((1, 3 * tokens, n * 1536), "bfloat16") for n in (1, 3)]
    shapes += [((1, 3, 1536), "float32"), ((1536,), "bfloat16"), ((3 * tokens, 64), "float32")]
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(block).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("gpu$xla.gpu.triton") == 6


def test_the_public_calls_choose_what_runs_here():
    assert fused.explain(1536)["xla"] is None
    x = draw(0, 1, 8, 32)
    np.testing.assert_array_equal(fused.quantise(x).scale, xla.quantise(x).scale)


@pytest.mark.skipif(platform.device().nvidia, reason="of machines without an NVIDIA GPU")
def test_a_named_implementation_runs_or_raises():
    x, vector = jnp.ones((1, 8, 32)), jnp.ones((1, 1, 32))
    for call in (
        functools.partial(fused.norm_modulate, x, vector, vector, eps=EPS),
        functools.partial(fused.layer_norm, x, vector[0, 0], vector[0, 0], eps=EPS),
        functools.partial(fused.norm_rope, x, vector[0, 0], heads=2, eps=EPS),
        functools.partial(fused.quantise, x),
    ):
        with pytest.raises(NotImplementedError, match="fused with implementation='triton': needs an NVIDIA GPU"):
            call(implementation="triton")
        with pytest.raises(ValueError, match="implementation='cuda' must be one of triton, xla, or None"):
            call(implementation="cuda")


def test_reasons_of_the_kernels(monkeypatch):
    hopper = SimpleNamespace(compute_capability=(9, 0), kind="NVIDIA H200", backend="gpu")
    monkeypatch.setattr(platform, "device", lambda: hopper)
    assert fused.explain(1536, 128, True) == {"triton": None, "xla": None} == fused.explain(96, 32)
    assert "received 5120" in fused.explain(5120)["triton"] and "received 40" in fused.explain(40)["triton"]
    assert fused.explain(480, 40)["triton"] == "head_dim must be a power of two of at most 128, received 40"
    hopper.compute_capability = (8, 0)
    assert fused.explain(1536)["triton"] is None
    assert fused.explain(1536, None, True)["triton"] == "float8 needs compute capability 8.9 or later, this is 8.0"
    hopper.compute_capability = (7, 0)
    assert fused.explain(1536)["triton"] == "needs compute capability 8.x, 9.x or 12.x, NVIDIA H200 has 7.0"


@pytest.mark.parametrize(
    ("name", "arrays", "options", "message"),
    [
        ("norm_modulate", [(1, 8, 32), (1, 2, 16), (1, 2, 32)], {}, r"shift.shape=\(1, 2, 16\) must be \[1, frame, 32\]"),
        ("norm_modulate", [(2, 8, 32), (2, 2, 32), (2, 1, 32)], {}, r"scale.shape=\(2, 1, 32\) must be \[2, frame, 32\]"),
        ("norm_modulate", [(1, 8, 32), (1, 3, 32), (1, 3, 32)], {}, r"x.shape=\(1, 8, 32\) must have the tokens of 3 frames"),
        ("layer_norm", [(1, 8, 32), (16,), (32,)], {}, r"weight.shape=\(16,\) must be \(32,\)"),
        ("norm_rope", [(1, 8, 40), (32,)], {}, r"must hold whole parts as wide as weight, 32, and part=0 be one"),
        ("norm_rope", [(1, 8, 64), (32,)], {"part": 2}, "and part=2 be one"),
        ("norm_rope", [(1, 8, 32), (32,)], {"heads": 3}, "heads=3 must divide 32"),
        ("norm_rope", [(1, 8, 32), (32,), (8, 8)], {}, "cos and sin go together"),
        ("norm_rope", [(1, 8, 32), (32,), (8, 8), (8, 16)], {}, r"sin.shape=\(8, 16\) must be \[8, 8\]"),
        ("norm_rope", [(1, 8, 32), (32,)], {"block": 0}, "block=0 must be positive"),
        ("norm_rope", [(1, 8, 32), (32,)], {"frame_tokens": 4}, "frame_tokens=4 needs a block"),
        ("norm_rope", [(1, 8, 32), (32,)], {"block": 4, "frame_tokens": 5}, "must have whole frames of 5 tokens"),
    ],
)
def test_wrong_calls_are_refused(name, arrays, options, message):
    options = ({"heads": 2} if name == "norm_rope" else {}) | options
    with pytest.raises(ValueError, match=message):
        getattr(fused, name)(*map(jnp.ones, arrays), eps=EPS, **options)


def test_every_implementation_is_documented():
    for name in api.IMPLEMENTATIONS:
        assert f'"{name}"' in fused.norm_modulate.__doc__
