"""Convolutions of video autoencoders: 3 x 3 over rows and columns, causal over time, with what stands around them fused in."""

from pallas_kernels.conv.api import convolve, explain

__all__ = ["convolve", "explain"]
