"""What an implementation has to know of a call when it is compiled."""

from typing import NamedTuple

SIDE = 3  # rows and columns of a kernel


class Form(NamedTuple):
    """What is done beside the products."""

    upsample: bool  # the convolution sees every row and column of the input twice
    norm: bool  # the channels of a pixel are divided by their root mean square, scaled, and sent through SiLU
