"""Kernels for video diffusion on NVIDIA GPUs. Imports jax and numpy only; usable alone.

block_sparse   attention over lists of key blocks, forward and backward
selection      the choice of the lists
linear         linear layers in float8 and bfloat16
fused          what stands between linear layers: norms, rotation, means of blocks, quantisation
conv           convolutions of the autoencoders
"""

from pallas_kernels.block_sparse import BlockMap, Past, block_sparse_attention, check_block_map

__all__ = ["BlockMap", "Past", "block_sparse_attention", "check_block_map"]
