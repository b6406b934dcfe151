"""Programs are compiled before they are called, once, and a later process finds them."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import small

from lf_jax import cli, compilation, generate, programs
from pallas_kernels.linear import Quantised, hopper

HEAVY = {"jit_encode", "jit_text_cache", "jit_next_chunk", "jit_decode_pixels"}
CHILD = """
import pathlib, sys, jax
from lf_jax import cli

model, folder = sys.argv[1:]
cache = ["--compilation-cache", folder + "/cache"]

def run(*words):
    assert cli.main([*words, "--model", model, "--num-frames", "21", *cache]) == 0
    print(*sorted(file.name for file in pathlib.Path(folder, "cache").glob("*-cache")), flush=True)
    jax.clear_caches()  # as a new process starts

run("warmup", "--json")
run("sample", "--prompt", "one", "--output", folder + "/a")
run("sample", "--prompt", "two", "--output", folder + "/b")
run("warmup", "--json")
"""


def test_a_second_start_compiles_nothing(tmp_path):
    model = small.save(tmp_path / "model")
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true"}
    words = [sys.executable, "-c", CHILD, str(model), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(found) for found in re.findall(r"^\{.*?^\}", done.stdout, re.M | re.S)]
    warmed, sampled, again, rewarmed = (set(line.split()) for line in done.stdout.splitlines() if line.startswith("jit_"))
    assert [program["cached"] for program in reports[0]["programs"].values()] == [False] * 5
    assert [program["cached"] for program in reports[1]["programs"].values()] == [True] * 5
    assert {name.rsplit("-", 2)[0] for name in warmed} >= HEAVY
    assert not {name for name in sampled - warmed if name.rsplit("-", 2)[0] in HEAVY}, "what was compiled ahead is not called"
    assert sampled == again == rewarmed


def test_a_call_finds_what_was_compiled_ahead(caplog):
    config = dataclasses.replace(small.CONFIG, rollout=dataclasses.replace(small.CONFIG.rollout, shift=4.5))
    with programs.ahead(programs.of_videos(config, batch=2)) as built:
        pass
    assert not any(future.result().cached for future in built.values())
    with jax.log_compiles():
        small.pipe()(["one", "two"], rollout=config.rollout)
    compiled = re.findall(r"Finished XLA compilation of jit\((.+?)\)", caplog.text)
    assert compiled and not {f"jit_{name}" for name in compiled} & (HEAVY - {"jit_encode"})


def test_every_length_of_a_chunk_has_its_programs():
    rollout = dataclasses.replace(small.CONFIG.rollout, chunk_frames=4, independent_first_frame=True)
    video = dataclasses.replace(small.CONFIG.video, num_frames=33)
    names = list(programs.of_videos(dataclasses.replace(small.CONFIG, rollout=rollout, video=video)))
    decoders = ["decoder of the first 1", "decoder of 1", "decoder of 3"]
    assert names == ["text keys and values", "chunk of 1", "chunk of 4", *decoders]


@pytest.mark.parametrize(("frames", "parts"), [(1, (1,)), (3, (3,)), (4, (1, 3)), (8, (2, 3, 3))])
def test_the_decoder_takes_a_few_frames_at_a_time(frames, parts):
    assert generate.decode_lengths(frames) == parts


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel lowers without a GPU from jax 0.11 on")
def test_a_kernel_is_the_same_program_whoever_calls_it_and_whatever_was_lowered_before(monkeypatch):
    naming = compilation.mosaic_gpu_dialect.get_or_set_dump_options
    monkeypatch.setattr(compilation.mosaic_gpu_dialect, "get_or_set_dump_options", getattr(naming, "original", naming))
    limit = jax.config.jax_traceback_in_locations_limit
    try:
        jax.config.update("jax_traceback_in_locations_limit", 100)  # JAX's own
        numbered = [program() for _ in range(2)]
        compilation.use_cache()
        named = [program(), from_elsewhere(), program()]
        compilation.use_cache()
        assert numbered[0] != numbered[1] and len({*named, program()}) == 1
        assert jax.config.jax_traceback_in_locations_limit == 0
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def program() -> str:
    """A small call of the linear layer for Hopper."""
    x, w = (
        Quantised(jax.ShapeDtypeStruct((rows, 128), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((rows,), jnp.float32))
        for rows in (128, 64)
    )
    rest = {"activation": None, "gate": None, "residual": None, "reach": None, "dtype": jnp.bfloat16}
    call = jax.jit(lambda *given: hopper.linear(*given, None, **rest))
    lowered = call.trace(x, w, jax.ShapeDtypeStruct((64,), jnp.float32)).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def from_elsewhere() -> str:
    return program()


def test_the_cache_has_a_default_a_variable_and_an_option(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert compilation.default_folder() == pathlib.Path("/caches/lf_jax/compiled")
    seen = {}
    monkeypatch.setattr(jax.config, "update", seen.__setitem__)
    monkeypatch.setattr(compilation, "default_folder", lambda: pathlib.Path("/default"))
    compilation.use_cache("/chosen")
    assert seen["jax_compilation_cache_dir"] == "/chosen"
    assert cli.main(["doctor", "--compilation-cache=/chosen", "--compilation-cache", "/last", "--help"]) == 0
    assert seen["jax_compilation_cache_dir"] == "/last" and "usage: lf-jax doctor" in capsys.readouterr().out
    assert cli.main(["doctor", "--compilation-cache"]) == cli.BAD_INPUT
    assert "--compilation-cache needs a folder" in capsys.readouterr().err
