"""Grid arithmetic: pixels, latent frames, chunks, tokens, blocks. The only place that knows how a frame is laid out."""

import dataclasses

from lf_jax.config import Config, check


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one latent frame becomes tokens, and how its keys lie in the cache.

    480x832 pixels give 30 x 52 = 1560 tokens a frame, which no useful block size divides. So the keys of a frame are
    padded up to whole key blocks (1568 = 49 x 32): a block never straddles two frames, and the last block of a frame
    holds fewer live tokens. Queries are not padded; the last query block of a chunk may be short.
    """

    rows: int  # tokens down a frame
    columns: int  # tokens across a frame
    block_q: int  # tokens of a query block
    block_k: int  # tokens of a key block; 1 where attention is dense and nothing needs padding

    @classmethod
    def of(cls, config: Config) -> "Grid":
        stride, (_, down, across) = config.vae.spatial_stride, config.model.patch
        sparsity = config.sparsity
        return cls(
            rows=config.video.height // stride // down,
            columns=config.video.width // stride // across,
            block_q=sparsity.block_q,
            block_k=1 if sparsity.dense else sparsity.block_k,
        )

    @property
    def frame_tokens(self) -> int:
        """Live tokens of a frame."""
        return self.rows * self.columns

    @property
    def frame_blocks(self) -> int:
        """Key blocks of a frame."""
        return -(-self.frame_tokens // self.block_k)

    @property
    def padded_frame(self) -> int:
        """Token slots of a frame in the cache."""
        return self.frame_blocks * self.block_k

    def query_blocks(self, frames: int) -> int:
        """Query blocks of a chunk of `frames` frames; the last one may be short."""
        return -(-frames * self.frame_tokens // self.block_q)


def latent_frames(num_frames: int, temporal_stride: int) -> int:
    """Latent frames of `num_frames` pixel frames: the first stands alone, each later one covers `temporal_stride`.

    Raises:
        ValueError: if `num_frames` is not 1 + a multiple of `temporal_stride`.
    """
    short, over = divmod(num_frames - 1, temporal_stride)
    low = 1 + short * temporal_stride
    check(
        over == 0 and num_frames > 0,
        f"{num_frames=} must be 1 + a multiple of {temporal_stride}; the nearest are {low} and {low + temporal_stride}",
    )
    return short + 1


def chunk_lengths(frames: int, chunk_frames: int, independent_first_frame: bool = False) -> tuple[int, ...]:
    """Latent frames of every chunk of a video of `frames` latent frames: (3, 3, ...) or (1, 3, 3, ...).

    Raises:
        ValueError: if the chunks do not add up to `frames`.
    """
    first = 1 if independent_first_frame else 0
    chunks, over = divmod(frames - first, chunk_frames)
    low = first + chunks * chunk_frames
    check(
        over == 0 and frames > 0,
        f"{frames=} latent frames do not split into chunks of {chunk_frames}"
        f"{' after a first one of 1' if first else ''}; the nearest are {low} and {low + chunk_frames}",
    )
    return (1,) * first + (chunk_frames,) * chunks
