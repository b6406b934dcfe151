"""Self-Forcing, Light Forcing, LongLive: Wan's transformer inside a wrapper, `{"generator": {"model.blocks.0. ...": ...}}`.

The reader removes the wrapper's and the trainers' prefixes; export writes `model.` and `generator` again, which is what
the originals load strictly (Self-Forcing, inference.py).
"""

from convert.families.wan import COMPONENT, describe, rules
from convert.tensors import Tensors

__all__ = ["BRANCH", "COMPONENT", "describe", "restore", "rules"]

BRANCH = "generator"


def restore(tensors: Tensors) -> Tensors:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}
