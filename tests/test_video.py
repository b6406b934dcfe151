"""mp4 files are complete or absent; what is written can be read back."""

import av
import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import video


def gradient(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Smooth moving colours: what survives a video codec."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([x * 5, y * 7, (t * 9 + x + y)], axis=-1).astype(np.uint8)


def test_uint8_rounds_and_clips():
    pixels = video.to_uint8(jnp.float32([-2, -1, 0.0041, 1, 2, -0.999]).reshape(1, 2, 3))
    np.testing.assert_array_equal(np.asarray(pixels).ravel(), [0, 0, 128, 255, 255, 0])


def test_uint8_round_trip_is_exact():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(video.to_uint8(video.from_uint8(every)), every)


def test_mp4_reads_back(tmp_path):
    frames, target = gradient(13), tmp_path / "new" / "a.mp4"
    video.write_mp4(target, frames, fps=16)
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate) == (13, 16)
    back = video.read_video(target, 32, 48)
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 4
    assert [p.name for p in target.parent.iterdir()] == ["a.mp4"]


def test_growing_file_can_be_read_before_it_ends(tmp_path):
    frames = gradient(24)
    with video.Mp4Writer(tmp_path / "a.mp4", 16, growing=True) as writer:
        for start in range(0, 24, 8):
            writer.add(frames[start : start + 8])
            assert len(video.read_video(writer.partial, 32, 48)) == start + 7  # the muxer holds one back
        assert not (tmp_path / "a.mp4").exists()
    assert len(video.read_video(tmp_path / "a.mp4", 32, 48)) == 24


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error), video.Mp4Writer(tmp_path / "a.mp4", 16) as writer:
        writer.add(gradient(4))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_file(tmp_path):
    video.write_mp4(tmp_path / "a.mp4", gradient(5), fps=8)
    old = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(KeyboardInterrupt), video.Mp4Writer(tmp_path / "a.mp4", 16) as writer:
        writer.add(gradient(9))
        raise KeyboardInterrupt
    assert (tmp_path / "a.mp4").read_bytes() == old


def test_sizes_are_checked(tmp_path):
    with pytest.raises(ValueError, match="33x48.*even"):
        video.write_mp4(tmp_path / "a.mp4", gradient(2, height=33), fps=16)
    with pytest.raises(ValueError, match="16x48 follow frames of 32x48"), video.Mp4Writer(tmp_path / "a.mp4", 16) as writer:
        writer.add(gradient(2))
        writer.add(gradient(2, height=16))
    with pytest.raises(ValueError, match="no frames"), video.Mp4Writer(tmp_path / "a.mp4", 16):
        pass
    assert list(tmp_path.iterdir()) == []


def test_input_is_scaled_and_cropped_around_the_centre(tmp_path):
    wide = np.zeros((3, 32, 96, 3), np.uint8)
    wide[:, :, 32:64] = 200
    video.write_mp4(tmp_path / "a.mp4", wide, fps=16)
    back = video.read_video(tmp_path / "a.mp4", 64, 64, max_frames=2)
    assert back.shape == (2, 64, 64, 3)
    assert np.abs(back[:, :, 4:60].astype(int) - 200).max() < 10


def test_image_input(tmp_path):
    with av.open(str(tmp_path / "a.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(gradient(1)[0], format="rgb24")))
        container.mux(stream.encode(None))
    np.testing.assert_array_equal(video.read_video(tmp_path / "a.png", 32, 48)[0], gradient(1)[0])


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="a.mp4 is not an image or a video"):
        video.read_video(tmp_path / "a.mp4", 32, 48)
    with pytest.raises(FileNotFoundError):
        video.read_video(tmp_path / "b.mp4", 32, 48)
