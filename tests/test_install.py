"""`pip install .` into an empty environment gives every package, command and preset, from any folder."""

import os
import pathlib
import subprocess
import sys

import pytest

from lf_jax.cli import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` folder of an environment that holds this project, not editable, and a folder far from the sources."""
    home = tmp_path_factory.mktemp("install")
    subprocess.run([sys.executable, "-m", "venv", home / "env"], check=True)
    constraints = ROOT / "constraints" / f"py{sys.version_info.major}{sys.version_info.minor}.txt"
    pip = [home / "env/bin/python", "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints]
    subprocess.run([*pip, str(ROOT)], check=True, timeout=900)
    (home / "elsewhere").mkdir()
    return home / "env/bin", home / "elsewhere"


def run(installed, *command) -> str:
    folder, elsewhere = installed
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [folder / command[0], *command[1:]], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_packages_come_from_the_environment(installed):
    where = run(
        installed, "python", "-c", "import configs, convert, lf_jax, pallas_kernels as p; print(lf_jax.__file__, p.__file__)"
    )
    assert str(ROOT) not in where and where.count("site-packages") == 2


def test_torch_is_not_needed(installed):
    assert run(installed, "python", "-c", "import importlib.util as u; print(u.find_spec('torch'))").strip() == "None"


def commands(installed, lines) -> str:
    """What `lf-jax` prints for each line, in one process: what takes time is its imports."""
    program = "import sys; from lf_jax import cli; sys.exit(any([cli.main(line.split()) for line in sys.argv[1:]]))"
    return run(installed, "python", "-c", program, *lines)


def test_every_command_explains_itself(installed):
    overview = run(installed, "lf-jax", "--help")
    assert all(f"\n  {command}" in overview for command in COMMANDS)
    pages = commands(installed, [f"{command} --help" for command in COMMANDS]).split("usage: ")[1:]
    for command, page in zip(COMMANDS, pages, strict=True):
        assert page.startswith(f"lf-jax {command} ") and len(page.splitlines()) > 5


def test_every_converter_loads(installed):
    tables = "[part.module.rules for family in convert.FAMILIES.values() for part in family.parts]"
    assert int(run(installed, "python", "-c", f"import convert; print(len({tables}))")) >= 12


def test_every_preset_loads(installed):
    assert len(PRESETS) >= 8
    assert commands(installed, [f"plan --model {preset}" for preset in PRESETS]).count("KV cache") == len(PRESETS)


def test_a_video_is_made(installed):
    run(installed, "lf-jax", "sample", "--model", "tiny", "--prompt", "a red ball", "--output", "videos")
    assert [p.suffix for p in (installed[1] / "videos").glob("*.mp4")] == [".mp4"]
