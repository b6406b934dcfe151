"""What all implementations agree on."""

from typing import NamedTuple


class Layout(NamedTuple):
    """How the tokens of a chunk lie in blocks, which begin anew in every frame."""

    frames: int
    frame_tokens: int
    block: int | None  # tokens of a block; None: nobody asks for blocks
    padded: bool  # whether the result holds whole blocks, with zeros at the end of a frame

    @property
    def blocks(self) -> int:
        """Of a frame; the last may hold fewer tokens."""
        return -(-self.frame_tokens // self.block)
