"""Convolutions against sums over taps in numpy: in XLA, the kernel in the interpreter, and the kernel as it is on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic, platform
from pallas_kernels.conv import api, convolve, explain, hopper, hopper_plan, xla
from pallas_kernels.conv.types import Form

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    b: int = 1
    f: int = 1
    h: int = 4
    w: int = 64
    c: int = 8
    out: int = 8
    past: bool = False
    residual: bool = False
    norm: bool = False
    upsample: bool = False
    rows: int = 4
    stages: int = 2


CASES = {
    "over time, ragged in rows, columns and channels": Case(b=2, f=2, h=3, w=72, c=40, out=16, past=True, rows=2),
    "more rows than wait to be stored": Case(h=8, c=16, out=56, rows=8, residual=True, stages=3),
    "the same, ragged": Case(f=2, h=13, out=56, rows=8, residual=True),
    "ragged, nothing added": Case(f=2, h=9, out=56, rows=8),
    "ragged in columns": Case(h=2, w=72, out=16, residual=True, rows=2),
    "ragged in columns, channels that fill tiles": Case(h=2, w=72, out=32, residual=True, rows=2),
    "norm of channels that fill no tile": Case(f=2, h=3, c=24, out=20, past=True, norm=True),
    "norm and residual": Case(w=8, c=32, out=32, past=True, norm=True, residual=True, rows=2),
    "norm of channels in two tiles": Case(h=2, w=8, out=384, norm=True, rows=2),
    "after an upsampling": Case(f=2, h=3, w=72, c=40, out=24, upsample=True, rows=2),
    "after an upsampling, channels in two tiles": Case(h=2, w=8, out=384, upsample=True, residual=True, rows=2),
}


def arguments(case: Case, dtype="bfloat16"):
    draw, up = np.random.default_rng(0), 2 if case.upsample else 1

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), dtype)

    taps, image = 3 if case.past else 1, (case.h, case.w)
    kernel = normal(taps, 3, 3, case.c, case.out) / np.sqrt(9 * taps * case.c)
    past = normal(case.b, 2, *image, case.c) if case.past else None
    residual = normal(case.b, case.f, up * case.h, up * case.w, case.out) if case.residual else None
    scale = 1 + normal(case.out) / 4 if case.norm else None
    return normal(case.b, case.f, *image, case.c), kernel.astype(dtype), normal(case.out), past, residual, scale


def expected(case: Case, *arrays) -> np.ndarray:
    """From the formula, a tap at a time, in float64."""
    x, kernel, bias, past, residual, scale = (
        None if a is None else np.asarray(a.astype(jnp.float32), np.float64) for a in arrays
    )
    x = x if past is None else np.concatenate([past, x], axis=1)
    x = x.repeat(2, axis=2).repeat(2, axis=3) if case.upsample else x
    (h, w), x = x.shape[2:4], np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((case.b, case.f, h, w, case.out)) + bias
    for t, i, j in np.ndindex(kernel.shape[:3]):
        y += x[:, t : t + case.f, i : i + h, j : j + w] @ kernel[t, i, j]
    y = y if residual is None else y + residual
    if scale is None:
        return y
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + EPS) * scale
    return y / (1 + np.exp(-y))


def distance(found, wanted) -> float:
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


def check(case: Case, conv, twice: bool):
    """`twice`: whether a norm is of numbers that were rounded."""
    arrays, form = arguments(case), Form(case.upsample, case.norm)
    found, wanted = jax.jit(lambda *arrays: conv(*arrays, form, EPS))(*arrays), expected(case, *arrays)
    assert found.dtype == jnp.bfloat16 and found.shape == wanted.shape
    assert distance(found.astype(jnp.float32), wanted) < (6e-3 if case.norm and twice else 3e-3)


def check_kernel(case: Case, interpret=None):
    config = hopper.Config(rows=case.rows, stages=case.stages, multiprocessors=2, interpret=interpret)
    check(case, functools.partial(hopper.conv, config=config), twice=case.out > hopper_plan.WIDEST)


@pytest.mark.parametrize("name", CASES)
def test_xla(name):
    check(CASES[name], xla.conv, twice=True)


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name, interpret):
    check_kernel(CASES[name], interpret)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name):
    check_kernel(CASES[name])


# Frames of the decoders of Wan and of LightVAE at 512x768, every width of theirs, and rows that end within a tile.
LAYERS = {
    "light, finest": Case(f=2, h=512, w=768, c=24, out=24, past=True, norm=True),
    "light, last": Case(f=1, h=512, w=768, c=24, out=3, past=True),
    "light": Case(f=2, h=256, w=384, c=48, out=48, past=True, residual=True),
    "light, up": Case(f=1, h=256, w=384, c=48, out=24, upsample=True),
    "wan, finest": Case(f=1, h=512, w=768, c=96, out=96, past=True, residual=True),
    "wan": Case(f=1, h=256, w=384, c=192, out=192, past=True, norm=True),
    "wan, coarse": Case(f=1, h=128, w=192, c=384, out=384, past=True, residual=True),
    "wan, up": Case(f=1, h=128, w=192, c=384, out=192, upsample=True),
    "480x832": Case(f=1, h=240, w=416, c=48, out=48, past=True, residual=True),
    "480x832, wan": Case(f=1, h=120, w=208, c=192, out=192, past=True, residual=True),
    "480x832, up": Case(f=1, h=240, w=416, c=48, out=24, upsample=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_decoders_compile_for_a_gpu(name):
    case = LAYERS[name]
    arrays = jax.eval_shape(functools.partial(arguments_of_zeros, case))
    form = Form(case.upsample, case.norm)
    config = hopper.Config(multiprocessors=mosaic.SXM)
    assert hopper.unfit(arrays[0], arrays[1], form) is None
    size = hopper.plan(arrays[0], arrays[1], form, case.residual, config)
    assert size.shared_bytes <= hopper_plan.SHARED
    text = jax.jit(lambda *a: hopper.conv(*a, form, EPS, config=config)).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert text.as_text().count("mosaic_gpu_v2") == 1


def arguments_of_zeros(case: Case):
    up, taps, image = 2 if case.upsample else 1, 3 if case.past else 1, (case.h, case.w)
    past = jnp.zeros((case.b, 2, *image, case.c), jnp.bfloat16) if case.past else None
    residual = jnp.zeros((case.b, case.f, up * case.h, up * case.w, case.out), jnp.bfloat16) if case.residual else None
    vector = jnp.zeros((case.out,), jnp.bfloat16)
    x, kernel = (jnp.zeros(shape, jnp.bfloat16) for shape in ((case.b, case.f, *image, case.c), (taps, 3, 3, case.c, case.out)))
    return x, kernel, vector, past, residual, vector if case.norm else None


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_decoders_on_a_gpu(name):
    case = LAYERS[name]
    arrays = arguments(case)
    form = Form(case.upsample, case.norm)
    wide = [None if a is None else a.astype(jnp.float32) for a in arrays]
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(jax.jit(lambda *a: xla.conv(*a, form, EPS))(*wide))
    found = jax.jit(lambda *a: hopper.conv(*a, form, EPS))(*arrays)
    assert distance(found.astype(jnp.float32), wanted) < 3e-3


@pytest.mark.parametrize("name", ["norm and residual", "after an upsampling"])
def test_gradients_are_those_of_xla(name, monkeypatch):
    """Also where another implementation would run, which needs none of its own."""
    case = CASES[name]
    arrays = arguments(case, "float32")
    form = Form(case.upsample, case.norm)
    other = api.Implementation(lambda *call: None, lambda *call: None, lambda *call: 2 * jax.lax.stop_gradient(xla.conv(*call)))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "hopper", other)

    def loss(run, *arrays):
        return jnp.sin(run(*arrays)).sum()

    def gradients(run):
        return jax.jit(jax.grad(functools.partial(loss, run), some))(*arrays)

    def public(x, kernel, bias, past, residual, scale):
        eps = None if scale is None else EPS
        return convolve(x, kernel, bias, past=past, residual=residual, scale=scale, eps=eps, upsample=case.upsample)

    np.testing.assert_array_equal(public(*arrays), 2 * xla.conv(*arrays, form, EPS))
    some = tuple(i for i, array in enumerate(arrays) if array is not None)
    for one, other in zip(gradients(public), gradients(lambda *a: xla.conv(*a, form, EPS)), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def shapes(h=512, w=768, c=24, out=24, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((1, 12, h, w, c), dtype), jax.ShapeDtypeStruct((3, 3, 3, c, out), dtype)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (shapes(), None),
        (shapes(dtype="float32"), "bfloat16, received float32"),
        (shapes(c=3), "8 input channels, received 3"),
        (shapes(w=100), "8 pixels, received 100"),
        (shapes(out=200), "at most 192 output channels"),
        (shapes(out=384), None),
    ],
)
def test_the_kernel_says_what_it_is_not_made_for(call, why):
    found = hopper.unfit(*call, Form(False, False))
    assert found is None if why is None else why in found
    if why is not None:
        with pytest.raises(NotImplementedError, match=why):
            hopper.conv(*call, None, None, None, None, Form(False, False), None)


def test_small_images_are_left_to_xla():
    assert hopper.slow(*shapes(), Form(False, False)) is None
    assert "of its tiles" in hopper.slow(*shapes(h=16, w=24), Form(False, False))
    assert hopper.slow(*shapes(w=416), Form(False, False)) is None


def test_layers_of_the_same_shapes_share_a_kernel():
    """One program for the GPU's compiler, called three times."""
    *arrays, _, _ = jax.eval_shape(functools.partial(arguments_of_zeros, LAYERS["light, finest"]))
    form = Form(False, False)

    def layers(x, kernel, bias, past):
        for _ in range(3):
            x = hopper.conv(x, kernel, bias, past, None, None, form, EPS, config=hopper.Config(multiprocessors=mosaic.SXM))
        return x

    text = jax.jit(layers).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1 and text.count("call @_run") == 3


def test_a_tile_has_many_rows_where_there_are_many_tiles():
    """Rows share what is copied, but a GPU that waits for its last tiles shares nothing."""

    def rows(channels, h, w):
        call = shapes(h, w, channels, channels)
        return hopper.plan(*call, Form(False, False), False, hopper.Config(multiprocessors=mosaic.SXM)).rows

    assert rows(96, 512, 768) == 8 and rows(192, 256, 384) == 4, "all that the registers hold"
    assert rows(96, 32, 48) < 8 and rows(24, 512, 768) > rows(24, 16, 64)
    with pytest.raises(ValueError, match="config.rows=64 and config.stages=None do not fit 24 channels"):
        hopper.plan(*shapes(), Form(False, False), False, hopper.Config(rows=64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 0}, "rows=0 must be at least 2"),
        ({"rows": 3}, "rows=3 must be a multiple of 2"),
        ({"stages": 1}, "stages=1 must be at least 2"),
        ({"multiprocessors": 0}, "multiprocessors=0 must be at least 1"),
    ],
)
def test_config_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        hopper.Config(**fields)


@pytest.mark.skipif(platform.device().nvidia, reason="of machines without an NVIDIA GPU")
def test_a_named_implementation_runs_or_raises():
    x, kernel, bias, past, *_ = arguments(CASES["norm and residual"])
    assert "compute capability 9.0" in explain(x, kernel)["hopper"] and explain(x, kernel)["xla"] is None
    with pytest.raises(NotImplementedError, match="compute capability 9.0"):
        convolve(x, kernel, bias, past=past, implementation="hopper")
    with pytest.raises(ValueError, match="'hoper' must be one of hopper, xla"):
        convolve(x, kernel, bias, past=past, implementation="hoper")
    one, other = (convolve(x, kernel, bias, past=past, implementation=name) for name in (None, "xla"))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.zeros((1, 3, 3, 8, 8))}, r"kernel.shape=.* must be \[3, side, side, 8, out\]"),
        ({"kernel": jnp.zeros((3, 5, 5, 8, 8))}, "with a side of 1 or 3"),
        ({"bias": jnp.zeros(9)}, r"bias must be \(8,\), received \(9,\)"),
        ({"residual": jnp.zeros((1, 2, 4, 8, 9))}, r"residual must be \(1, 2, 4, 8, 8\)"),
        ({"past": jnp.zeros((1, 1, 4, 8, 8))}, r"past must be \(1, 2, 4, 8, 8\), received \(1, 1, 4, 8, 8\)"),
        ({"eps": 1e-6}, "scale and eps go together"),
        ({"upsample": True}, "upsample goes without a past"),
        ({"x": jnp.zeros((2, 4, 8, 8))}, r"must be \[b, f, h, w, c\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    call = dict(x=jnp.zeros((1, 2, 4, 8, 8)), kernel=jnp.zeros((3, 3, 3, 8, 8)), bias=jnp.zeros(8))
    call |= {"past": jnp.zeros((1, 2, 4, 8, 8))} | change
    x, kernel, bias = (call.pop(name) for name in ("x", "kernel", "bias"))
    with pytest.raises(ValueError, match=message):
        convolve(x, kernel, bias, **call)
