"""PyTorch checkpoints into converted folders and back. The only package that may import torch, and only for its own files."""

from convert.conversion import convert
from convert.exporting import export
from convert.families import FAMILIES
from convert.rules import ConversionError

__all__ = ["FAMILIES", "ConversionError", "convert", "export"]
