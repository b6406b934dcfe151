"""VBench's prompts and the names of its files."""

import json

import pytest

from lf_jax.evaluate.vbench import read


def test_samples_follow_the_dimensions(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    entries = [
        {"prompt_en": "a cat", "dimension": ["color"]},
        {"prompt_en": "a still lake, 4k.", "dimension": ["temporal_flickering", "imaging_quality"]},
        {"prompt_en": "a cat", "dimension": ["object_class"]},
    ]
    path.write_text(json.dumps(entries))
    cat, lake = read(path, 5)
    assert (cat.prompt, cat.text, cat.samples, cat.file_name(4)) == ("a cat", "a cat", 5, "a cat-4.mp4")
    assert (lake.samples, lake.file_name(0)) == (25, "a still lake, 4k.-0.mp4")


def test_prompts_may_be_extended(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "long.txt").write_text("A cat on a sofa, cinematic / warm\nA dog in the snow\n")
    cat, dog = read(tmp_path / "prompts.txt", 2, tmp_path / "long.txt")
    assert (cat.text, cat.file_name(1)) == ("A cat on a sofa, cinematic / warm", "a cat-1.mp4")
    (tmp_path / "long.txt").write_text("one\n")
    with pytest.raises(ValueError, match="has 1 lines, expected 2"):
        read(tmp_path / "prompts.txt", 2, tmp_path / "long.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "holds no prompts"),
        ("a.json", "[1]", "is not a list of entries with 'prompt_en'"),
        ("a.json", "no json", "is not a list of entries with 'prompt_en'"),
        ("a.txt", "either/or", "cannot be part of a file's name"),
        ("a.txt", "x" * 250, "cannot be part of a file's name"),
        ("a.txt", "\n\n", "holds no prompts"),
    ],
)
def test_what_vbench_could_not_find_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, 5)
    with pytest.raises(ValueError, match="samples=0 must be positive"):
        read(tmp_path / name, 0)
