"""What an implementation of the choice has to know when it is compiled."""

from typing import NamedTuple


class Rule(NamedTuple):
    """How frames lie in a row of scores, and which of them a query block may visit."""

    cached: int  # key blocks of the past, in sight or not
    width: int  # entries of a list
    frame_blocks: int  # key blocks of a frame
    block_k: int  # tokens of a key block
    dead: int  # dead tokens of the last key block of a frame
    keep_frames: int | None  # past frames that a query block may visit; None: all
    sink_frames: int  # of these the first ones
    near_frames: int  # and the last ones
