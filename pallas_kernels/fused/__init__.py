"""What stands between the linear layers of a transformer, each in one pass: norms, rotation, means of blocks, float8."""

from pallas_kernels.fused.api import explain, layer_norm, norm_modulate, norm_rope, quantise

__all__ = ["explain", "layer_norm", "norm_modulate", "norm_rope", "quantise"]
