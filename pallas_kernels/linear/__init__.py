"""Linear layers: in bfloat16, or for inference on float8 numbers (e4m3), with a scale for every token and output channel."""

from pallas_kernels.linear.api import explain, linear
from pallas_kernels.linear.types import Quantised, quantise_rows, reach

__all__ = ["Quantised", "explain", "linear", "quantise_rows", "reach"]
