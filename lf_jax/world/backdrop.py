"""The background of a video from its pixels: how the camera pans over it, whether it stays, and what it looks like."""

import dataclasses

import numpy as np

from lf_jax.arrays import Bool, Float
from lf_jax.world.settings import TINTS

BANDS = 32  # rows that a frame is reduced to; columns stay, for a pan is seen in them
TEXTURE = 8.0  # levels: a row varies at least so much where a pan can be seen
SEARCH = 2  # pixels that the camera may stray from its steady course between two frames
KEY = 8  # frames between the frames that others are matched with
STILL = 0.3  # pixels: a shift below this is none
SIGHTINGS = 8  # of a place, whose mean is what it should stay
BLOCK = (2, 8)  # bands and columns over which differences are averaged, against noise
PLAIN = 14.0  # levels: what varies less has one tint
EXPLAINED = 0.6  # of the variance, by rows for a gradient and by columns for stripes
SHARE = 0.1  # of the background, from which either of two tints is taken: blurred edges lie between them


@dataclasses.dataclass(frozen=True)
class Backdrop:
    """The background of every frame, foreground left out."""

    bands: Float[np.ndarray, "f band w 3"]  # levels 0..255, mean over a band of rows
    open: Bool[np.ndarray, "f band w"]  # background in all of the band
    camera: Float[np.ndarray, " f"]  # pixels to the right of where it stood first; 0 on backgrounds that do not show it
    change: Float[np.ndarray, "f block column 3"]  # from what the same place looked like first; NaN where it is not seen


def backdrop(video: np.ndarray, open_: np.ndarray) -> Backdrop:
    """Follows the background of `video` [f, h, w, 3] through the pixels `open_` [f, h, w]."""
    frames, height, width = open_.shape
    tall = max(1, height // BANDS)
    used = height - height % tall
    split = (frames, used // tall, tall, width)
    bands = video[:, :used].reshape(*split, 3).mean(axis=2, dtype=np.float32)
    whole = open_[:, :used].reshape(split).all(axis=2)
    offsets = _camera(bands, whole)
    return Backdrop(bands, whole, offsets, _change(bands, whole, offsets))


def _camera(bands: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Matches every frame with a key frame a little before it, to fractions of a pixel."""
    frames, _, width, _ = bands.shape
    masked = np.where(whole[0, ..., None], bands[0], np.nan)
    seen = masked[whole[0].sum(axis=1) > width // 4]
    offsets = np.zeros(frames)
    if len(seen) == 0 or np.nanstd(seen, axis=1).mean() < TEXTURE:
        return offsets

    def difference(t: int, key: int, shift: int) -> float:  # pixel x of frame t shows what x + shift of the key does
        if abs(shift) >= width:
            return np.inf
        here, there = slice(max(-shift, 0), width - max(shift, 0)), slice(max(shift, 0), width - max(-shift, 0))
        both = (whole[t, ::2, here] & whole[key, ::2, there]).astype(np.float32)  # every other band is enough
        delta = bands[t, ::2, here] - bands[key, ::2, there]
        count = both.sum()
        return float(np.einsum("rwc,rwc,rw->", delta, delta, both) / count) if count else np.inf

    key, moved, step = 0, 0.0, 0.0
    for t in range(1, frames):
        guess = int(np.clip(round(moved + step), -width // 2, width // 2))  # of noise, steps may add up to anything
        costs = [difference(t, key, guess + d) for d in range(-SEARCH, SEARCH + 1)]
        best = int(np.argmin(costs))
        shift = float(guess + best - SEARCH)
        if 0 < best < 2 * SEARCH and np.isfinite(costs[best - 1] + costs[best + 1]):
            before, at, after = costs[best - 1 : best + 2]
            shift += 0.5 * (before - after) / max(before - 2 * at + after, 1e-6)
        step, moved = shift - moved, shift
        offsets[t] = offsets[key] + (shift if abs(shift) > STILL else 0.0)
        if t - key == KEY:
            key, moved = t, 0.0
    return offsets


def _change(bands: np.ndarray, whole: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Compares each place of the room with the mean of its first sightings, and averages the differences in blocks."""
    frames, rows, width, _ = bands.shape
    left = np.round(offsets - offsets.min()).astype(int)
    total = np.zeros((rows, width + left.max(), 3), np.float32)
    sightings = np.zeros(total.shape[:2], np.int32)
    down, across = BLOCK
    high, wide = rows - rows % down, width - width % across
    blocks = (high // down, down, wide // across, across)
    change = np.empty((frames, blocks[0], blocks[2], 3), np.float32)
    for t in range(frames):
        view = slice(left[t], left[t] + width)
        fresh = whole[t] & (sightings[:, view] < SIGHTINGS)
        total[:, view] += np.where(fresh[..., None], bands[t], 0)
        sightings[:, view] += fresh
        weight = whole[t].astype(np.float32)
        delta = (bands[t] - total[:, view] / np.maximum(sightings[:, view], 1)[..., None]) * weight[..., None]
        weights = weight[:high, :wide].reshape(blocks).sum((1, 3))
        sums = delta[:high, :wide].reshape(*blocks, 3).sum((1, 3))
        enough = weights > down * across / 2
        change[t] = np.where(enough[..., None], sums / np.maximum(weights, 1)[..., None], np.nan)
    return change


def describe(bands: np.ndarray, whole: np.ndarray) -> tuple[str, tuple[str, ...]]:
    """Kind and tints of the background of one frame: [band, w, 3] levels and where they count; no tints if it is unlike any."""
    names, palette = list(TINTS), np.array(list(TINTS.values()), np.float32)

    def name(level: np.ndarray) -> str:
        return names[int(np.linalg.norm(level - palette, axis=1).argmin())]

    if not whole.any():
        return "plain", ()
    cells = bands[whole]
    masked = np.where(whole[..., None], bands, np.nan)
    rows = np.nanmean(masked[whole.any(axis=1)], axis=1)
    columns = np.nanmean(masked[:, whole.any(axis=0)], axis=0)
    spread, by_rows, by_columns = (x.var(axis=0).sum() for x in (cells, rows, columns))
    if spread < PLAIN**2:
        return "plain", (name(cells.mean(axis=0)),)
    if by_rows > EXPLAINED * spread:
        return "gradient", (name(rows[0]), name(rows[-1]))
    axis = np.linalg.svd(np.cov(cells.T))[0][:, 0]
    order = np.argsort(cells @ axis)
    few = max(1, round(SHARE * len(cells)))
    ends = (cells[order[:few]].mean(axis=0), cells[order[-few:]].mean(axis=0))
    return "stripes" if by_columns > EXPLAINED * spread else "checker", tuple(map(name, ends))
