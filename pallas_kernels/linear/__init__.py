"""Linear layers on float8 numbers (e4m3), one scale for every token and one for every output channel. Inference only."""

from pallas_kernels.linear.api import explain, linear
from pallas_kernels.linear.types import Quantised, quantise_rows, reach

__all__ = ["Quantised", "explain", "linear", "quantise_rows", "reach"]
