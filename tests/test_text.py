"""Tokenizer, UMT5 encoder and embedding files, without PyTorch."""

import dataclasses
import functools
import importlib.util
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from flax import nnx

from lf_jax import config, text
from lf_jax.text import umt5

PART = config.Text(vocab=512, dim=16, ffn_dim=24, heads=2, head_dim=8, layers=2, length=32, dtype="float32")
SENTENCE = "An old fisherman walks slowly through the rain at sunset."


@pytest.fixture(scope="module")
def tokenizer():
    return text.Tokenizer(text.tiny_model(), length=PART.length, vocab=PART.vocab)


def abstract(part):
    return jax.eval_shape(lambda key: text.UMT5(part, rngs=nnx.Rngs(key)), jax.random.key(0))


@functools.cache
def encoder(seed=0, part=PART):
    """Random weights by numpy: compiling the initialisers would take longer than the tests."""
    random = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(abstract(part))
    values = [
        random.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else np.ones(leaf.shape) for leaf in leaves
    ]
    return jax.tree.unflatten(tree, [jnp.asarray(x, leaf.dtype) for x, leaf in zip(values, leaves, strict=True)])


encode = jax.jit(text.encode)


def arrays(model):
    return {"embedding": model.token_embedding[...], "blocks.q": model.blocks.q.kernel[...], "norm": model.norm.scale[...]}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  a \n\t cat\u00a0walks  ", "a cat walks"),
        ("a cat &amp; a dog", "a cat & a dog"),
        ("1 &amp;lt; 2", "1 < 2"),  # needs both passes
        ("sch\u00c3\u00b6n", "sch\u00f6n"),  # UTF-8 read as Latin-1
        ("&nbsp;x&nbsp;", "x"),
        ("\u732b\u3000\u72ac", "\u732b \u72ac"),
        ("", ""),
    ],
)
def test_clean(prompt, expected):
    assert text.clean(prompt) == expected


def test_tokens_of_a_batch(tokenizer):
    ids, lengths = tokenizer([SENTENCE, "", "a cat"])
    assert ids.dtype == lengths.dtype == np.int32 and ids.shape == (3, PART.length)
    assert lengths.tolist() == [len(tokenizer.pieces(SENTENCE)) + 1, 1, len(tokenizer.pieces("a cat")) + 1]
    for row, length in zip(ids, lengths, strict=True):
        assert row[length - 1] == 1 and np.all(row[length:] == 0) and np.all(row[: length - 1] > 1)


def test_round_trip(tokenizer):
    ids, _ = tokenizer([f"  {SENTENCE}\n"])
    assert tokenizer.decode(ids[0]) == SENTENCE


def test_truncation_keeps_the_end_token(tokenizer):
    full = tokenizer.pieces("the rain and the wind " * 20)
    for length in (1, 2, PART.length, len(full), len(full) + 1):
        ids, lengths = text.Tokenizer(text.tiny_model(), length=length)(["the rain and the wind " * 20])
        assert ids[0].tolist() == [*full[: length - 1], 1] and lengths[0] == length


def test_unknown_characters_are_one_token_a_run(tokenizer):
    cat = tokenizer.pieces("a cat")
    assert tokenizer.pieces("a cat\u732b\u72ac\U0001f9a9") == [*cat, 3]
    assert tokenizer.pieces("a cat\u732b a cat\u72ac") == [*cat, 3, *cat, 3]


def test_source_is_a_path_or_bytes(tokenizer, tmp_path):
    (tmp_path / "spiece.model").write_bytes(tokenizer.model)
    for source in (tmp_path / "spiece.model", str(tmp_path / "spiece.model")):
        again = text.Tokenizer(source)
        assert again.vocab == 512 and again.length == 512 and again.model == tokenizer.model
        assert again.pieces(SENTENCE) == tokenizer.pieces(SENTENCE)


def test_tokenizer_errors(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="spiece.model"):
        text.Tokenizer(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match="no file"):
        text.Tokenizer(tmp_path)
    for content in (b"", b"not a model", tokenizer.model[:1000]):
        with pytest.raises(ValueError, match="is not a sentencepiece model"):
            text.Tokenizer(content)
    with pytest.raises(ValueError, match="Git LFS"):
        text.Tokenizer(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4548313\n")
    with pytest.raises(ValueError, match="has 512 pieces.*vocab=511"):
        text.Tokenizer(tokenizer.model, vocab=511)
    with pytest.raises(ValueError, match="length=0"):
        text.Tokenizer(tokenizer.model, length=0)
    for prompts in ([], "a cat"):
        with pytest.raises(ValueError, match="must be a list of at least one prompt"):
            tokenizer(prompts)


def test_tiny_model_is_what_its_script_trains(tokenizer):
    path = pathlib.Path(__file__).parent.parent / "tools" / "make_tiny_tokenizer.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    trained = text.Tokenizer(tool.train())
    assert trained.pieces(" ".join(tool.ACTIONS)) == tokenizer.pieces(" ".join(tool.ACTIONS))
    assert len(text.tiny_model()) < 30_000
    assert all(tokenizer.decode(tokenizer.pieces(sentence)) == sentence for sentence in tool.sentences()[::97])


def test_ids_must_be_those_of_umt5():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat walks", "a dog runs"]), model_writer=model, vocab_size=17, minloglevel=2
    )
    with pytest.raises(ValueError, match="pad and end ids"):
        text.Tokenizer(model.getvalue())


def test_position_buckets_by_hand():
    table = umt5.position_buckets(300, 32, 128)
    assert table[5, 5] == 0
    assert table[10, :10].tolist() == [8, 8, 8, 7, 6, 5, 4, 3, 2, 1]  # 8..11 share a bucket
    assert table[0, [1, 7, 8, 11, 12, 15, 16]].tolist() == [17, 23, 24, 24, 25, 25, 26]
    assert table[0, [22, 23, 32, 64, 90, 91, 128, 299]].tolist() == [26, 27, 28, 30, 30, 31, 31, 31]
    assert table[299, [0, 299 - 91, 299 - 90]].tolist() == [15, 15, 14]


def test_encoder_equals_a_plain_loop(tokenizer):
    """Against the formulas, one head and one query at a time, in float64."""
    model = encoder()
    ids, lengths = tokenizer(["a red fox", SENTENCE])
    out = encode(model, jnp.asarray(ids), jnp.asarray(lengths))
    buckets = umt5.position_buckets(PART.length, PART.buckets, PART.max_distance)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + PART.eps) * scale

    for row, length, tokens in zip(out, lengths, ids, strict=True):
        x = np.asarray(model.token_embedding[...], np.float64)[tokens[:length]]
        for layer in range(PART.layers):
            w = jax.tree.map(lambda a, layer=layer: np.asarray(a[layer], np.float64), nnx.to_pure_dict(nnx.state(model.blocks)))
            y = norm(x, w["attention_norm"]["scale"])
            heads = []
            for h in range(PART.heads):
                cut = slice(h * PART.head_dim, (h + 1) * PART.head_dim)
                q, k, v = (y @ w[name]["kernel"][:, cut] for name in "qkv")
                scores = q @ k.T + w["position_bias"][buckets[:length, :length], h]
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                heads.append(weights / weights.sum(-1, keepdims=True) @ v)
            x = x + np.concatenate(heads, -1) @ w["o"]["kernel"]
            y = norm(x, w["ffn_norm"]["scale"])
            gate = y @ w["gate"]["kernel"]
            gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            x = x + (gelu * (y @ w["up"]["kernel"])) @ w["down"]["kernel"]
        np.testing.assert_allclose(row[:length], norm(x, np.asarray(model.norm.scale[...])), rtol=2e-5, atol=2e-5)
        assert np.all(np.asarray(row[length:]) == 0)


def test_padding_changes_nothing(tokenizer):
    model = encoder()
    prompts = ["a cat", SENTENCE, ""]
    together = encode(model, *map(jnp.asarray, tokenizer(prompts)))
    for row, prompt in zip(together, prompts, strict=True):
        alone = encode(model, *map(jnp.asarray, tokenizer([prompt])))[0]
        short = text.Tokenizer(tokenizer.model, length=len(tokenizer.pieces(prompt)) + 1)
        unpadded = encode(model, *map(jnp.asarray, short([prompt])))[0]
        np.testing.assert_allclose(row, alone, atol=1e-5)
        np.testing.assert_allclose(row[: len(unpadded)], unpadded, atol=1e-5)
        assert np.any(np.asarray(unpadded[-1]) != 0) and np.all(np.asarray(row[len(unpadded) :]) == 0)


def test_one_trace_for_all_lengths(tokenizer):
    traces = []

    @jax.jit
    def counted(model, ids, lengths):
        traces.append(ids.shape)
        return text.encode(model, ids, lengths)

    for seed, prompt in enumerate(["a cat", SENTENCE, ""]):
        counted(encoder(seed), *map(jnp.asarray, tokenizer([prompt])))
    assert traces == [(1, PART.length)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tokenizer, dtype):
    inputs = [jnp.asarray(part) for part in tokenizer([SENTENCE])]
    full, half = encoder(), encoder(part=dataclasses.replace(PART, dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(dtype)}
    out = encode(half, *inputs)
    assert out.dtype == jnp.dtype(dtype)
    error = jnp.linalg.norm(out.astype(jnp.float32) - encode(full, *inputs)) / jnp.linalg.norm(out.astype(jnp.float32))
    assert error < (3e-2 if dtype == "bfloat16" else 4e-3)


def test_float16_overflow_is_cut_off(tokenizer):
    model = encoder(part=dataclasses.replace(PART, dtype="float16"))
    model = jax.tree.map(lambda leaf: leaf * 1000 if leaf.shape[1:] == (PART.ffn_dim, PART.dim) else leaf, model)
    out = encode(model, *map(jnp.asarray, tokenizer([SENTENCE])))
    assert np.all(np.isfinite(np.asarray(out)))


def test_full_size_by_shapes():
    part = config.Text()
    model = abstract(part)
    leaves = jax.tree.leaves(model)
    assert sum(leaf.size for leaf in leaves) == 5_680_910_336 and {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 512), (2,)))
    out = jax.eval_shape(text.encode, model, ids, lengths)
    assert out.shape == (2, 512, 4096) and out.dtype == jnp.bfloat16


def embeddings(dtype="bfloat16", **changes):
    values = jnp.arange(2 * 4 * 8, dtype=dtype).reshape(2, 4, 8)
    fields = {"values": np.asarray(values), "lengths": np.array([2, 4]), "prompts": ("a \u732b", 'b "x"\n'), "encoder": "ab12"}
    return text.Embeddings(**{**fields, **changes})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_embeddings_file(tmp_path, dtype):
    made = embeddings(dtype)
    for _ in range(2):  # the second replaces the first
        text.save_embeddings(tmp_path / "e.safetensors", made)
    read = text.load_embeddings(str(tmp_path / "e.safetensors"), encoder="ab12")
    assert read.values.dtype == made.values.dtype and np.array_equal(read.values, made.values)
    assert read.lengths.tolist() == [2, 4] and (read.prompts, read.encoder) == (made.prompts, made.encoder)
    assert text.load_embeddings(tmp_path / "e.safetensors").encoder == "ab12"
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


def test_embeddings_are_chosen_by_prompt():
    made = embeddings()
    chosen = made.select(['b "x"\n', "a \u732b", 'b "x"\n'])
    assert np.array_equal(chosen, made.values[[1, 0, 1]])
    with pytest.raises(ValueError, match=r"not among the 2 encoded prompts: \['c'\]"):
        made.select(["a \u732b", "c"])


def test_embeddings_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        text.load_embeddings(tmp_path / "none")
    path = tmp_path / "e.safetensors"
    text.save_embeddings(path, embeddings())
    with pytest.raises(ValueError, match="made by encoder ab12, not by cd34"):
        text.load_embeddings(path, encoder="cd34")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        text.load_embeddings(path)
    safetensors.numpy.save_file({"embeddings": np.zeros((1, 2, 3), np.float32)}, path)
    with pytest.raises(ValueError, match="format None"):
        text.load_embeddings(path)
    with pytest.raises(OSError):
        text.save_embeddings(tmp_path / "nowhere" / "e.safetensors", embeddings())
    with pytest.raises(ValueError, match=r"must be \[b, n, dim\]"):
        embeddings(values=np.zeros((2, 4)))
    with pytest.raises(ValueError, match="2 embeddings need as many prompts"):
        embeddings(prompts=("a",))
    for lengths in ([0, 4], [2, 5]):
        with pytest.raises(ValueError, match=r"must lie in \[1, 4\]"):
            embeddings(lengths=np.array(lengths))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "e.safetensors"
    text.save_embeddings(path, embeddings())
    before = path.read_bytes()

    def full_disk(self, target):
        raise OSError("no space")

    monkeypatch.setattr(pathlib.Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        text.save_embeddings(path, embeddings(encoder="cd34"))
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["e.safetensors"]


def test_fingerprint(tokenizer, tmp_path):
    model = encoder()
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({name: np.asarray(array) for name, array in arrays(model).items()}, path)
    mark = text.fingerprint(PART, tokenizer.model, arrays(model))
    assert mark == text.fingerprint(PART, tokenizer.model, path) == text.fingerprint(PART, tokenizer.model, arrays(encoder()))
    others = {
        text.fingerprint(PART, tokenizer.model, arrays(encoder(1))),
        text.fingerprint(PART, tokenizer.model + b"x", arrays(model)),
        text.fingerprint(dataclasses.replace(PART, length=20), tokenizer.model, arrays(model)),
        text.fingerprint(PART, tokenizer.model, {k: v for k, v in arrays(model).items() if k != "norm"}),
    }
    assert len(others | {mark}) == 5
    half = dataclasses.replace(PART, dtype="bfloat16")
    rounded = {name: array.astype(jnp.bfloat16) for name, array in arrays(model).items()}
    assert text.fingerprint(half, tokenizer.model, rounded) == text.fingerprint(half, tokenizer.model, path)
