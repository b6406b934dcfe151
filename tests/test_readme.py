"""The README's Python runs as printed, and the commands and files that it names exist."""

import pathlib
import re

import lf_jax
from lf_jax.cli import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    variables = {}
    exec(compile(script, "README.md", "exec"), variables)
    assert variables["video"].shape == (1, 21, 64, 96, 3)
    assert (tmp_path / "state.safetensors").exists()


def test_the_commands_exist():
    table = TEXT.split("| command | |")[1].split("\n\n")[0]
    named = set(re.findall(r"lf-jax (\w+)", TEXT)) | set(re.findall(r"`(\w+)`", table))
    assert set(COMMANDS) <= named and all(name in COMMANDS for name in re.findall(r"^lf-jax (\w+)", TEXT, re.MULTILINE))


def test_the_paths_exist():
    named = re.findall(r"`((?:lf_jax|pallas_kernels|configs|constraints|docs|tools)/[\w/.]*)`", TEXT)
    named += re.findall(r"\]\(((?!http)[\w/.]+)\)", TEXT)
    assert len(named) > 15
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_public_names_exist():
    for name in set(re.findall(r"lf_jax\.(\w+)\(", TEXT)):
        assert callable(getattr(lf_jax, name)), name
