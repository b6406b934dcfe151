"""Scores of a video against what its caption says, from pixels alone: no network, no look at the scene it should be.

How each score is made, with the reasons of the thresholds: docs/world.md.
"""

import dataclasses
import math
import warnings

import numpy as np

from lf_jax.arrays import Float, UInt8
from lf_jax.config import check
from lf_jax.world.backdrop import Backdrop, backdrop, describe
from lf_jax.world.captions import Facts, Thing
from lf_jax.world.pixels import Seen, look
from lf_jax.world.settings import COLOURS, HEADINGS, SHAPES, SIZES, SPEEDS, World
from lf_jax.world.tracks import MARGIN, RESTS, Return, Track, hiding, tracks

BEGINS = 0.6  # seconds of clear view that give the direction at the start; nothing bounces before CLEAR
TURNED = (math.radians(30), math.radians(60))  # angle to the asked heading that scores 1, and that scores 0
PACE = (math.log(1.25), math.log(1.6))  # distance of a speed from its range, as the logarithm of a ratio
CREEP = (RESTS, 0.1)  # h/s of what should stand still
LEVELS = (8.0, 32.0)  # mean change of the background, of 255
OBJECT_LEVELS = (20.0, 70.0)  # change of an object's colour: six colours are at least 80 apart
GROWTH = (math.log(1.2), math.log(1.6))  # change of an object's radius
FLICKER = (4.0, 16.0)  # mean second difference of the background in time, of 255
WALL_STAYS = 0.1  # h: a standing wall does not leave the middle of its places by more
WALL_MOVES = 0.15  # h/s: a sliding wall is faster
PANNED = (0.4, 0.8)  # of the least way that a camera should go: what scores 1 is above the second
RETURNED = (0.3, 0.7)  # of the way that it went: what is left when it is back


@dataclasses.dataclass(frozen=True)
class Scores:
    """Each in [0, 1], 1 as asked; None where the facts do not ask, or nothing could be judged."""

    count: float | None  # as many objects as there are things, counting those rightly hidden
    colour: float | None
    shape: float | None
    size: float | None
    direction: float | None  # of the first movement, relative to the background
    speed: float | None
    identity: float | None  # comes back from behind the wall in time, in place, as it was
    wall: float | None
    background: float | None  # kind and tints
    camera: float | None
    constancy: float | None  # of the background: every place keeps the colour it had when first seen
    flicker: float | None  # 1: none
    drift: float | None  # the last second looks like the first: background, colours and sizes of objects
    seconds: dict[str, tuple[float | None, ...]]  # the scores of every second by name, but for direction, camera, identity

    def whole(self) -> dict[str, float | None]:
        """The scores of the whole video by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "seconds"}


@dataclasses.dataclass(frozen=True)
class _Found:
    """A thing and what is taken for it."""

    thing: Thing
    own: Track  # of the colour asked for
    track: Track  # that one, or of another colour where the own is never seen
    excused: np.ndarray  # [f] bool
    returns: list[Return]
    velocity: np.ndarray  # [f, 2] h/s


def evaluate(world: World, video: UInt8[np.ndarray, "f h w 3"], facts: Facts) -> Scores:
    """Scores a video of any length against `facts`. `world` gives frame rate, sizes, speeds and what a pan should reach.

    Raises:
        ValueError: if `video` is not uint8 [f, h, w, 3] of the world's height and width, or shorter than half a second.
    """
    check(video.dtype == np.uint8 and video.ndim == 4, f"{video.dtype=} and {video.shape=} must be uint8 [f, h, w, 3]")
    size = (world.height, world.width, 3)
    check(video.shape[1:] == size, f"{video.shape=} must be [f, {', '.join(map(str, size))}], as the world")
    check(len(video) >= world.fps / 2, f"{video.shape[0]=} frames must be half a second at {world.fps=} or more")
    seen = look(video)
    ground = backdrop(video, seen.open)
    camera = ground.camera / world.height
    all_tracks = tracks(seen, camera)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing are NaN, and NaN is None
        found = _match(world, facts, all_tracks, seen, camera)
        frame_scores = {
            "count": _count(facts, found, all_tracks),
            "colour": _colour(facts, found, all_tracks),
            "shape": _shape(len(video), found),
            "size": _size(world, len(video), found),
            "wall": _wall(world, facts, seen, camera),
            "background": _background(world, facts, ground),
            "constancy": _ramp(_mean(np.abs(ground.change)), LEVELS),
            "flicker": _ramp(_mean(np.abs(np.diff(ground.change, 2, axis=0))), FLICKER),
        }
        parts = _seconds(len(video), world.fps)
        whole = slice(0, len(video))
        over_time = {name: [_average(values[part]) for part in parts] for name, values in frame_scores.items()}
        over_time["speed"] = [_speed(world, found, part) for part in parts]
        over_time["drift"] = [_drift(ground, found, parts[0], part) for part in parts]
        scores = {name: _average(values) for name, values in frame_scores.items()}
        scores["speed"] = _speed(world, found, whole)
        scores["drift"] = over_time["drift"][-1]
        scores["direction"] = _average([_direction(world, f) for f in found])
        scores["identity"] = _identity(facts, found)
        scores["camera"] = _camera(world, facts, camera)
    seconds = {name: tuple(map(_known, values)) for name, values in over_time.items()}
    return Scores(**{name: _known(value) for name, value in scores.items()}, seconds=seconds)


def _ramp(value, ends: tuple[float, float]):
    """1 up to the first end, 0 from the second on."""
    return np.clip((ends[1] - value) / (ends[1] - ends[0]), 0, 1)


def _average(values) -> float:
    return float(np.nanmean(values)) if len(values) else math.nan


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean(change: Float[np.ndarray, "f block column 3"]) -> Float[np.ndarray, " f"]:
    return np.nanmean(change, axis=(1, 2, 3))


def _is(values: np.ndarray, asked: int, where: np.ndarray) -> np.ndarray:
    return np.where(where, (values == asked).astype(float), np.nan)


def _seconds(frames: int, fps: int) -> list[slice]:
    """Whole seconds; what is left at the end belongs to the last."""
    starts = [*range(0, max(frames - fps, 0) + 1, fps)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], frames], strict=True)]


def _match(world: World, facts: Facts, all_tracks: list[Track], seen: Seen, camera: np.ndarray) -> list[_Found]:
    """The track of a thing's own colour; where that is never clearly seen, the best of the colours that nobody asked for."""
    names = list(COLOURS)
    own = [names.index(thing.colour) for thing in facts.things]
    spare = [i for i in range(len(names)) if i not in own and all_tracks[i].clear.any()]
    found = []
    for thing, mine in zip(facts.things, own, strict=True):
        track = all_tracks[mine]
        if not track.clear.any() and spare:
            alike = [(all_tracks[i].shape == SHAPES.index(thing.shape)).sum() + 0.5 * all_tracks[i].clear.sum() for i in spare]
            track = all_tracks[spare.pop(int(np.argmax(alike)))]
        rivals = [other for other in all_tracks if other is not track]
        excused, returns = hiding(world, track, rivals, seen.wall, camera)
        found.append(_Found(thing, all_tracks[mine], track, excused, returns, track.velocities(world.fps)))
    return found


def _over_things(frames: int, judged: list[tuple[_Found, np.ndarray]]) -> np.ndarray:
    """Mean over things, frame by frame; 0 throughout for a thing that is not there."""
    scores = [values if f.track.clear.any() else np.zeros(frames) for f, values in judged]
    return np.nanmean(scores, axis=0) if scores else np.full(frames, np.nan)


def _count(facts: Facts, found: list[_Found], all_tracks: list[Track]) -> np.ndarray:
    there = sum(track.seen + track.others for track in all_tracks) + sum(f.excused for f in found)
    return (there == len(facts.things)).astype(float)


def _colour(facts: Facts, found: list[_Found], all_tracks: list[Track]) -> np.ndarray:
    asked = {thing.colour for thing in facts.things}
    strays = [track.seen for name, track in zip(COLOURS, all_tracks, strict=True) if name not in asked]
    stray = np.any(strays, axis=0)
    missed = np.array([~f.own.seen & ~(f.excused & (f.track is f.own)) for f in found])
    wrong = missed & (stray | ~np.array([[f.own.seen.any()] for f in found]))
    right = np.array([f.own.seen for f in found])
    return np.nanmean(np.where(right, 1.0, np.where(wrong, 0.0, np.nan)), axis=0)


def _shape(frames: int, found: list[_Found]) -> np.ndarray:
    return _over_things(frames, [(f, _is(f.track.shape, SHAPES.index(f.thing.shape), f.track.clear)) for f in found])


def _size(world: World, frames: int, found: list[_Found]) -> np.ndarray:
    between = math.sqrt(world.radii[0][1] * world.radii[1][0])
    judged = []
    for f in found:
        if f.thing.size is not None:
            large = (f.track.radius > between).astype(int)
            judged.append((f, _is(large, SIZES.index(f.thing.size), np.isfinite(f.track.radius))))
    return _over_things(frames, judged)


def _direction(world: World, f: _Found) -> float:
    if f.thing.heading is None:
        return math.nan
    clear = np.flatnonzero(f.track.clear)
    if len(clear) < 3:
        return 0.0
    clear = clear[: max(3, np.searchsorted(clear, clear[0] + BEGINS * world.fps))]
    slope = np.polyfit(clear, f.track.place[clear], 1)[0] * world.fps
    if np.linalg.norm(slope) < RESTS:
        return 0.0
    asked = HEADINGS.index(f.thing.heading) * math.pi / 4
    turned = math.atan2(-slope[1], slope[0]) - asked
    return float(_ramp(abs(math.remainder(turned, 2 * math.pi)), TURNED))


def _speed(world: World, found: list[_Found], part: slice) -> float:
    scores = []
    for f in found:
        if f.thing.speed is None:
            continue
        pace = np.nanmedian(np.linalg.norm(f.velocity[part], axis=1))
        low, high = world.speeds[SPEEDS.index(f.thing.speed)]
        if not f.track.clear.any():
            scores.append(0.0)
        elif high == 0:
            scores.append(_ramp(pace, CREEP))
        else:
            scores.append(_ramp(np.maximum(np.log(pace / high), np.log(low / np.maximum(pace, 1e-6))), PACE))
    return _average(scores)


def _identity(facts: Facts, found: list[_Found]) -> float:
    """The mean over returns from behind the wall; a thing that is said to hide and is always seen has failed once."""
    if facts.wall is None:
        return math.nan
    kept = [r.kept for f in found for r in f.returns]
    kept += [False for f in found if f.thing.hidden and not f.returns and not f.excused.any()]
    return _average(kept)


def _wall(world: World, facts: Facts, seen: Seen, camera: np.ndarray) -> np.ndarray:
    edges = seen.wall + camera[:, None]
    there = np.isfinite(edges[:, 0])
    if facts.wall is None:
        return np.full(len(camera), np.nan)
    if facts.wall == "standing":
        middle = edges.mean(axis=1)
        return (there & (np.abs(middle - np.nanmedian(middle)) < WALL_STAYS)).astype(float)
    if not there.any():
        return np.zeros(len(camera))
    half = max(1, round(world.fps / 8))
    inner = np.where((seen.wall > MARGIN) & (seen.wall < world.aspect - MARGIN), edges, np.nan)
    pace = np.full(len(camera), np.nan)
    pace[half:-half] = np.nanmax(np.abs(inner[2 * half :] - inner[: -2 * half]), axis=1) * world.fps / (2 * half)
    return np.where(np.isfinite(pace), (pace > WALL_MOVES).astype(float), np.nan)


def _background(world: World, facts: Facts, ground: Backdrop) -> np.ndarray:
    """Judged twice a second: half for the kind, half for the tints."""
    scores = np.full(len(ground.bands), np.nan)
    if facts.background is not None:
        for t in range(0, len(scores), max(1, world.fps // 2)):
            kind, tints = describe(ground.bands[t], ground.open[t])
            ordered = facts.background == "gradient"
            same = tints == facts.tints if ordered else set(tints) == set(facts.tints)
            scores[t] = 0.5 * (kind == facts.background) + 0.5 * same
    return scores


def _camera(world: World, facts: Facts, camera: np.ndarray) -> float:
    """Judged on the first `world.seconds`: in a longer video it turns again."""
    if facts.camera is None:
        return math.nan
    way, *back = facts.camera.split(" and ")
    went = camera[: world.num_frames] * (1 if way == "right" else -1)
    least = world.pan_speeds[0] * (len(went) - 1) / world.fps / (2 if back else 1)
    low, high = PANNED
    reached = 1 - float(_ramp(went.max() / least, (low, high)))
    if not back:
        return reached * (1 - float(_ramp(went[-1] / max(went.max(), 1e-6), (low, high))))
    return reached * float(_ramp(abs(went[-1]) / max(went.max(), 1e-6), RETURNED))


def _drift(ground: Backdrop, found: list[_Found], first: slice, part: slice) -> float:
    """The worst of what changed since the first second: background, colour and radius of every object."""
    scores = [_ramp(np.nanmean(np.abs(np.nanmean(ground.change[part], axis=0))), LEVELS)]
    for f in found:
        clear = [np.flatnonzero(f.track.clear[p]) + p.start for p in (first, part)]
        if min(map(len, clear)) < 3:
            continue
        before, after = (np.median(f.track.level[c], axis=0) for c in clear)
        scores.append(_ramp(np.linalg.norm(after - before), OBJECT_LEVELS))
        before, after = (np.nanmedian(f.track.radius[c]) for c in clear)
        scores.append(_ramp(abs(np.log(after / before)), GROWTH))
    return float(np.nanmin(scores)) if np.isfinite(scores).any() else math.nan
