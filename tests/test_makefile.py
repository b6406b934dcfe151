"""`make` names what it needs where it does not have it."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def make(goal: str, python: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    """What `make` would run under an interpreter of that version, in an environment that does not exist yet."""
    command = ["make", "--dry-run", goal, f"VERSION={python}", f"VENV={folder / 'env'}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("python", ["311", "312"])
def test_tested_pythons(python, tmp_path):
    assert f"--constraint constraints/py{python}.txt" in make("test", python, tmp_path).stdout


def test_other_pythons_are_refused(tmp_path):
    refused = make("test", "313", tmp_path)
    assert refused.returncode != 0
    assert "none of the tested Pythons, 3.11 and 3.12: name one, for example PYTHON=python3.12" in refused.stderr
    assert make("clean", "313", tmp_path).returncode == 0
