"""Every preset loads, fits its own frame count, and has the numbers that its source publishes."""

import jaxtyping
import numpy as np
import pytest

from lf_jax import plan, presets, tokens
from lf_jax.checkpoint import component
from lf_jax.config import Config, Video

NUMBERS = {  # preset: tokens a frame, chunks, latent frames
    "tiny": (24, 7, 21),
    "self_forcing_1_3b": (1560, 7, 21),
    "self_forcing_14b": (1560, 7, 21),
    "longlive_1_3b": (1560, 40, 120),
    "light_forcing_1_3b": (1536, 7, 21),
    "light_forcing_1_3b_dmd": (1536, 7, 21),
    "light_forcing_hopper": (1536, 7, 21),
    "light_forcing_long_1_3b": (1536, 21, 63),
    "wan_1_3b": (1560, 1, 21),
    "wan_14b": (3600, 1, 21),
    "world": (96, 7, 21),
    "world_vae_short": (96, 7, 21),
    "world_vae": (96, 7, 21),
    "world_stills": (96, 1, 21),
    "world_clips": (96, 1, 21),
    "world_teacher": (96, 1, 21),
    "world_causal": (96, 7, 21),
    "world_dmd": (96, 7, 21),
    "world_light_forcing": (96, 7, 21),
}


def test_every_preset_is_known():
    assert set(presets.names()) == set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_preset(name):
    config = presets.load(name)
    hash(config)  # a static argument of jit
    frames = tokens.latent_frames(config.video.num_frames, config.vae.temporal_stride)
    lengths = tokens.chunk_lengths(frames, config.rollout.chunk_frames, config.rollout.independent_first_frame)
    assert (tokens.Grid.of(config).frame_tokens, len(lengths), frames) == NUMBERS[name]


@pytest.mark.parametrize("name, parameters", [("self_forcing_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)])
def test_parameter_counts_are_those_of_the_released_files(name, parameters):
    assert plan.count(component.abstract(presets.load(name).model)) == parameters


def test_a_users_own_file_loads_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom lf_jax import presets\nfrom lf_jax.config import Rollout\n"
        "CONFIG = dataclasses.replace(presets.load('tiny'), rollout=Rollout(shift=8.0))\n"
    )
    config = presets.load("mine.py")
    assert isinstance(config, Config) and config.rollout.shift == 8.0 and config.model == presets.load("tiny").model


@pytest.mark.parametrize("field", ["height", "width", "num_frames", "fps"])
def test_sizes_are_whole_numbers(field, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it: the tests' own hook would be first
    with pytest.raises(ValueError, match=f"{field}=33.0 must be an integer"):
        Video(**{field: 33.0})
    with pytest.raises(ValueError, match=f"{field}=0 must be positive"):
        Video(**{field: 0})
    assert getattr(Video(**{field: np.int64(32)}), field) == 32


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="'tinny' is neither a Python file nor a preset; the presets are .*tiny"):
        presets.load("tinny")
    with pytest.raises(ValueError, match="neither"):
        presets.load(tmp_path)
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="must set CONFIG to an lf_jax.config.Config, received NoneType"):
        presets.load(tmp_path / "empty.py")
