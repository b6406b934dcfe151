"""Linear layers against a product in numpy: in XLA, in the Mosaic interpreter, and as they are on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.families import lightx2v_fp8
from pallas_kernels import platform
from pallas_kernels.linear import Quantised, api, explain, hopper, linear, quantise_rows, reach, xla
from pallas_kernels.linear.hopper_kernel import Config


@dataclasses.dataclass(frozen=True)
class Case:
    b: int = 1
    tokens: int = 200
    inputs: int = 256
    outputs: int = 192
    layers: int | None = None
    gelu: bool = False
    frames: int | None = None  # of a gate
    residual: bool = False
    quantise: bool = False
    plain: bool = False  # bfloat16 in place of float8
    turned: bool = False
    config: tuple = ()  # fields of the kernel's configuration; nothing: the kernel's choice

    def configured(self, **more):
        fields = {"tile": 128, "cluster": 1, "stages": 2, "multiprocessors": 2} | dict(self.config)
        return Config(**fields, **more) if self.config else None

    @property
    def fixed(self):
        form = {"turned": self.turned} if self.plain else {"dtype": jnp.dtype(jnp.bfloat16)}
        return {"activation": "gelu" if self.gelu else None, **form}

    def of(self, module):
        """The layer of that implementation."""
        return functools.partial(module.plain, sliced=None) if self.plain else module.linear


CASES = {
    "bias": Case(inputs=384, config=(("lead", 1),)),
    "bias, one layer of three, clusters": Case(tokens=300, layers=3, config=(("cluster", 2), ("multiprocessors", 4))),
    "GELU to float8": Case(b=2, tokens=100, gelu=True, quantise=True, config=(("tile", 64), ("buffers", 1), ("lead", 0))),
    "to float8, clusters, a block without tokens": Case(
        tokens=128, layers=2, quantise=True, config=(("tile", 96), ("cluster", 2))
    ),
    "residual": Case(b=2, tokens=65, residual=True, config=(("tile", 224), ("stages", 1), ("lead", 0))),
    "frames that end within tiles": Case(b=2, tokens=150, residual=True, frames=1, config=(("buffers", 2), ("lead", 1))),
    "frames that end with tiles": Case(tokens=256, outputs=64, residual=True, frames=2, config=(("tile", 64),)),
    "GELU, pieces that leave a rest of the buffers": Case(tokens=128, gelu=True, config=(("tile", 96), ("multiprocessors", 1))),
    "bfloat16, one layer of two, clusters": Case(
        plain=True, layers=2, tokens=300, inputs=320, config=(("cluster", 2), ("multiprocessors", 4))
    ),
    "bfloat16, turned, GELU": Case(plain=True, turned=True, gelu=True, layers=2, config=(("tile", 96), ("lead", 1))),
    "bfloat16, gate, narrow pieces of the weights": Case(
        plain=True, b=2, tokens=150, inputs=192, residual=True, frames=1, config=(("tile", 224), ("stages", 3))
    ),
    "bfloat16, residual, a bias shorter than a tile": Case(
        plain=True, tokens=65, residual=True, layers=3, config=(("tile", 160),)
    ),
}


@functools.cache
def arguments(case: Case):
    """(x, w, bias, layer) and the other arrays of a call by name."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    stack = () if case.layers is None else (case.layers,)
    x = normal(case.b, case.tokens, case.inputs) * jnp.exp(normal(case.b, case.tokens, 1))
    w = normal(*stack, case.outputs, case.inputs) * case.inputs**-0.5
    bias, whole = normal(*stack, case.outputs), (case.b, case.tokens, case.outputs)
    if case.plain:
        x, w, bias = (array.astype(jnp.bfloat16) for array in (x, w if case.turned else w.swapaxes(-1, -2), bias))
    else:
        x, w = quantise_rows(x), quantise_rows(w)
    rest = {
        "gate": normal(case.b, case.frames, case.outputs) if case.frames else None,
        "residual": normal(*whole).astype(jnp.bfloat16) if case.residual else None,
    } | ({} if case.plain else {"reach": reach(w, bias) if case.quantise else None})
    return (x, w, bias, None if case.layers is None else jnp.int32(case.layers - 1)), rest


def plain(q: Quantised | jax.Array) -> np.ndarray:
    if not isinstance(q, Quantised):
        return np.asarray(q, np.float64)
    return np.asarray(q.values, np.float64) * np.asarray(q.scale, np.float64)[..., None]


def expected(case: Case) -> np.ndarray:
    (x, w, bias, layer), rest = arguments(case)
    weights, bias = plain(w), np.asarray(bias, np.float64)
    if layer is not None:
        weights, bias = weights[int(layer)], bias[int(layer)]
    y = plain(x) @ (weights if case.plain and not case.turned else weights.T) + bias
    if case.gelu:
        y = 0.5 * y * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))
    if case.frames:
        y = y * np.repeat(np.asarray(rest["gate"], np.float64), case.tokens // case.frames, axis=1)
    return y + np.asarray(rest["residual"], np.float64) if case.residual else y


def check(case: Case, run, wanted: np.ndarray, rounding: float = 2.5e-3):
    """`rounding`: what bfloat16 costs at most, relative L2."""
    given, rest = arguments(case)
    out = jax.jit(functools.partial(run, **case.fixed))(*given, **rest)
    if not case.quantise:
        assert out.dtype == jnp.bfloat16 and out.shape == wanted.shape
        assert distance(out, wanted) <= rounding
        return
    assert out.values.dtype == jnp.float8_e4m3fn and out.values.shape == wanted.shape
    assert out.scale.dtype == jnp.float32 and out.scale.shape == wanted.shape[:-1]
    assert (np.abs(wanted).max(-1) <= 448 * np.asarray(out.scale)).all()
    assert distance(plain(out), wanted) <= 1.1 * distance(plain(quantise_rows(jnp.asarray(wanted, jnp.float32))), wanted)


def distance(got, wanted) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", CASES)
def test_xla(name):
    """Of bfloat16, every operation rounds what it returns."""
    case = CASES[name]
    check(case, case.of(xla), expected(case), rounding=4.5e-3 if case.plain else 2.5e-3)


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name, interpret):
    case = CASES[name]
    check(case, functools.partial(case.of(hopper), config=case.configured(interpret=interpret)), expected(case))


FULL_SIZE = {
    "4608 tokens": Case(tokens=4608, outputs=4608, inputs=1536, layers=30),
    "4680 tokens, GELU to float8": Case(tokens=4680, outputs=8960, inputs=1536, layers=30, gelu=True, quantise=True),
    "4680 tokens, residual": Case(tokens=4680, outputs=1536, inputs=1536, layers=30, residual=True),
    "4608 tokens, gate": Case(tokens=4608, outputs=1536, inputs=8960, layers=30, residual=True, frames=3),
    "4680 tokens, gate": Case(tokens=4680, outputs=1536, inputs=1536, layers=30, residual=True, frames=3),
    "4608 tokens, bfloat16, turned": Case(plain=True, turned=True, tokens=4608, outputs=4608, inputs=1536, layers=30),
    "4680 tokens, bfloat16, GELU": Case(plain=True, tokens=4680, outputs=8960, inputs=1536, layers=30, gelu=True),
    "4680 tokens, bfloat16, gate": Case(plain=True, tokens=4680, outputs=1536, inputs=8960, layers=30, residual=True, frames=3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", FULL_SIZE)
def test_on_the_gpu(name):
    """Against XLA, which is checked above. The tensor cores' sums of float8 products have about 14 bits."""
    case = dataclasses.replace(FULL_SIZE[name], layers=2)
    given, rest = arguments(case)
    exact = case.fixed if case.plain else case.fixed | {"dtype": jnp.dtype(jnp.float32)}
    wide = {key: None if key == "reach" or value is None else value.astype(jnp.float32) for key, value in rest.items()}
    first = jax.tree.map(lambda x: x.astype(jnp.float32), given[:1]) if case.plain else given[:1]
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(jax.jit(functools.partial(case.of(xla), **exact))(*first, *given[1:], **wide))
    for config in (None, Config(tile=96, cluster=1, lead=0), Config(tile=256, stages=3, buffers=1)):
        check(case, functools.partial(case.of(hopper), config=config), wanted, rounding=4e-3)


@pytest.mark.gpu
def test_small_sizes_on_the_gpu():
    for case in CASES.values():
        check(case, functools.partial(case.of(hopper), config=case.configured()), expected(case))


@pytest.mark.parametrize(
    "name", [*FULL_SIZE, "residual", "GELU, pieces that leave a rest of the buffers", "bfloat16, turned, GELU"]
)
def test_lowers_without_a_gpu_to_one_kernel(name):
    """Shared memory, shapes and layouts are checked on the way. Nothing is copied, unless rows do not come in eights."""
    case, array = (FULL_SIZE | CASES)[name], jax.ShapeDtypeStruct
    stack = () if case.layers is None else (case.layers,)

    def rows(*shape):
        if case.plain:
            return array(shape, jnp.bfloat16)
        return Quantised(array(shape, jnp.float8_e4m3fn), array(shape[:-1], jnp.float32))

    rest = {
        "gate": array((case.b, case.frames, case.outputs), jnp.float32) if case.frames else None,
        "residual": array((case.b, case.tokens, case.outputs), jnp.bfloat16) if case.residual else None,
    } | ({} if case.plain else {"reach": array((*stack, 2), jnp.float32) if case.quantise else None})
    order = (case.inputs, case.outputs) if case.plain and not case.turned else (case.outputs, case.inputs)
    weights, bias = rows(*stack, *order), array((*stack, case.outputs), jnp.bfloat16 if case.plain else jnp.float32)
    given = rows(case.b, case.tokens, case.inputs), weights, bias, array((), jnp.int32) if stack else None
    run = functools.partial(case.of(hopper), **case.fixed, config=case.configured())
    text = jax.jit(run).trace(*given, **rest).lower(lowering_platforms=("cuda",)).as_text()
    operations = {line.split("stablehlo.")[1].split()[0] for line in text.splitlines() if "stablehlo." in line}
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    padded = {"constant", "convert", "pad", "slice"} if case.b * case.tokens % 8 else set()
    assert operations <= {"custom_call", "reshape", "broadcast_in_dim"} | padded


@pytest.mark.parametrize(
    ("rows", "row_bytes", "outputs", "tile", "cluster"),
    [
        (4608, 8960, 1536, 224, 2),  # 252 tiles for 132 multiprocessors, where tiles of 256 are 216
        (4680, 1536, 1536, 224, 1),  # 259 fit two waves, pairs of them do not
        (4608, 1536, 4608, 256, 2),
        (512, 1536, 1536, 128, 2),  # small tiles, so that there are more
        (4608, 2 * 8960, 1536, 224, 2),  # bfloat16
    ],
)
def test_tiles_fill_the_waves(monkeypatch, rows, row_bytes, outputs, tile, cluster):
    monkeypatch.setattr(platform, "device", lambda: platform.Device("gpu", "NVIDIA H200", (9, 0), 1, 132))
    chosen = hopper.layout(rows, row_bytes, outputs)
    assert (chosen.tile, chosen.cluster, chosen.multiprocessors) == (tile, cluster, 132)


def test_rows_are_quantised_as_lightx2v_does():
    weights = np.random.default_rng(0).standard_normal((3, 64, 80)).astype(np.float32)
    weights[0, 3] = 0
    found = jax.jit(quantise_rows)(weights)
    number, scale = lightx2v_fp8.quantise(weights.reshape(-1, 80))
    np.testing.assert_allclose(found.scale.reshape(-1, 1), scale, rtol=2e-7)
    same = np.asarray(found.values).reshape(-1, 80) == number  # a rounding of the scale may turn a number at a tie
    assert same.mean() > 0.999 and not np.asarray(found.values[0, 3]).astype(np.float32).any()
    assert (np.abs(np.asarray(found.values, np.float32)).max(-1)[found.scale > 1e-6] == 448).all()


def test_the_reach_is_met_by_the_worst_row_and_never_exceeded():
    """Every activation at the end of the range, with the signs of the weights: the largest output there can be."""
    draw = np.random.default_rng(0)
    w, bias = quantise_rows(jnp.asarray(draw.standard_normal((64, 256)))), jnp.asarray(draw.standard_normal(64), jnp.float32)
    worst = jnp.where(w.values.astype(jnp.float32) < 0, -448.0, 448.0) * jnp.where(bias < 0, -1, 1)[:, None]
    x = Quantised(worst.astype(jnp.float8_e4m3fn), jnp.full(64, 0.01, jnp.float32))
    out = linear(x, w, bias, quantise=True, implementation="xla")
    most = np.abs(np.asarray(out.values, np.float32)).max()
    assert 0.9 * 448 < most <= 448 and np.isfinite(plain(out)).all()


def test_a_row_of_nothing_stays_nothing():
    x, w = quantise_rows(jnp.zeros((2, 64))), quantise_rows(jnp.zeros((64, 64)))
    out = linear(x, w, jnp.zeros(64), quantise=True, implementation="xla")
    assert not plain(out).any() and (out.scale > 0).all()


@pytest.mark.parametrize(("outlier", "loose", "cost"), [(1, 40, 2.75e-2), (30, 180, 2.75e-2), (100, 300, 2.75e-2)])
def test_a_bound_is_as_good_a_scale_as_the_row_itself(outlier, loose, cost):
    """Normalised activations, one channel of which is larger; GELU. `linear` quotes these figures."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((64, 1536))
    x[:, 7] *= outlier
    x, w = (quantise_rows(jnp.asarray(rows)) for rows in (x, draw.standard_normal((1024, 1536)) * 1536**-0.5))
    bias = jnp.asarray(0.3 * draw.standard_normal(1024), jnp.float32)
    call = functools.partial(linear, x, w, bias, activation="gelu", implementation="xla")
    exact, found = np.asarray(call(dtype=jnp.float32)), call(quantise=True)
    assert (448 * np.asarray(found.scale) / np.abs(exact).max(-1)).mean() <= loose
    own = distance(plain(quantise_rows(jnp.asarray(exact))), exact)
    assert 0.024 < own <= distance(plain(found), exact) <= min(cost, 1.05 * own)


def test_reach_is_computed_where_it_is_not_given():
    (x, w, bias, layer), _ = arguments(CASES["to float8, clusters, a block without tokens"])
    given, computed = (
        linear(x, w, bias, layer=layer, quantise=True, reach=known, implementation="xla") for known in (reach(w, bias), None)
    )
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, given, computed)))


def test_float32_comes_from_xla():
    case = CASES["bias"]
    (x, w, bias, _), _ = arguments(case)
    out = linear(x, w, bias, dtype=jnp.float32)
    assert out.dtype == jnp.float32 and distance(out, expected(case)) < 1e-6


def test_gradients_are_refused():
    (x, w, bias, _), _ = arguments(CASES["bias"])
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda bias: linear(x, w, bias, implementation="xla").astype(jnp.float32).sum())(bias)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        ((192, 64, None, None), "multiple of 128 inputs"),
        ((96, 64, None, jnp.bfloat16, jnp.bfloat16), "multiple of 64 inputs"),
        ((128, 100, None, None), "multiple of 64 outputs"),
        ((128, 64, 100, None), "128 tokens a frame"),
        ((128, 64, None, jnp.dtype("float32")), "not float32"),
        ((128, 64, None, jnp.float32, jnp.float32), "multiplies float8_e4m3fn or bfloat16, not float32"),
    ],
)
def test_what_the_kernel_is_not_made_for(monkeypatch, call, rule):
    monkeypatch.setattr(platform, "device", lambda: platform.Device("gpu", "NVIDIA H200", (9, 0), 1, 132))
    assert rule in explain(*call)["hopper"]
    assert explain(1536, 8960, 1560, jnp.dtype("bfloat16")) == {"hopper": None, "xla": None}
    assert explain(192, 8960, 1560, jnp.bfloat16, operands=jnp.bfloat16) == {"hopper": None, "xla": None}


@pytest.fixture
def ours(monkeypatch):
    """As on a Hopper GPU, where the kernel gives sevens."""

    def sevens(x, w, bias, layer, sliced, **rest):
        return jnp.full((*x.shape[:-1], w.shape[-1]), 7, x.dtype)

    monkeypatch.setitem(api.IMPLEMENTATIONS, "hopper", api.Implementation(lambda *call: None, None, sevens))


def stacked_layer(**given):
    (x, stack, biases, layer), _ = arguments(CASES["bfloat16, one layer of two, clusters"])
    mine = stack[layer], biases[layer]
    return lambda x, w, bias: linear(x, stack, biases, layer=layer, sliced=(w, bias), **given), (x, *mine)


def test_differentiated_it_is_xlas_in_value_and_gradient(ours):
    run, given = stacked_layer(activation="gelu")
    assert (run(*given) == 7).all()

    def wanted(x, w, bias):
        return jax.nn.gelu(x @ w + bias, approximate=True)

    for transform in (
        lambda f: lambda *a: (lambda out, pull: (out, pull(out)))(*jax.vjp(f, *a)),
        lambda f: lambda *a: jax.jvp(f, a, a),
    ):
        same = jax.tree.map(jnp.array_equal, jax.jit(transform(run))(*given), jax.jit(transform(wanted))(*given))
        assert all(jax.tree.leaves(same))


def test_a_named_kernel_has_no_gradient(ours):
    run, given = stacked_layer(implementation="hopper")
    with pytest.raises(NotImplementedError, match="leave the choice open"):
        jax.grad(lambda *a: run(*a).astype(jnp.float32).sum())(*given)


def test_a_stack_is_a_slice_of_it():
    run, (x, w, bias) = stacked_layer(implementation="xla")
    (_, stack, biases, layer), _ = arguments(CASES["bfloat16, one layer of two, clusters"])
    assert (run(x, w, bias) == linear(x, stack, biases, layer=layer, implementation="xla")).all()


def test_a_named_implementation_runs_or_raises():
    (x, w, bias, _), _ = arguments(CASES["bias"])
    if (platform.device().compute_capability or (0,))[0] != 9:
        with pytest.raises(NotImplementedError, match="compute capability 9.0"):
            linear(x, w, bias, implementation="hopper")
    wide = quantise_rows(jnp.ones((100, 256)))
    with pytest.raises(NotImplementedError, match="multiple of 64 outputs, received 100"):
        hopper.linear(x, wide, jnp.zeros(100), None, **dict.fromkeys(("activation", "gate", "residual", "reach")), dtype=None)
    assert list(api.IMPLEMENTATIONS) == ["hopper", "xla"]


x, w = quantise_rows(jnp.ones((1, 6, 64))), quantise_rows(jnp.ones((32, 64)))
bias, whole = jnp.zeros(32), jnp.zeros((1, 6, 32), jnp.bfloat16)
PLAIN = {"x": jnp.ones((1, 6, 64)), "w": jnp.ones((64, 32))}
STACKED = {"x": jnp.ones((1, 6, 64)), "w": jnp.ones((2, 64, 32)), "bias": jnp.ones((2, 32)), "layer": jnp.int32(0)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": quantise_rows(jnp.ones((6, 32)))}, r"x.shape=\(6, 32\) must be \[..., 64\]"),
        ({"x": Quantised(jnp.ones((6, 64)), jnp.ones(6))}, "x.values must be float8_e4m3fn, received float32"),
        ({"w": Quantised(w.values, w.scale.astype(jnp.bfloat16))}, "w.scale must be float32, received bfloat16"),
        ({"w": Quantised(w.values, w.scale[:, None])}, r"w.scale.shape=\(32, 1\) must be \(32,\)"),
        ({"layer": jnp.int32(0)}, r"must be \[layer, out, in\] with layer"),
        ({"bias": jnp.zeros(64)}, r"bias.shape=\(64,\) must be \(32,\)"),
        ({"activation": "relu"}, "activation='relu' must be one of None, 'gelu'"),
        ({"dtype": jnp.float16}, "dtype=float16 must be bfloat16 or float32"),
        ({"residual": whole[:, :5]}, r"residual.shape=\(1, 5, 32\) must be \(1, 6, 32\)"),
        ({"residual": whole.astype(jnp.float32)}, "residual.dtype"),
        ({"residual": whole, "quantise": True}, "quantise=True goes without a residual"),
        ({"residual": whole, "activation": "gelu"}, "activation='gelu' goes without a residual"),
        ({"gate": jnp.ones((1, 2, 32))}, "gate goes with a residual"),
        ({"gate": jnp.ones((1, 4, 32)), "residual": whole}, r"gate.shape=\(1, 4, 32\) must be \[1, f, 32\]"),
        ({"reach": jnp.ones(2)}, "reach goes with quantise=True"),
        ({"reach": jnp.ones(3), "quantise": True}, r"reach must be float32 \(2,\), received float32 \(3,\)"),
        ({"x": jnp.ones((1, 6, 64))}, "x and w must both be Quantised or neither"),
        ({"turned": True}, "turned and sliced go with plain arrays"),
        (PLAIN | {"quantise": True}, "quantise=True goes with float8"),
        (PLAIN | {"dtype": jnp.bfloat16}, "dtype=bfloat16 goes with float8: of plain x it is float32"),
        (PLAIN | {"turned": True}, r"x.shape=\(1, 6, 64\) must be \[..., 32\]"),
        (PLAIN | {"layer": jnp.int32(0)}, r"must be \[layer, in, out\] with layer"),
        (PLAIN | {"sliced": (jnp.ones((64, 32)), bias)}, "sliced goes with layer"),
        (STACKED | {"sliced": (jnp.ones((32, 64)), bias)}, r"sliced must be of \(64, 32\) and \(32,\), received \(\(32, 64\)"),
        ({"implementation": "triton"}, "implementation='triton' must be one of hopper, xla, or None"),
    ],
)
def test_calls_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        linear(**({"x": x, "w": w, "bias": bias} | wrong))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": 80}, "tile=80 must be a multiple of 32"),
        ({"tile": 288}, "at most 256"),
        ({"stages": 0}, "stages=0 must be at least 1"),
        ({"lead": -1}, "lead=-1 must be at least 0"),
        ({"cluster": 2, "multiprocessors": 1}, "cluster=2 must be at most multiprocessors=1"),
    ],
)
def test_config_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
