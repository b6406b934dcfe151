"""Attention kernels over lists of key blocks, and the choice of the lists. Imports jax and numpy only; usable alone."""

from pallas_kernels.block_sparse import BlockMap, Past, block_sparse_attention, check_block_map

__all__ = ["BlockMap", "Past", "block_sparse_attention", "check_block_map"]
