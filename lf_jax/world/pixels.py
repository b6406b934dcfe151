"""From pixels to what is in them: wall, coloured blobs, background. Nothing here knows what the video should show.

Backgrounds and wall are nearly grey and objects are not, so a pixel is known by its chroma, the part of its colour that is not
grey: half way from grey to a colour of the palette is the edge of an object of that colour, whatever lies behind it.
"""

import dataclasses
import functools
import math

import numpy as np
from scipy import ndimage

from lf_jax.arrays import Bool, Float, Int, UInt8
from lf_jax.world import settings
from lf_jax.world.settings import COLOURS, SHAPES

BACKGROUND, WALL = 0, len(COLOURS) + 1  # labels; 1 + index into COLOURS between them
DARK = 85  # mean level below which what has no colour is wall: half way from the wall to the darkest tint, about
EDGE = 0.016  # h: half of the strip at a border of two labels that is not trusted (blur, fringes of mixed colours)
POINT = 0.06  # h: how far the points of a triangle stick out of what is left of it without that strip
LEAST = 0.0018  # h^2: a blob without that strip is at least so large; a small triangle has 0.010, a wholly visible one
OVERLAP = 0.6  # least intersection over union with a shape
FOREIGN = 0.02  # share of a blob's surroundings that may have another colour before it counts as touched
SOFT = (0.0, 0.2)  # blur of the shapes that a blob is compared with, over their radius
WARPED = 0.1  # change of a blob's width over height that shows that the border cuts it and does not only touch it
ASPECTS = {"circle": 1.0, "square": 1.0, "triangle": 2 / math.sqrt(3), "cross": 1.0}  # width over height
GRID = 20  # samples of a shape across its bounding box


@dataclasses.dataclass(frozen=True)
class Blobs:
    """Coloured regions of all frames, in order of frames. Lengths in h, on the screen."""

    frame: Int[np.ndarray, " n"]
    colour: Int[np.ndarray, " n"]  # index into COLOURS
    place: Float[np.ndarray, "n 2"]  # x, y of the centre of mass
    area: Float[np.ndarray, " n"]  # h^2
    shape: Int[np.ndarray, " n"]  # index into SHAPES, -1 for none of them
    clear: Bool[np.ndarray, " n"]  # nothing touches it: neither wall nor another blob nor the border of the frame
    level: Float[np.ndarray, "n 3"]  # mean colour inside, 0..255


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the pixels of a video show."""

    blobs: Blobs
    wall: Float[np.ndarray, "f 2"]  # left and right edge, h; NaN where there is no wall
    open: Bool[np.ndarray, "f h w"]  # background, and a little away from everything else


def look(video: UInt8[np.ndarray, "f h w 3"]) -> Seen:
    """Segments every frame by itself."""
    height = video.shape[1]
    labels = label(video)
    strip = 2 * max(1, round(EDGE * height)) + 1
    low = ndimage.minimum_filter(labels, (1, strip, strip))
    high = ndimage.maximum_filter(labels, (1, strip, strip))
    coloured = (low == high) & (low > BACKGROUND) & (low < WALL)
    return Seen(_blobs(video, labels, coloured), _wall(labels), high == BACKGROUND)


def label(video: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "f h w"]:
    """Background, wall or colour of every pixel, by a table of six bits a channel."""
    bits = video >> 2
    index = (bits[..., 0].astype(np.int32) << 12) | (bits[..., 1].astype(np.int32) << 6) | bits[..., 2]
    return _table()[index]


@functools.cache
def _table() -> UInt8[np.ndarray, " n"]:
    level = 4.0 * np.arange(64) + 2
    pixels = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)
    palette = np.array(list(COLOURS.values()), float)
    chroma, hues = (x - x.mean(axis=1, keepdims=True) for x in (pixels, palette))
    length = np.linalg.norm(hues, axis=1)
    along = chroma @ hues.T / length  # of the chroma, along each hue
    nearest = along.argmax(axis=1)
    saturated = along.max(axis=1) > 0.5 * length[nearest]
    labels = np.where(saturated, 1 + nearest, np.where(pixels.mean(axis=1) < DARK, WALL, BACKGROUND))
    return labels.astype(np.uint8)


@functools.cache
def _templates() -> Bool[np.ndarray, "shape soft n n"]:
    """Every shape, sharp and blurred, sampled in its bounding box."""
    grid = np.linspace(-1.5, 1.5, 97)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    masks = {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(np.abs(x), np.abs(y)) <= 1,
        "triangle": (y <= 0.5) & (math.sqrt(3) * np.abs(x) - y <= 1),
        "cross": (np.minimum(np.abs(x), np.abs(y)) <= settings.ARM) & (np.maximum(np.abs(x), np.abs(y)) <= 1),
    }
    step = grid[1] - grid[0]
    blurred = [[ndimage.gaussian_filter(masks[name].astype(float), soft / step) > 0.5 for soft in SOFT] for name in SHAPES]
    return np.array([[_sampled(_cropped(mask)) for mask in masks] for masks in blurred])


def _cropped(mask: np.ndarray) -> np.ndarray:
    return mask[ndimage.find_objects(mask.astype(int))[0]]


def _sampled(mask: np.ndarray) -> np.ndarray:
    y, x = (((np.arange(GRID) + 0.5) * n / GRID).astype(int) for n in mask.shape)
    return mask[y[:, None], x]


def _blobs(video: np.ndarray, labels: np.ndarray, coloured: np.ndarray) -> Blobs:
    height, width = labels.shape[1:]
    in_frame = np.zeros((3, 3, 3), bool)
    in_frame[1] = True  # neighbours within a frame only
    parts, _ = ndimage.label(coloured, in_frame)
    areas = np.bincount(parts.ravel())
    reach = round(POINT * height)
    rows = []
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        if areas[number] < LEAST * height**2:
            continue
        frame = box[0].start
        inside = parts[box][0] == number
        colour = labels[box][0][inside][0]
        down, across = _grown(box[1:], reach, height, width)
        mask = ndimage.uniform_filter((labels[frame, down, across] == colour).astype(np.float32), 3) > 0.5  # against noise
        (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
        mask = mask[top : bottom + 1, left : right + 1]
        top, bottom, left, right = top + down.start, bottom + down.start + 1, left + across.start, right + across.start + 1
        around = labels[frame][_grown((slice(top, bottom), slice(left, right)), 2, height, width)]
        foreign = np.count_nonzero((around != colour) & (around != BACKGROUND))
        rows_of_mask, columns_of_mask = np.nonzero(mask)
        cut = top == 0 or left == 0 or bottom == height or right == width
        shape = _shape(mask)
        cut &= abs(mask.shape[1] / mask.shape[0] / ASPECTS[SHAPES[shape]] - 1) > WARPED
        rows.append(
            (
                frame,
                colour - 1,
                ((left + columns_of_mask.mean() + 0.5) / height, (top + rows_of_mask.mean() + 0.5) / height),
                len(rows_of_mask) / height**2,
                shape,
                not cut and foreign <= FOREIGN * around.size,
                video[frame, box[1], box[2]][inside].mean(axis=0),
            )
        )
    columns = list(zip(*rows, strict=True)) or [()] * 7
    kinds = (int, int, float, float, int, bool, float)
    tails = ((), (), (2,), (), (), (), (3,))
    return Blobs(*(np.array(c, kind).reshape(-1, *tail) for c, kind, tail in zip(columns, kinds, tails, strict=True)))


def _grown(box: tuple[slice, slice], by: int, height: int, width: int) -> tuple[slice, slice]:
    (top, bottom), (left, right) = ((s.start - by, s.stop + by) for s in box)
    return slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))


def _shape(mask: np.ndarray) -> int:
    sampled, templates = _sampled(mask), _templates()
    overlap = ((sampled & templates).sum((2, 3)) / (sampled | templates).sum((2, 3))).max(axis=1)
    best = int(overlap.argmax())
    return best if overlap[best] >= OVERLAP else -1


def _wall(labels: np.ndarray) -> Float[np.ndarray, "f 2"]:
    frames, height, width = labels.shape
    dark = (labels == WALL).mean(axis=1) > 0.5  # [f, w]
    edges = np.stack([dark.argmax(axis=1), width - dark[:, ::-1].argmax(axis=1)], axis=1) / height
    edges[~dark.any(axis=1)] = np.nan
    return edges
