"""Blobs of many frames put together: one track a colour, where it must be hidden, and how it moves."""

import dataclasses

import numpy as np

from lf_jax.arrays import Bool, Float, Int
from lf_jax.world.pixels import Seen
from lf_jax.world.settings import AREAS, COLOURS, SHAPES, World

STRIDE = 0.25  # seconds between two places whose difference is a velocity: the noise of places is small beside it
RUN = 0.4  # seconds of clear view before a disappearance, from which the hidden path is foretold
LATE = 0.45  # seconds that a return may be early or late
AWAY = 0.2  # h that the place of a return may be off
ALIKE = 1.25  # ratio of radii that passes as the same size
MARGIN = 0.03  # h: a path so near to an edge of the wall or the frame counts as covered
STRAIGHT = 0.012  # h: places that are no farther from a line lie on it
BESIDE = 0.15  # h: radius taken for what was never clear
RESTS = 0.04  # h/s: what moves less stands still; also the least that has a direction


@dataclasses.dataclass(frozen=True)
class Track:
    """What is seen of one colour, frame by frame; NaN or -1 where it is not seen. Places in h, in the room."""

    seen: Bool[np.ndarray, " f"]
    clear: Bool[np.ndarray, " f"]  # seen, with nothing touching it
    place: Float[np.ndarray, "f 2"]
    radius: Float[np.ndarray, " f"]  # h, from area and shape; NaN where it is not clear
    shape: Int[np.ndarray, " f"]  # index into SHAPES; -1 where it is not clear or is none of them
    level: Float[np.ndarray, "f 3"]
    others: Int[np.ndarray, " f"]  # more blobs of the same colour, apart from this one

    def velocities(self, fps: int) -> Float[np.ndarray, "f 2"]:
        """h/s at every frame, by the clear places half a stride before and after."""
        half = max(1, round(STRIDE * fps / 2))
        place = np.where(self.clear[:, None], self.place, np.nan)
        velocity = np.full_like(place, np.nan)
        velocity[half:-half] = (place[2 * half :] - place[: -2 * half]) * fps / (2 * half)
        return velocity


@dataclasses.dataclass(frozen=True)
class Return:
    """One time that an object was hidden and should have come out again."""

    frame: int  # at which it was foretold to be seen again
    kept: bool  # it did so in time, in place, and with its shape and size


def follow(seen: Seen, camera: Float[np.ndarray, " f"], colour: int) -> Track:
    """The track of a colour: the largest blob of every frame. `camera`: h to the right."""
    frames, blobs = len(camera), seen.blobs
    radii = np.sqrt(blobs.area / np.array([*(AREAS[name] for name in SHAPES), np.nan])[blobs.shape])
    track = Track(
        seen=np.zeros(frames, bool),
        clear=np.zeros(frames, bool),
        place=np.full((frames, 2), np.nan),
        radius=np.full(frames, np.nan),
        shape=np.full(frames, -1),
        level=np.full((frames, 3), np.nan),
        others=np.zeros(frames, int),
    )
    mine = np.flatnonzero(blobs.colour == colour)
    for i in mine[np.argsort(blobs.area[mine])]:  # the largest last
        t = blobs.frame[i]
        place = blobs.place[i] + (camera[t], 0)
        track.others[t] += track.seen[t] and np.linalg.norm(place - track.place[t]) > 2 * np.sqrt(blobs.area[i] / np.pi)
        track.seen[t], track.clear[t] = True, blobs.clear[i]
        track.place[t], track.level[t] = place, blobs.level[i]
        track.shape[t] = blobs.shape[i] if blobs.clear[i] else -1
        track.radius[t] = radii[i] if blobs.clear[i] else np.nan
    return track


def tracks(seen: Seen, camera: Float[np.ndarray, " f"]) -> list[Track]:
    """Of all colours, in the order of COLOURS."""
    return [follow(seen, camera, colour) for colour in range(len(COLOURS))]


def hiding(
    world: World, track: Track, rivals: list[Track], wall: Float[np.ndarray, "f 2"], camera: Float[np.ndarray, " f"]
) -> tuple[Bool[np.ndarray, " f"], list[Return]]:
    """Where a track that is not seen has a reason to be hidden, and how it came back from behind the wall.

    From the clear view before it disappears, its path is continued in a straight line, reflected at the borders. As long as
    that path is covered by the wall or another object, or is out of view, the object is rightly unseen.
    """
    frames, fps = len(track.seen), world.fps
    late, run = round(LATE * fps), max(3, round(RUN * fps))
    excused, returns = np.zeros(frames, bool), []
    gone = np.flatnonzero(~track.seen[1:] & track.seen[:-1]) + 1
    for start in gone.tolist():
        stop = start + int(np.argmax(track.seen[start:])) if track.seen[start:].any() else frames
        before = _steady(track, start, run)
        there = [rival for rival in rivals if rival.seen[start]]  # one that comes later may be the same object, changed
        if len(before) == 0:  # in view too shortly to foretell anything
            last = np.broadcast_to(track.place[start - 1], (frames, 2))
            excused[start:stop] = _covered(last, BESIDE, there, wall, camera, world.aspect)[1][start - 1]
            continue
        path, moves = _continue(world, track, before, camera)
        by_wall, hidden = _covered(path, float(np.nanmedian(track.radius[before])), there, wall, camera, world.aspect)
        lost = hidden[start:] & _outside(path[start:] - camera[start:, None] * (1, 0), world.aspect)
        if moves and np.ptp(camera) > MARGIN and lost.any():
            hidden[start + int(np.argmax(lost)) :] = True  # where it turns, out of view, cannot be foretold
        around = slice(max(start - 1, 0), start + late)
        if not hidden[around].any():
            continue
        first = start + int(np.argmax(hidden[start:])) if hidden[start:].any() else start
        back = first + int(np.argmax(~hidden[first:])) if not hidden[first:].all() else frames
        excused[start : min(back + late, stop)] = True
        if back < frames and by_wall[around].any():
            kept = _kept(track, path, before, back, late)
            if kept or back + late < frames:
                returns.append(Return(back, kept))
    return excused & ~track.seen, returns


def _steady(track: Track, start: int, run: int) -> np.ndarray:
    """The last clear frames before `start`, at most `run`, in which the object moved straight; none if fewer than three."""
    clear = np.flatnonzero(track.clear[:start])
    clear = clear[clear > start - 1 - np.argmin(track.seen[:start][::-1])] if not track.seen[:start].all() else clear
    for length in range(min(run, len(clear)), 2, -1):
        frames = clear[-length:]
        slope, at = np.polyfit(frames, track.place[frames], 1)
        rest = track.place[frames] - at - slope * frames[:, None]
        if frames[-1] - frames[0] < 4 * run and np.abs(rest).max() < STRAIGHT:
            return frames
    return clear[:0]


def _continue(world: World, track: Track, before: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, bool]:
    """The straight path through the places at `before`, reflected at borders that can be known; and whether it moves."""
    t = np.arange(len(track.seen))
    slope, at = np.polyfit(before, track.place[before], 1)
    moves = np.linalg.norm(slope) * world.fps > RESTS
    path = at + slope * t[:, None] if moves else np.tile(track.place[before].mean(axis=0), (len(t), 1))
    radius = np.nanmedian(track.radius[before])
    if np.isfinite(radius):
        ends = [(radius, 1 - radius, 1)]
        if np.ptp(camera) < MARGIN:
            ends.append((radius, world.aspect - radius, 0))
        for low, high, axis in ends:
            path[:, axis] = high - np.abs((path[:, axis] - low) % (2 * (high - low)) - (high - low))
    return path, bool(moves)


def _outside(places: np.ndarray, aspect: float) -> np.ndarray:
    return (places[:, 0] < 0) | (places[:, 0] > aspect)


def _covered(path, radius: float, rivals: list[Track], wall, camera, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """Frames at which a path is touched by the wall, and by anything at all."""
    x, reach = path[:, 0] - camera, np.nan_to_num(radius) + MARGIN
    by_wall = (x + reach > wall[:, 0]) & (x - reach < wall[:, 1])  # False where there is no wall
    hidden = by_wall | (x - reach < -2 * MARGIN) | (x + reach > aspect + 2 * MARGIN)
    for rival in rivals:
        near = np.linalg.norm(rival.place - path, axis=1) < reach + np.nan_to_num(np.nanmax(rival.radius, initial=0))
        hidden |= near & rival.seen
    return by_wall, hidden


def _kept(track: Track, path: np.ndarray, before: np.ndarray, back: int, late: int) -> bool:
    """Whether the track is seen again near the foretold frame and place, and as the object that it was once it is clear."""
    window = np.arange(max(back - late, before[-1] + 1), min(back + late, len(path)))
    near = track.seen[window] & (np.linalg.norm(track.place[window] - path[window], axis=1) < AWAY)
    after = window[0] + np.flatnonzero(track.clear[window[0] : back + 4 * late])[: len(before)]
    if len(after) == 0:
        return bool(near.any())
    ratio = np.nanmedian(track.radius[after]) / np.nanmedian(track.radius[before])
    same = _common(track.shape[after]) == _common(track.shape[before]) and 1 / ALIKE < ratio < ALIKE
    return bool(near.any() and same)


def _common(shapes: np.ndarray) -> int:
    return int(np.bincount(shapes + 1, minlength=1).argmax()) - 1
