"""The size of the world, and the names and numbers that scenes, captions and the evaluator share.

Lengths are in heights of the frame (h), so that a world looks the same at every resolution: x runs from 0 to
width / height, y from 0 at the top to 1. Times are in seconds.
"""

import dataclasses
import math

from lf_jax.config import check

COLOURS = {  # of the objects: saturated, about 60 degrees of hue apart
    "red": (220, 45, 45),
    "yellow": (235, 215, 50),
    "green": (45, 175, 65),
    "cyan": (45, 200, 215),
    "blue": (55, 85, 225),
    "purple": (180, 55, 205),
}
TINTS = {  # of the background: pale, so that no colour is told apart from a tint by lightness alone
    "white": (238, 238, 234),
    "grey": (146, 146, 150),
    "beige": (212, 198, 170),
    "azure": (164, 190, 218),
}
WALL = (38, 36, 44)  # darker than everything else that is not saturated
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
SPEEDS = ("still", "slow", "fast")
HEADINGS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")  # 45 degrees apart
WALLS = ("none", "standing", "sliding")
BACKGROUNDS = ("plain", "gradient", "stripes", "checker")
CAMERAS = ("fixed", "right", "left", "right and back", "left and back")

ARM = 0.36  # half the width of a cross's arm, over its radius
SIDE = 0.88  # half the side of a square, over its radius: the area of a circle
APEX = 1.2  # of a triangle: height of the apex above the centre, over its radius; the base lies half as far below
AREAS = {  # over the square of the radius
    "circle": math.pi,
    "square": 4 * SIDE**2,
    "triangle": 0.75 * math.sqrt(3) * APEX**2,
    "cross": 8 * ARM - 4 * ARM**2,
}


@dataclasses.dataclass(frozen=True)
class World:
    """A world of procedural videos. Ranges are (least, most)."""

    height: int = 128  # pixels
    width: int = 192
    num_frames: int = 81
    fps: int = 16
    max_objects: int = 3
    radii: tuple[tuple[float, float], ...] = ((0.11, 0.12), (0.15, 0.165))  # h, one range a name of SIZES
    speeds: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.19, 0.23), (0.45, 0.55))  # h/s, one a name of SPEEDS
    wall_widths: tuple[float, float] = (0.4, 0.46)  # h: wider than a large object
    wall_speeds: tuple[float, float] = (0.36, 0.42)  # h/s, of a sliding wall
    pan_speeds: tuple[float, float] = (0.09, 0.12)  # h/s: less than a slow object's, whose direction thus shows on screen too
    mention: tuple[float, float] = (0.2, 1.2)  # chance that a caption says what it may leave out; drawn scene by scene

    def __post_init__(self):
        for name in ("height", "width", "num_frames", "fps"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        check(1.25 <= self.aspect <= 2, f"{self.width=} over {self.height=} must be within 1.25..2: walls and starts need room")
        check(1 <= self.max_objects <= 3, f"{self.max_objects=} must be within 1..3")
        check(len(self.radii) == len(SIZES), f"{self.radii=} needs one range for each of {SIZES}")
        check(len(self.speeds) == len(SPEEDS), f"{self.speeds=} needs one range for each of {SPEEDS}")
        for name in ("wall_widths", "wall_speeds", "pan_speeds"):
            low, high = getattr(self, name)
            check(0 < low <= high, f"{name}={(low, high)} must rise and be positive")
        check(0 <= self.mention[0] <= self.mention[1], f"{self.mention=} must rise from 0 or more; above 1 is certain")

    @property
    def aspect(self) -> float:
        """Width of the frame, in h."""
        return self.width / self.height

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return (self.num_frames - 1) / self.fps
