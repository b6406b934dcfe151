"""Block-sparse attention: every query block attends to its own list of key blocks."""

from pallas_kernels.block_sparse.api import block_sparse_attention, check_block_map, explain
from pallas_kernels.block_sparse.types import BlockMap, Past

__all__ = ["BlockMap", "Past", "block_sparse_attention", "check_block_map", "explain"]
