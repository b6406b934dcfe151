"""Measures of pixels against their definitions, computed here in another way."""

import json
import math
import stat

import numpy as np
import pytest

from lf_jax.evaluate import pixels, vmaf


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_psnr():
    video = np.full((3, 4, 6, 3), 100, np.uint8)
    other = video.copy()
    other[0] += 5
    other[1, 0, 0, 0] = 0
    expected = [20 * math.log10(255 / 5), 10 * math.log10(255**2 / (100**2 / 72)), 100.0]  # the same: 100 dB by convention
    np.testing.assert_allclose(pixels.psnr(video, other), expected, rtol=1e-6)


def direct_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The definition: weighted moments of every window that lies within the frame, float64."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for channel in range(3):
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                a, b = (z[row : row + 11, column : column + 11, channel].astype(np.float64) for z in (x, y))
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                spread_a, spread_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
                both = (weights * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
                values.append(brightness * (2 * both + c2) / (spread_a + spread_b + c2))
    return float(np.mean(values))


def test_ssim():
    video = noise(3, 13, 17)
    other = np.stack([noise(13, 17, seed=1), 255 - video[1] // 2, video[2]])
    expected = [direct_ssim(a, b) for a, b in zip(video, other, strict=True)]
    assert expected[1] < 0 and expected[2] == 1
    np.testing.assert_allclose(pixels.ssim(video, other), expected, atol=2e-5)
    with pytest.raises(ValueError, match="smaller than SSIM's window"):
        pixels.ssim(noise(1, 8, 20), noise(1, 8, 20))


def test_flicker_is_what_vbench_computes():
    video = noise(5, 4, 6)
    distances = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(video, video[1:], strict=False)]
    assert pixels.flicker(video) == pytest.approx((255.0 - np.mean(distances)) / 255.0, rel=1e-6)
    assert pixels.flicker(np.repeat(video[:1], 4, axis=0)) == 1


def test_appearance_second_by_second():
    video = np.zeros((5, 4, 4, 3), np.uint8)  # two seconds of two frames, and one frame more, which is of the second
    video[2:] = 255
    video[2:, :, 2:] = (255, 0, 0)
    found = {name: np.asarray(values) for name, values in pixels.appearance(video, 2).items()}
    red = 0.299
    np.testing.assert_allclose(found["brightness"], [0, (1 + red) / 2], atol=1e-6)
    np.testing.assert_allclose(found["contrast"], [0, (1 - red) / 2], atol=1e-6)
    np.testing.assert_allclose(found["saturation"], [0, 0.5], atol=1e-6)
    np.testing.assert_allclose(found["sharpness"], [0, (1 - red) / 3 / 2], atol=1e-6)  # one step of three, across only
    np.testing.assert_allclose(found["motion"], [0, (3 + 1) / 6 / 3], atol=1e-6)  # one change of three


def test_grouped():
    values = np.arange(8.0)
    np.testing.assert_allclose(pixels.grouped(values, [3, 3, 2]), [1, 4, 6.5])
    assert pixels.seconds_of(81, 16) == [16] * 4 + [17] and pixels.seconds_of(5, 16) == [5]


def fake_ffmpeg(folder, body: str) -> str:
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_vmaf_asks_ffmpeg(tmp_path):
    log = json.dumps({"frames": [{"metrics": {"vmaf": 90.0}}, {"metrics": {"vmaf": 80.5}}]})
    saved = tmp_path / "arguments"
    program = fake_ffmpeg(tmp_path, f"echo \"$@\" > {saved}; wc -c video reference >> {saved}; echo '{log}' > log.json")
    assert vmaf.vmaf(noise(2, 4, 6), noise(2, 4, 6), 16, program).tolist() == [90.0, 80.5]
    assert "-video_size 6x4 -framerate 16 -i video" in saved.read_text()
    assert "144 video" in saved.read_text() and "144 reference" in saved.read_text()
    with pytest.raises(ValueError, match="VMAF failed.*no such filter"):
        vmaf.vmaf(noise(2, 4, 6), noise(2, 4, 6), 16, fake_ffmpeg(tmp_path, "echo no such filter >&2; exit 1"))


def test_an_ffmpeg_without_libvmaf_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)  # as if it were not installed
    monkeypatch.setenv("PATH", str(tmp_path))
    vmaf.find_ffmpeg.cache_clear()
    assert vmaf.find_ffmpeg() == (None, "there is no ffmpeg on PATH and no package imageio-ffmpeg")
    program = fake_ffmpeg(tmp_path, "echo ' ... ssim  VV->V'")
    vmaf.find_ffmpeg.cache_clear()
    assert vmaf.find_ffmpeg() == (None, f"{program} were built without libvmaf")
    fake_ffmpeg(tmp_path, "echo ' ... libvmaf           VV->V      Calculate the VMAF'")
    vmaf.find_ffmpeg.cache_clear()
    assert vmaf.find_ffmpeg() == (program, "")
    vmaf.find_ffmpeg.cache_clear()
