"""How the convolution for Hopper is cut into tiles, and what of a tile is in shared memory at a time."""

import dataclasses
import math
from typing import Any, NamedTuple

from pallas_kernels import mosaic
from pallas_kernels.conv.types import SIDE, Form

COLUMNS = 64  # pixels of a row of a tile: what a product of a warpgroup takes
STEP = 32  # channels of a step
WIDEST = 192  # output channels of a tile
SHARED = 224 * 1024  # bytes of shared memory that tiles may have
FETCHED = 24  # bytes that a multiprocessor gets from the L2 cache in a clock while all do: about 5.5 TB/s together
LATENCY = 700  # clocks of a copy beside those of its bytes
AHEAD = 2  # steps whose weights have room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mosaic.Config):
    """How the kernel is laid out."""

    rows: int | None = None  # of a tile, for both warpgroups; None takes what should be fastest
    stages: int | None = None  # steps whose pixels have room; None takes as many as fit, four at most

    def __post_init__(self):
        super().__post_init__()
        self.at_least(rows=2, stages=2)
        if self.rows is not None and self.rows % 2:
            raise ValueError(f"rows={self.rows} must be a multiple of 2: each of two warpgroups has half of them")


class Plan(NamedTuple):
    """The tiles of a call."""

    batch: int
    frames: int
    height: int
    width: int
    inputs: int
    outputs: int  # a multiple of 8
    taps: int  # frames of the kernel
    form: Form
    residual: bool
    rows: int  # of a tile
    stages: int
    staged: int  # rows of a warpgroup that wait to be stored

    @property
    def side(self) -> int:
        return 2 if self.form.upsample else SIDE

    @property
    def phases(self) -> int:
        return 4 if self.form.upsample else 1

    @property
    def channels(self) -> int:
        """Outputs of a tile."""
        return min(self.outputs, WIDEST)

    @property
    def shares(self) -> int:
        return self.outputs // self.channels

    @property
    def chunks(self) -> int:
        return -(-self.inputs // STEP)

    @property
    def steps(self) -> int:
        return self.taps * self.side * self.chunks

    @property
    def places(self) -> tuple[int, int]:
        return -(-self.height // self.rows), -(-self.width // COLUMNS)

    @property
    def tiles(self) -> int:
        return math.prod(self.places) * self.batch * self.frames * self.phases * self.shares

    @property
    def pixel_bytes(self) -> int:
        """Of a step."""
        return 2 * STEP * (self.rows + self.side - 1) * COLUMNS

    @property
    def weight_bytes(self) -> int:
        """Of a step."""
        return 2 * STEP * self.side * self.channels

    @property
    def staged_bytes(self) -> int:
        return 2 * 2 * self.staged * COLUMNS * self.channels

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.pixel_bytes + AHEAD * self.weight_bytes + self.staged_bytes

    @property
    def clocks(self) -> float:
        """Of a tile, about: for products or for copies, whichever takes longer, and for its end.

        A product of 64 pixels x 16 channels x n takes n / 2 clocks of the tensor cores, and 16 + n / 4 of shared memory.
        """
        products = self.rows * self.side * (STEP // 16) * max(self.channels / 2, 16 + self.channels / 4)
        copies = (self.pixel_bytes + self.weight_bytes) / FETCHED
        alone = self.pixel_bytes / FETCHED + LATENCY if self.stages == 2 else 0  # then copies of pixels are one at a time
        return self.steps * max(products, copies, alone) + 200 * self.rows

    def waves(self, config: Config) -> int:
        """Tiles of the thread block that has most."""
        return -(-self.tiles // config.multiprocessors)

    def fitted(self, config: Config) -> "Plan":
        """With the rows that should be fastest, and the stages that fit."""
        tried = [rows for rows in (2, 4, 8, 16) if rows // 2 * self.channels <= 2 * WIDEST]
        tried = tried if config.rows is None else [config.rows]
        plans = [self._replace(rows=rows, staged=rows // 2 if self.channels <= 48 else min(rows // 2, 2)) for rows in tried]
        plans = [plan._replace(stages=config.stages or min(4, plan.most_stages)) for plan in plans]
        plans = [plan for plan in plans if plan.stages > 1 and plan.shared_bytes <= SHARED]
        if not plans:
            raise ValueError(f"{config.rows=} and {config.stages=} do not fit {self.channels} channels: expected fewer")
        return min(plans, key=lambda plan: plan.waves(config) * plan.clocks)

    @property
    def most_stages(self) -> int:
        return (SHARED - self.staged_bytes - AHEAD * self.weight_bytes) // self.pixel_bytes


def plan(x: Any, kernel: Any, form: Form, residual: bool, config: Config) -> Plan:
    b, f, h, w, c = x.shape
    outputs = -(-kernel.shape[-1] // 8) * 8
    return Plan(b, f, h, w, c, outputs, kernel.shape[0], form, residual, 0, 0, 0).fitted(config)
