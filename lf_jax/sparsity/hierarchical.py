"""Hierarchical Sparse Attention: choose frames, then blocks within them (Light Forcing, section 3.3)."""

from lf_jax.sparsity.select import Inputs, best_blocks, block_scores
from pallas_kernels import BlockMap


def light_forcing(inputs: Inputs) -> BlockMap:
    """A selector. Up to `keep_frames` past frames: the best blocks of all. More: the best blocks of the chunk, the sink
    and near frames, and the middle frames that suit the query block best, `keep_frames` past frames in all.

    A frame suits by the mean query times the mean key of the frame. Being linear, that is the mean of its blocks' scores,
    in which every block weighs as much as it has live tokens. The budget may exceed the candidates of the second case,
    which the paper leaves open: then all of them are kept.
    """
    settings = inputs.settings
    return best_blocks(
        inputs,
        block_scores(inputs),
        keep_frames=settings.keep_frames,
        sink_frames=settings.sink_frames,
        near_frames=settings.near_frames,
    )
