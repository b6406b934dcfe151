"""The autoencoders: chunks against wholes, states, sizes, streaming and errors. Parity with PyTorch is in tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lf_jax import vae as vaes
from lf_jax.config import Vae
from lf_jax.vae.layers import interleave
from pallas_kernels.conv.xla import conv3d, upsample

SMALL = dict(channels=4, mean=(0.5, -0.5, 0.2, 0.0), std=(2.0, 1.5, 0.5, 1.0), dtype="float32")
WAN = Vae(base=8, multipliers=(1, 1, 1), temporal=(True, True), res_blocks=1, **SMALL)
TINY = Vae(kind="tiny", widths=(8, 6, 4, 4), temporal=(True, True, False), **SMALL)
TAEHV = Vae(kind="tiny", temporal=(True, True, False))
PARTS = {"wan": WAN, "tiny": TINY}
SIZE = {"wan": (8, 12), "tiny": (16, 24)}  # of a video of 2 x 3 latent pixels


def compiled(function, **options):
    """Compiled in a hurry: most of a test is compilation."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


decode_chunk, encode_chunk = compiled(vaes.decode_chunk), compiled(vaes.encode_chunk)


@functools.cache
def build(part):
    """Random weights from numpy: drawing them in JAX is one compilation more for every shape."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: vaes.build(part, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    draw = [random.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1]))) for leaf in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, leaf.dtype) for x, leaf in zip(draw, leaves, strict=True)])


@pytest.fixture(params=PARTS)
def vae(request):
    return build(PARTS[request.param])


def latents(frames):
    return jax.random.normal(jax.random.key(1), (2, frames, 2, 3, 4))


def pixels(frames):
    return jax.random.uniform(jax.random.key(2), (2, frames, 16, 8, 3), minval=-1, maxval=1)


def in_chunks(step, vae, x, sizes):
    parts, state, at = [], None, 0
    for size in sizes:
        part, state = step(vae, x[:, at : at + size], state)
        parts.append(part)
        at += size
    assert at == x.shape[1]
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("space", [1, 3])
def test_taps_side_by_side_are_the_3d_convolution(space):
    x = jax.random.normal(jax.random.key(0), (2, 7, 5, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, space, space, 3, 6))
    pad = (space // 2, space // 2)
    want = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), ((0, 0), pad, pad), dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    np.testing.assert_allclose(conv3d([x[:, k : k + 5] for k in range(3)], kernel), want, rtol=1e-5, atol=1e-5)


def test_taps_are_summed_in_float32():
    frames, kernel = 3 * [jnp.ones((1, 1, 1, 1, 1), jnp.bfloat16)], jnp.array([256.0, 1.0, 1.0], jnp.bfloat16)
    assert conv3d(frames, kernel.reshape(3, 1, 1, 1, 1)).item() == 258  # bfloat16 would round 257 to 256, twice


def test_upsample_and_interleave_put_every_number_where_it_belongs():
    x = jnp.arange(2 * 2 * 3 * 4.0).reshape(1, 2, 2, 3, 4)
    np.testing.assert_array_equal(upsample(x), np.repeat(np.repeat(x, 2, axis=2), 2, axis=3))
    y = interleave(x, 2)
    np.testing.assert_array_equal(y[:, 0::2], x[..., :2])
    np.testing.assert_array_equal(y[:, 1::2], x[..., 2:])


def test_decoding_in_chunks_is_decoding_at_once(vae):
    z = latents(5)
    whole, _ = decode_chunk(vae, z)
    assert whole.shape == (2, 17, *SIZE[vae.config.kind], 3)
    assert whole.std() > 0.05 and whole.min() >= -1 and whole.max() <= 1
    np.testing.assert_allclose(in_chunks(decode_chunk, vae, z, [1] * 5), whole, atol=2e-5)
    streamed = compiled(vaes.decode, static_argnames="step")(vae, z, step=3)  # 2 frames, then 3
    np.testing.assert_allclose(streamed, whole, atol=2e-5)


def test_encoding_in_chunks_is_encoding_at_once(vae):
    first = 1 if vae.config.kind == "wan" else 4  # pixel frames of the first latent frame
    x = pixels(first + 8)
    whole, _ = encode_chunk(vae, x)
    assert whole.shape[:2] == (2, 3) and whole.std() > 0.02
    np.testing.assert_allclose(in_chunks(encode_chunk, vae, x, (first, 4, 4)), whole, atol=2e-5)


def test_encode_returns_one_frame_and_then_one_of_every_four(vae):
    x = pixels(9)
    whole = compiled(vaes.encode, static_argnames="step")(vae, x, step=2)
    padded = x if vae.config.kind == "wan" else jnp.concatenate([x] + 3 * [x[:, -1:]], axis=1)
    np.testing.assert_allclose(whole, encode_chunk(vae, padded)[0], atol=2e-5)


def test_decoding_is_causal(vae):
    """A latent frame reaches its own four pixel frames and later ones, none before."""
    z = latents(5)
    change = jnp.abs(decode_chunk(vae, z.at[:, 3].add(0.5))[0] - decode_chunk(vae, z)[0]).max(axis=(0, 2, 3, 4))
    assert change[:9].max() == 0 and change[9:13].min() > 0


def test_state_can_be_kept_forked_and_resumed(vae):
    z = latents(3)
    _, state = decode_chunk(vae, z[:, :1])
    leaves, tree = jax.tree.flatten(state)
    assert leaves and all(leaf.shape[1] in (1, 2) for leaf in leaves)
    kept = jax.tree.unflatten(tree, [np.asarray(leaf) for leaf in leaves])
    first, _ = decode_chunk(vae, z[:, 1:2], state)
    other, _ = decode_chunk(vae, z[:, 2:], state)
    again, _ = decode_chunk(vae, z[:, 1:2], kept)
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 1e-3


def test_state_keeps_its_shapes_so_that_one_compiled_step_serves_all_chunks(vae):
    _, state = jax.eval_shape(vaes.decode_chunk, vae, latents(1))
    _, later = jax.eval_shape(vaes.decode_chunk, vae, latents(3), state)
    assert jax.tree.structure(state) == jax.tree.structure(later)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(later)]


def test_memory_of_a_whole_decode_does_not_grow_with_the_video():
    def growth(function):
        short, long = (compiled(function).lower(build(TINY), latents(frames)).compile() for frames in (9, 17))
        return long.memory_analysis().temp_size_in_bytes - short.memory_analysis().temp_size_in_bytes

    video = 2 * 32 * 16 * 24 * 3 * 4  # of 8 latent frames more
    assert growth(vaes.decode) < 1.2 * video  # the pixels themselves
    assert growth(vaes.decode_chunk) > 2 * video


def test_scaled_networks_take_latents_that_are_not_normalised():
    plain, scaled = build(TINY), build(dataclasses.replace(TINY, scaled=True))
    mean, std = jnp.array(TINY.mean), jnp.array(TINY.std)
    z, x = latents(1), pixels(4)
    np.testing.assert_allclose(decode_chunk(scaled, z)[0], decode_chunk(plain, z * std + mean)[0], atol=1e-5)
    np.testing.assert_allclose(encode_chunk(scaled, x)[0] * std + mean, encode_chunk(plain, x)[0], atol=1e-5)


def test_bfloat16_stays_near_float32(vae):
    half = build(dataclasses.replace(vae.config, dtype="bfloat16"))  # the same weights, rounded
    video, state = decode_chunk(half, latents(1))
    assert video.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}
    want, _ = decode_chunk(vae, latents(1))
    assert jnp.linalg.norm(video.astype(jnp.float32) - want) < 0.05 * jnp.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("part", [Vae(), Vae(base=24)], ids=["wan", "light"])
def test_a_gpu_decodes_as_in_float32(part):
    """Large enough that the kernels of `pallas_kernels.conv` are chosen where there are some, and two chunks: with a past."""
    exact, half = build(dataclasses.replace(part, dtype="float32")), build(part)
    latents = jax.random.normal(jax.random.key(1), (1, 4, 32, 48, 16))
    want = in_chunks(jax.jit(vaes.decode_chunk), exact, latents, (1, 3))
    found = in_chunks(jax.jit(vaes.decode_chunk), half, latents, (1, 3)).astype(jnp.float32)
    assert jnp.linalg.norm(found - want) < 0.05 * jnp.linalg.norm(want)


@pytest.mark.parametrize(
    "part, tensors, parameters",
    [(Vae(), 194, 126_892_531), (Vae(base=24), 194, 8_035_003), (TAEHV, 128, 11_315_539)],
    ids=["wan", "light", "tiny"],
)
def test_full_size(part, tensors, parameters):
    """Sizes of the released checkpoints, and the shapes of 81 frames, without computing anything."""
    vae = jax.eval_shape(lambda: vaes.build(part, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(vae)
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (tensors, parameters)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    for height, width in ((480, 832), (512, 768)):
        video = jax.ShapeDtypeStruct((1, 81, height, width, 3), jnp.bfloat16)
        latents = jax.eval_shape(vaes.encode, vae, video)
        assert (latents.shape, latents.dtype) == ((1, 21, height // 8, width // 8, 16), jnp.bfloat16)
        back = jax.eval_shape(vaes.decode, vae, latents)
        assert (back.shape, back.dtype) == (video.shape, video.dtype)


def test_wrong_inputs_are_named(vae):
    def fails(text, function, *args):
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(function, vae, *args)

    fails(r"video has 8 frames; expected 4 n \+ 1", vaes.encode, jnp.zeros((1, 8, 16, 8, 3)))
    fails(r"video has 0 frames; expected 4 n \+ 1", vaes.encode, jnp.zeros((1, 0, 16, 8, 3)))
    fails("video is 16x10; both must be multiples of", vaes.encode, jnp.zeros((1, 1, 16, 10, 3)))
    fails("latents have 5 channels; this autoencoder has 4", vaes.decode, jnp.zeros((1, 1, 2, 2, 5)))
    fails("have no frames", vaes.decode_chunk, jnp.zeros((1, 0, 2, 3, 4)))
    fails("video has 5 frames; expected 4 n\n", vaes.encode_chunk, jnp.zeros((1, 5, 16, 8, 3)), vaes.VaeState(()))
    fails("video has 6 frames; expected 4 n", vaes.encode_chunk, jnp.zeros((1, 6, 16, 8, 3)))


def test_config_names_the_wrong_field():
    with pytest.raises(ValueError, match="temporal.*widths"):
        Vae(kind="tiny", widths=(8, 4, 4))
    with pytest.raises(ValueError, match="temporal.*multipliers"):
        Vae(multipliers=(1, 2))
