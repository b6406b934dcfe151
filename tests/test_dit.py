"""The transformer against a float64 numpy one, written here from the formulas and sharing no code with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lf_jax import cache, config
from lf_jax.dit import TextCache, WanDiT, forward, text_cache
from lf_jax.layers import sinusoid
from lf_jax.sparsity import Budget
from lf_jax.tokens import Grid
from pallas_kernels.linear import api, xla

TINY = config.Model(
    dim=24, ffn_dim=40, heads=2, layers=3, channels=4, freq_dim=16, text_dim=12, text_len=6, eps=1e-6, dtype="float32"
)
GRID = Grid(rows=2, columns=3, block_q=64, block_k=1)
DENSE = config.Sparsity()
BATCH, FRAMES, TEXT_ROWS = 2, 5, 4
step = jax.jit(forward, static_argnames=("grid", "sparsity"))
read_text = jax.jit(text_cache)
commit = jax.jit(cache.append, static_argnums=(2, 3))


def random_model(seed: int = 0, model: config.Model = TINY) -> WanDiT:
    """No bias is zero, no norm weight is one."""
    draw = np.random.default_rng(seed).normal
    paths, tree = jax.tree.flatten_with_path(jax.eval_shape(functools.partial(WanDiT, model), rngs=nnx.Rngs(0)))
    values = [0.2 * draw(size=x.shape) + ("scale" in jax.tree_util.keystr(path)) for path, x in paths]
    return jax.tree.unflatten(tree, [jnp.asarray(v, x.dtype) for v, (_, x) in zip(values, paths, strict=True)])


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH, FRAMES, 2 * GRID.rows, 2 * GRID.columns, TINY.channels))
    timestep, embeddings = rng.uniform(0, 1000, (BATCH, FRAMES)), rng.normal(size=(BATCH, TEXT_ROWS, TINY.text_dim))
    return jnp.float32(x), jnp.float32(timestep), jnp.float32(embeddings)


def empty_cache(model: config.Model = TINY) -> cache.KVCache:
    return cache.empty(model, GRID, config.Cache(), sparse=False, batch=BATCH, frames=FRAMES)


def in_chunks(dit: WanDiT, lengths: tuple[int, ...], run=step, sparsity=DENSE, grid=GRID, budget=None) -> jax.Array:
    """Chunk after chunk, each committed to the cache as it was seen."""
    x, timestep, embeddings = inputs()
    text, out, at = read_text(dit, embeddings), [], 0
    state = cache.empty(TINY, grid, config.Cache(), sparse=not sparsity.dense, batch=BATCH, frames=FRAMES)
    for n in lengths:
        now = slice(at, at + n)
        velocity, new = run(dit, x[:, now], timestep[:, now], text, state, budget, grid=grid, sparsity=sparsity)
        state, at = commit(state, new, n, n), at + n
        out.append(velocity)
    return jnp.concatenate(out, axis=1)


# ---- the same model in numpy, float64, all frames in one pass under a block-causal mask ----------------------------------


def parameters(dit: WanDiT) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(nnx.state(dit))}


def numpy_model(p: dict[str, np.ndarray], x, timestep, embeddings, lengths: tuple[int, ...]) -> np.ndarray:
    x, timestep, embeddings = (np.asarray(a, np.float64) for a in (x, timestep, embeddings))
    b, f, rows, columns, heads, dim = *timestep.shape, GRID.rows, GRID.columns, TINY.heads, TINY.dim
    frame = np.repeat(np.arange(f), rows * columns)

    def linear(name, y):
        return y @ p[name + ".kernel"] + p[name + ".bias"]

    def gelu(y):
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    def silu(y):
        return y / (1 + np.exp(-y))

    def norm(y):
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + TINY.eps)

    def rms(y, scale):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + TINY.eps) * scale

    def turn(y):  # pairs of a head as complex numbers: frames, rows and columns turn 2, 2 and 2 of them
        position = [frame, np.tile(np.repeat(np.arange(rows), columns), f), np.tile(np.arange(columns), f * rows)]
        turns = np.concatenate([n[:, None] * 10000.0 ** (-np.arange(2) / 2) for n in position], axis=-1)
        z = (y[..., 0::2] + 1j * y[..., 1::2]) * np.exp(1j * turns)[:, None]
        return np.stack([z.real, z.imag], axis=-1).reshape(y.shape)

    def attend(q, k, v, mask=None):
        logits = np.einsum("bthe,bshe->bhts", q, k) / np.sqrt(q.shape[-1])
        weight = np.exp(logits - logits.max(-1, keepdims=True)) * (1 if mask is None else mask)
        return np.einsum("bhts,bshe->bthe", weight / weight.sum(-1, keepdims=True), v).reshape(b, -1, dim)

    def split(y):
        return y.reshape(b, -1, heads, dim // heads)

    angle = timestep[..., None] * 10000.0 ** (-np.arange(TINY.freq_dim // 2) / (TINY.freq_dim // 2))
    time = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    time = linear("time_embedding.down", silu(linear("time_embedding.up", time)))
    six = linear("time_projection", silu(time)).reshape(b, f, 6, dim)
    text = np.zeros((b, TINY.text_len, TINY.text_dim))
    text[:, : embeddings.shape[1]] = embeddings
    text = linear("text_embedding.down", gelu(linear("text_embedding.up", text)))

    chunk = np.repeat(np.arange(len(lengths)), lengths)[frame]
    patches = x.reshape(b, f, rows, 2, columns, 2, -1).transpose(0, 1, 2, 4, 3, 5, 6)
    y = linear("patch_embedding", patches.reshape(b, f * rows * columns, -1))
    for i in range(TINY.layers):
        layer = {name.removeprefix("blocks."): a[i] for name, a in p.items() if name.startswith("blocks.")}
        p = p | {f"now.{name}": a for name, a in layer.items()}
        m = np.moveaxis((layer["modulation"] + six)[:, frame], 2, 0)
        h = norm(y) * (1 + m[1]) + m[0]
        q, k, v = (
            h @ kernel.T + bias
            for kernel, bias in zip(layer["self_attention.qkv.kernel"], layer["self_attention.qkv.bias"], strict=True)
        )
        q, k = (rms(each, layer[f"self_attention.norm_{n}.scale"]) for n, each in (("q", q), ("k", k)))
        h = attend(turn(split(q)), turn(split(k)), split(v), chunk[:, None] >= chunk)
        y = y + m[2] * linear("now.self_attention.o", h)
        h = norm(y) * layer["cross_norm.scale"] + layer["cross_norm.bias"]
        q = rms(linear("now.cross_attention.q", h), layer["cross_attention.norm_q.scale"])
        k = rms(linear("now.cross_attention.k", text), layer["cross_attention.norm_k.scale"])
        h = attend(split(q), split(k), split(linear("now.cross_attention.v", text)))
        y = y + linear("now.cross_attention.o", h)
        h = norm(y) * (1 + m[4]) + m[3]
        y = y + m[5] * linear("now.ffn.down", gelu(linear("now.ffn.up", h)))
    shift, scale = np.moveaxis((p["head.modulation"] + time[:, :, None])[:, frame], 2, 0)
    out = linear("head.linear", norm(y) * (1 + scale) + shift).reshape(b, f, rows, columns, 2, 2, -1)
    return out.transpose(0, 1, 2, 4, 3, 5, 6).reshape(x.shape)


def distance(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


# ---- values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5,), (1, 2, 2), (2, 2, 1)])
def test_cached_chunks_equal_one_block_causal_pass(lengths):
    dit = random_model()
    want = numpy_model(parameters(dit), *inputs(), lengths)
    assert distance(in_chunks(dit, lengths), want) < 1e-5
    other = numpy_model(parameters(dit), *inputs(), (3, 2))
    assert distance(other, want) > 1e-2  # the mask matters at this size


def test_block_sparse_attention_over_all_blocks_is_dense_attention():
    dit, blocks = random_model(), FRAMES * 2  # 6 tokens a frame: a key block of 4 and one of 2 live tokens
    sparse = in_chunks(
        dit,
        (3, 2),
        sparsity=config.Sparsity(policy="topk", block_q=4, block_k=4),
        grid=dataclasses.replace(GRID, block_q=4, block_k=4),
        budget=Budget(jnp.int32(blocks), width=blocks),
    )
    assert distance(sparse, numpy_model(parameters(dit), *inputs(), (3, 2))) < 1e-5


def test_gradient_equals_a_float64_difference():
    dit = random_model()
    leaves, tree = jax.tree.flatten(dit)
    draw = np.random.default_rng(7).normal
    direction = jax.tree.unflatten(tree, [jnp.float32(draw(size=x.shape)) for x in leaves])
    loss = jax.grad(lambda m: jnp.mean(jnp.square(in_chunks(m, (2, 3), run=forward))))
    grads = jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})(dit)  # compiles in half the time
    got = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    p, d, h = parameters(dit), parameters(direction), 1e-6
    up, down = (np.mean(numpy_model({n: p[n] + e * d[n] for n in p}, *inputs(), (2, 3)) ** 2) for e in (h, -h))
    np.testing.assert_allclose(got, (up - down) / (2 * h), rtol=1e-4)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_the_kernel_reads_stacks_and_gradients_go_to_slices(monkeypatch):
    """A slice handed to a kernel would be a copy, and every layer's gradient of a whole stack as large as the stack."""
    dit, (x, timestep, embeddings), seen = random_model(), inputs(), []

    def loss(dit, x):
        given = x[:, :2], timestep[:, :2], text_cache(dit, embeddings), empty_cache()
        return jnp.square(forward(dit, *given, None, grid=GRID, sparsity=DENSE)[0]).mean()

    def kernel(x, w, bias, layer, sliced, **rest):
        seen.append((w.shape[0], bias.shape[0], jnp.shape(layer)))
        return xla.plain(x, w, bias, layer, None, **rest)

    plain, wanted = jax.jit(loss)(dit, x), jax.jit(jax.grad(loss))(dit, x)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "hopper", api.Implementation(lambda *call: None, None, kernel))
    jax.clear_caches()
    np.testing.assert_allclose(jax.jit(loss)(dit, x), plain, rtol=1e-6)
    of_text, of_pass = 2, 6
    assert len(seen) == of_text + of_pass and set(seen) == {(TINY.layers, TINY.layers, ())}
    program = jax.make_jaxpr(jax.grad(loss))(dit, x)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(jax.grad(loss))(dit, x), wanted)
    whole = dit.blocks.ffn.up.kernel.shape
    assert f"f32[{TINY.layers},{','.join(map(str, whole))}]" not in str(program)
    jax.clear_caches()


def test_text_is_padded_with_zero_rows_that_count():
    dit, (x, timestep, embeddings) = random_model(), inputs()
    short = read_text(dit, embeddings)
    padded = read_text(dit, jnp.pad(embeddings, ((0, 0), (0, TINY.text_len - TEXT_ROWS), (0, 0))))
    jax.tree.map(np.testing.assert_array_equal, short, padded)
    assert short.k.shape == (TINY.layers, BATCH, TINY.text_len, TINY.heads, TINY.head_dim)
    prompt_only = TextCache(short.k[:, :, :TEXT_ROWS], short.v[:, :, :TEXT_ROWS])
    full, cut = (
        step(dit, x, timestep, text, empty_cache(), None, grid=GRID, sparsity=DENSE)[0] for text in (short, prompt_only)
    )
    assert distance(cut, np.asarray(full)) > 1e-3


def test_the_pass_only_reads_the_cache_and_returns_what_append_takes():
    dit, (x, timestep, embeddings) = random_model(), inputs()
    args = (x[:, :2], timestep[:, :2], read_text(dit, embeddings))
    _, new = step(dit, *args, empty_cache(), None, grid=GRID, sparsity=DENSE)
    assert new.k.shape == new.v.shape == (TINY.layers, BATCH, 2 * GRID.frame_tokens, TINY.heads, TINY.head_dim)
    state = commit(empty_cache(), new, 2, 2)
    before = jax.tree.map(np.array, state)
    step(dit, *args, state, None, grid=GRID, sparsity=DENSE)
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_bfloat16_stays_bfloat16_and_close():
    low = dataclasses.replace(TINY, dtype="bfloat16")
    half, state = random_model(model=low), empty_cache(low)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    values = [x.astype(jnp.float32) for x in jax.tree.leaves(half)]
    full = jax.tree.unflatten(jax.tree.structure(random_model()), values)
    x, timestep, embeddings = inputs()
    text = read_text(half, embeddings)
    velocity, new = step(half, x.astype(jnp.bfloat16), timestep, text, state, None, grid=GRID, sparsity=DENSE)
    assert {a.dtype for a in (velocity, new.k, new.v, text.k, text.v)} == {jnp.dtype("bfloat16")}
    kept, _ = jax.eval_shape(lambda: forward(half, x, timestep, text, state, None, grid=GRID, sparsity=DENSE))
    assert kept.dtype == jnp.float32  # latents kept in float32 get a float32 velocity
    want = in_chunks(full, (FRAMES,))
    assert distance(velocity, np.asarray(want)) < 3e-2


def test_sinusoid_is_exact_to_float32_at_every_timestep():
    t = np.array([0.0, 1.0, 625.0, 833.3333, 937.5, 1000.0], np.float32)
    angle = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    want = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    np.testing.assert_allclose(sinusoid(jnp.asarray(t), 256), want, atol=7e-5)  # half a unit in the last place of 1000


# ---- errors ----------------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_named():
    dit, (x, timestep, embeddings) = random_model(), inputs()
    with pytest.raises(ValueError, match="7 rows.*text_len=6"):
        text_cache(dit, jnp.zeros((1, 7, TINY.text_dim)))
    with pytest.raises(ValueError, match="13 wide.*text_dim=12"):
        text_cache(dit, jnp.zeros((1, 4, 13)))
    with pytest.raises(ValueError, match=r"\(4, 8\), expected \(4, 6\)"):
        wide = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 2), (0, 0)))
        forward(dit, wide, timestep, text_cache(dit, embeddings), empty_cache(), None, GRID, DENSE)


def test_initial_values_are_wans_but_for_the_head():
    dit = jax.jit(lambda: WanDiT(TINY, rngs=nnx.Rngs(0)))()
    qkv, ffn = dit.blocks.self_attention.qkv, dit.blocks.ffn.up
    for kernel in (qkv.kernel[...], ffn.kernel[...]):
        bound = np.sqrt(6 / sum(kernel.shape[-2:]))
        assert 0.95 * bound < float(jnp.abs(kernel).max()) <= bound
    every = qkv.kernel[...].reshape(-1, TINY.dim, TINY.dim)
    assert len(np.unique(every[:, 0, 0])) == 3 * TINY.layers  # every layer and each of the three its own
    for mlp in (dit.text_embedding, dit.time_embedding):
        assert 0.015 < float(jnp.std(mlp.down.kernel[...])) < 0.025
    assert float(jnp.std(dit.head.linear.kernel[...])) > 0.1  # a zero head would make all random models alike
    assert float(jnp.abs(qkv.bias[...]).max()) == 0 and float(dit.blocks.cross_norm.scale[...].min()) == 1


# ---- structure, and full size without memory ---------------------------------------------------------------------------------


def test_modules_hold_parameters_and_plain_numbers_only():
    dit = random_model()
    variables = jax.tree.leaves(dit, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert all(type(v) is nnx.Param for v in variables)
    for path, module in nnx.iter_graph(dit):
        for name, value in vars(module).items() if isinstance(module, nnx.Module) else ():
            plain = name.startswith("_") or isinstance(value, nnx.Module | nnx.Param | config.Model | int | float | None)
            assert plain, f"{path}: {name} = {value!r} may not compare by value, so that every model would compile anew"


def test_new_weights_do_not_compile_again():
    traces = []

    @functools.partial(jax.jit, static_argnames=("grid", "sparsity"))
    def run(*args, **settings):
        traces.append(args)
        return forward(*args, **settings)

    (x, timestep, embeddings), state = inputs(), empty_cache()
    for seed in range(3):
        dit = random_model(seed)
        _, new = run(dit, x[:, :1], timestep[:, :1], read_text(dit, embeddings), state, None, grid=GRID, sparsity=DENSE)
        state = commit(state, new, 1, 1)  # nor does another place in the video
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (config.Model(), 1_418_996_800),
        (config.Model(dim=5120, ffn_dim=13824, heads=40, layers=40), 14_288_491_584),
    ],
    ids=["1.3B", "14B"],
)
def test_full_size_has_the_released_number_of_parameters(model, count):
    dit = jax.eval_shape(functools.partial(WanDiT, model), rngs=nnx.Rngs(0))
    assert sum(x.size for x in jax.tree.leaves(dit)) == count
    assert {x.dtype for x in jax.tree.leaves(dit)} == {jnp.dtype("bfloat16")}


def test_full_size_traces_at_480x832():
    full = config.Config()
    model, grid = full.model, Grid.of(full)
    dit = jax.eval_shape(functools.partial(WanDiT, model), rngs=nnx.Rngs(0))
    state = jax.eval_shape(lambda: cache.empty(model, grid, full.cache, sparse=False, batch=1, frames=21))
    text = jax.eval_shape(text_cache, dit, jax.ShapeDtypeStruct((1, 77, model.text_dim), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((1, 3, 60, 104, model.channels), jnp.bfloat16)
    timestep = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    lowered = jax.jit(forward, static_argnames=("grid", "sparsity")).lower(
        dit, x, timestep, text, state, None, grid=grid, sparsity=full.sparsity
    )
    velocity, new = lowered.out_info
    assert (velocity.shape, velocity.dtype) == (x.shape, x.dtype)
    assert new.k.shape == (30, 1, 3 * 1560, 12, 128) and new.k.dtype == jnp.bfloat16
    names = lowered.as_text(debug_info=True)
    inside = (f"block/attention/{part}" for part in ("qkv", "norm_rope", "attend", "output"))
    assert all(scope in names for scope in ("embed/", *inside, "block/cross_attention", "block/ffn", "head/"))


def test_the_cache_is_never_copied():
    model = dataclasses.replace(TINY, layers=8)
    dit = jax.eval_shape(functools.partial(WanDiT, model), rngs=nnx.Rngs(0))
    state = jax.eval_shape(lambda: cache.empty(model, GRID, config.Cache(), sparse=False, batch=BATCH, frames=1000))
    text = jax.eval_shape(text_cache, dit, jax.ShapeDtypeStruct((BATCH, TEXT_ROWS, model.text_dim), jnp.float32))
    x, timestep, _ = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs())
    memory = step.lower(dit, x, timestep, text, state, None, grid=GRID, sparsity=DENSE).compile().memory_analysis()
    one_layer = 2 * state.k.size // model.layers * 4  # dense attention makes one layer's keys and values contiguous
    assert memory.temp_size_in_bytes < 4 * one_layer
