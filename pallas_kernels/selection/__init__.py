"""Selection: which key blocks a query block attends to, by products of mean queries and mean keys."""

from pallas_kernels.selection.api import block_means, block_scores, choose_blocks, explain

__all__ = ["block_means", "block_scores", "choose_blocks", "explain"]
