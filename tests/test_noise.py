"""The seed contract: bitwise the same noise for any batch, order and length."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import noise

SHAPE = (3, 4, 6, 2)
PROMPTS = ["a cat", "ein Hund", "一只猫", ""]


def keys(prompts, seed=0):
    return jnp.stack([noise.sample_key(seed, p) for p in prompts])


def test_hash_does_not_depend_on_the_process():
    assert noise.prompt_hash("a cat") == int(hashlib.sha256(b"a cat").hexdigest()[:8], 16) == 0x51E46741
    assert noise.prompt_hash("一只猫") == int(hashlib.sha256("一只猫".encode()).hexdigest()[:8], 16)
    assert len({noise.prompt_hash(p) for p in PROMPTS}) == len(PROMPTS)


def test_the_formula_is_the_documented_one():
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), jnp.uint32(noise.prompt_hash("a cat"))), 2)
    got = noise.chunk_noise(keys(["a cat"], 7), 2, SHAPE)
    np.testing.assert_array_equal(got[0], jax.random.normal(key, SHAPE))
    again = noise.step_noise(keys(["a cat"], 7), 2, 1, SHAPE)
    np.testing.assert_array_equal(again[0], jax.random.normal(jax.random.fold_in(key, 1), SHAPE))
    assert got.dtype == again.dtype == jnp.float32


def test_batch_and_order_do_not_matter():
    whole = noise.chunk_noise(keys(PROMPTS), 5, SHAPE)
    alone = jnp.concatenate([noise.chunk_noise(keys([p]), 5, SHAPE) for p in PROMPTS])
    turned = noise.chunk_noise(keys(PROMPTS[::-1]), 5, SHAPE)[::-1]
    np.testing.assert_array_equal(whole, alone)
    np.testing.assert_array_equal(whole, turned)
    jitted = jax.jit(noise.chunk_noise, static_argnums=2)(keys(PROMPTS), jnp.int32(5), SHAPE)  # a traced chunk, as in a scan
    np.testing.assert_array_equal(whole, jitted)


def test_a_longer_video_starts_with_a_shorter_one():
    k = keys(PROMPTS[:2])
    short, long = (noise.video_noise(k, 0, (1,) + (3,) * n, SHAPE[1:]) for n in (2, 5))
    np.testing.assert_array_equal(long[:, :7], short)
    np.testing.assert_array_equal(long[:, 7:], noise.video_noise(k, 3, (3, 3, 3), SHAPE[1:]))  # and goes on where it stopped
    assert long.shape == (2, 16, *SHAPE[1:])


def test_everything_it_depends_on_changes_it():
    draws = [
        noise.chunk_noise(keys(["a cat"], 0), 0, SHAPE),
        noise.chunk_noise(keys(["a cat"], 1), 0, SHAPE),
        noise.chunk_noise(keys(["a dog"], 0), 0, SHAPE),
        noise.chunk_noise(keys(["a cat"], 0), 1, SHAPE),
        noise.step_noise(keys(["a cat"], 0), 0, 0, SHAPE),
        noise.step_noise(keys(["a cat"], 0), 0, 1, SHAPE),
        noise.step_noise(keys(["a cat"], 0), 1, 0, SHAPE),
    ]
    for i, a in enumerate(draws):
        assert abs(float(a.std()) - 1) < 0.15
        for b in draws[:i]:
            assert abs(float(jnp.corrcoef(a.ravel(), b.ravel())[0, 1])) < 0.3
