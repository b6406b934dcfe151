"""The UMT5 encoder against transformers' `UMT5EncoderModel`, with random weights through the conversion tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import convert, rules
from convert.families import hf_umt5, umt5
from lf_jax import checkpoint, config, text
from lf_jax.text.umt5 import position_buckets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

PROMPTS = ["a red fox", "", "An old fisherman walks slowly through the rain at sunset. Film grain.", "the rain and " * 40]
LENGTH = 96
SETTINGS = {"feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 40, "layer_norm_epsilon": 1e-5}


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 16}
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=512, **sizes, **SETTINGS)).eval()
    with torch.no_grad():  # away from the initial ones and from saturated attention
        for name, parameter in model.named_parameters():
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter) if "norm" in name else 0.4 * torch.randn_like(parameter))
    return model


def test_equals_transformers(original, tmp_path):
    original.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "text_encoder" / "spiece.model").write_bytes(text.tiny_model())
    convert("hf_umt5", tmp_path / "text_encoder", tmp_path / "converted")
    part, model = checkpoint.load_component(tmp_path / "converted", "text")
    assert (part.max_distance, part.eps, part.buckets, part.layers, part.dtype) == (40, 1e-5, 16, 3, "float32")
    ids, lengths = text.Tokenizer(tmp_path / "converted" / "text" / "spiece.model", length=LENGTH)(PROMPTS)
    assert lengths[1] == 1 and lengths[3] == LENGTH
    live = np.arange(LENGTH) < lengths[:, None]
    with torch.no_grad():
        expected = original(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(live).long()).last_hidden_state
    out = np.asarray(jax.jit(text.encode)(model, jnp.asarray(ids), jnp.asarray(lengths)))
    for row, wanted, length in zip(out, expected.numpy(), lengths, strict=True):
        error = np.linalg.norm(row[:length] - wanted[:length]) / np.linalg.norm(wanted[:length])
        assert error < 1e-5, f"{length} tokens: {error}"
        assert np.all(row[length:] == 0)


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 40)])
def test_position_buckets(buckets, max_distance):
    attention = transformers.models.umt5.modeling_umt5.UMT5Attention(
        transformers.UMT5Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance)
    )
    relative = torch.arange(301)[None] - torch.arange(301)[:, None]
    expected = attention._relative_position_bucket(relative)
    assert np.array_equal(position_buckets(301, buckets, max_distance), expected.numpy())


def original_names(state, layers):
    """The same weights as Wan-AI's file names them."""
    names = {
        "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2", "layer.0.SelfAttention.relative_attention_bias":
        "pos_embedding.embedding", "layer.1.DenseReluDense.wi_0": "ffn.gate.0", "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2", **{f"layer.0.SelfAttention.{p}": f"attn.{p}" for p in "qkvo"},
    }  # fmt: skip
    renamed = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for layer in range(layers):
        for theirs, ours in names.items():
            renamed[f"blocks.{layer}.{ours}.weight"] = state[f"encoder.block.{layer}.{theirs}.weight"]
    return renamed


def test_every_naming_gives_the_same_model(original, tmp_path):
    state = original.state_dict()
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= set(state)
    without = [{name: tensor for name, tensor in state.items() if name != left} for left in hf_umt5.EMBEDDINGS]
    sources = [("hf_umt5", state), ("hf_umt5", without[0]), ("hf_umt5", without[1]), ("umt5", original_names(state, 3))]
    received = []
    for i, (family, tensors) in enumerate(sources):
        torch.save(tensors, tmp_path / f"{i}.pth")
        convert(family, tmp_path / f"{i}.pth", tmp_path / str(i))
        received.append(jax.tree.leaves(checkpoint.load_component(tmp_path / str(i), "text")[1]))
    for leaves in received[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(received[0], leaves, strict=True))


def full_size():
    layer = {
        "norm1": (4096,), "norm2": (4096,), "attn.q": (4096, 4096), "attn.k": (4096, 4096), "attn.v": (4096, 4096),
        "attn.o": (4096, 4096), "ffn.gate.0": (10240, 4096), "ffn.fc1": (10240, 4096), "ffn.fc2": (4096, 10240),
        "pos_embedding.embedding": (32, 64),
    }  # fmt: skip
    blocks = {f"blocks.{i}.{name}.weight": shape for i in range(24) for name, shape in layer.items()}
    return {"token_embedding.weight": (256384, 4096), **blocks, "norm.weight": (4096,)}


def test_full_size_names_match_one_to_one():
    source = full_size()
    assert len(source) == 242 and sum(np.prod(shape) for shape in source.values()) == 5_680_910_336
    part = umt5.describe(source)
    assert part == config.Text()
    shapes = checkpoint.shapes(part)
    pieces = rules.plan(umt5.rules(part), source, shapes)
    assert {piece.source: piece.shape for piece in pieces} == source and len(pieces) == 242
    assert {(piece.source, piece.target, piece.index) for piece in rules.pieces_of(umt5.rules(part), shapes)} == {
        (piece.source, piece.target, piece.index) for piece in pieces
    }
    theirs = {piece.source: piece.shape for piece in rules.pieces_of(hf_umt5.rules(part), shapes)}
    assert len(theirs) == 242 and "encoder.embed_tokens.weight" not in theirs
    assert hf_umt5.describe(theirs) == part and len(rules.plan(hf_umt5.rules(part), theirs, shapes)) == 242


def test_what_is_no_umt5_encoder():
    source = full_size()
    with pytest.raises(ValueError, match=r"missing token_embedding.weight, .*blocks.0.attn.q.weight"):
        umt5.describe({"head.head.weight": (64, 1536)})
    with pytest.raises(ValueError, match="missing shared.weight"):
        hf_umt5.describe(source)
    with pytest.raises(ValueError, match="64 heads .* cannot share"):
        umt5.describe({**source, "blocks.0.attn.q.weight": (4095, 4096)})
    with pytest.raises(ValueError, match="feed_forward_proj='relu'"):
        hf_umt5.describe(source, {"feed_forward_proj": "relu"})
    with pytest.raises(rules.ConversionError) as error:
        rules.plan(umt5.rules(config.Text()), {**source, "blocks.24.norm1.weight": (4096,)}, checkpoint.shapes(config.Text()))
    assert list(error.value.faults) == ["unknown names in the source"]
